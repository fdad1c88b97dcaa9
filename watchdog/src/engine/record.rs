//! Leases in memory.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Duration;

use hostler_protocol::lease::{LeaseId, LeaseState, LeaseView, Report};
use hostler_protocol::resource::ResourceView;
use tokio::sync::{Notify, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;

use super::audit::Because;
use crate::model::{Lease, MountIdentity, Opener, ResourceIdentity};
use hostler_protocol::lease::ResourceOutcome;

/// How many ended leases are kept to be shown.
const ENDED_KEPT: usize = 32;

/// A lease with what is only in memory.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) lease: Lease,
    pub(super) state: LeaseState,
    /// Descriptors of the claims that have no file handle, by the claim's index. They keep the
    /// claimed file system mounted, which a handle does not.
    pub(super) descriptors: BTreeMap<usize, Rc<OwnedFd>>,
    /// On whose word it is taken back.
    pub(super) because: Option<Because>,
    /// When the lease ended.
    pub(super) over_since: Option<Instant>,
    /// How long after that what it left is left alone.
    pub(super) grace: Duration,
    /// Somebody does not want to wait for the end of that, or for the next attempt.
    pub(super) hurry: Rc<Notify>,
    /// Who waits for its deadline.
    pub(super) deadline: Option<Waiting>,
    /// What became of its resources so far.
    pub(super) outcomes: BTreeMap<ResourceIdentity, ResourceOutcome>,
    /// The report of the last attempt, for those who wait for it.
    pub(super) report: watch::Sender<Option<Report>>,
    /// Somebody takes it back already.
    pub(super) is_reclaiming: bool,
    /// Mounts that the last attempt left although no bystander holds them.
    pub(super) stuck: BTreeSet<MountIdentity>,
}

/// A task that waits on behalf of a lease, and ends with this.
#[derive(Debug)]
pub(super) struct Waiting(pub(super) AbortHandle);

impl Drop for Waiting {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Record {
    pub(super) fn new(lease: Lease) -> Self {
        Self {
            lease,
            state: LeaseState::Open,
            descriptors: BTreeMap::new(),
            because: None,
            over_since: None,
            grace: Duration::ZERO,
            hurry: Rc::new(Notify::new()),
            deadline: None,
            outcomes: BTreeMap::new(),
            report: watch::Sender::new(None),
            is_reclaiming: false,
            stuck: BTreeSet::new(),
        }
    }

    /// The lease as clients see it.
    pub(super) fn view(&self, now_ms: u64, resources: Vec<ResourceView>) -> LeaseView {
        LeaseView {
            lease: self.lease.id,
            name: self.lease.name.clone(),
            uid: self.lease.uid,
            owner_pid: self.lease.owner.pid,
            state: self.state,
            tracking: self.lease.tracking,
            age_seconds: now_ms.saturating_sub(self.lease.opened_at_ms) as f64 / 1000.0,
            resources,
            report: self.report.borrow().clone(),
        }
    }
}

/// All leases.
#[derive(Debug)]
pub(super) struct State {
    records: BTreeMap<LeaseId, Record>,
    ended: VecDeque<LeaseView>,
    next_lease: u64,
    /// Leases on their way, by user: they count as open.
    opening: BTreeMap<u32, usize>,
}

impl State {
    pub(super) fn new(next_lease: u64) -> Self {
        Self { records: BTreeMap::new(), ended: VecDeque::new(), next_lease, opening: BTreeMap::new() }
    }

    /// A number that was never given.
    pub(super) fn take_number(&mut self) -> LeaseId {
        let id = LeaseId(self.next_lease);
        self.next_lease += 1;
        id
    }

    /// Counts a lease of this user's as being opened, unless he has `limit` already.
    pub(super) fn begin_opening(&mut self, user: u32, limit: usize) -> bool {
        let is_users = |lease: &&Lease| lease.uid == user && lease.opener == Opener::Client;
        let open = self.leases().filter(is_users).count();
        let opening = self.opening.entry(user).or_default();
        let has_room = open + *opening < limit;
        *opening += usize::from(has_room);
        has_room
    }

    /// The lease is open, or will not be.
    pub(super) fn end_opening(&mut self, user: u32) {
        if let Some(count) = self.opening.get_mut(&user) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.opening.remove(&user);
            }
        }
    }

    /// The number that will be given next.
    pub(super) fn next_number(&self) -> LeaseId {
        LeaseId(self.next_lease)
    }

    pub(super) fn insert(&mut self, record: Record) {
        self.records.insert(record.lease.id, record);
    }

    pub(super) fn get(&self, lease: LeaseId) -> Option<&Record> {
        self.records.get(&lease)
    }

    pub(super) fn get_mut(&mut self, lease: LeaseId) -> Option<&mut Record> {
        self.records.get_mut(&lease)
    }

    pub(super) fn records(&self) -> impl Iterator<Item = &Record> {
        self.records.values()
    }

    pub(super) fn records_mut(&mut self) -> impl Iterator<Item = &mut Record> {
        self.records.values_mut()
    }

    pub(super) fn leases(&self) -> impl Iterator<Item = &Lease> {
        self.records.values().map(|record| &record.lease)
    }

    /// Whether one more descriptor of a claimed directory may be kept for a user.
    pub(super) fn may_keep(&self, user: u32, limit_of_user: usize, limit: usize) -> bool {
        let kept = |record: &Record| record.descriptors.len();
        let of_user = self.records.values().filter(|record| record.lease.uid == user).map(kept);
        of_user.sum::<usize>() < limit_of_user && self.records.values().map(kept).sum::<usize>() < limit
    }

    pub(super) fn has_claims(&self) -> bool {
        self.records.values().any(|record| !record.lease.claims.is_empty())
    }

    /// Takes a lease out, and keeps how it ended to be shown.
    pub(super) fn remove(&mut self, lease: LeaseId, now_ms: u64) -> Option<Record> {
        let record = self.records.remove(&lease)?;
        let mut view = record.view(now_ms, Vec::new());
        view.state = LeaseState::Ended;
        self.ended.push_back(view);
        while self.ended.len() > ENDED_KEPT {
            self.ended.pop_front();
        }
        Some(record)
    }

    pub(super) fn ended(&self) -> impl Iterator<Item = &LeaseView> {
        self.ended.iter()
    }
}
