//! Device-mapper maps and md arrays: what sysfs lists, and removing one.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags, open};

use super::{Acted, Found, block, block_calls};
use crate::model::{DiskSequence, Map, MapIdentity, MapKind};

/// What stands for a sequence number before Linux 5.15. The kernel counts from 1 (`inc_diskseq` in
/// `block/genhd.c`), so it is no map's own, and with it nothing is ever removed: without such a number
/// a later map of the same device number could not be told from this one.
const NO_SEQUENCE: DiskSequence = DiskSequence(0);

/// How long a map may be busy before that counts. Whenever a device changes, udev opens it for a
/// moment to look at it (`dmsetup remove --retry` and `mdadm --stop` try again for the same reason).
const PATIENCE: Duration = Duration::from_secs(2);
const INTERVAL: Duration = Duration::from_millis(50);

/// All maps, and all arrays that have any disk. `sys` is where sysfs is mounted.
///
/// # Errors
/// When sysfs cannot be read.
pub fn list(sys: &Path) -> io::Result<Vec<Map>> {
    let mut maps = Vec::new();
    for (name, directory) in block::disks(sys)? {
        // Where there are hundreds of these, looking into each took longer than the rest of a look. Their
        // drivers give them their names, and nobody else's begin so.
        if !["loop", "nbd", "ram"].iter().any(|kind| name.starts_with(kind)) {
            maps.extend(block::unless_gone(&directory, || describe(&name, &directory))?);
        }
    }
    maps.sort_by_key(|map| map.identity);
    Ok(maps)
}

fn describe(name: &str, directory: &Path) -> io::Result<Option<Map>> {
    let text = |file: &str| {
        let bytes = block::read_if_there(&directory.join(file))?;
        Ok::<_, io::Error>(
            bytes.map(|bytes| String::from_utf8_lossy(&bytes).trim_end_matches('\n').to_owned()),
        )
    };
    let (kind, name, uuid) = if let Some(map) = text("dm/name")? {
        (MapKind::DeviceMapper, map, text("dm/uuid")?.unwrap_or_default())
    } else if text("md/array_state")?.is_some() {
        (MapKind::Array, name.to_owned(), String::new())
    } else {
        return Ok(None);
    };
    let lower = block::lower(directory)?;
    let partitions = block::partitions(directory)?;
    match kind {
        MapKind::DeviceMapper => {}
        // The node of an array that was stopped, or never made, can stay for as long as the module
        // does; it uses nothing. One that is assembled and does not run does hold its disks.
        MapKind::Array if lower.is_empty() && text("md/array_state")?.as_deref() == Some("clear") => {
            return Ok(None);
        }
        MapKind::Array => {}
    }
    let device = block::device(directory)?;
    let sequence = block::sequence(directory)?.unwrap_or(NO_SEQUENCE);
    Ok(Some(Map { identity: MapIdentity { kind, device, sequence }, name, uuid, lower, partitions }))
}

/// Opens exactly this map or array, and holds it: while it is open it can be neither removed nor
/// replaced. May hang with what it is built on.
///
/// # Errors
/// What opening says.
pub fn hold(sys: &Path, identity: &MapIdentity) -> io::Result<Found> {
    refuse_unnumbered(identity)?;
    // Opening the node of an array that is not there would make an empty one (`md_probe`).
    if block::device(&block::directory(sys, identity.device)).is_err() {
        return Ok(Found::Gone);
    }
    let node = match block::open_node(sys, identity.device) {
        Ok(node) => node,
        Err(error) if block::is_gone(&error) => return Ok(Found::Gone),
        Err(error) => return Err(error),
    };
    if DiskSequence(block_calls::disk_sequence(&node)?) == identity.sequence {
        Ok(Found::It(node))
    } else {
        Ok(Found::Replaced)
    }
}

fn refuse_unnumbered(identity: &MapIdentity) -> io::Result<()> {
    if identity.sequence == NO_SEQUENCE {
        let cause = "this kernel gives disks no sequence number, so that map cannot be told from a later one";
        return Err(io::Error::new(io::ErrorKind::Unsupported, cause));
    }
    Ok(())
}

/// Removes exactly this map, or stops exactly this array.
///
/// # Errors
/// What the calls say; `EBUSY` when somebody has it open, after some patience.
pub fn remove(sys: &Path, identity: &MapIdentity) -> io::Result<Acted> {
    refuse_unnumbered(identity)?;
    let begin = Instant::now();
    loop {
        // The identity is checked each time.
        let result = match identity.kind {
            MapKind::DeviceMapper => remove_map(sys, identity),
            MapKind::Array => stop_array(sys, identity),
        };
        match result {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) && begin.elapsed() < PATIENCE => {
                std::thread::sleep(INTERVAL);
            }
            result => return result,
        }
    }
}

/// The map is not held open here: the device-mapper removes none that is (`dm_lock_for_deletion`). So
/// its name and uuid are asked for by its number, then its sequence number is seen to be the right
/// one, which makes them that map's; and it is removed by these, not by the number. A map that takes
/// its number in between has another name or uuid. What is left is that somebody makes the same map
/// again within that moment.
///
/// `DM_DEFERRED_REMOVE` would let the map be held meanwhile, and is no way: it takes effect at the last
/// close, whenever that is and whoever uses the map then, and others can cancel it.
fn remove_map(sys: &Path, identity: &MapIdentity) -> io::Result<Acted> {
    let control = control()?;
    let status = match block_calls::map_status(&control, identity.device) {
        Ok(status) => status,
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(Acted::Gone),
        Err(error) => return Err(error),
    };
    match block::sequence(&block::directory(sys, identity.device)) {
        Ok(Some(sequence)) if sequence == identity.sequence => {}
        Ok(Some(_)) => return Ok(Acted::Replaced),
        Ok(None) => return Ok(Acted::Gone),
        Err(error) if block::is_gone(&error) => return Ok(Acted::Gone),
        Err(error) => return Err(error),
    }
    match block_calls::map_remove(&control, &status) {
        Ok(()) => Ok(Acted::Done),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(Acted::Gone),
        Err(error) => Err(error),
    }
}

fn control() -> io::Result<OwnedFd> {
    const PATH: &str = "/dev/mapper/control";
    open(PATH, OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty()).map_err(|error| {
        let error = io::Error::from(error);
        io::Error::new(error.kind(), format!("opening {PATH}: {error}"))
    })
}

/// `STOP_ARRAY` on the array's own descriptor, and not `clear` written to sysfs's `array_state`: the
/// kernel lets the caller of the former, and nobody else, have it open (`do_md_stop`), so the array
/// that was checked is the one that is stopped.
fn stop_array(sys: &Path, identity: &MapIdentity) -> io::Result<Acted> {
    let node = match hold(sys, identity)? {
        Found::It(node) => node,
        Found::Gone => return Ok(Acted::Gone),
        Found::Replaced => return Ok(Acted::Replaced),
    };
    match block_calls::array_stop(&node) {
        Ok(()) => Ok(Acted::Done),
        Err(error) if block::is_gone(&error) => Ok(Acted::Gone),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{Tree, device_number as number};
    use super::*;
    use crate::model::Partition;

    fn identity(kind: MapKind, device: (u32, u32), sequence: u64) -> MapIdentity {
        MapIdentity { kind, device: number(device.0, device.1), sequence: DiskSequence(sequence) }
    }

    /// Debian 12 (6.1) with a logical volume on a loop device and a mirror on two partitions.
    fn tree() -> Tree {
        Tree::new()
            .file("block/loop0/dev", "7:0\n")
            .file("block/loop0/loop0p1/dev", "259:0\n")
            .file("block/loop0/loop0p1/partition", "1\n")
            .file("block/loop0/loop0p2/dev", "259:1\n")
            .file("block/loop0/loop0p2/partition", "2\n")
            .file("block/loop1/dev", "7:1\n")
            .file("block/dm-0/dev", "254:0\n")
            .file("block/dm-0/diskseq", "21\n")
            .file("block/dm-0/dm/name", "vg-root\n")
            .file("block/dm-0/dm/uuid", "LVM-7vT0Y2vcYkYz3eW7\n")
            .file("block/dm-0/dm/suspended", "0\n")
            .link("block/dm-0/slaves/loop1", "../../loop1")
            .file("block/dm-1/dev", "254:1\n")
            .file("block/dm-1/diskseq", "22\n")
            .file("block/dm-1/dm/name", "plain\n")
            .file("block/dm-1/dm/uuid", "\n")
            .link("block/dm-1/slaves/dm-0", "../../dm-0")
            .file("block/md127/dev", "9:127\n")
            .file("block/md127/diskseq", "25\n")
            .file("block/md127/md/array_state", "clean\n")
            .file("block/md127/md127p1/dev", "259:5\n")
            .file("block/md127/md127p1/partition", "1\n")
            .link("block/md127/slaves/loop0p1", "../../loop0/loop0p1")
            .link("block/md127/slaves/loop0p2", "../../loop0/loop0p2")
            .file("block/md126/dev", "9:126\n")
            .file("block/md126/diskseq", "24\n")
            .file("block/md126/md/array_state", "clear\n")
            .directory("block/md126/slaves")
    }

    #[test]
    fn lists_maps_and_arrays_with_what_they_are_built_on() {
        let map = |identity, name: &str, uuid: &str, lower: &[_], partitions: &[_]| Map {
            identity,
            name: name.to_owned(),
            uuid: uuid.to_owned(),
            lower: lower.to_vec(),
            partitions: partitions.to_vec(),
        };
        let partition = Partition { number: 1, device: number(259, 5) };
        assert_eq!(
            list(tree().path()).expect("readable"),
            [
                map(
                    identity(MapKind::DeviceMapper, (254, 0), 21),
                    "vg-root",
                    "LVM-7vT0Y2vcYkYz3eW7",
                    &[number(7, 1)],
                    &[]
                ),
                map(identity(MapKind::DeviceMapper, (254, 1), 22), "plain", "", &[number(254, 0)], &[]),
                map(
                    identity(MapKind::Array, (9, 127), 25),
                    "md127",
                    "",
                    &[number(259, 0), number(259, 1)],
                    &[partition]
                ),
            ]
        );
    }

    #[test]
    fn an_array_that_does_not_run_still_holds_its_disks() {
        let tree = Tree::new()
            .file("block/loop0/dev", "7:0\n")
            .file("block/md5/dev", "9:5\n")
            .file("block/md5/diskseq", "31\n")
            .file("block/md5/md/array_state", "inactive\n")
            .link("block/md5/slaves/loop0", "../../loop0");
        let found = list(tree.path()).expect("readable");
        assert_eq!(found.iter().map(|map| map.lower.clone()).collect::<Vec<_>>(), [[number(7, 0)]]);
    }

    #[test]
    fn a_map_without_a_sequence_number_is_listed_and_never_removed() {
        let tree = Tree::new()
            .file("block/dm-0/dev", "254:0\n")
            .file("block/dm-0/dm/name", "x\n")
            .directory("block/dm-0/slaves");
        let found = list(tree.path()).expect("readable");
        assert_eq!(found[0].identity.sequence, NO_SEQUENCE);
        let error = remove(tree.path(), &found[0].identity).expect_err("it has no identity");
        assert_eq!(error.kind(), io::ErrorKind::Unsupported);
    }

    #[test]
    fn an_array_that_is_gone_is_not_made_by_looking_for_it() {
        let gone = identity(MapKind::Array, (9, 99), 7);
        assert!(matches!(hold(Tree::new().path(), &gone).expect("nothing there"), Found::Gone));
        assert_eq!(remove(Tree::new().path(), &gone).expect("nothing there"), Acted::Gone);
    }
}
