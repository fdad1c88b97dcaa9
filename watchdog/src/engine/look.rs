//! Looks at the host, shared by all who want one at the same time.
//!
//! When a host's builders die together, each lease wants to look before and after each round. One look
//! tells all of them: whoever asks while a look is under way waits for the next one, which begins after
//! all of them have asked.

use std::cell::RefCell;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use tokio::sync::watch;

use super::memory::Seen;
use super::{Engine, News, query};
use crate::causes::chain;
use crate::decide::{Ownership, attribute, learn, unnumbered};
use crate::model::{Claim, Lease, Snapshot, SnapshotDepth};
use crate::worker::{ClaimQuery, Extent, LeaseQuery, NumberQuery, Query, WorkerError};
use hostler_protocol::lease::LeaseId;

/// What a look saw, and whose it is.
#[derive(Debug)]
pub(super) struct Look {
    pub(super) snapshot: Snapshot,
    pub(super) ownership: Ownership,
}

/// A look that gave nothing.
#[derive(Clone, Debug, thiserror::Error)]
#[error("looking at the host failed: {}", chain(.0.as_ref()))]
pub(super) struct LookFailed(Rc<WorkerError>);

type Outcome = Option<Result<Rc<Look>, LookFailed>>;

/// The looks that have been asked for and have not begun, one of each depth.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    ownership: Slot,
    status: Slot,
    holders: Slot,
}

#[derive(Debug, Default)]
struct Slot {
    pending: RefCell<Option<watch::Receiver<Outcome>>>,
    running: tokio::sync::Mutex<()>,
}

impl Waiting {
    fn slot(&self, depth: SnapshotDepth) -> &Slot {
        match depth {
            SnapshotDepth::Ownership => &self.ownership,
            SnapshotDepth::Status => &self.status,
            SnapshotDepth::Holders => &self.holders,
        }
    }
}

impl Engine {
    /// Looks, says whose everything is, and remembers it. The look begins after this is called.
    pub(super) async fn look(&self, depth: SnapshotDepth) -> Result<Rc<Look>, LookFailed> {
        let mut outcome = self.join_or_start(depth);
        let done = outcome.wait_for(Option::is_some).await;
        let ended =
            || LookFailed(Rc::new(WorkerError::Ended { doing: "the daemon was stopping".to_owned() }));
        done.map_err(|_| ended())?.clone().ok_or_else(ended)?
    }

    fn join_or_start(&self, depth: SnapshotDepth) -> watch::Receiver<Outcome> {
        let slot = self.shared.looks.slot(depth);
        if let Some(pending) = slot.pending.borrow().as_ref() {
            return pending.clone();
        }
        let (tell, outcome) = watch::channel(None);
        *slot.pending.borrow_mut() = Some(outcome.clone());
        let engine = self.clone();
        tokio::task::spawn_local(async move {
            let slot = engine.shared.looks.slot(depth);
            let _one_at_a_time = slot.running.lock().await;
            // From here on the look has begun: who asks now waits for the next.
            slot.pending.borrow_mut().take();
            // Nobody may wait any more.
            let _ = tell.send(Some(engine.look_now(depth).await));
        });
        outcome
    }

    async fn look_now(&self, depth: SnapshotDepth) -> Result<Rc<Look>, LookFailed> {
        let leases: Vec<Lease> = self.shared.state.borrow().leases().cloned().collect();
        let result = self.observe_and_attribute(depth).await;
        match &result {
            Ok((snapshot, _)) => {
                self.shared.metrics.gaps.set(i64::try_from(snapshot.gaps.len()).unwrap_or(i64::MAX));
            }
            Err(_) => self.shared.metrics.observation_failures.inc(),
        }
        let (snapshot, ownership) = result.map_err(|error| LookFailed(Rc::new(error)))?;
        self.measure(&snapshot, &ownership);
        self.remember(&snapshot, &ownership, Seen::Whole(&leases));
        Ok(Rc::new(Look { snapshot, ownership }))
    }

    /// Looks again for as long as what was seen says that more numbers have to be known: mostly not at all,
    /// and once for each file system that lies in another.
    async fn observe_and_attribute(
        &self,
        depth: SnapshotDepth,
    ) -> Result<(Snapshot, Ownership), WorkerError> {
        loop {
            let snapshot = self.observe(depth, Extent::Host).await?;
            learn(&mut self.shared.numbers.borrow_mut(), &snapshot);
            let ownership = attribute(&snapshot, self.shared.state.borrow().leases());
            let wanted = unnumbered(&snapshot, &ownership, None);
            let is_news = self.want_numbers(&wanted);
            // Those that were wanted before could not be learnt, which the look has told.
            if !is_news {
                return Ok((snapshot, ownership));
            }
        }
    }

    /// Has the next looks know the numbers of these file systems, and says whether that is news of any.
    fn want_numbers(&self, instances: &[u64]) -> bool {
        let mut numbers = self.shared.numbers.borrow_mut();
        let before = numbers.len();
        for instance in instances {
            numbers.entry(*instance).or_default();
        }
        numbers.len() > before
    }

    /// A look at all that may hold what a person asks about.
    pub(super) async fn look_about(&self, target: &str) -> Result<Rc<Look>, LookFailed> {
        let look = self.look(SnapshotDepth::Holders).await?;
        if self.want_numbers(&unnumbered(&look.snapshot, &look.ownership, Some(target))) {
            return self.look(SnapshotDepth::Holders).await;
        }
        Ok(look)
    }

    /// Looks at nothing but what the kernel told of, and remembers whose that is.
    pub(super) async fn glance(&self, news: News) -> Result<(), LookFailed> {
        let extent = Extent::Only {
            loops: news.loops.into_iter().collect(),
            mounts: news.mounts.into_iter().collect(),
        };
        let result = self.observe(SnapshotDepth::Ownership, extent).await;
        let snapshot = result.map_err(|error| LookFailed(Rc::new(error)))?;
        let ownership = attribute(&snapshot, self.shared.state.borrow().leases());
        self.remember(&snapshot, &ownership, Seen::Part);
        Ok(())
    }

    async fn observe(&self, depth: SnapshotDepth, extent: Extent) -> Result<Snapshot, WorkerError> {
        let mut held = Vec::new();
        let queries = {
            let state = self.shared.state.borrow();
            state
                .records()
                .map(|record| {
                    query(&record.lease, |index| {
                        let descriptor = record.descriptors.get(&index)?;
                        held.push(Rc::clone(descriptor));
                        Some(held.len() - 1)
                    })
                })
                .collect()
        };
        let descriptors: Vec<BorrowedFd<'_>> = held.iter().map(|descriptor| descriptor.as_fd()).collect();
        let silence = self.shared.config.borrow().reclaim.step_timeout;
        let (criteria, protected) = self.criteria();
        let numbers = {
            let numbers = self.shared.numbers.borrow();
            let query = |(instance, number): (&u64, &_)| NumberQuery { instance: *instance, number: *number };
            numbers.iter().map(query).collect()
        };
        let query = Query { extent, depth, leases: queries, criteria, protected, numbers, avoid: Vec::new() };
        self.shared.pool.observe(query, &descriptors, silence).await
    }

    /// Looks at what lies below a directory that a lease is about to claim, and at nothing of other
    /// leases.
    pub(super) async fn observe_claim(
        &self,
        lease: LeaseId,
        claim: &Claim,
        kept: Option<&Rc<OwnedFd>>,
    ) -> Result<Snapshot, WorkerError> {
        let descriptors: Vec<BorrowedFd<'_>> = kept.into_iter().map(|directory| directory.as_fd()).collect();
        let claim = ClaimQuery { claim: claim.clone(), descriptor: kept.map(|_| 0) };
        let leases = vec![LeaseQuery { lease, cgroup: None, claims: vec![claim] }];
        let query = Query { leases, ..Query::host(SnapshotDepth::Ownership) };
        let silence = self.shared.config.borrow().reclaim.step_timeout;
        self.shared.pool.observe(query, &descriptors, silence).await
    }
}
