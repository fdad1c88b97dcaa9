//! The daemon's state, and what changes it.
//!
//! One thread, one state. Requests and kernel events change it between two waits and never while
//! another does: no borrow of the state lives across an `await`. Everything slow or dangerous
//! happens in workers or on the journal's thread.
//!
//! Deliberately absent: decisions (they are in [`crate::decide`]) and system calls that free something
//! (they are in workers); making a lease's control group and putting a process into it is done here.

mod lifecycle;
mod reclaim;
mod record;
mod restart;
mod view;

use std::cell::{Cell, RefCell};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hostler_protocol::lease::LeaseId;
pub use lifecycle::Caller;
use tokio::sync::Notify;

use crate::causes::chain;
use crate::config::Config;
use crate::decide::{Ownership, attribute};
use crate::journal::{Entry, Journal};
use crate::kernel::cgroups::Hierarchy;
use crate::kernel::events::{KernelEvent, Watcher};
use crate::metrics::Metrics;
use crate::model::{BootId, Claim, Lease, Snapshot, SnapshotDepth};
use crate::worker::{ClaimQuery, LeaseQuery, Pool, Query, WorkerError};
use record::State;

/// The daemon's heart. Cheap to clone; all clones are one.
#[derive(Clone, Debug)]
pub struct Engine {
    shared: Rc<Shared>,
}

#[derive(Debug)]
struct Shared {
    config: RefCell<Config>,
    pool: Pool,
    journal: Journal,
    watcher: Watcher,
    metrics: Metrics,
    hierarchy: Option<Hierarchy>,
    boot: BootId,
    state: RefCell<State>,
    /// Something changed that may free what is pinned.
    changed: Notify,
    /// Something changed that may belong to a lease.
    news: Notify,
    /// When the resource gauges were last set.
    measured: Cell<Option<tokio::time::Instant>>,
}

/// What the engine is made of.
#[derive(Debug)]
pub struct Parts {
    /// The settings.
    pub config: Config,
    /// The program to start workers from.
    pub program: PathBuf,
    /// The open journal.
    pub journal: Journal,
    /// The kernel's events.
    pub watcher: Watcher,
    /// The metrics.
    pub metrics: Metrics,
    /// Where leases get control groups.
    pub hierarchy: Option<Hierarchy>,
    /// The host's boot.
    pub boot: BootId,
    /// The first number for a new lease.
    pub next_lease: u64,
}

impl Engine {
    /// An engine without leases.
    #[must_use]
    pub fn new(parts: Parts) -> Self {
        Self {
            shared: Rc::new(Shared {
                config: RefCell::new(parts.config),
                pool: Pool::new(parts.program),
                journal: parts.journal,
                watcher: parts.watcher,
                metrics: parts.metrics,
                hierarchy: parts.hierarchy,
                boot: parts.boot,
                state: RefCell::new(State::new(parts.next_lease)),
                changed: Notify::new(),
                news: Notify::new(),
                measured: Cell::new(None),
            }),
        }
    }

    /// The metrics.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.shared.metrics
    }

    /// The settings as they are now.
    #[must_use]
    pub fn config(&self) -> Config {
        self.shared.config.borrow().clone()
    }

    /// Takes new settings, after a SIGHUP. The socket, the metrics' address and the state directory
    /// stay as they were at the start.
    pub fn set_config(&self, config: Config) {
        *self.shared.config.borrow_mut() = config;
    }

    /// Takes an event of the kernel.
    pub fn handle(&self, event: KernelEvent) {
        match event {
            KernelEvent::OwnerEnded(lease) => {
                tracing::info!(lease = lease.0, "lease {lease}: its owner ended");
                self.end(lease, self.shared.config.borrow().reclaim.grace);
            }
            KernelEvent::LoopChanged | KernelEvent::MountsChanged | KernelEvent::Lost => {
                self.shared.changed.notify_waiters();
                self.shared.news.notify_one();
            }
        }
    }

    /// Runs for as long as the daemon does: looks whose new loop devices and mounts are, so that it
    /// is still known when their traces below a claim are gone.
    pub async fn follow_changes(&self) {
        /// Changes come in bursts: a builder mounts a dozen things at once.
        const SETTLE: Duration = Duration::from_millis(20);
        loop {
            self.shared.news.notified().await;
            tokio::time::sleep(SETTLE).await;
            let has_claims = self.shared.state.borrow().has_claims();
            if has_claims && let Err(error) = self.look_and_remember().await {
                tracing::warn!("a look after a change gave nothing: {}", chain(&error));
            }
        }
    }

    async fn look_and_remember(&self) -> Result<(), WorkerError> {
        let (snapshot, ownership) = self.look(SnapshotDepth::Ownership).await?;
        self.remember(&snapshot, &ownership).await;
        Ok(())
    }

    /// Looks, and says whose everything is.
    async fn look(&self, depth: SnapshotDepth) -> Result<(Snapshot, Ownership), WorkerError> {
        let result = self.observe(depth).await;
        match &result {
            Ok(snapshot) => {
                self.shared.metrics.gaps.set(i64::try_from(snapshot.gaps.len()).unwrap_or(i64::MAX));
            }
            Err(_) => self.shared.metrics.observation_failures.inc(),
        }
        let snapshot = result?;
        let state = self.shared.state.borrow();
        let ownership = attribute(&snapshot, state.leases());
        drop(state);
        self.measure(&snapshot, &ownership);
        Ok((snapshot, ownership))
    }

    async fn observe(&self, depth: SnapshotDepth) -> Result<Snapshot, WorkerError> {
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
        let query = Query { depth, leases: queries, avoid: Vec::new() };
        self.shared.pool.observe(query, &descriptors, silence).await
    }

    /// Looks at what lies below a directory that a lease is about to claim, and at nothing of other
    /// leases.
    async fn observe_claim(
        &self,
        lease: LeaseId,
        claim: &Claim,
        kept: Option<&Rc<OwnedFd>>,
    ) -> Result<Snapshot, WorkerError> {
        let descriptors: Vec<BorrowedFd<'_>> = kept.into_iter().map(|directory| directory.as_fd()).collect();
        let claim = ClaimQuery { claim: claim.clone(), descriptor: kept.map(|_| 0) };
        let leases = vec![LeaseQuery { lease, cgroup: None, claims: vec![claim] }];
        let query = Query { depth: SnapshotDepth::Ownership, leases, avoid: Vec::new() };
        let silence = self.shared.config.borrow().reclaim.step_timeout;
        self.shared.pool.observe(query, &descriptors, silence).await
    }

    /// Writes to the journal. A journal that cannot be written is told loudly, and what is in
    /// memory goes on.
    async fn record(&self, entries: Vec<Entry>) {
        if let Err(error) = self.shared.journal.append(entries).await {
            self.shared.metrics.journal_failures.inc();
            tracing::error!("a restart now would forget what just happened: {}", chain(&error));
        }
    }
}

/// What a look has to know of a lease.
fn query(lease: &Lease, mut descriptor: impl FnMut(usize) -> Option<usize>) -> LeaseQuery {
    let claims = lease.claims.iter().enumerate();
    LeaseQuery {
        lease: lease.id,
        cgroup: lease.cgroup.clone(),
        claims: claims
            .map(|(index, claim)| ClaimQuery { claim: claim.clone(), descriptor: descriptor(index) })
            .collect(),
    }
}

/// Milliseconds since 1970.
fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
