//! Holds a disk while a step acts on what lies on it, so that no other can take its place meanwhile.

use std::io;
use std::path::Path;

use crate::kernel::{Found, block, loops, maps, nbd};
use crate::model::{DeviceNumber, ResourceIdentity};

/// Opens a disk when it still is `resource`, and `device`, if one is given, is it or a partition of it.
/// `sys` and `proc` are where sysfs and procfs are mounted.
pub(super) fn hold(
    sys: &Path,
    proc: &Path,
    device: Option<DeviceNumber>,
    resource: &ResourceIdentity,
) -> io::Result<Found> {
    let (found, disk) = match resource {
        ResourceIdentity::Loop(identity) => (loops::hold(identity)?, loops::device(sys, identity.number)),
        ResourceIdentity::Map(identity) => (maps::hold(sys, identity)?, Ok(identity.device)),
        ResourceIdentity::Nbd(identity) => {
            (nbd::hold(sys, proc, identity)?, nbd::device(sys, identity.number))
        }
        ResourceIdentity::Process(_)
        | ResourceIdentity::Mount(_)
        | ResourceIdentity::Swap(_)
        | ResourceIdentity::Directory(_)
        | ResourceIdentity::Cgroup(_) => {
            let cause = "only a loop device, a map or a network block device is a disk";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, cause));
        }
    };
    let Some(device) = device else { return Ok(found) };
    // The disk is held by now, so its numbers and partitions are its own.
    match found {
        Found::It(held) if block::is_part_of(sys, disk?, device)? => Ok(Found::It(held)),
        Found::It(_) => Ok(Found::Replaced),
        not_held => Ok(not_held),
    }
}
