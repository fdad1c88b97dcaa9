//! The part of a look that is about block devices besides loop devices, and what lives on them. Reads
//! only.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;

use hostler_protocol::text::printable;

use crate::kernel::filesystems::{self, Listed, Reading};
use crate::kernel::{fuse, maps, nbd, swaps};
use crate::model::{DeviceNumber, Filesystem, Gap, LoopState, Partition, Snapshot};

/// What a worker says before it touches what may hang.
pub(super) type Touching<'a> = &'a mut dyn FnMut(Option<u32>, &str);

/// Reads maps, network block devices, swap, file systems and FUSE connections into a snapshot that has
/// its loop devices and mounts already. `avoid` are loop devices, and `skip` words of an earlier
/// look, that hung.
pub(super) fn read(avoid: &[u32], skip: &[String], touching: Touching<'_>, snapshot: &mut Snapshot) {
    let (sys, proc) = (Path::new("/sys"), Path::new("/proc"));
    let gaps = &mut snapshot.gaps;
    snapshot.maps = list("maps and arrays", maps::list(sys), gaps);
    snapshot.nbds = list("network block devices", nbd::list(sys, proc), gaps);
    let listed = swaps::list(proc, &mut |path| {
        let what = format!("swap area {}", printable(path));
        let is_to_be_looked_up = !skip.contains(&what);
        if is_to_be_looked_up {
            touching(None, &what);
        } else {
            gaps.push(Gap::Blocks(format!("{what}: looking it up hung before")));
        }
        is_to_be_looked_up
    });
    snapshot.swaps = list("swap areas", listed, gaps);
    snapshot.fuse = list("FUSE connections", fuse::list(sys), gaps);
    let mut listed = list("file systems", filesystems::list(sys), gaps);
    for one in &mut listed {
        read_freeze(sys, proc, avoid, &mut one.filesystem, touching, snapshot);
    }
    name_btrfs(&mut listed, avoid, skip, touching, snapshot);
    snapshot.filesystems = listed.into_iter().map(|one| one.filesystem).collect();
}

fn list<T>(what: &str, result: io::Result<Vec<T>>, gaps: &mut Vec<Gap>) -> Vec<T> {
    result.unwrap_or_else(|error| {
        gaps.push(Gap::Blocks(format!("{what}: {error}")));
        Vec::new()
    })
}

/// Of loop devices the mark is read from the device if need be: they are asked at each look anyway,
/// and one that hangs is known by its number from then on. Of maps and arrays only what is in memory is
/// read, so a map that is suspended, or built on what hangs, is no trouble; the superblock of a
/// mounted ext4 with blocks as large as pages is always in memory. All other devices are nobody's to
/// take back.
fn read_freeze(
    sys: &Path,
    proc: &Path,
    avoid: &[u32],
    filesystem: &mut Filesystem,
    touching: Touching<'_>,
    snapshot: &Snapshot,
) {
    let &[device] = filesystem.blocks.as_slice() else { return };
    if filesystem.kind != "ext4" {
        return;
    }
    let of_loop = snapshot.loops.iter().find(|one| one.has_device(device));
    let is_of_map = || snapshot.maps.iter().any(|map| is_part(device, map.identity.device, &map.partitions));
    let reading = match of_loop {
        Some(one) if !is_answering(one.state) || avoid.contains(&one.number) => return,
        Some(one) => {
            touching(Some(one.number), "whether its file system is frozen");
            Reading::Whole
        }
        None if is_of_map() => {
            touching(None, "whether a map's file system is frozen");
            Reading::InMemory
        }
        None => return,
    };
    // What cannot be read is not known, and an error is one way of not knowing: the device may have
    // gone meanwhile.
    filesystem.frozen = filesystems::is_ext4_frozen(sys, proc, device, reading).unwrap_or(None);
}

fn is_answering(state: LoopState) -> bool {
    match state {
        LoopState::Bound(_) => true,
        LoopState::Closing | LoopState::Unread | LoopState::Leftover => false,
    }
}

/// Finds the number that the mounts of each btrfs show, for those that lie on what may be a lease's.
/// When none of its mounts answers, as when all are in other namespaces, the number stays unknown.
fn name_btrfs(
    listed: &mut [Listed],
    avoid: &[u32],
    skip: &[String],
    touching: Touching<'_>,
    snapshot: &Snapshot,
) {
    let mut wanted: Vec<&mut Listed> =
        listed.iter_mut().filter(|one| one.uuid.is_some() && is_reclaimable(one, snapshot)).collect();
    let mounts = snapshot
        .mounts
        .iter()
        .filter(|mount| mount.filesystem == "btrfs" && Some(mount.identity.namespace) == snapshot.namespace);
    // What mountinfo calls the source is only trusted with the order, and with what to blame.
    let mut mounts: Vec<_> = mounts.map(|mount| (loop_in(&mount.source), mount)).collect();
    mounts.sort_by_key(|(of_loop, _)| of_loop.is_none());
    let mut answered = BTreeSet::new();
    for (of_loop, mount) in mounts {
        if wanted.iter().all(|one| !one.filesystem.shown_as.is_empty()) {
            return;
        }
        let what = format!("the btrfs mounted on {}", printable(&mount.point));
        let device = mount.identity.device;
        let hung_before = of_loop.is_some_and(|number| avoid.contains(&number)) || skip.contains(&what);
        if hung_before || answered.contains(&device) {
            continue;
        }
        touching(of_loop, &what);
        // Where one mount cannot be reached or asked, another of the same file system may be.
        let Ok(Some(uuid)) = filesystems::btrfs_of(mount) else { continue };
        answered.insert(device);
        if let Some(one) = wanted.iter_mut().find(|one| one.uuid == Some(uuid)) {
            one.filesystem.shown_as.push(device);
        }
    }
}

fn is_reclaimable(one: &Listed, snapshot: &Snapshot) -> bool {
    one.filesystem.blocks.iter().any(|device| {
        snapshot.loops.iter().any(|one| one.has_device(*device))
            || snapshot.maps.iter().any(|map| is_part(*device, map.identity.device, &map.partitions))
            || snapshot.nbds.iter().any(|nbd| is_part(*device, nbd.device, &nbd.partitions))
    })
}

fn is_part(device: DeviceNumber, whole: DeviceNumber, partitions: &[Partition]) -> bool {
    device == whole || partitions.iter().any(|partition| partition.device == device)
}

/// N of `/dev/loopN` or of a partition of it.
fn loop_in(source: &[u8]) -> Option<u32> {
    let number = source.strip_prefix(b"/dev/loop")?.split(|byte| !byte.is_ascii_digit()).next()?;
    std::str::from_utf8(number).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_loop_devices_node_names_one() {
        assert_eq!(loop_in(b"/dev/loop12"), Some(12));
        assert_eq!(loop_in(b"/dev/loop12p3"), Some(12));
        assert_eq!(loop_in(b"/dev/loop"), None);
        assert_eq!(loop_in(b"/dev/loop-control"), None);
        assert_eq!(loop_in(b"loop12"), None);
    }
}
