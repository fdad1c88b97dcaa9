//! Sweeps: looks that nothing asked for. They find what events did not tell, and count for the
//! administrator's rules; see [`crate::decide::policy`].

use std::cell::{Cell, RefCell};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use super::Engine;
use super::audit::Because;
use super::look::{Look, LookFailed};
use crate::causes::chain;
use crate::decide::policy::{Sighting, Sightings, Stage, advance, candidates, due, has_candidates, is_clear};
use crate::model::{Criterion, ResourceIdentity, SnapshotDepth, Taking};

/// The wait before something is read again that could not be read: one such gap begins every count anew.
const GAP_WAIT: Duration = Duration::from_millis(100);

/// What sweeps know. Nothing of it outlives the daemon: after a restart each count begins anew.
#[derive(Debug)]
pub(super) struct Sweeps {
    /// Where the daemon's own clock begins.
    began: Instant,
    sightings: RefCell<Sightings>,
    next: Cell<Instant>,
    set_again: Notify,
}

impl Sweeps {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self { began: now, sightings: RefCell::default(), next: Cell::new(now), set_again: Notify::new() }
    }

    /// Has the time of the next sweep taken from the settings again.
    pub(super) fn set_again(&self) {
        self.set_again.notify_one();
    }

    /// Whether a rule is about a resource.
    pub(super) fn knows(&self, resource: ResourceIdentity) -> bool {
        self.sightings.borrow().contains_key(&resource)
    }

    /// What is known of a resource that a rule is about.
    pub(super) fn sighting(&self, resource: ResourceIdentity) -> Option<Sighting> {
        self.sightings.borrow().get(&resource).cloned()
    }
}

impl Engine {
    /// Sweeps for as long as the daemon runs. Between two sweeps nothing of this wakes the host up.
    pub async fn sweep_regularly(&self) {
        let mut last = Instant::now();
        loop {
            let interval = self.shared.config.borrow().sweep.interval;
            self.shared.sweeps.next.set(last + interval);
            tokio::select! {
                () = tokio::time::sleep_until(last + interval) => {}
                () = self.shared.sweeps.set_again.notified() => continue,
            }
            last = Instant::now();
            self.shared.sweeps.next.set(last + interval);
            if let Err(error) = self.sweep().await {
                // What was not seen may have changed.
                self.shared.sweeps.sightings.borrow_mut().clear();
                tracing::warn!("a sweep gave nothing: {}", chain(&error));
            }
        }
    }

    /// What looks have to find for the rules and for `[protect]`.
    pub(super) fn criteria(&self) -> (Vec<Criterion>, Vec<Criterion>) {
        let config = self.shared.config.borrow();
        let mut criteria: Vec<Criterion> = config.policy.iter().map(|rule| rule.criterion.clone()).collect();
        criteria.sort();
        criteria.dedup();
        (criteria, config.protect.criteria())
    }

    async fn sweep(&self) -> Result<(), LookFailed> {
        let look = self.look(SnapshotDepth::Ownership).await?;
        let rules = self.shared.config.borrow().policy.clone();
        if rules.is_empty() || !has_candidates(&look.snapshot, &look.ownership) {
            self.shared.sweeps.sightings.borrow_mut().clear();
            return Ok(());
        }
        let Look { snapshot, ownership } = &*self.look_for_holders().await?;
        let found = candidates(snapshot, ownership, &rules);
        let now = self.shared.sweeps.began.elapsed();
        let sightings = advance(&self.shared.sweeps.sightings.borrow(), found, now);
        for (resource, sighting) in &sightings {
            self.tell_of(*resource, sighting, snapshot);
        }
        let takings = due(&sightings, &rules);
        {
            let mut kept = self.shared.sweeps.sightings.borrow_mut();
            *kept = sightings;
            // What is taken now is the lease's; what of it stays begins anew.
            kept.retain(|_, sighting| sighting.stage != Stage::Due);
        }
        // The gauges tell who is quarantined.
        self.shared.measured.set(None);
        for taking in &takings {
            let id = self.take(taking).await;
            self.note_cause(id, Because::Rule);
            self.end(id, Duration::ZERO);
        }
        Ok(())
    }

    /// What would be taken back at the next sweep if nothing changed until then, and when that is.
    pub(super) async fn due_next(&self) -> Result<Option<DueNext>, LookFailed> {
        let sweeps = &self.shared.sweeps;
        if !sweeps.sightings.borrow().values().any(|sighting| sighting.stage == Stage::Quarantined) {
            return Ok(None);
        }
        let look = self.look_for_holders().await?;
        let rules = self.shared.config.borrow().policy.clone();
        let found = candidates(&look.snapshot, &look.ownership, &rules);
        let wait = sweeps.next.get().saturating_duration_since(Instant::now());
        let sightings = advance(&sweeps.sightings.borrow(), found, sweeps.began.elapsed() + wait);
        Ok(Some(DueNext { look, takings: due(&sightings, &rules), wait }))
    }

    /// A look at all that may hold something; a second one where the first missed something.
    async fn look_for_holders(&self) -> Result<std::rc::Rc<Look>, LookFailed> {
        let look = self.look(SnapshotDepth::Holders).await?;
        if is_clear(&look.snapshot) {
            return Ok(look);
        }
        tokio::time::sleep(GAP_WAIT).await;
        self.look(SnapshotDepth::Holders).await
    }

    /// Says once that something is quarantined.
    fn tell_of(&self, resource: ResourceIdentity, sighting: &Sighting, snapshot: &crate::model::Snapshot) {
        let before = self.shared.sweeps.sighting(resource).map(|before| before.stage);
        if sighting.stage == Stage::Quarantined && before != Some(Stage::Quarantined) {
            let name = super::view::name_of(resource, snapshot);
            tracing::warn!(
                policy = sighting.rule.name,
                kind = resource.kind().name(),
                name,
                "{} {name} belongs to no lease and is taken for leaked: {}",
                resource.kind().name(),
                sighting.sentence()
            );
        }
    }
}

/// What the next sweep would take back.
pub(super) struct DueNext {
    /// The look that says so.
    pub(super) look: std::rc::Rc<Look>,
    /// What.
    pub(super) takings: Vec<Taking>,
    /// How long until then.
    pub(super) wait: Duration,
}
