//! What became of each resource, by a second look. No call's success counts here.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::Path;

use hostler_protocol::lease::{LeaseId, Tracking};
use hostler_protocol::resource::Outcome;
use hostler_protocol::text::LEFT_OUT;

use super::attribute::Ownership;
use super::index::Index;
use crate::model::{
    Gap, Lease, LoopDevice, LoopState, Plan, ProcessIdentity, ResourceIdentity, Snapshot, Step, StepResult,
    UnmountHow,
};

/// All that a lease owns of a snapshot, but processes that have ended already.
#[must_use]
pub fn everything_of(
    lease: LeaseId,
    snapshot: &Snapshot,
    ownership: &Ownership,
) -> BTreeSet<ResourceIdentity> {
    let running = Running::of(snapshot);
    ownership.of(lease).filter(|identity| running.is_there(*identity)).collect()
}

/// The same of each lease that has something.
#[must_use]
pub fn everything_by_lease(
    snapshot: &Snapshot,
    ownership: &Ownership,
) -> BTreeMap<LeaseId, Vec<ResourceIdentity>> {
    let running = Running::of(snapshot);
    let mut all = ownership.by_lease();
    all.values_mut().for_each(|of_lease| of_lease.retain(|identity| running.is_there(*identity)));
    all
}

/// The processes of a look that have not ended: a lease may have as many as the host.
struct Running(HashSet<ProcessIdentity>);

impl Running {
    fn of(snapshot: &Snapshot) -> Self {
        let running = snapshot.processes.iter().filter(|process| !process.ended);
        Self(running.map(|process| process.identity).collect())
    }

    fn is_there(&self, identity: ResourceIdentity) -> bool {
        match identity {
            ResourceIdentity::Process(process) => self.0.contains(&process),
            ResourceIdentity::Mount(_)
            | ResourceIdentity::Loop(_)
            | ResourceIdentity::Map(_)
            | ResourceIdentity::Nbd(_)
            | ResourceIdentity::Swap(_)
            | ResourceIdentity::Directory(_)
            | ResourceIdentity::Cgroup(_) => true,
        }
    }
}

/// What could not be read and may hide something of a lease: while there is any, nobody can say that
/// nothing of it is left.
#[must_use]
pub fn doubts<'a>(lease: &Lease, snapshot: &'a Snapshot) -> Vec<&'a Gap> {
    let hides = |gap: &&Gap| match gap {
        Gap::Loops(_) => !lease.claims.is_empty() || !lease.loops.is_empty(),
        Gap::Mounts(_) => !lease.claims.is_empty() || !lease.loops.is_empty() || !lease.mounts.is_empty(),
        Gap::Blocks(_) => !lease.maps.is_empty() || !lease.loops.is_empty(),
        Gap::Loop(number, _) => {
            lease.loops.iter().any(|identity| identity.number == *number)
                || may_lie_below(lease, snapshot, *number)
        }
        Gap::Processes(_) => lease.tracking == Tracking::Descent,
        Gap::Cgroup(of, _) | Gap::Claim(of, _) => *of == lease.id,
        // A mount in another namespace is mostly of a device that is bound for as long as it lasts; but an
        // overlay's, for one, is of none.
        Gap::Namespaces(_) => {
            lease.mounts.iter().any(|mount| snapshot.namespace.is_none_or(|host| host != mount.namespace))
        }
        Gap::Namespace(namespace, _) => lease.mounts.iter().any(|mount| mount.namespace == *namespace),
        // Such a look tells nothing of what is there besides.
        Gap::Unasked => true,
        // It tells what holds things, not what is there.
        Gap::Process(..) => false,
        // What may be protected is left as if it were.
        Gap::Criterion(_) => false,
    };
    snapshot.gaps.iter().filter(hides).collect()
}

/// Whether a loop device that could not be asked may be the lease's: it was attached after the claim, and
/// text says that its file lies below. That is enough to doubt, and never to act.
fn may_lie_below(lease: &Lease, snapshot: &Snapshot, number: u32) -> bool {
    let is_later = |device: &LoopDevice| device.sequence.is_none_or(|sequence| sequence > lease.loops_before);
    let lies_below = |device: &LoopDevice| {
        // Of a long path only the end is known.
        let is_above =
            |path: &str| path.starts_with(LEFT_OUT) || Path::new(&device.backing_text).starts_with(path);
        lease.claims.iter().any(|claim| is_above(&claim.path))
    };
    !lease.evidence_closed
        && snapshot
            .loops
            .iter()
            .any(|device| device.number == number && is_later(device) && lies_below(device))
}

/// What became of `resource`: `after` is the second look, `plan` and `results` what was tried.
#[must_use]
pub fn verify(resource: ResourceIdentity, plan: &Plan, results: &[StepResult], after: &Snapshot) -> Outcome {
    match presence(resource, after) {
        // Out of sight is not free.
        Presence::Gone { .. } if is_only_out_of_sight(resource, plan, after) => Outcome::Pinned,
        Presence::There => Outcome::Pinned,
        Presence::Unclear => Outcome::Unknown,
        Presence::Gone { name_in_use } => {
            let acted = acted_on(resource, plan, results);
            match (acted, name_in_use) {
                (true, _) => Outcome::Reclaimed,
                (false, true) => Outcome::Replaced,
                (false, false) => Outcome::AlreadyGone,
            }
        }
    }
}

/// Whether a mount was unmounted lazily, and its file system's device is still in use.
fn is_only_out_of_sight(resource: ResourceIdentity, plan: &Plan, after: &Snapshot) -> bool {
    let ResourceIdentity::Mount(mount) = resource else { return false };
    let lazily = plan.steps.iter().any(|step| match step {
        Step::Unmount { mount: other, how, .. } => *other == mount && *how == UnmountHow::Lazy,
        _ => false,
    });
    lazily && !Index::new(after).blocks_under(mount.device).is_empty()
}

/// Whether the daemon did something that made it go.
fn acted_on(resource: ResourceIdentity, plan: &Plan, results: &[StepResult]) -> bool {
    let tried = || plan.steps.iter().zip(results);
    let own = || tried().filter(|(step, _)| step.acts_on(resource));
    let by_itself = own().any(|(_, result)| match result {
        StepResult::Done | StepResult::Locked | StepResult::Failed { .. } | StepResult::Hung { .. } => true,
        StepResult::Replaced | StepResult::Gone => false,
    });
    // Some things go with others that a step of ours freed: a loop device that was set up for its mount
    // alone (`mount -o loop`) with the last unmount, a network block device with its server, the copies
    // of a mount with that, the mounts of a namespace with its last process.
    let with_another = match resource {
        ResourceIdentity::Loop(_)
        | ResourceIdentity::Map(_)
        | ResourceIdentity::Nbd(_)
        | ResourceIdentity::Swap(_)
        | ResourceIdentity::Mount(_) => own().any(|(_, result)| *result == StepResult::Gone),
        ResourceIdentity::Process(_) | ResourceIdentity::Directory(_) | ResourceIdentity::Cgroup(_) => false,
    };
    by_itself || with_another && tried().any(|(_, result)| *result == StepResult::Done)
}

enum Presence {
    There,
    Gone { name_in_use: bool },
    Unclear,
}

fn presence(resource: ResourceIdentity, after: &Snapshot) -> Presence {
    if after.gaps.contains(&Gap::Unasked) {
        return Presence::Unclear;
    }
    let gone = |name_in_use| Presence::Gone { name_in_use };
    let has_gap = |is_it: fn(&Gap) -> bool| after.gaps.iter().any(is_it);
    match resource {
        ResourceIdentity::Process(process) => {
            if is_running(process, after) {
                Presence::There
            } else if has_gap(|gap| matches!(gap, Gap::Processes(_))) {
                Presence::Unclear
            } else {
                gone(false)
            }
        }
        ResourceIdentity::Mount(mount) => {
            let hides = |gap: &Gap| match gap {
                Gap::Mounts(_) => after.namespace.is_none_or(|host| host == mount.namespace),
                Gap::Namespaces(_) => after.namespace != Some(mount.namespace),
                Gap::Namespace(namespace, _) => *namespace == mount.namespace,
                _ => false,
            };
            if after.mounts.iter().any(|other| other.identity == mount) {
                Presence::There
            } else if after.gaps.iter().any(hides) {
                Presence::Unclear
            } else {
                gone(false)
            }
        }
        ResourceIdentity::Loop(identity) => {
            if has_gap(|gap| matches!(gap, Gap::Loops(_))) {
                return Presence::Unclear;
            }
            let Some(device) = after.loops.iter().find(|device| device.number == identity.number) else {
                return gone(false);
            };
            match (device.sequence, device.state) {
                (Some(sequence), _) if sequence != identity.sequence => gone(true),
                (Some(_), LoopState::Leftover) => gone(false),
                (Some(_) | None, LoopState::Unread) | (None, _) => Presence::Unclear,
                (Some(_), LoopState::Bound(_) | LoopState::Closing) => Presence::There,
            }
        }
        ResourceIdentity::Map(map) => {
            if after.maps.iter().any(|other| other.identity == map) {
                Presence::There
            } else if has_gap(|gap| matches!(gap, Gap::Blocks(_))) {
                Presence::Unclear
            } else {
                gone(after.maps.iter().any(|other| other.identity.device == map.device))
            }
        }
        ResourceIdentity::Nbd(nbd) => {
            match after.nbds.iter().find(|other| other.number == nbd.number).map(|other| other.identity) {
                Some(Some(other)) if other == nbd => Presence::There,
                Some(Some(_)) => gone(true),
                Some(None) => Presence::Unclear,
                None if has_gap(|gap| matches!(gap, Gap::Blocks(_))) => Presence::Unclear,
                None => gone(false),
            }
        }
        ResourceIdentity::Swap(swap) => {
            if after.swaps.iter().any(|other| other.identity == swap) {
                Presence::There
            } else if has_gap(|gap| matches!(gap, Gap::Blocks(_))) {
                Presence::Unclear
            } else {
                gone(false)
            }
        }
        ResourceIdentity::Directory(directory) => {
            if after.directories.iter().any(|found| found.what == directory) {
                Presence::There
            } else if has_gap(|gap| matches!(gap, Gap::Claim(..))) {
                Presence::Unclear
            } else {
                gone(false)
            }
        }
        ResourceIdentity::Cgroup(cgroup) => {
            if after.cgroups.values().any(|other| *other == cgroup) {
                Presence::There
            } else if has_gap(|gap| matches!(gap, Gap::Cgroup(..))) {
                Presence::Unclear
            } else {
                gone(false)
            }
        }
    }
}

fn is_running(process: ProcessIdentity, snapshot: &Snapshot) -> bool {
    snapshot.processes.iter().any(|other| other.identity == process && !other.ended)
}

#[cfg(test)]
#[path = "verify_tests.rs"]
mod tests;
