//! What would be done: the plans themselves, made from what there is now.

use hostler_protocol::lease::LeaseState;
use hostler_protocol::methods::{CallError, Planned, PlannedStep, PolicyStep};
use serde_json::Value;
use tokio::time::Instant;

use super::Engine;
use super::lifecycle::{Caller, unavailable};
use super::look::Look;
use super::record::Record;
use super::sweep::DueNext;
use crate::decide::{attribute, plan};
use crate::model::{Lease, Phase, Snapshot, SnapshotDepth, Step};

impl Engine {
    /// What would be done now, at the end of each running grace, and at the next sweep: for the caller's
    /// leases, and for root all.
    ///
    /// # Errors
    /// When looking gives nothing.
    pub async fn planned(&self, caller: Caller) -> Result<Planned, CallError> {
        let look = self.look(SnapshotDepth::Ownership).await.map_err(unavailable)?;
        let mut planned =
            Planned { steps: self.planned_for_leases(caller, &look.snapshot)?, ..Planned::default() };
        if !caller.is_root() {
            return Ok(planned);
        }
        if let Some(next) = self.due_next().await.map_err(unavailable)? {
            planned.by_policy = self.planned_by_policy(&next)?;
        }
        Ok(planned)
    }

    fn planned_for_leases(&self, caller: Caller, snapshot: &Snapshot) -> Result<Vec<PlannedStep>, CallError> {
        let state = self.shared.state.borrow();
        // Anew: a sweep may have taken something since the look began.
        let ownership = attribute(snapshot, state.leases());
        let mut steps = Vec::new();
        for record in state.records().filter(|record| caller.may_use(record.lease.uid)) {
            let (lease, in_seconds) = when_over(record);
            let settings = self.plan_settings(lease.id);
            for step in plan(&lease, snapshot, &ownership, &settings).steps {
                let (does, step) = (step.sentence(), as_in_the_journal(&step)?);
                steps.push(PlannedStep { lease: lease.id, does, in_seconds, step });
            }
        }
        Ok(steps)
    }

    fn planned_by_policy(&self, next: &DueNext) -> Result<Vec<PolicyStep>, CallError> {
        let DueNext { look, takings, wait } = next;
        let Look { snapshot, .. } = &**look;
        let state = self.shared.state.borrow();
        let numbers = (state.next_number().0..).map(hostler_protocol::lease::LeaseId);
        let opened: Vec<Lease> =
            takings.iter().zip(numbers).map(|(taking, id)| self.lease_for(taking, id)).collect();
        let ownership = attribute(snapshot, state.leases().chain(&opened));
        let mut steps = Vec::new();
        for (taking, lease) in takings.iter().zip(&opened) {
            for step in plan(lease, snapshot, &ownership, &self.plan_settings(lease.id)).steps {
                let policy = taking.rule.clone().unwrap_or_default();
                let (does, step) = (step.sentence(), as_in_the_journal(&step)?);
                steps.push(PolicyStep { policy, does, in_seconds: wait.as_secs_f64(), step });
            }
        }
        Ok(steps)
    }
}

/// A lease as it will be once its grace is over, and how many seconds that takes. One whose owner lives
/// stays as it is.
fn when_over(record: &Record) -> (Lease, f64) {
    let mut lease = record.lease.clone();
    let ends = record.over_since.map(|since| since + record.grace);
    match (record.state, ends) {
        (LeaseState::Closing, Some(ends)) => {
            lease.phase = Phase::Over;
            (lease, ends.saturating_duration_since(Instant::now()).as_secs_f64())
        }
        _ => (lease, 0.0),
    }
}

fn as_in_the_journal(step: &Step) -> Result<Value, CallError> {
    serde_json::to_value(step).map_err(unavailable)
}
