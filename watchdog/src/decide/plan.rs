//! What is to be done for a lease that is over.
//!
//! Order: processes end first; then mounts and loop devices, each after all that holds it (a mount
//! before the mount it is on and before its device, a nested loop device before the mount its
//! backing file lies on); then scratch directories; then the control group.
//!
//! What a bystander holds is in no plan, and neither is what that holds in turn.

use std::collections::{BTreeMap, BTreeSet};

use hostler_protocol::lease::LeaseId;

use super::attribute::Ownership;
use crate::model::{
    CgroupIdentity, Gap, Lease, LoopIdentity, Mount, MountNumber, Phase, Plan, ProcessIdentity,
    ResourceIdentity, Snapshot, Step, UnmountHow,
};

/// What the administrator set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PlanSettings {
    /// How long processes have to end after SIGTERM, in milliseconds.
    pub term_timeout_ms: u64,
}

/// What is to be done for `lease`, given whose everything is. Empty while its owner lives.
#[must_use]
pub fn plan(lease: &Lease, snapshot: &Snapshot, ownership: &Ownership, settings: PlanSettings) -> Plan {
    match lease.phase {
        Phase::Open => return Plan::default(),
        Phase::Over => {}
    }
    let mut steps = Vec::new();
    let processes = live_processes(lease.id, snapshot, ownership);
    if !processes.is_empty() {
        steps.push(Step::EndProcesses {
            processes,
            cgroup: killable_cgroup(lease, snapshot, ownership),
            term_timeout_ms: settings.term_timeout_ms,
        });
    }
    // Without the list of mounts nobody knows what holds a device or lies in a directory.
    let mounts_known = !snapshot.gaps.iter().any(|gap| matches!(gap, Gap::Mounts(_)));
    if mounts_known {
        steps.extend(in_holding_order(lease.id, snapshot, ownership));
        steps.extend(directories(lease, snapshot, ownership));
    }
    if let Some((identity, path)) = &lease.cgroup
        && snapshot.cgroups.get(&lease.id) == Some(identity)
    {
        steps.push(Step::RemoveCgroup { cgroup: *identity, path: path.clone() });
    }
    Plan { steps }
}

/// The lease's control group, when it may be killed as a whole: not while a process is in it that is
/// not to be ended, such as a living owner, or those of a lease within this one.
fn killable_cgroup(
    lease: &Lease,
    snapshot: &Snapshot,
    ownership: &Ownership,
) -> Option<(CgroupIdentity, String)> {
    let members = snapshot.members.get(&lease.id)?;
    let (identity, path) = lease.cgroup.clone()?;
    let is_there = snapshot.cgroups.get(&lease.id) == Some(&identity);
    let all_ours = members.iter().all(|member| ownership.is_of(ResourceIdentity::Process(*member), lease.id));
    (is_there && all_ours).then_some((identity, path))
}

fn live_processes(lease: LeaseId, snapshot: &Snapshot, ownership: &Ownership) -> Vec<ProcessIdentity> {
    snapshot
        .processes
        .iter()
        .filter(|process| !process.ended)
        .map(|process| process.identity)
        .filter(|identity| ownership.is_of(ResourceIdentity::Process(*identity), lease))
        .collect()
}

/// A mount or a loop device, in the order that breaks ties: mounts first, the latest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Node {
    Mount(std::cmp::Reverse<usize>),
    Loop(LoopIdentity),
}

/// Unmounts and detaches, each after all that holds it. What a bystander holds, directly or
/// through something else, is left out.
fn in_holding_order(lease: LeaseId, snapshot: &Snapshot, ownership: &Ownership) -> Vec<Step> {
    let mut nodes: BTreeSet<Node> = BTreeSet::new();
    for (index, mount) in snapshot.mounts.iter().enumerate() {
        if ownership.is_of(ResourceIdentity::Mount(mount.identity), lease) {
            nodes.insert(Node::Mount(std::cmp::Reverse(index)));
        }
    }
    for identity in snapshot.loops.iter().filter_map(crate::model::LoopDevice::identity) {
        if ownership.is_of(ResourceIdentity::Loop(identity), lease) {
            nodes.insert(Node::Loop(identity));
        }
    }
    let mut waits_for: BTreeMap<Node, BTreeSet<Node>> = BTreeMap::new();
    let mut held_by_bystander = BTreeSet::new();
    for node in &nodes {
        match holders_of(*node, snapshot) {
            Some(holders) if holders.iter().all(|holder| nodes.contains(holder)) => {
                waits_for.insert(*node, holders);
            }
            Some(_) | None => {
                held_by_bystander.insert(*node);
            }
        }
    }
    let mut steps = Vec::new();
    // Each round takes the first node that nothing holds any more. A node that waits for one that
    // was left out, or for itself, is never taken.
    while let Some(next) = waits_for.iter().find(|(_, holders)| holders.is_empty()).map(|(node, _)| *node) {
        waits_for.remove(&next);
        for holders in waits_for.values_mut() {
            holders.remove(&next);
        }
        steps.push(step(next, lease, snapshot, ownership));
    }
    steps
}

/// What holds a node, or `None` when something holds it that no step of ours can end.
fn holders_of(node: Node, snapshot: &Snapshot) -> Option<BTreeSet<Node>> {
    let mut holders = BTreeSet::new();
    match node {
        Node::Mount(std::cmp::Reverse(index)) => {
            let mount = &snapshot.mounts[index];
            for (other_index, other) in snapshot.mounts.iter().enumerate() {
                if other.parent == Some(mount.short_number) && other_index != index {
                    holders.insert(Node::Mount(std::cmp::Reverse(other_index)));
                }
            }
            if is_of_a_loop_device(mount, snapshot) {
                let nested = snapshot.loops.iter().filter_map(crate::model::LoopDevice::identity);
                let nested = nested.filter(|identity| identity.backing.device == mount.device());
                holders.extend(nested.map(Node::Loop));
            }
        }
        Node::Loop(identity) => {
            let device = snapshot.loops.iter().find(|device| device.identity() == Some(identity))?;
            for (index, mount) in snapshot.mounts.iter().enumerate() {
                if device.has_device(mount.device()) {
                    holders.insert(Node::Mount(std::cmp::Reverse(index)));
                }
            }
        }
    }
    Some(holders)
}

/// Whether the mounted file system lies on a loop device. Only then does a loop device whose backing
/// file is on that file system hold the mount: of the host's own file systems, which every builder
/// binds somewhere, other mounts remain.
fn is_of_a_loop_device(mount: &Mount, snapshot: &Snapshot) -> bool {
    snapshot.loops.iter().any(|device| device.has_device(mount.device()))
}

fn step(node: Node, lease: LeaseId, snapshot: &Snapshot, ownership: &Ownership) -> Step {
    match node {
        Node::Mount(std::cmp::Reverse(index)) => {
            let mount = &snapshot.mounts[index];
            let (identity, short_number, point) = (mount.identity, mount.short_number, mount.point.clone());
            match peer_of_a_bystander(mount, lease, snapshot, ownership) {
                parent => Step::Unmount {
                    mount: identity,
                    short_number,
                    point,
                    apart_from: parent.map(|parent| parent.identity),
                    how: UnmountHow::Plain,
                },
            }
        }
        Node::Loop(identity) => Step::DetachLoop { identity, partitions: Vec::new() },
    }
}

/// The mount that `mount` is on, when unmounting there would unmount a bystander's mount as well.
///
/// A bind of a shared mount is its peer, and `mount --rbind /dev` copies what is mounted below: the
/// kernel undoes an unmount below one peer below all. So where the lease's parent mount is shared,
/// and another mount of the same file system has the same thing mounted on it, not the lease's, the
/// two are parted first. Not when that other one is younger: then it is the copy, which came by
/// propagation of what the lease mounted, and is to go with it.
fn peer_of_a_bystander<'a>(
    mount: &Mount,
    lease: LeaseId,
    snapshot: &'a Snapshot,
    ownership: &Ownership,
) -> Option<&'a Mount> {
    let is_own = |mount: &Mount| ownership.is_of(ResourceIdentity::Mount(mount.identity), lease);
    let on = |mount: &Mount| {
        snapshot.mounts.iter().find(|other| Some(other.short_number) == mount.parent && other.peers.is_some())
    };
    let parent = on(mount).filter(|parent| is_own(parent))?;
    let counterpart = snapshot.mounts.iter().any(|other| {
        other.device() == mount.device()
            && other.root == mount.root
            && !is_own(other)
            && !is_younger(other, mount)
            && on(other).is_some_and(|peer| peer.device() == parent.device() && !is_own(peer))
    });
    counterpart.then_some(parent)
}

/// Whether one mount was made after another; unknown, so not, where numbers are given again.
fn is_younger(one: &Mount, other: &Mount) -> bool {
    match (one.identity.number, other.identity.number) {
        (MountNumber::Unique(one), MountNumber::Unique(other)) => one > other,
        (MountNumber::Reusable(_), _) | (_, MountNumber::Reusable(_)) => false,
    }
}

fn directories(lease: &Lease, snapshot: &Snapshot, ownership: &Ownership) -> Vec<Step> {
    lease
        .claims
        .iter()
        .filter(|claim| claim.scratch)
        .filter(|claim| ownership.is_of(ResourceIdentity::Directory(claim.directory), lease.id))
        .filter(|_| {
            // A mount below it that is not ours: removing around it would empty a bystander's
            // surroundings and detach its copies in other namespaces.
            snapshot
                .claimed_mounts
                .iter()
                .filter(|found| found.lease == lease.id)
                .all(|found| ownership.is_of(ResourceIdentity::Mount(found.what), lease.id))
        })
        .map(|claim| Step::RemoveDirectory {
            directory: claim.directory,
            lease: lease.id,
            path: claim.path.clone(),
        })
        .collect()
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
