//! Taking back what a lease left: look, plan, act, look again, tell; again while it helps.

use std::collections::{BTreeSet, HashSet};
use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::Duration;

use hostler_protocol::lease::{LeaseId, LeaseState, Report, ResourceOutcome};
use hostler_protocol::resource::Outcome;
use hostler_protocol::why::Reason;
use tokio::time::Instant;

use super::look::{Look, LookFailed};
use super::view::name_of;
use super::{Engine, now_ms};
use crate::causes::chain;
use crate::decide::{
    Ownership, PlanSettings, doubts, everything_of, plan, reasons_for, strangers_below, stuck, verify,
};
use crate::journal::Entry;
use crate::model::{
    Claim, Gap, Lease, LoopState, Phase, Plan, ResourceIdentity, Snapshot, SnapshotDepth, Step, StepResult,
};
use crate::worker::{ClaimQuery, WorkerError};

/// How many rounds one attempt has. Each must have freed something for the next to begin; a chain
/// of processes that start others ends with the control group's kill.
const ROUND_LIMIT: u32 = 16;
/// Waits between second looks for what the kernel frees late: a detach at the last close, while
/// udev or blkid has the device open for a moment.
const SECOND_LOOKS: [Duration; 4] = [
    Duration::from_millis(5),
    Duration::from_millis(20),
    Duration::from_millis(100),
    Duration::from_millis(300),
];
/// The wait before something is read again that could not be read.
const DOUBT_WAIT: Duration = Duration::from_millis(100);
/// Waits before what is pinned is tried again.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_LAST: Duration = Duration::from_secs(60);

/// How much of the host a look saw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Seen {
    /// All that is not there is gone.
    Whole,
    /// What is not there was not looked for.
    Part,
}

/// Why an attempt ended before it could say anything.
#[derive(Debug, thiserror::Error)]
enum AttemptFailed {
    #[error(transparent)]
    Look(#[from] LookFailed),
    #[error("doing a step failed")]
    Act(#[from] WorkerError),
}

impl Engine {
    /// Ends a lease after `grace`, and has all it left taken back. Does nothing when that is under
    /// way.
    pub(super) fn end(&self, id: LeaseId, grace: Duration) {
        {
            let mut state = self.shared.state.borrow_mut();
            let Some(record) = state.get_mut(id) else { return };
            if record.is_reclaiming {
                return;
            }
            record.is_reclaiming = true;
            record.state = LeaseState::Closing;
            record.over_since = Some(Instant::now());
            record.grace = grace;
        }
        self.shared.watcher.forget_owner(id);
        let engine = self.clone();
        tokio::task::spawn_local(async move {
            if !grace.is_zero() {
                tokio::time::sleep(grace).await;
            }
            let over = engine.change(id, |lease| lease.phase = Phase::Over);
            let is_owner_inside =
                engine.shared.state.borrow().get(id).is_some_and(|record| record.lease.owner_inside);
            let first = if is_owner_inside {
                over.await;
                let lease = engine.shared.state.borrow().get(id).map(|record| record.lease.clone());
                if let Some(lease) = lease {
                    engine.let_owner_out(&lease);
                }
                None
            } else {
                // The look does not wait for the disk; what acts on it does. And all whose owners ended
                // together ask for it before it begins.
                let ((), look) = tokio::join!(over, engine.look(engine.depth_for(id)));
                look.ok()
            };
            engine.reclaim(id, first).await;
        });
    }

    /// Attempts until nothing is left. Between attempts it sleeps until something changes, at most
    /// a minute.
    async fn reclaim(&self, id: LeaseId, mut first: Option<Rc<Look>>) {
        let mut wait = RETRY_FIRST;
        // A retry leaves it pinned until it has worked: an alert on what is pinned must not begin anew
        // with each.
        self.set_state(id, LeaseState::Reclaiming);
        loop {
            match self.attempt(id, first.take()).await {
                Ok(true) => {
                    self.finish(id).await;
                    return;
                }
                Ok(false) => {}
                Err(error) => {
                    tracing::warn!(
                        lease = id.0,
                        "lease {id}: taking back failed, it is tried again: {}",
                        chain(&error)
                    );
                    self.tell(id, false);
                }
            }
            if self.has_one_attempt(id) {
                self.give_up(id).await;
                return;
            }
            self.set_state(id, LeaseState::Pinned);
            let changed = self.shared.changed.notified();
            // Our own attempt changed mounts and loop devices too: without a pause it would wake
            // itself for ever.
            let pause = async {
                tokio::time::sleep(RETRY_FIRST.max(wait / 4)).await;
                changed.await;
            };
            let _ = tokio::time::timeout(wait, pause).await;
            wait = (wait * 2).min(RETRY_LAST);
        }
    }

    fn set_state(&self, id: LeaseId, new: LeaseState) {
        if let Some(record) = self.shared.state.borrow_mut().get_mut(id) {
            record.state = new;
        }
        // The gauges tell verdicts, which follow from the state.
        self.shared.measured.set(None);
    }

    /// One attempt: rounds for as long as each frees something. Says whether nothing is left.
    async fn attempt(&self, id: LeaseId, first: Option<Rc<Look>>) -> Result<bool, AttemptFailed> {
        let mut left_before: Option<BTreeSet<ResourceIdentity>> = None;
        let mut doubted_before = false;
        // The look after a round is as good as one before the next, when nothing was left.
        let mut last_look = first;
        for round in 0..ROUND_LIMIT {
            let look = match last_look.take() {
                Some(look) => look,
                None => self.look(self.depth_for(id)).await?,
            };
            let Look { snapshot: before, ownership } = &*look;
            let Some(lease) = self.shared.state.borrow().get(id).map(|record| record.lease.clone()) else {
                return Ok(true);
            };
            if !lease.evidence_closed && is_settled(&lease, before, ownership) {
                // All that the lease did is seen and remembered: what comes later is somebody else's.
                self.change(id, |lease| lease.evidence_closed = true).await;
            }
            let plan = plan(&lease, before, ownership, &self.plan_settings(id));
            let owned = everything_of(id, before, ownership);
            if owned.is_empty() && plan.steps.is_empty() {
                let doubts = doubts(&lease, before);
                if doubts.is_empty() {
                    self.settle(id);
                    self.tell(id, true);
                    return Ok(true);
                }
                if doubted_before {
                    self.note_doubts(&lease, before, &doubts);
                    break;
                }
                // A table that changed while it was read is read whole a moment later.
                doubted_before = true;
                tokio::time::sleep(DOUBT_WAIT).await;
                continue;
            }
            // Durable before it is acted on: whoever looks after a crash sees what was under way.
            self.record(vec![Entry::Planned { lease: id, round, plan: plan.clone() }]).await;
            let results = self.act(&lease, round, &plan).await?;
            let (left, look) = self.second_look(id, &owned, &plan, &results).await?;
            if left.is_empty() {
                // What was born while we acted is in that look too, and makes another round.
                left_before = None;
                last_look = Some(look);
                continue;
            }
            if left_before.as_ref() == Some(&left) {
                break;
            }
            left_before = Some(left);
        }
        self.tell(id, false);
        Ok(false)
    }

    pub(super) fn plan_settings(&self, id: LeaseId) -> PlanSettings {
        let config = self.shared.config.borrow();
        let state = self.shared.state.borrow();
        let is_due = |since: Instant| config.reclaim.lazy_after.is_some_and(|after| since.elapsed() >= after);
        let record = state.get(id).filter(|record| record.over_since.is_some_and(is_due));
        PlanSettings {
            term_timeout_ms: u64::try_from(config.reclaim.term_timeout.as_millis()).unwrap_or(u64::MAX),
            lazily: record.map(|record| record.stuck.clone()).unwrap_or_default(),
        }
    }

    async fn act(&self, lease: &Lease, round: u32, plan: &Plan) -> Result<Vec<StepResult>, WorkerError> {
        let mut results = Vec::with_capacity(plan.steps.len());
        for (index, step) in plan.steps.iter().enumerate() {
            let limit = self.step_limit(step);
            let (claim, descriptor) = self.claim_of(lease, step);
            let descriptors: Vec<_> = descriptor.iter().map(|descriptor| descriptor.as_fd()).collect();
            let result = self.shared.pool.act(step, claim, &descriptors, limit).await?;
            let (id, sentence, said) = (lease.id, step.sentence(), result.sentence());
            tracing::info!(lease = id.0, step = sentence, result = said, "lease {id}: {sentence}: {said}");
            // It tells the story; what has to be done is durable already.
            self.record_meanwhile(Entry::Stepped {
                lease: lease.id,
                round,
                step: index,
                result: result.clone(),
            });
            results.push(result);
        }
        Ok(results)
    }

    fn step_limit(&self, step: &Step) -> Duration {
        let step_timeout = self.shared.config.borrow().reclaim.step_timeout;
        match step {
            Step::EndProcesses { term_timeout_ms, .. } => {
                Duration::from_millis(*term_timeout_ms) + step_timeout
            }
            Step::Unmount { .. }
            | Step::AbortFuse { .. }
            | Step::SwapOff { .. }
            | Step::ReleaseFilesystem { .. }
            | Step::RemoveMap { .. }
            | Step::DisconnectNbd { .. }
            | Step::DetachLoop { .. }
            | Step::RemoveCgroup { .. } => step_timeout,
            // A tree of a million files takes a while, and hangs nobody but its own lease.
            Step::RemoveDirectory { .. } => step_timeout.max(Duration::from_secs(300)),
        }
    }

    fn claim_of(&self, lease: &Lease, step: &Step) -> (Option<ClaimQuery>, Option<Rc<std::os::fd::OwnedFd>>) {
        let Step::RemoveDirectory { directory, .. } = step else { return (None, None) };
        let found = lease.claims.iter().enumerate().find(|(_, claim)| claim.directory == *directory);
        let Some((index, claim)) = found else { return (None, None) };
        let state = self.shared.state.borrow();
        let descriptor = state.get(lease.id).and_then(|record| record.descriptors.get(&index)).cloned();
        let query = ClaimQuery { claim: claim.clone(), descriptor: descriptor.as_ref().map(|_| 0) };
        (Some(query), descriptor)
    }

    /// Looks until all of `owned` is gone or the waits are over; notes what became of each, and
    /// returns what is left, and the last look.
    async fn second_look(
        &self,
        id: LeaseId,
        owned: &BTreeSet<ResourceIdentity>,
        plan: &Plan,
        results: &[StepResult],
    ) -> Result<(BTreeSet<ResourceIdentity>, Rc<Look>), LookFailed> {
        let mut left = owned.clone();
        let mut waits = SECOND_LOOKS.iter();
        let look = loop {
            let look = self.look(SnapshotDepth::Ownership).await?;
            let after = &look.snapshot;
            for resource in std::mem::take(&mut left) {
                let outcome = verify(resource, plan, results, after);
                match outcome {
                    Outcome::Reclaimed | Outcome::AlreadyGone | Outcome::Replaced => {
                        self.note(id, resource, outcome, (Vec::new(), String::new()), plan, after);
                    }
                    Outcome::Pinned | Outcome::Unknown => {
                        left.insert(resource);
                    }
                }
            }
            match waits.next() {
                Some(wait) if !left.is_empty() && may_still_go(&left, plan, results) => {
                    tokio::time::sleep(*wait).await;
                }
                Some(_) | None => break look,
            }
        };
        if !left.is_empty() {
            let look = self.look(SnapshotDepth::Holders).await?;
            let Look { snapshot: after, ownership } = &*look;
            for resource in &left {
                self.note_left(id, *resource, plan, results, after, ownership);
            }
            if let Some(record) = self.shared.state.borrow_mut().get_mut(id) {
                record.stuck = stuck(id, after, ownership);
            }
        }
        Ok((left, look))
    }

    fn note_left(
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
            let said = plan.steps.iter().zip(results).find(|(step, _)| step.resources().contains(&resource));
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
    fn note_doubts(&self, lease: &Lease, before: &Snapshot, doubts: &[&Gap]) {
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

    /// Once nothing is left, what was pinned or unknown at an earlier attempt has gone by itself.
    fn settle(&self, id: LeaseId) {
        let mut state = self.shared.state.borrow_mut();
        let Some(record) = state.get_mut(id) else { return };
        for outcome in record.outcomes.values_mut() {
            match outcome.outcome {
                Outcome::Reclaimed | Outcome::AlreadyGone | Outcome::Replaced => {}
                Outcome::Pinned | Outcome::Unknown => {
                    outcome.outcome = Outcome::AlreadyGone;
                    outcome.reasons.clear();
                    outcome.detail.clear();
                }
            }
        }
    }

    fn note(
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
    fn tell(&self, id: LeaseId, complete: bool) {
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

    async fn finish(&self, id: LeaseId) {
        let record = self.shared.state.borrow_mut().remove(id, now_ms());
        let Some(record) = record else { return };
        let seconds = record.over_since.map_or(0.0, |since| since.elapsed().as_secs_f64());
        self.shared.metrics.reclaim_seconds.observe(seconds);
        let report = record.report.borrow().clone().unwrap_or_default();
        tracing::info!(
            lease = id.0,
            name = record.lease.name,
            resources = report.resources.len(),
            seconds,
            "lease {id}: ended after {seconds:.3} s, {} resources, nothing is left: {}",
            report.resources.len(),
            record.lease.name
        );
        self.record(vec![Entry::Looked { lease: id, report }, Entry::Ended { lease: id }]).await;
    }

    /// Keeps what a look found out about whose things are, for as long as evidence may vanish.
    pub(super) async fn remember(&self, snapshot: &Snapshot, ownership: &Ownership, seen: Seen) {
        let mut entries = Vec::new();
        for record in self.shared.state.borrow_mut().records_mut() {
            let before = record.lease.clone();
            for resource in ownership.of(record.lease.id) {
                match resource {
                    ResourceIdentity::Loop(identity) => {
                        record.lease.loops.insert(identity);
                    }
                    ResourceIdentity::Mount(identity) => {
                        record.lease.mounts.insert(identity);
                    }
                    ResourceIdentity::Process(identity) if record.lease.cgroup.is_none() => {
                        record.lease.processes.insert(identity);
                    }
                    ResourceIdentity::Map(identity) => {
                        record.lease.maps.insert(identity);
                    }
                    ResourceIdentity::Process(_)
                    | ResourceIdentity::Nbd(_)
                    | ResourceIdentity::Swap(_)
                    | ResourceIdentity::Directory(_)
                    | ResourceIdentity::Cgroup(_) => {}
                }
            }
            let of_lease = |(_, owner): &(&u64, &LeaseId)| **owner == record.lease.id;
            let namespaces = ownership.namespaces.iter().filter(of_lease).map(|(namespace, _)| *namespace);
            record.lease.namespaces.extend(namespaces.collect::<Vec<_>>());
            match seen {
                Seen::Whole => forget_what_is_gone(&mut record.lease, snapshot),
                Seen::Part => {}
            }
            if record.lease != before {
                entries.push(Entry::Lease { lease: Box::new(record.lease.clone()) });
            }
        }
        if !entries.is_empty() {
            self.record(entries).await;
        }
    }
}

/// Whether a look saw everything that a lease can have made: none of its processes is left to make
/// more, and nothing hid from the look.
fn is_settled(lease: &Lease, snapshot: &Snapshot, ownership: &Ownership) -> bool {
    let has_process = |identity: &ResourceIdentity| matches!(identity, ResourceIdentity::Process(_));
    !everything_of(lease.id, snapshot, ownership).iter().any(has_process)
        && doubts(lease, snapshot).is_empty()
}

/// Identities are never used again, so those of what is gone only take space.
fn forget_what_is_gone(lease: &mut Lease, snapshot: &Snapshot) {
    let has_gap = |is_it: fn(&Gap) -> bool| snapshot.gaps.iter().any(is_it);
    if !has_gap(|gap| matches!(gap, Gap::Loops(_))) {
        lease.loops.retain(|identity| {
            snapshot.loops.iter().any(|device| {
                device.number == identity.number
                    && (device.sequence == Some(identity.sequence) || device.state == LoopState::Unread)
            })
        });
    }
    if !has_gap(|gap| matches!(gap, Gap::Mounts(_) | Gap::Namespaces(_) | Gap::Namespace(..))) {
        let there: HashSet<_> = snapshot.mounts.iter().map(|mount| mount.identity).collect();
        lease.mounts.retain(|identity| there.contains(identity));
    }
    if !has_gap(|gap| matches!(gap, Gap::Blocks(_))) {
        lease.maps.retain(|identity| snapshot.maps.iter().any(|map| map.identity == *identity));
    }
    if !has_gap(|gap| matches!(gap, Gap::Namespaces(_))) {
        let is_there = |unique: &u64| snapshot.namespaces.iter().any(|other| other.unique == Some(*unique));
        lease.namespaces.retain(is_there);
    }
    if !has_gap(|gap| matches!(gap, Gap::Processes(_))) {
        lease.processes.retain(|identity| {
            snapshot.processes.iter().any(|process| process.identity == *identity && !process.ended)
        });
    }
}

/// Whether a little patience may free what is left: only what a call was said to have freed.
fn may_still_go(left: &BTreeSet<ResourceIdentity>, plan: &Plan, results: &[StepResult]) -> bool {
    plan.steps.iter().zip(results).any(|(step, result)| {
        *result == StepResult::Done && step.resources().iter().any(|resource| left.contains(resource))
    })
}

/// A resource's name for people, as the plan, its lease or a look has it.
fn name_in(plan: &Plan, resource: ResourceIdentity, lease: &Lease, seen: &Snapshot) -> String {
    use hostler_protocol::text::printable;
    let step = plan.steps.iter().find(|step| step.resources().contains(&resource));
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
