//! The part of a look that is about block devices besides loop devices, and what lives on them. Reads
//! only.

use std::io;
use std::path::Path;

use hostler_protocol::text::printable;

use crate::kernel::filesystems::{self, Reading};
use crate::kernel::{fuse, maps, nbd, swaps};
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
pub(super) fn read(careful: &mut Careful<'_>, snapshot: &mut Snapshot) {
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
            "btrfs" => read_number(sys, filesystem, careful, snapshot),
            _ => {}
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

/// Of loop devices the mark is read from the device if need be: they are asked at each look anyway,
/// and one that hangs is known by its number from then on. Of maps and arrays only what is in memory is
/// read, so one that is suspended, or built on what hangs, is no trouble; the superblock of a mounted
/// ext4 with blocks as large as pages is always in memory. All other devices are nobody's to take back.
fn read_freeze(
    sys: &Path,
    proc: &Path,
    filesystem: &mut Filesystem,
    careful: &mut Careful<'_>,
    snapshot: &Snapshot,
) {
    let &[device] = filesystem.blocks.as_slice() else { return };
    let of_loop = snapshot.loops.iter().find(|one| one.has_device(device));
    let is_of_map = || snapshot.maps.iter().any(|map| is_part(device, map.identity.device, &map.partitions));
    let reading = match of_loop {
        Some(one) if matches!(one.state, LoopState::Bound(_)) => Reading::Whole,
        Some(_) => return,
        None if is_of_map() => Reading::InMemory,
        None => return,
    };
    let what = format!("whether the file system on {device} is frozen");
    if careful.may_touch(of_loop.map(|one| one.number), &what) {
        // An error is one way of not knowing: the device may have gone meanwhile.
        filesystem.frozen = filesystems::is_ext4_frozen(sys, proc, device, reading).unwrap_or(None);
    }
}

/// Finds the number that the mounts of a btrfs show, when it lies on what may be a lease's: the host's own
/// are left alone.
fn read_number(sys: &Path, filesystem: &mut Filesystem, careful: &mut Careful<'_>, snapshot: &mut Snapshot) {
    let is_reclaimable = |device: &DeviceNumber| {
        snapshot.loops.iter().any(|one| one.has_device(*device))
            || snapshot.maps.iter().any(|map| is_part(*device, map.identity.device, &map.partitions))
            || snapshot.nbds.iter().any(|nbd| is_part(*device, nbd.device, &nbd.partitions))
    };
    let Some(&device) = filesystem.blocks.iter().find(|device| is_reclaimable(device)) else { return };
    let of_loop = snapshot.loops.iter().find(|one| one.has_device(device)).map(|one| one.number);
    let what = format!("the number of the btrfs on {device}");
    let number = if careful.may_touch(of_loop, &what) {
        let number = filesystems::number_of_living(sys, &filesystem.kind, device);
        number.map_err(|error| error.to_string())
    } else {
        Err("it hung before".to_owned())
    };
    match number {
        Ok(number) => filesystem.shown_as.extend(number),
        Err(cause) => snapshot.gaps.push(Gap::Blocks(format!("{what}: {cause}"))),
    }
}

fn is_part(device: DeviceNumber, whole: DeviceNumber, partitions: &[Partition]) -> bool {
    device == whole || partitions.iter().any(|partition| partition.device == device)
}

#[cfg(test)]
mod tests {
    use super::*;

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
