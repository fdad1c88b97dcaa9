//! A lease's life, as clients ask for it: open, adopt, claim, close.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use hostler_protocol::lease::{Epoch, LeaseId, LeaseState, Report, Tracking};
use hostler_protocol::methods::{CallError, LeaseOpened, ReportBuild};
use hostler_protocol::text::printable;

use super::audit::Because;
use super::record::{Record, Waiting};
use super::{Engine, now_ms};
use crate::causes::chain;
use crate::journal::Entry;
use crate::kernel::{calls, cgroups, signals};
use crate::model::{
    CgroupIdentity, Claim, DiskSequence, Gap, Lease, Opener, Phase, ProcessIdentity, Proof, ProvenDirectory,
    ProvenLoop, ProvenProcess, ResourceIdentity, SnapshotDepth, Wanted,
};
use crate::worker::{Examined, WorkerError};

/// How many descriptors of claimed directories are kept, of all leases together and of one user's. All of
/// them go beside one message to a worker, which can carry 253.
const KEPT_LIMIT: usize = 200;
const KEPT_FOR_USER: usize = 32;
/// How many workers may hang because of one user's descriptors before no more of his are looked at.
const HANGING_LIMIT: usize = 4;
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

fn limit_reached(limit: &str, value: usize) -> CallError {
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

    /// Has the lease end when its owner does, and at its deadline.
    pub(super) fn watch(&self, lease: &Lease, pidfd: OwnedFd) {
        if let Err(error) = self.shared.watcher.watch_owner(lease.id, pidfd) {
            self.ask_again(lease.clone(), &error);
        }
        if let Some(deadline) = lease.deadline_ms {
            let engine = self.clone();
            let id = lease.id;
            let left = Duration::from_millis(deadline.saturating_sub(now_ms()));
            let waiting = tokio::task::spawn_local(async move {
                tokio::time::sleep(left).await;
                if engine.shared.state.borrow().get(id).is_some_and(|record| record.state == LeaseState::Open)
                {
                    tracing::info!(lease = id.0, "lease {id}: its deadline has passed");
                    engine.note_cause(id, Because::Deadline);
                    engine.end(id, Duration::ZERO);
                }
            });
            if let Some(record) = self.shared.state.borrow_mut().get_mut(lease.id) {
                record.deadline = Some(Waiting(waiting.abort_handle()));
            }
        }
        if lease.tracking == Tracking::Descent {
            self.follow_descent(lease.id);
        }
    }

    /// Looks at a lease's processes again and again while it is open, so that one whose parent
    /// ends was seen while it still had one.
    fn follow_descent(&self, id: LeaseId) {
        const INTERVAL: Duration = Duration::from_millis(500);
        let engine = self.clone();
        tokio::task::spawn_local(async move {
            loop {
                tokio::time::sleep(INTERVAL).await;
                if engine.shared.state.borrow().get(id).is_none_or(|record| record.state != LeaseState::Open)
                {
                    return;
                }
                if let Err(error) = engine.look(SnapshotDepth::Ownership).await {
                    tracing::warn!(
                        lease = id.0,
                        "lease {id}: a look at its processes gave nothing: {}",
                        chain(&error)
                    );
                }
            }
        });
    }

    /// What a descriptor is of that a client passed, as a worker finds it.
    async fn examine(
        &self,
        caller: Caller,
        passed: Passed<'_>,
        wanted: Wanted,
    ) -> Result<Examined, CallError> {
        if self.shared.pool.hanging_for(caller.uid) >= HANGING_LIMIT {
            return Err(refused(format!(
                "{HANGING_LIMIT} descriptors of user {} hang whoever looks at them; end what does not answer (a FUSE server, for example) first",
                caller.uid
            )));
        }
        let number = i32::try_from(passed.number).map_err(|_| refused("there is no such descriptor"))?;
        let silence = self.shared.config.borrow().reclaim.step_timeout;
        let examined = self.shared.pool.examine(caller.uid, passed.reader, number, wanted, silence).await;
        match examined {
            Ok(Examined { proof: Proof::None(why), .. }) => Err(refused(why)),
            Ok(examined) => Ok(examined),
            Err(error @ WorkerError::Hung { .. }) => Err(refused(error.to_string())),
            Err(error) => Err(unavailable(chain(&error))),
        }
    }

    /// The process of a pidfd, when it is of the caller's user.
    async fn owned_process(&self, caller: Caller, passed: Passed<'_>) -> Result<ProcessIdentity, CallError> {
        let examined = self.examine(caller, passed, Wanted::Process).await?;
        let Proof::Process(ProvenProcess { process, user }) = examined.proof else {
            return Err(refused("that descriptor is no pidfd"));
        };
        if caller.may_use(user) {
            Ok(process)
        } else {
            Err(refused(format!("process {} is not one of user {}", process.pid, caller.uid)))
        }
    }

    /// Puts a process under a lease.
    ///
    /// # Errors
    /// When the lease or the process is not the caller's.
    pub async fn adopt(
        &self,
        caller: Caller,
        id: LeaseId,
        epoch: Epoch,
        pidfd: Passed<'_>,
    ) -> Result<(), CallError> {
        self.room_for_a_resource(caller, id, epoch)?;
        let process = self.owned_process(caller, pidfd).await?;
        // It may have ended while that was looked at.
        let lease = self.room_for_a_resource(caller, id, epoch)?;
        if let Some((_, path)) = &lease.cgroup
            && !cgroups::enter(std::path::Path::new(path), process).map_err(unavailable)?
        {
            return Err(refused("that process has ended"));
        }
        self.change(id, |lease| {
            lease.owner_inside |= process == lease.owner;
            lease.processes.insert(process);
        })
        .await;
        self.tell_registered(caller, id, ResourceIdentity::Process(process));
        Ok(())
    }

    /// Puts a loop device under a lease.
    ///
    /// # Errors
    /// When the descriptor is of no bound loop device that the caller may open for writing.
    pub async fn register_loop(
        &self,
        caller: Caller,
        id: LeaseId,
        epoch: Epoch,
        device: Passed<'_>,
    ) -> Result<(), CallError> {
        self.room_for_a_resource(caller, id, epoch)?;
        let examined = self.examine(caller, device, Wanted::Loop).await?;
        // Whoever may only read a device must not be able to have it detached.
        let Proof::Loop(ProvenLoop { identity, is_writable: true }) = examined.proof else {
            return Err(refused("that descriptor is of no loop device that was opened for writing"));
        };
        self.room_for_a_resource(caller, id, epoch)?;
        self.change(id, |lease| {
            lease.loops.insert(identity);
        })
        .await;
        self.tell_registered(caller, id, ResourceIdentity::Loop(identity));
        Ok(())
    }

    /// Claims a directory for a lease.
    ///
    /// # Errors
    /// When the lease or the directory is not the caller's, or a limit is reached.
    pub async fn claim(
        &self,
        caller: Caller,
        id: LeaseId,
        epoch: Epoch,
        directory: Passed<'_>,
        scratch: bool,
    ) -> Result<(), CallError> {
        self.room_for_a_claim(caller, id, epoch)?;
        let Examined { proof, kept } = self.examine(caller, directory, Wanted::Directory).await?;
        let Proof::Directory(proven) = proof else {
            return Err(refused("that descriptor is of no directory"));
        };
        let shown = &proven.path;
        if proven.is_root {
            return Err(refused(
                "the root directory cannot be claimed; claim the directory that the job works in",
            ));
        }
        let owner = proven.owner;
        if !caller.may_use(owner) || (owner != caller.uid && scratch) {
            return Err(refused(format!("{shown} belongs to user {owner}; claim a directory of your own")));
        }
        if scratch && proven.is_everybodys {
            return Err(refused(format!(
                "everybody may write to {shown}, so it cannot be removed with all it holds; `chmod o-w` it, or claim it without having it removed"
            )));
        }
        let lease = self.room_for_a_claim(caller, id, epoch)?;
        let is_claimed = |claim: &Claim| claim.directory == proven.directory && claim.scratch == scratch;
        if lease.claims.iter().any(is_claimed) {
            return Ok(());
        }
        let is_first = lease.claims.is_empty();
        let ProvenDirectory { directory, path, handle, mount, .. } = proven;
        let claim = Claim { directory, scratch, path, handle, mount };
        let kept = kept.filter(|_| claim.handle.is_none()).map(Rc::new);
        self.add_claim(caller, epoch, id, claim.clone(), kept, is_first).await?;
        self.tell_claimed(caller, id, &claim);
        Ok(())
    }

    /// Takes a claim into a lease, together with what lay below the directory before, which is not
    /// the lease's. Both in one step: a look that knew the claim alone would take all that for the
    /// lease's, and remember it as such.
    async fn add_claim(
        &self,
        caller: Caller,
        epoch: Epoch,
        id: LeaseId,
        claim: Claim,
        kept: Option<Rc<OwnedFd>>,
        is_first: bool,
    ) -> Result<(), CallError> {
        let snapshot = self.observe_claim(id, &claim, kept.as_ref()).await.map_err(unavailable)?;
        let unclear = snapshot.gaps.iter().find(|gap| match gap {
            Gap::Mounts(_) | Gap::Loops(_) => true,
            Gap::Claim(lease, _) => *lease == id,
            Gap::Loop(..)
            | Gap::Blocks(_)
            | Gap::Namespaces(_)
            | Gap::Processes(_)
            | Gap::Process(..)
            | Gap::Namespace(..)
            | Gap::Cgroup(..)
            | Gap::Criterion(_) => false,
        });
        if let Some(gap) = unclear {
            return Err(unavailable(format!(
                "what lies in the directory cannot be told: {}",
                gap.sentence()
            )));
        }
        if !is_first {
            // What the lease has made below its earlier claims must be known as its own before its marks are
            // set to what is there now. This comes after the look that they are taken from, so that what is
            // made in between is later than they are.
            self.look(SnapshotDepth::Ownership).await.map_err(unavailable)?;
        }
        let below = snapshot.claimed_mounts.iter().filter(|found| found.lease == id).map(|found| found.what);
        let all_namespaces_read = !snapshot.gaps.iter().any(|gap| matches!(gap, Gap::Namespaces(_)));
        let newest = snapshot.loops.iter().filter_map(|device| device.sequence).max();
        let entry = {
            // Others may have claimed meanwhile, and the lease may be over by now.
            self.room_for_a_claim(caller, id, epoch)?;
            let mut state = self.shared.state.borrow_mut();
            if kept.is_some() && !state.may_keep(caller.uid, KEPT_FOR_USER, KEPT_LIMIT) {
                return Err(refused(format!(
                    "{} is on a file system without file handles, and {KEPT_FOR_USER} directories of such are claimed by one user already, or {KEPT_LIMIT} by all; claim one on a disk",
                    claim.path
                )));
            }
            let record = state.get_mut(id).ok_or(CallError::NoSuchLease { lease: id })?;
            if let Some(directory) = kept {
                record.descriptors.insert(record.lease.claims.len(), directory);
            }
            let lease = &mut record.lease;
            lease.claims.push(claim);
            // What it made below an earlier claim stays its own.
            lease.mounts_before.extend(below.filter(|mount| !lease.mounts.contains(mount)));
            lease.loops_before = lease.loops_before.max(newest.unwrap_or(DiskSequence(0)));
            if lease.namespaces_there.is_none() && all_namespaces_read {
                let there = snapshot.namespaces.iter().filter_map(|namespace| namespace.unique);
                lease.namespaces_there = Some(there.collect());
            }
            Entry::Lease { lease: Box::new(lease.clone()) }
        };
        self.record(vec![entry]).await;
        Ok(())
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

    /// The same, when it can take in one more directory.
    fn room_for_a_claim(&self, caller: Caller, id: LeaseId, epoch: Epoch) -> Result<Lease, CallError> {
        let lease = self.open_lease_of(caller, id, epoch)?;
        let limit = self.shared.config.borrow().limits.claims;
        if lease.claims.len() < limit { Ok(lease) } else { Err(limit_reached("claims", limit)) }
    }

    /// The same, when it can take in one more process or loop device.
    fn room_for_a_resource(&self, caller: Caller, id: LeaseId, epoch: Epoch) -> Result<Lease, CallError> {
        let lease = self.open_lease_of(caller, id, epoch)?;
        let limit = self.shared.config.borrow().limits.resources;
        let count = lease.processes.len() + lease.loops.len();
        if count < limit { Ok(lease) } else { Err(limit_reached("resources", limit)) }
    }

    /// The same, while its owner lives: what is over takes nothing in.
    fn open_lease_of(&self, caller: Caller, id: LeaseId, epoch: Epoch) -> Result<Lease, CallError> {
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

    /// Lets a living owner out of its own lease, before the rest of that is ended: back to the group
    /// that it came from, which is the one above.
    pub(super) fn let_owner_out(&self, lease: &Lease) {
        let Some((_, path)) = lease.cgroup.as_ref().filter(|_| lease.owner_inside) else { return };
        if let Some(above) = std::path::Path::new(path).parent()
            && let Err(error) = cgroups::enter(above, lease.owner)
        {
            // The plan then leaves the group itself alone, and the lease is pinned until the owner
            // ends.
            tracing::warn!(
                lease = lease.id.0,
                "lease {}: its owner could not be let out of it: {error}",
                lease.id
            );
        }
    }
}
