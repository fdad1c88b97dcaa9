//! The daemon's state, and what changes it.
//!
//! One thread, one state. Requests and kernel events change it between two waits and never while
//! another does: no borrow of the state lives across an `await`. Everything slow or dangerous
//! happens in workers or on the journal's thread.
//!
//! Deliberately absent: decisions (they are in [`crate::decide`]) and system calls that free something
//! (they are in workers); making a lease's control group and putting a process into it is done here.

mod acting;
mod audit;
mod foresee;
mod lifecycle;
mod look;
mod memory;
mod owner;
mod reclaim;
mod record;
mod register;
mod report;
mod restart;
mod stray;
mod sweep;
mod takings;
mod view;

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

pub use lifecycle::{Caller, Passed};
use tokio::sync::Notify;

use crate::causes::chain;
use crate::config::Config;
use crate::decide::Numbers;
use crate::journal::{Entry, Journal};
use crate::kernel::cgroups::Hierarchy;
use crate::kernel::events::{KernelEvent, Watcher};
use crate::metrics::Metrics;
use crate::model::{BootId, Lease, SnapshotDepth};
use crate::worker::{ClaimQuery, LeaseQuery, Pool};
use audit::Because;
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
    looks: look::Waiting,
    /// The numbers of the file systems that looks have to know it of.
    numbers: RefCell<Numbers>,
    /// The leases whose plans are being carried out.
    acting: acting::Acting,
    /// Something changed that may free what is pinned.
    changed: Notify,
    /// What changed that may belong to a lease.
    news: RefCell<News>,
    /// There is some.
    heard: Notify,
    /// What is known of what no lease has.
    sweeps: sweep::Sweeps,
    /// When the resource gauges were last set.
    measured: Cell<Option<tokio::time::Instant>>,
}

/// What the kernel told of since the last look.
#[derive(Debug, Default)]
struct News {
    loops: BTreeSet<u32>,
    mounts: BTreeSet<u64>,
    /// There is more than is known.
    is_unclear: bool,
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
                looks: look::Waiting::default(),
                numbers: RefCell::default(),
                acting: acting::Acting::default(),
                changed: Notify::new(),
                news: RefCell::default(),
                heard: Notify::new(),
                sweeps: sweep::Sweeps::new(),
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
        self.shared.sweeps.set_again();
    }

    /// Takes an event of the kernel.
    pub fn handle(&self, event: KernelEvent) {
        match event {
            KernelEvent::OwnerEnded(lease) => {
                tracing::info!(event = "owner ended", lease = lease.0, "lease {lease}: its owner ended");
                self.note_cause(lease, Because::OwnerEnded);
                self.end(lease, self.shared.config.borrow().reclaim.grace);
            }
            KernelEvent::LoopChanged(number) => self.hear(|news| news.loops.extend([number])),
            KernelEvent::MountMade(number) => self.hear(|news| news.mounts.extend([number])),
            // It belongs to nobody any more, and may free what is pinned.
            KernelEvent::MountGone => self.shared.changed.notify_waiters(),
            KernelEvent::MountsChanged | KernelEvent::Lost => self.hear(|news| news.is_unclear = true),
        }
    }

    fn hear(&self, note: impl FnOnce(&mut News)) {
        note(&mut self.shared.news.borrow_mut());
        self.shared.changed.notify_waiters();
        self.shared.heard.notify_one();
    }

    /// Runs for as long as the daemon does: looks whose new loop devices and mounts are, so that it
    /// is still known when their traces below a claim are gone.
    pub async fn follow_changes(&self) {
        /// Changes come in bursts: a builder mounts a dozen things at once.
        const SETTLE: Duration = Duration::from_millis(20);
        /// With more at once than this, one look at the host costs less.
        const NEWS_LIMIT: usize = 64;
        loop {
            self.shared.heard.notified().await;
            tokio::time::sleep(SETTLE).await;
            let news = self.shared.news.take();
            if !self.shared.state.borrow().has_claims() {
                continue;
            }
            let looked = if news.is_unclear || news.loops.len() + news.mounts.len() > NEWS_LIMIT {
                self.look(SnapshotDepth::Ownership).await.map(|_| ())
            } else {
                self.glance(news).await
            };
            if let Err(error) = looked {
                tracing::warn!("a look after a change gave nothing: {}", chain(&error));
            }
        }
    }

    /// Writes to the journal. The entries are on their way when this returns, and durable when what it
    /// returns is awaited: so are then all that were written before them. A journal that cannot be written is
    /// told loudly, and what is in memory goes on: a full disk must not keep what filled it from being taken
    /// back.
    fn record(&self, entries: Vec<Entry>) -> impl Future<Output = ()> + use<> {
        let written = self.shared.journal.append(entries);
        let engine = self.clone();
        async move {
            if let Err(error) = written.await {
                engine.shared.metrics.journal_failures.inc();
                tracing::error!("a restart now would forget what just happened: {}", chain(&error));
            }
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
