//! The part of a look that is about block devices besides loop devices, and what lives on them. Reads
//! only.

use std::io;
use std::path::Path;

use hostler_protocol::text::printable;

use super::message::NumberQuery;
use crate::kernel::{filesystems, fuse, maps, nbd, swaps};
use crate::model::{DeviceNumber, Filesystem, Gap, LoopState, Partition, Snapshot};

/// Says what is about to be touched, and keeps from what hung at an earlier look.
pub(super) struct Careful<'a> {
    /// Loop devices that hung.
    pub(super) avoid: &'a [u32],
    /// What else hung, in the words that it was said in.
    pub(super) skip: &'a [String],
    /// Whom it is said to.
    pub(super) touching: &'a mut dyn FnMut(Option<u32>, &str),
}

impl Careful<'_> {
    /// Whether this may be touched now; if so, that has been said.
    pub(super) fn may_touch(&mut self, of_loop: Option<u32>, what: &str) -> bool {
        let hung_before = of_loop.is_some_and(|number| self.avoid.contains(&number))
            || self.skip.iter().any(|one| one == what);
        if !hung_before {
            (self.touching)(of_loop, what);
        }
        !hung_before
    }
}

/// Reads maps, network block devices, swap, file systems and FUSE connections into a snapshot that has
/// its loop devices already.
pub(super) fn read(numbers: &[NumberQuery], careful: &mut Careful<'_>, snapshot: &mut Snapshot) {
    let (sys, proc) = (Path::new("/sys"), Path::new("/proc"));
    let gaps = &mut snapshot.gaps;
    snapshot.maps = list("maps and arrays", maps::list(sys), gaps);
    snapshot.nbds = list("network block devices", nbd::list(sys, proc), gaps);
    let listed = swaps::list(proc, &mut |path| {
        let what = format!("swap area {}", printable(path));
        let may_look = careful.may_touch(None, &what);
        if !may_look {
            gaps.push(Gap::Blocks(format!("{what}: looking it up hung before")));
        }
        may_look
    });
    snapshot.swaps = list("swap areas", listed, gaps);
    snapshot.fuse = list("FUSE connections", fuse::list(sys), gaps);
    let mut listed = list("file systems", filesystems::list(sys), gaps);
    for filesystem in &mut listed {
        match filesystem.kind.as_str() {
            "ext4" => read_freeze(sys, proc, filesystem, careful, snapshot),
            _ => {
                if let Some(query) = numbers.iter().find(|query| query.instance == filesystem.instance) {
                    read_number(sys, query.number, filesystem, careful, snapshot);
                }
            }
        }
    }
    snapshot.filesystems = listed;
}

fn list<T>(what: &str, result: io::Result<Vec<T>>, gaps: &mut Vec<Gap>) -> Vec<T> {
    result.unwrap_or_else(|error| {
        gaps.push(Gap::Blocks(format!("{what}: {error}")));
        Vec::new()
    })
}

/// Looks for the mark of a freeze where a lease may have to know of one: on loop devices, which are asked
/// at each look anyway, and on maps and arrays that stand on some. The host's own devices are not read.
fn read_freeze(
    sys: &Path,
    proc: &Path,
    filesystem: &mut Filesystem,
    careful: &mut Careful<'_>,
    snapshot: &Snapshot,
) {
    let &[device] = filesystem.blocks.as_slice() else { return };
    let loops = loops_below(device, snapshot);
    let is_answering = |number: &u32| {
        !careful.avoid.contains(number)
            && snapshot
                .loops
                .iter()
                .any(|one| one.number == *number && matches!(one.state, LoopState::Bound(_)))
    };
    if loops.is_empty() || !loops.iter().all(is_answering) {
        return;
    }
    let what = format!("whether the file system on {device} is frozen");
    if careful.may_touch(loops.first().copied(), &what) {
        // An error is one way of not knowing: the device may have gone meanwhile.
        filesystem.frozen = filesystems::is_ext4_frozen(sys, proc, device).unwrap_or(None);
    }
}

/// Has the number that the mounts of a btrfs show in the snapshot. Of the file systems that nobody asked for
/// it is never found out, as that takes mounting them.
fn read_number(
    sys: &Path,
    known: Option<DeviceNumber>,
    filesystem: &mut Filesystem,
    careful: &mut Careful<'_>,
    snapshot: &mut Snapshot,
) {
    if let Some(number) = known {
        filesystem.shown_as.push(number);
        return;
    }
    let Some(&device) = filesystem.blocks.first() else { return };
    let loops: Vec<u32> =
        filesystem.blocks.iter().flat_map(|device| loops_below(*device, snapshot)).collect();
    let what = format!("the number of the btrfs on {device}");
    let number = if loops.iter().all(|number| !careful.avoid.contains(number))
        && careful.may_touch(loops.first().copied(), &what)
    {
        filesystems::number_of_btrfs(sys, device).map_err(|error| error.to_string())
    } else {
        Err("it hung before".to_owned())
    };
    match number {
        Ok(number) => filesystem.shown_as.extend(number),
        Err(cause) => snapshot.gaps.push(Gap::Blocks(format!("{what}: {cause}"))),
    }
}

/// The loop devices that a device is, is a partition of, or stands on through maps and arrays.
fn loops_below(device: DeviceNumber, snapshot: &Snapshot) -> Vec<u32> {
    let mut found = Vec::new();
    let mut seen = Vec::new();
    let mut left = vec![device];
    while let Some(device) = left.pop() {
        if seen.contains(&device) {
            continue;
        }
        seen.push(device);
        found.extend(snapshot.loops.iter().find(|one| one.has_device(device)).map(|one| one.number));
        let map = snapshot.maps.iter().find(|map| is_part(device, map.identity.device, &map.partitions));
        left.extend(map.iter().flat_map(|map| &map.lower));
    }
    found
}

fn is_part(device: DeviceNumber, whole: DeviceNumber, partitions: &[Partition]) -> bool {
    device == whole || partitions.iter().any(|partition| partition.device == device)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{BackingFile, DiskSequence, LoopDevice, Map, MapIdentity, MapKind};

    fn number(major: u32, minor: u32) -> DeviceNumber {
        DeviceNumber { major, minor }
    }

    fn disk(index: u32) -> LoopDevice {
        LoopDevice {
            number: index,
            device: number(7, index),
            sequence: Some(DiskSequence(1)),
            state: LoopState::Bound(BackingFile { device: number(254, 0), inode: 12 }),
            backing_text: String::new(),
            autoclear: false,
            partitions: vec![Partition { number: 1, device: number(259, index) }],
        }
    }

    fn map(minor: u32, lower: &[DeviceNumber]) -> Map {
        let device = number(252, minor);
        Map {
            identity: MapIdentity { kind: MapKind::DeviceMapper, device, sequence: DiskSequence(2) },
            name: String::new(),
            uuid: String::new(),
            lower: lower.to_vec(),
            partitions: Vec::new(),
        }
    }

    #[test]
    fn finds_the_loop_devices_below_a_stack_of_maps() {
        let snapshot = Snapshot {
            loops: vec![disk(1), disk(2), disk(3)],
            maps: vec![
                map(0, &[number(259, 1), number(7, 2)]),
                map(1, &[number(252, 0)]),
                map(2, &[number(8, 1)]),
                // No kernel makes such a thing, and no text of its may hang a look.
                map(3, &[number(252, 3)]),
            ],
            ..Snapshot::default()
        };
        let mut below = loops_below(number(252, 1), &snapshot);
        below.sort_unstable();
        assert_eq!(below, [1, 2]);
        assert_eq!(loops_below(number(7, 3), &snapshot), [3]);
        assert_eq!(loops_below(number(252, 2), &snapshot), [0; 0]);
        assert_eq!(loops_below(number(252, 3), &snapshot), [0; 0]);
    }

    #[test]
    fn what_hung_before_is_not_touched_again() {
        let mut said = Vec::new();
        let skip = ["swap area /mnt/x".to_owned()];
        let mut touching = |of_loop: Option<u32>, what: &str| said.push((of_loop, what.to_owned()));
        let mut careful = Careful { avoid: &[3], skip: &skip, touching: &mut touching };
        assert!(!careful.may_touch(Some(3), "the btrfs"));
        assert!(!careful.may_touch(None, "swap area /mnt/x"));
        assert!(careful.may_touch(Some(4), "the btrfs"));
        assert!(careful.may_touch(None, "swap area /mnt/y"));
        assert_eq!(said, [(Some(4), "the btrfs".to_owned()), (None, "swap area /mnt/y".to_owned())]);
    }
}
