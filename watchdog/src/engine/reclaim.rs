//! Taking back what a lease left: look, plan, act, look again, tell; again while it helps.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use hostler_protocol::lease::{LeaseId, LeaseState};
use hostler_protocol::resource::Outcome;
use tokio::time::Instant;

use super::look::{Look, LookFailed};
use super::{Engine, now_ms};
use crate::causes::chain;
use crate::decide::policy::hidden;
use crate::decide::{PlanSettings, doubts, everything_of, is_settled, may_still_go, plan, stuck, verify};
use crate::journal::Entry;
use crate::model::{Lease, Phase, Plan, ResourceIdentity, SnapshotDepth, Step, StepResult};
use crate::worker::{ClaimQuery, Task, WorkerError};

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
                if grace.is_zero() {
                    record.hurry.notify_one();
                }
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
            engine.wait_for_hurry(id, tokio::time::sleep(grace)).await;
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

    /// Attempts until nothing is left. Between attempts it sleeps until something changes or somebody asks,
    /// at most a minute.
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
            let pause = async {
                let _ = tokio::time::timeout(wait, pause).await;
            };
            self.wait_for_hurry(id, pause).await;
            wait = (wait * 2).min(RETRY_LAST);
        }
    }

    /// Waits, unless somebody wants the lease to be taken back now.
    async fn wait_for_hurry(&self, id: LeaseId, wait: impl Future<Output = ()>) {
        let hurry = self.shared.state.borrow().get(id).map(|record| Rc::clone(&record.hurry));
        let Some(hurry) = hurry else { return };
        tokio::select! {
            () = wait => {}
            () = hurry.notified() => {}
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
            // Of what nobody registered nothing is known but what is seen: so all has to be.
            if self.has_one_attempt(id)
                && let Some(gap) = hidden(before)
            {
                if doubted_before {
                    self.note_hidden(id, before, ownership, gap);
                    break;
                }
                doubted_before = true;
                tokio::time::sleep(DOUBT_WAIT).await;
                continue;
            }
            // Once all that the lease did is seen and remembered, what comes later is somebody else's.
            let is_settled = lease.evidence_closed || is_settled(&lease, before, ownership);
            let closing = self.change(id, |lease| lease.evidence_closed = is_settled);
            let plan = plan(&lease, before, ownership, &self.plan_settings(id));
            let owned = everything_of(id, before, ownership);
            if owned.is_empty() && plan.steps.is_empty() {
                closing.await;
                let doubts = doubts(&lease, before);
                if doubts.is_empty() {
                    // What was pinned or unknown before has gone by itself, or is not the lease's to take
                    // back any more: that has to be seen.
                    if !self.settle(id, before, ownership) {
                        break;
                    }
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
            let planned = self.record(vec![Entry::Planned { lease: id, round, plan: plan.clone() }]);
            tokio::join!(closing, planned);
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
        let _turn = self.shared.acting.begin();
        let mut kept = Vec::new();
        let claimed = |step: &Step| Task { step: step.clone(), claim: self.claim_of(lease, step, &mut kept) };
        let tasks: Vec<Task> = plan.steps.iter().map(claimed).collect();
        let descriptors: Vec<_> = kept.iter().map(|descriptor| descriptor.as_fd()).collect();
        let mut results = Vec::with_capacity(tasks.len());
        let tell = |result: StepResult| {
            let step = results.len();
            self.tell_step(lease, round, step, &plan.steps[step], &result);
            // It tells the story; what has to be done is durable already.
            self.shared.journal.tell(Entry::Stepped { lease: lease.id, round, step, result: result.clone() });
            results.push(result);
        };
        self.shared.pool.act(&tasks, &descriptors, |step| self.step_limit(step), tell).await?;
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

    /// The claim that a step is about. Its descriptor, where it has one, is added to those that are passed.
    fn claim_of(&self, lease: &Lease, step: &Step, kept: &mut Vec<Rc<OwnedFd>>) -> Option<ClaimQuery> {
        let Step::RemoveDirectory { directory, .. } = step else { return None };
        let (index, claim) =
            lease.claims.iter().enumerate().find(|(_, claim)| claim.directory == *directory)?;
        let state = self.shared.state.borrow();
        let descriptor = state.get(lease.id).and_then(|record| record.descriptors.get(&index));
        let place = descriptor.map(|descriptor| {
            kept.push(Rc::clone(descriptor));
            kept.len() - 1
        });
        Some(ClaimQuery { claim: claim.clone(), descriptor: place })
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
        self.shared.acting.pause().await;
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

    async fn finish(&self, id: LeaseId) {
        let record = self.shared.state.borrow_mut().remove(id, now_ms());
        let Some(record) = record else { return };
        let seconds = record.over_since.map_or(0.0, |since| since.elapsed().as_secs_f64());
        self.shared.metrics.reclaim_seconds.observe(seconds);
        let report = record.report.borrow().clone().unwrap_or_default();
        tracing::info!(
            event = "ended",
            lease = id.0,
            uid = record.lease.uid,
            name = record.lease.name,
            resources = report.resources.len(),
            seconds,
            "lease {id}: ended after {seconds:.3} s, {} resources, nothing is left: {}",
            report.resources.len(),
            record.lease.name
        );
        self.record(vec![Entry::Looked { lease: id, report }, Entry::Ended { lease: id }]).await;
        // What another lease has may have waited for this one.
        self.shared.changed.notify_waiters();
    }
}
