//! What a look says about what is still to come: whether a lease can still make something, whether
//! patience helps, and what need not be remembered any more.

use std::collections::{BTreeSet, HashSet};

use super::attribute::Ownership;
use super::verify::{doubts, everything_of};
use crate::model::{Gap, Lease, LoopState, Plan, ResourceIdentity, Snapshot, StepResult};

/// Whether a look saw everything that a lease can have made: none of its processes is left to make
/// more, and nothing hid from the look.
#[must_use]
pub fn is_settled(lease: &Lease, snapshot: &Snapshot, ownership: &Ownership) -> bool {
    let has_process = |identity: &ResourceIdentity| matches!(identity, ResourceIdentity::Process(_));
    !everything_of(lease.id, snapshot, ownership).iter().any(has_process)
        && doubts(lease, snapshot).is_empty()
}

/// Identities are never used again, so those of what is gone only take space. `before` is the lease as it was
/// when the look began: what it got since may have come after the look had passed its place.
pub fn forget_what_is_gone(lease: &mut Lease, before: &Lease, snapshot: &Snapshot) {
    let has_gap = |is_it: fn(&Gap) -> bool| snapshot.gaps.iter().any(is_it);
    if !has_gap(|gap| matches!(gap, Gap::Loops(_))) {
        lease.loops.retain(|identity| {
            !before.loops.contains(identity)
                || snapshot.loops.iter().any(|device| {
                    device.number == identity.number
                        && (device.sequence == Some(identity.sequence) || device.state == LoopState::Unread)
                })
        });
    }
    if !has_gap(|gap| matches!(gap, Gap::Mounts(_) | Gap::Namespaces(_) | Gap::Namespace(..) | Gap::Unasked))
    {
        let there: HashSet<_> = snapshot.mounts.iter().map(|mount| mount.identity).collect();
        lease.mounts.retain(|identity| !before.mounts.contains(identity) || there.contains(identity));
    }
    if !has_gap(|gap| matches!(gap, Gap::Blocks(_))) {
        lease.maps.retain(|identity| {
            !before.maps.contains(identity) || snapshot.maps.iter().any(|map| map.identity == *identity)
        });
    }
    if !has_gap(|gap| matches!(gap, Gap::Namespaces(_))) {
        let is_there = |unique: &u64| snapshot.namespaces.iter().any(|other| other.unique == Some(*unique));
        lease.namespaces.retain(|unique| !before.namespaces.contains(unique) || is_there(unique));
    }
    if !has_gap(|gap| matches!(gap, Gap::Processes(_))) {
        lease.processes.retain(|identity| {
            !before.processes.contains(identity)
                || snapshot.processes.iter().any(|process| process.identity == *identity && !process.ended)
        });
    }
}

/// Whether a little patience may free what is left: only what a call was said to have freed.
#[must_use]
pub fn may_still_go(left: &BTreeSet<ResourceIdentity>, plan: &Plan, results: &[StepResult]) -> bool {
    plan.steps.iter().zip(results).any(|(step, result)| {
        *result == StepResult::Done && step.resources().iter().any(|resource| left.contains(resource))
    })
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{ROOT_DISK, host, lease, loop_device, loop_identity};
    use super::*;
    use crate::model::Phase;

    #[test]
    fn what_came_while_the_look_ran_is_not_forgotten() {
        let mut before = lease(1, Phase::Open);
        before.loops.extend([loop_identity(1, ROOT_DISK), loop_identity(2, ROOT_DISK)]);
        let mut now = before.clone();
        now.loops.insert(loop_identity(3, ROOT_DISK));
        let mut snapshot = host();
        snapshot.loops.push(loop_device(1, ROOT_DISK));
        forget_what_is_gone(&mut now, &before, &snapshot);
        assert_eq!(now.loops, BTreeSet::from([loop_identity(1, ROOT_DISK), loop_identity(3, ROOT_DISK)]));
    }
}
