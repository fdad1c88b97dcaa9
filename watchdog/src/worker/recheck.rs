//! Whether the block devices that a look began with are still the same at its end.
//!
//! Block devices are read first, and what is mounted on them after. The kernel gives their numbers to
//! others again: a loop device that was freed in between, and attached and mounted by somebody else, would
//! make his mounts those of whoever had it before, and they would be unmounted. The other order would
//! have his loop devices, on a file system with a number that was somebody else's, detached. So what was
//! read in between is taken for evidence only on devices that were the same before and after.
//! (A file system cannot end while a loop device's file is on it, nor an attachment while it is mounted.)

use std::path::Path;

use crate::kernel::{filesystems, loops, maps, nbd};
use crate::model::{DeviceNumber, Filesystem, Gap, LoopState, Snapshot};

const CHANGED: &str = "it was given to somebody else, or freed, while it was looked at";

/// Makes what changed unknown.
pub(super) fn recheck(snapshot: &mut Snapshot) {
    let (sys, proc) = (Path::new("/sys"), Path::new("/proc"));
    for device in &mut snapshot.loops {
        let is_known = match device.state {
            LoopState::Bound(_) | LoopState::Closing => true,
            LoopState::Unread | LoopState::Leftover => false,
        };
        if is_known && !loops::is_unchanged(sys, device) {
            device.state = LoopState::Unread;
            snapshot.gaps.push(Gap::Loop(device.number, CHANGED.to_owned()));
        }
    }
    if !snapshot.maps.is_empty() {
        let now = maps::list(sys).unwrap_or_default();
        let gone = |device: DeviceNumber| Gap::Blocks(format!("map {device}: {CHANGED}"));
        let changed = snapshot.maps.extract_if(.., |map| !now.contains(map));
        snapshot.gaps.extend(changed.map(|map| gone(map.identity.device)));
    }
    if !snapshot.nbds.is_empty() {
        let now = nbd::list(sys, proc).unwrap_or_default();
        for device in snapshot.nbds.iter_mut().filter(|device| !now.contains(device)) {
            device.identity = None;
            snapshot.gaps.push(Gap::Blocks(format!("/dev/nbd{}: {CHANGED}", device.number)));
        }
    }
    if snapshot.filesystems.iter().any(|filesystem| !filesystem.shown_as.is_empty()) {
        let now = filesystems::list(sys).unwrap_or_default();
        let lives = |one: &Filesystem| {
            now.iter().any(|other| other.instance == one.instance && other.blocks == one.blocks)
        };
        let numbered = snapshot.filesystems.iter_mut().filter(|one| !one.shown_as.is_empty());
        for filesystem in numbered.filter(|one| !lives(one)) {
            filesystem.shown_as.clear();
            snapshot.gaps.push(Gap::Blocks(format!("a {} file system: {CHANGED}", filesystem.kind)));
        }
    }
}
