//! What an unmount takes with it: `mount_namespaces(7)`, "Shared subtrees".
//!
//! The kernel mounts and unmounts below all peers of the mount that something is mounted on, and below
//! their slaves. So a leaked mount has copies, which are leaked like it; and a mount that a builder got
//! by `mount --rbind` is a copy of a bystander's, which must not go with it.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use super::index::Index;
use crate::model::{Mount, MountNumber};

/// The mounts that are unmounted together with this one.
pub(super) fn counterparts(at: usize, index: &Index<'_>) -> Vec<usize> {
    let Some(parent) = index.parent(at) else { return Vec::new() };
    let Some(group) = index.mount(parent).peers else { return Vec::new() };
    let mount = index.mount(at);
    let Some(place) = place_in_filesystem(mount, index.mount(parent)) else { return Vec::new() };
    let mut found = Vec::new();
    for receiver in receivers(group, index) {
        for child in index.children(receiver) {
            let other = index.mount(*child);
            let is_same = *child != at
                && other.device() == mount.device()
                && other.root == mount.root
                && place_in_filesystem(other, index.mount(receiver)).as_ref() == Some(&place);
            if is_same {
                found.push(*child);
            }
        }
    }
    found
}

/// The mounts in a peer group, and those that get its mounts, directly or through others.
fn receivers(group: u64, index: &Index<'_>) -> BTreeSet<usize> {
    let mut groups = vec![group];
    let mut seen = BTreeSet::from([group]);
    let mut found = BTreeSet::new();
    while let Some(group) = groups.pop() {
        found.extend(index.in_peer_group(group));
        for slave in index.slaves_of(group) {
            found.insert(*slave);
            groups.extend(index.mount(*slave).peers.filter(|peers| seen.insert(*peers)));
        }
    }
    found
}

/// Where a mount's mount point is in the file system of the mount that it is on. Text against text of
/// the same mountinfo, which the kernel wrote: whoever mounts cannot forge one against the other.
fn place_in_filesystem(mount: &Mount, parent: &Mount) -> Option<PathBuf> {
    let path = |bytes: &'_ [u8]| Path::new(OsStr::from_bytes(bytes)).to_owned();
    let below = path(&mount.point).strip_prefix(path(&parent.point)).ok()?.to_owned();
    Some(path(&parent.root).join(below))
}

/// Whether one mount was made after another; unknown, so not, where numbers are given again.
pub(super) fn is_younger(one: &Mount, other: &Mount) -> bool {
    match (one.identity.number, other.identity.number) {
        (MountNumber::Unique(one), MountNumber::Unique(other)) => one > other,
        (MountNumber::Reusable(_), _) | (_, MountNumber::Reusable(_)) => false,
    }
}
