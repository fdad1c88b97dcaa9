//! What became of a lease's things, as it is told: noted once for each change, told to those who wait.

use hostler_protocol::lease::{LeaseId, Report, ResourceOutcome};
use hostler_protocol::resource::Outcome;
use hostler_protocol::why::Reason;

use super::Engine;
use super::view::name_of;
use crate::decide::{Ownership, PROTECTED, everything_of, reasons_for, strangers_below, verify};
use crate::model::{Claim, Gap, Lease, Plan, ResourceIdentity, Snapshot, Step, StepResult};

impl Engine {
    /// Notes what a second look still shows, and why.
    pub(super) fn note_left(
        &self,
        id: LeaseId,
        resource: ResourceIdentity,
        plan: &Plan,
        results: &[StepResult],
        after: &Snapshot,
        ownership: &Ownership,
    ) {
        let outcome = verify(resource, plan, results, after);
        let (mut reasons, mut detail) = match resource {
            ResourceIdentity::Directory(_) => strangers_below(id, after, ownership),
            _ => reasons_for(resource, after, ownership),
        };
        let can_be_held_unseen = matches!(
            resource,
            ResourceIdentity::Mount(_)
                | ResourceIdentity::Loop(_)
                | ResourceIdentity::Map(_)
                | ResourceIdentity::Nbd(_)
        );
        if reasons.is_empty() && can_be_held_unseen {
            // Something holds it that no look can show: a descriptor on its way over a socket, for one.
            reasons.push(Reason::Unknown);
        }
        if detail.is_empty() {
            let said = plan.steps.iter().zip(results).find(|(step, _)| step.acts_on(resource));
            detail = match said {
                Some((_, StepResult::Failed { cause })) => cause.clone(),
                Some((_, result @ StepResult::Locked)) => result.sentence(),
                Some((_, StepResult::Hung { doing })) => format!("{doing} hangs"),
                Some(_) => "every call succeeded, and it is still there".to_owned(),
                None => "something that holds it cannot be taken back".to_owned(),
            };
        }
        self.note(id, resource, outcome, (reasons, detail), plan, after);
    }

    /// Notes what a lease may still have, which cannot be told.
    pub(super) fn note_doubts(&self, lease: &Lease, before: &Snapshot, doubts: &[&Gap]) {
        for gap in doubts {
            let hidden: Vec<ResourceIdentity> = match gap {
                Gap::Claim(..) => {
                    let is_seen =
                        |claim: &&Claim| before.directories.iter().any(|found| found.what == claim.directory);
                    let unseen = lease.claims.iter().filter(|claim| !is_seen(claim));
                    unseen.map(|claim| ResourceIdentity::Directory(claim.directory)).collect()
                }
                Gap::Loop(number, _) => {
                    let own = lease.loops.iter().filter(|identity| identity.number == *number);
                    own.copied().map(ResourceIdentity::Loop).collect()
                }
                Gap::Cgroup(..) => {
                    lease.cgroup.iter().map(|(identity, _)| ResourceIdentity::Cgroup(*identity)).collect()
                }
                Gap::Loops(_)
                | Gap::Mounts(_)
                | Gap::Unasked
                | Gap::Blocks(_)
                | Gap::Namespaces(_)
                | Gap::Processes(_)
                | Gap::Namespace(..)
                | Gap::Process(..)
                | Gap::Criterion(_) => Vec::new(),
            };
            for resource in hidden {
                let because = (vec![Reason::Unknown], gap.sentence());
                self.note(lease.id, resource, Outcome::Unknown, because, &Plan::default(), before);
            }
        }
    }

    /// Notes that nothing of a lease was taken back, because of what a look could not see.
    pub(super) fn note_hidden(&self, id: LeaseId, before: &Snapshot, ownership: &Ownership, gap: &Gap) {
        for resource in everything_of(id, before, ownership) {
            let because = (vec![Reason::Unknown], format!("not tried: {}", gap.sentence()));
            self.note(id, resource, Outcome::Unknown, because, &Plan::default(), before);
        }
    }

    /// Once a lease has nothing left, sees what was pinned or unknown at an earlier attempt: it has gone by
    /// itself, or it is still there and not the lease's any more. Says whether all of it has gone.
    pub(super) fn settle(&self, id: LeaseId, seen: &Snapshot, ownership: &Ownership) -> bool {
        let unsettled: Vec<ResourceIdentity> = {
            let state = self.shared.state.borrow();
            let outcomes = state.get(id).into_iter().flat_map(|record| &record.outcomes);
            let is_unsettled = |outcome: Outcome| match outcome {
                Outcome::Reclaimed | Outcome::AlreadyGone | Outcome::Replaced => false,
                Outcome::Pinned | Outcome::Unknown => true,
            };
            outcomes.filter(|(_, one)| is_unsettled(one.outcome)).map(|(resource, _)| *resource).collect()
        };
        let mut all_gone = true;
        for resource in unsettled {
            let outcome = verify(resource, &Plan::default(), &[], seen);
            let because = match outcome {
                Outcome::Reclaimed | Outcome::AlreadyGone | Outcome::Replaced => (Vec::new(), String::new()),
                Outcome::Pinned | Outcome::Unknown => {
                    all_gone = false;
                    no_longer_its_own(resource, ownership)
                }
            };
            self.note(id, resource, outcome, because, &Plan::default(), seen);
        }
        all_gone
    }

    /// Notes what became of a resource.
    pub(super) fn note(
        &self,
        id: LeaseId,
        resource: ResourceIdentity,
        outcome: Outcome,
        (reasons, detail): (Vec<Reason>, String),
        plan: &Plan,
        seen: &Snapshot,
    ) {
        let mut state = self.shared.state.borrow_mut();
        let Some(record) = state.get_mut(id) else { return };
        let known = record.outcomes.get(&resource);
        // Each change counts once: what is pinned is seen while it is, and not at each retry.
        if known.is_none_or(|known| known.outcome != outcome) {
            let labels = [resource.kind().name(), outcome.name()];
            self.shared.metrics.reclaims.with_label_values(&labels).inc();
        }
        let known = known.map(|known| known.name.clone());
        let name = known.unwrap_or_else(|| name_in(plan, resource, &record.lease, seen));
        let outcome = ResourceOutcome { kind: resource.kind(), name, outcome, reasons, detail };
        record.outcomes.insert(resource, outcome);
    }

    /// Tells those who wait what became of a lease so far.
    pub(super) fn tell(&self, id: LeaseId, complete: bool) {
        let state = self.shared.state.borrow();
        let Some(record) = state.get(id) else { return };
        let seconds = record.over_since.map_or(0.0, |since| since.elapsed().as_secs_f64());
        let report = Report { complete, seconds, resources: record.outcomes.values().cloned().collect() };
        for left in
            report.resources.iter().filter(|left| matches!(left.outcome, Outcome::Pinned | Outcome::Unknown))
        {
            tracing::warn!(
                lease = id.0,
                kind = left.kind.name(),
                name = left.name,
                outcome = left.outcome.name(),
                detail = left.detail,
                "lease {id}: {} {} is still there: {}",
                left.kind.name(),
                left.name,
                left.detail
            );
        }
        record.report.send_replace(Some(report));
    }
}

/// Why what is there is not the lease's any more.
fn no_longer_its_own(resource: ResourceIdentity, ownership: &Ownership) -> (Vec<Reason>, String) {
    if ownership.protected.contains(&resource) {
        (vec![Reason::Bystander], PROTECTED.to_owned())
    } else if ownership.doubtful.contains(&resource) {
        (vec![Reason::Bystander], "another lease has it too".to_owned())
    } else {
        (vec![Reason::Unknown], "it is in use, and whose it is cannot be told any more".to_owned())
    }
}

/// A resource's name for people, as the plan, its lease or a look has it.
fn name_in(plan: &Plan, resource: ResourceIdentity, lease: &Lease, seen: &Snapshot) -> String {
    use hostler_protocol::text::printable;
    let step = plan.steps.iter().find(|step| step.acts_on(resource));
    match (resource, step) {
        (ResourceIdentity::Mount(_), Some(Step::Unmount { point, .. })) => printable(point),
        (ResourceIdentity::Directory(_), Some(Step::RemoveDirectory { path, .. }))
        | (ResourceIdentity::Cgroup(_), Some(Step::RemoveCgroup { path, .. })) => path.clone(),
        (ResourceIdentity::Process(process), _) => process.pid.to_string(),
        (ResourceIdentity::Loop(device), _) => format!("/dev/loop{}", device.number),
        // What somebody holds may be in no plan.
        (ResourceIdentity::Mount(_), _) => name_of(resource, seen),
        (ResourceIdentity::Map(map), _) => format!("map {}", map.device),
        (ResourceIdentity::Nbd(nbd), _) => format!("/dev/nbd{}", nbd.number),
        (ResourceIdentity::Swap(_), _) => String::new(),
        (ResourceIdentity::Directory(_) | ResourceIdentity::Cgroup(_), _) => lease.path_of(resource),
    }
}
