//! What an administrator names to be taken back, of what no lease has.

use std::collections::BTreeSet;

use hostler_protocol::lease::LeaseId;

use super::attribute::Ownership;
use super::explain::find;
use super::graph::identity_of;
use super::index::Index;
use super::policy::{Cone, is_reusable};
use crate::model::{Opener, ResourceIdentity, Snapshot, Taking};

/// Why it is not taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotTaken {
    /// Nothing has that name.
    #[error("nothing has that name")]
    Nothing,
    /// What it is could not be read.
    #[error("it did not tell what it is, so it is left alone; `hostler status` says what could not be read")]
    Unread,
    /// It is protected.
    #[error("[protect] protects it; take it out of hostlerd's configuration first")]
    Protected,
    /// A lease has it.
    #[error("lease {0} has it")]
    OfALease(LeaseId),
    /// More than one lease may have it.
    #[error("more than one lease has evidence for it, so it is nobody's to take back; end those first")]
    Doubtful,
    /// It is nothing that is taken back by name.
    #[error(
        "only loop devices, mounts and maps are taken back by name; end a swap area with swapoff, a network block device with qemu-nbd --disconnect, a process with kill"
    )]
    AnotherKind,
    /// It is mounted elsewhere only.
    #[error("it is not mounted in the host's namespace; end the processes of the namespace that it is in")]
    Elsewhere,
    /// Its number proves nothing.
    #[error(
        "this kernel gives the numbers of mounts again (Linux before 6.8), so it cannot be told from a later one; unmount it by hand"
    )]
    Unprovable,
    /// It is the host's root.
    #[error("everything lies on the root; name the mount or device that is meant")]
    Root,
}

/// What a name means, as [`explain`](super::explain) takes it, with all that lies on it and is nobody's.
///
/// That somebody uses it is no reason to refuse: it is left then, and the report says who does.
///
/// # Errors
/// When it is not to be taken back.
pub fn requested(target: &str, snapshot: &Snapshot, ownership: &Ownership) -> Result<Taking, NotTaken> {
    let index = Index::new(snapshot);
    let node = find(target, &index).ok_or(NotTaken::Nothing)?;
    let identity = identity_of(node, &index).ok_or(NotTaken::Unread)?;
    if ownership.protected.contains(&identity) {
        return Err(NotTaken::Protected);
    }
    if let Some(lease) = ownership.owners.get(&identity) {
        return Err(NotTaken::OfALease(*lease));
    }
    if ownership.doubtful.contains(&identity) {
        return Err(NotTaken::Doubtful);
    }
    match identity {
        ResourceIdentity::Loop(_) | ResourceIdentity::Map(_) => {}
        ResourceIdentity::Mount(mount) => {
            let is_root = |other: &crate::model::Mount| other.identity == mount && other.point == b"/";
            if !index.is_host(mount.namespace) {
                return Err(NotTaken::Elsewhere);
            }
            if snapshot.mounts.iter().any(is_root) {
                return Err(NotTaken::Root);
            }
            if is_reusable(identity) {
                return Err(NotTaken::Unprovable);
            }
        }
        ResourceIdentity::Process(_)
        | ResourceIdentity::Nbd(_)
        | ResourceIdentity::Swap(_)
        | ResourceIdentity::Directory(_)
        | ResourceIdentity::Cgroup(_) => return Err(NotTaken::AnotherKind),
    }
    let mut cone = Cone::new(&index, ownership);
    cone.follow(node);
    // Of what holds a mount, only what is mounted on it goes with it: a loop device with its file there is
    // somebody's use of it.
    let goes_with_it = |held_by: &ResourceIdentity| match (identity, held_by) {
        (ResourceIdentity::Mount(_), ResourceIdentity::Mount(_)) => true,
        (ResourceIdentity::Mount(_), _) => false,
        (_, _) => true,
    };
    let mut what: BTreeSet<ResourceIdentity> = cone.with.into_iter().filter(goes_with_it).collect();
    what.insert(identity);
    let name = format!("reclaim: {}", hostler_protocol::text::printable(target.as_bytes()));
    Ok(Taking { rule: None, name, opener: Opener::Administrator, what })
}

#[cfg(test)]
#[path = "requested_tests.rs"]
mod tests;
