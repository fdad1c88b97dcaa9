//! What `[protect]` keeps from all plans.
//!
//! A look says what the configuration names. What lies on that is protected with it: a file system in a
//! protected image is as much the administrator's as the image.

use std::collections::BTreeSet;

use hostler_protocol::lease::LeaseId;
use hostler_protocol::text::printable;
use hostler_protocol::why::Reason;

use super::attribute::Ownership;
use super::index::Index;
use crate::model::{DeviceNumber, LoopDevice, LoopState, ResourceIdentity, Snapshot, SwapIdentity};

/// All that is protected: what a look found named, and the mounts, loop devices, maps and swap areas that
/// lie on it.
pub(super) fn protected(index: &Index<'_>) -> BTreeSet<ResourceIdentity> {
    let snapshot = index.snapshot;
    let mut found = snapshot.protected.clone();
    // Most hosts protect nothing.
    while !found.is_empty() {
        let mut more = Vec::new();
        for mount in snapshot.mounts.iter().filter(|mount| lies_on_any(&found, mount.device(), index)) {
            more.push(ResourceIdentity::Mount(mount.identity));
        }
        for identity in snapshot.loops.iter().filter_map(LoopDevice::identity) {
            if lies_on_any(&found, identity.backing.device, index) {
                more.push(ResourceIdentity::Loop(identity));
            }
        }
        for map in &snapshot.maps {
            if map.lower.iter().any(|device| lies_on_any(&found, *device, index)) {
                more.push(ResourceIdentity::Map(map.identity));
            }
        }
        for swap in &snapshot.swaps {
            let device = match swap.identity {
                SwapIdentity::Device(device) => Some(device),
                SwapIdentity::File(file) => Some(file.device),
                SwapIdentity::Unreachable(_) => None,
            };
            if device.is_some_and(|device| lies_on_any(&found, device, index)) {
                more.push(ResourceIdentity::Swap(swap.identity));
            }
        }
        let before = found.len();
        found.extend(more);
        if found.len() == before {
            break;
        }
    }
    found
}

/// Whether any block device that this number is of, or that a file system with it lies on, is in a set.
fn lies_on_any(set: &BTreeSet<ResourceIdentity>, device: DeviceNumber, index: &Index<'_>) -> bool {
    let mut blocks = index.blocks_under(device).into_iter();
    blocks.any(|block| index.identity(block).is_some_and(|identity| set.contains(&identity)))
}

/// The loop devices that are not the lease's, and whose backing files lie below its claims: removing a claimed
/// directory would take the file's name from under them.
fn strange_files_below(lease: LeaseId, snapshot: &Snapshot, ownership: &Ownership) -> Vec<ResourceIdentity> {
    let files = snapshot.claimed_files.iter().filter(|found| found.lease == lease).map(|found| found.what);
    let files: BTreeSet<_> = files.collect();
    let loops = snapshot.loops.iter().filter(|device| match device.state {
        LoopState::Bound(backing) => files.contains(&backing),
        LoopState::Closing | LoopState::Unread | LoopState::Leftover => false,
    });
    loops
        .filter_map(|device| device.identity().map(ResourceIdentity::Loop))
        .filter(|identity| !ownership.is_of(*identity, lease))
        .collect()
}

/// What keeps a scratch directory: the mounts below its lease's claims that are not the lease's, loop devices
/// that are not with their files there, and other leases' claims.
#[must_use]
pub fn strangers_below(lease: LeaseId, after: &Snapshot, ownership: &Ownership) -> (Vec<Reason>, String) {
    let found = after.claimed_mounts.iter().filter(|found| found.lease == lease).map(|found| found.what);
    let points: Vec<String> = found
        .filter(|mount| !ownership.is_of(ResourceIdentity::Mount(*mount), lease))
        .filter_map(|identity| after.mounts.iter().find(|mount| mount.identity == identity))
        .map(|mount| printable(&mount.point))
        .take(3)
        .collect();
    if !points.is_empty() {
        let detail = format!("mounted below it, and not the lease's: {}", points.join(", "));
        return (vec![Reason::ChildMount], detail);
    }
    if let Some(file) = strange_files_below(lease, after, ownership).first() {
        let whose = if ownership.protected.contains(file) {
            "that [protect] protects"
        } else {
            "that is not the lease's"
        };
        return (vec![Reason::Bystander], format!("the backing file of a loop device {whose} lies below it"));
    }
    let inner = after.inner_claims.iter().find(|found| found.lease == lease);
    match inner {
        Some(inner) => {
            let detail = format!("lease {} has claimed a directory in it, or the same one", inner.what);
            (vec![Reason::Bystander], detail)
        }
        None => (Vec::new(), String::new()),
    }
}

#[cfg(test)]
#[path = "protect_tests.rs"]
mod tests;
