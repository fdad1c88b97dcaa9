//! A lease's life, as clients ask for it: open, close, reclaim.

use std::os::fd::BorrowedFd;
use std::time::Duration;

use hostler_protocol::lease::{Epoch, LeaseId, LeaseState, Report, Tracking};
use hostler_protocol::methods::{CallError, LeaseOpened, ReportBuild};
use hostler_protocol::text::printable;

use super::audit::Because;
use super::record::Record;
use super::{Engine, now_ms};
use crate::journal::Entry;
use crate::kernel::{calls, cgroups, signals};
use crate::model::{CgroupIdentity, DiskSequence, Lease, Opener, Phase, ProcessIdentity};

/// Longest name of a lease, in bytes.
const NAME_LIMIT: usize = 200;

/// Who asks, as the socket tells it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The user that connected.
    pub uid: u32,
    /// The process that connected, while it lives.
    pub process: Option<ProcessIdentity>,
}

/// A descriptor that a client passed: it stays in the reader.
#[derive(Clone, Copy, Debug)]
pub struct Passed<'reader> {
    /// The reader's pidfd.
    pub reader: BorrowedFd<'reader>,
    /// The descriptor's number there.
    pub number: u32,
}

impl Caller {
    pub(super) fn is_root(self) -> bool {
        self.uid == 0
    }

    pub(super) fn may_use(self, uid: u32) -> bool {
        self.is_root() || self.uid == uid
    }
}

pub(super) fn refused(reason: impl Into<String>) -> CallError {
    CallError::Refused { reason: reason.into() }
}

pub(super) fn limit_reached(limit: &str, value: usize) -> CallError {
    CallError::LimitReached { limit: limit.to_owned(), value: value as u64 }
}

pub(super) fn unavailable(reason: impl std::fmt::Display) -> CallError {
    CallError::Unavailable { reason: reason.to_string() }
}

impl Engine {
    /// Opens a lease. The owner is the process that `owner` is a pidfd of, else the caller.
    ///
    /// # Errors
    /// When a limit is reached, or the owner is not the caller's to name.
    pub async fn open(
        &self,
        caller: Caller,
        name: &str,
        owner: Option<Passed<'_>>,
        deadline: Option<Duration>,
    ) -> Result<LeaseOpened, CallError> {
        if name.len() > NAME_LIMIT {
            return Err(refused(format!("a lease's name has at most {NAME_LIMIT} bytes")));
        }
        let limit = self.shared.config.borrow().limits.leases;
        if !self.shared.state.borrow_mut().begin_opening(caller.uid, limit) {
            return Err(limit_reached("leases", limit));
        }
        let opened = self.open_in_limits(caller, name, owner, deadline).await;
        self.shared.state.borrow_mut().end_opening(caller.uid);
        opened
    }

    async fn open_in_limits(
        &self,
        caller: Caller,
        name: &str,
        owner: Option<Passed<'_>>,
        deadline: Option<Duration>,
    ) -> Result<LeaseOpened, CallError> {
        let (owner, pidfd) = match owner {
            Some(passed) => {
                let process = self.owned_process(caller, passed).await?;
                let ended = || refused("that process has ended");
                (process, signals::open(process).map_err(unavailable)?.ok_or_else(ended)?)
            }
            None => {
                let ended = || refused("the process that connected has ended; pass the owner's pidfd");
                let process = caller.process.ok_or_else(ended)?;
                let pidfd = signals::open(process).map_err(unavailable)?;
                (process, pidfd.ok_or_else(ended)?)
            }
        };
        let id = self.shared.state.borrow_mut().take_number();
        let now = now_ms();
        let epoch = Epoch(now);
        let cgroup = self.make_cgroup(owner.pid, id, epoch).await;
        let tracking = if cgroup.is_some() { Tracking::Cgroup } else { Tracking::Descent };
        let lease = Lease {
            id,
            epoch,
            name: printable(name.as_bytes()),
            opener: Opener::Client,
            uid: caller.uid,
            owner,
            tracking,
            cgroup,
            owner_inside: false,
            phase: Phase::Open,
            claims: Vec::new(),
            loops: Default::default(),
            mounts: Default::default(),
            processes: Default::default(),
            maps: Default::default(),
            namespaces: Default::default(),
            namespaces_there: None,
            loops_before: DiskSequence(0),
            mounts_before: Default::default(),
            boot: self.shared.boot.clone(),
            evidence_closed: false,
            owner_handle: calls::file_handle(&pidfd).ok(),
            opened_at_ms: now,
            deadline_ms: deadline
                .map(|after| now.saturating_add(after.as_millis().try_into().unwrap_or(u64::MAX))),
        };
        let opened = LeaseOpened { lease: id, epoch: lease.epoch, tracking };
        self.shared.state.borrow_mut().insert(Record::new(lease.clone()));
        self.record(vec![Entry::Lease { lease: Box::new(lease.clone()) }]).await;
        self.shared.metrics.leases_opened.inc();
        tracing::info!(
            event = "opened",
            lease = id.0,
            name = lease.name,
            uid = caller.uid,
            by_pid = caller.process.map(|process| process.pid),
            owner = owner.pid,
            "lease {id}: opened by user {} for process {}: {}",
            caller.uid,
            owner.pid,
            lease.name
        );
        self.watch(&lease, pidfd);
        Ok(opened)
    }

    /// A control group for a lease, where the host has them. Its place is in the journal before it is
    /// made: a daemon that is killed in between finds it at its next start.
    async fn make_cgroup(
        &self,
        owner_pid: u32,
        id: LeaseId,
        epoch: Epoch,
    ) -> Option<(CgroupIdentity, String)> {
        let hierarchy = self.shared.hierarchy.as_ref()?;
        let place = cgroups::place_for(hierarchy, owner_pid, id, epoch);
        if let Ok(place) = &place {
            self.record(vec![Entry::Opening { lease: id, cgroup: place.clone() }]).await;
        }
        match place.and_then(|place| Ok((cgroups::create(&place)?, place))) {
            Ok((identity, path)) => Some((identity, path.to_string_lossy().into_owned())),
            Err(error) => {
                tracing::warn!(
                    lease = id.0,
                    "lease {id}: no control group, so its processes are followed by descent, and one that loses its parent between two looks is lost: {error}"
                );
                None
            }
        }
    }

    /// Counts a build.
    ///
    /// # Errors
    /// When the lease is not the caller's, or the numbers are none.
    pub fn report_build(&self, caller: Caller, report: &ReportBuild) -> Result<(), CallError> {
        self.lease_of(caller, report.lease, report.epoch)?;
        if !report.seconds.is_finite() || report.seconds < 0.0 {
            return Err(refused("a build takes a number of seconds that is 0 or more"));
        }
        let metrics = &self.shared.metrics;
        metrics.builds.with_label_values(&[report.result.name()]).inc();
        metrics.build_seconds.with_label_values(&[report.result.name()]).observe(report.seconds);
        metrics.download_bytes.with_label_values(&["upstream"]).inc_by(report.upstream_bytes);
        metrics.download_bytes.with_label_values(&["cache"]).inc_by(report.cached_bytes);
        metrics.download_files.with_label_values(&["upstream"]).inc_by(report.upstream_files);
        metrics.download_files.with_label_values(&["cache"]).inc_by(report.cached_files);
        metrics.upstream_failures.inc_by(report.upstream_failures);
        Ok(())
    }

    /// Closes a lease, and waits until what it left is gone or cannot be taken back now.
    ///
    /// # Errors
    /// When the lease is not the caller's.
    pub async fn close(&self, caller: Caller, id: LeaseId, epoch: Epoch) -> Result<Report, CallError> {
        self.lease_of(caller, id, epoch)?;
        self.note_cause(id, Because::User(caller.uid));
        self.end_and_wait(id).await
    }

    /// Ends any lease, as root.
    ///
    /// # Errors
    /// When the caller is not root, or there is no such lease.
    pub async fn reclaim_now(&self, caller: Caller, id: LeaseId) -> Result<Report, CallError> {
        if !caller.is_root() {
            return Err(refused("only root may end another's lease; an owner closes its own"));
        }
        self.note_cause(id, Because::User(caller.uid));
        self.end_and_wait(id).await
    }

    pub(super) async fn end_and_wait(&self, id: LeaseId) -> Result<Report, CallError> {
        let mut reports = {
            let state = self.shared.state.borrow();
            let record = state.get(id).ok_or(CallError::NoSuchLease { lease: id })?;
            // Only a report that comes from now on counts.
            let mut reports = record.report.subscribe();
            reports.mark_unchanged();
            reports
        };
        self.end(id, Duration::ZERO);
        self.shared.changed.notify_waiters();
        reports.changed().await.map_err(|_| unavailable("the daemon is stopping"))?;
        let report = reports.borrow().clone();
        Ok(report.unwrap_or_default())
    }

    /// The caller's lease of that number and epoch.
    fn lease_of(&self, caller: Caller, id: LeaseId, epoch: Epoch) -> Result<Lease, CallError> {
        let state = self.shared.state.borrow();
        // Another user's lease is answered like none: whether a number is in use is nobody's business here.
        let record = state
            .get(id)
            .filter(|record| caller.may_use(record.lease.uid))
            .ok_or(CallError::NoSuchLease { lease: id })?;
        if record.lease.epoch == epoch {
            Ok(record.lease.clone())
        } else {
            Err(CallError::StaleEpoch { lease: id, epoch })
        }
    }

    /// The same, while its owner lives: what is over takes nothing in.
    pub(super) fn open_lease_of(
        &self,
        caller: Caller,
        id: LeaseId,
        epoch: Epoch,
    ) -> Result<Lease, CallError> {
        let lease = self.lease_of(caller, id, epoch)?;
        let state = self.shared.state.borrow();
        match state.get(id).map(|record| record.state) {
            Some(LeaseState::Open) => Ok(lease),
            Some(_) | None => Err(refused(format!("lease {id} is over; open another"))),
        }
    }

    /// Changes a lease, durably.
    pub(super) async fn change(&self, id: LeaseId, change: impl FnOnce(&mut Lease)) {
        let entry = {
            let mut state = self.shared.state.borrow_mut();
            let Some(record) = state.get_mut(id) else { return };
            let before = record.lease.clone();
            change(&mut record.lease);
            if record.lease == before {
                return;
            }
            Entry::Lease { lease: Box::new(record.lease.clone()) }
        };
        self.record(vec![entry]).await;
    }
}
