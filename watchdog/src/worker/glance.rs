//! A look at nothing but what an event told of: a loop device that was attached, a mount that was made.
//!
//! It costs the same on a host with ten mounts and one with ten thousand. It sees what the thing lies on
//! too (a mount's parent and device, a loop device's file system), so that what follows from a lease's
//! earlier things still does. All else it does not see, and says so: such a look is only ever remembered.

use std::os::fd::OwnedFd;
use std::path::Path;

use super::claims::{self, Search};
use super::message::Query;
use crate::kernel::{loops, mounts, statmount};
use crate::model::{DeviceNumber, Gap, LoopState, Mount, MountNumber, Snapshot};

/// How many loop devices in each other are followed.
const DEPTH_LIMIT: usize = 16;

/// Looks at these loop devices and mounts.
pub(super) fn glance(
    (devices, numbers): (&[u32], &[u64]),
    query: &Query,
    skip: &[String],
    passed: &[OwnedFd],
    touching: &mut dyn FnMut(Option<u32>, &str),
) -> Snapshot {
    let mut snapshot = Snapshot { gaps: vec![Gap::Unasked], ..Snapshot::default() };
    match mounts::namespace_of(None) {
        Ok(namespace) => snapshot.namespace = Some(namespace),
        Err(error) => snapshot.gaps.push(Gap::Mounts(error.to_string())),
    }
    for unique in numbers {
        add_mount(*unique, &mut snapshot.mounts);
        if let Ok(basics) = statmount::basics(None, *unique) {
            add_mount(basics.parent, &mut snapshot.mounts);
        }
    }
    let below: Vec<DeviceNumber> = snapshot.mounts.iter().map(Mount::device).collect();
    let below = below.into_iter().filter_map(|device| loops::number_of(Path::new("/sys"), device));
    for number in devices.iter().copied().chain(below.collect::<Vec<_>>()) {
        add_loop(number, query, touching, &mut snapshot);
    }
    // Numbers of devices and file systems are given again. What is still mounted now was so when the loop
    // devices were asked, so these are what it is on, and their files are on it.
    snapshot.mounts.retain(is_still_there);
    for lease in &query.leases {
        for claim in &lease.claims {
            if let Some(MountNumber::Unique(unique)) = claim.claim.mount {
                add_mount(unique, &mut snapshot.mounts);
            }
        }
    }
    let found = std::mem::take(&mut snapshot.mounts);
    let search = Search::new(&found, &snapshot);
    for lease in &query.leases {
        claims::read(lease, skip, passed, &search, touching, &mut Vec::new(), &mut snapshot);
    }
    snapshot.mounts = found;
    snapshot
}

fn add_mount(unique: u64, into: &mut Vec<Mount>) {
    let is_it = |mount: &Mount| mount.identity.number == MountNumber::Unique(unique);
    // One that is gone again, or cannot be read, is for the next whole look.
    if !into.iter().any(is_it)
        && let Ok(Some(mount)) = mounts::one(unique)
    {
        into.push(mount);
    }
}

fn is_still_there(mount: &Mount) -> bool {
    match mount.identity.number {
        MountNumber::Unique(unique) => statmount::basics(None, unique).is_ok(),
        MountNumber::Reusable(_) => false,
    }
}

/// The device, and those that its backing file's file system lies on.
fn add_loop(
    number: u32,
    query: &Query,
    touching: &mut dyn FnMut(Option<u32>, &str),
    snapshot: &mut Snapshot,
) {
    let mut next = Some(number);
    for _ in 0..DEPTH_LIMIT {
        let Some(number) = next.take() else { return };
        if query.avoid.contains(&number) || snapshot.loops.iter().any(|device| device.number == number) {
            return;
        }
        let Ok(Some(mut device)) = loops::one(Path::new("/sys"), number) else { return };
        touching(Some(number), "loop device");
        if loops::ask(&mut device).is_err() {
            return;
        }
        if let LoopState::Bound(backing) = device.state {
            next = loops::number_of(Path::new("/sys"), backing.device);
        }
        snapshot.loops.push(device);
    }
}
