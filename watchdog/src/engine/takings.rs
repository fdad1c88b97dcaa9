//! What the daemon takes back on its own: what a rule takes for leaked, or an administrator names.
//!
//! It becomes a lease that is over, so that planning, acting, looking again, the journal and a restart are
//! the same as for all others. It has one attempt: what no lease has is nobody's promise, so it is not
//! tried again for ever, but let go.

use hostler_protocol::lease::{LeaseId, LeaseState, Report};
use hostler_protocol::methods::CallError;
use hostler_protocol::resource::Outcome;
use hostler_protocol::text::printable;

use super::audit::Because;
use super::lifecycle::{Caller, refused, unavailable};
use super::record::Record;
use super::{Engine, now_ms};
use crate::decide::{NotTaken, requested};
use crate::journal::Entry;
use crate::kernel::processes;
use crate::model::{Lease, Opener, ProcessIdentity, SnapshotDepth, StartTime, Taking};

impl Engine {
    /// Takes back a device or mount that no lease has, as root, and waits until it is gone or cannot be
    /// taken back.
    ///
    /// # Errors
    /// When the caller is not root, or it is not to be taken back.
    pub async fn reclaim_target(&self, caller: Caller, target: &str) -> Result<Report, CallError> {
        if !caller.is_root() {
            return Err(refused("only root may take back what no lease has"));
        }
        let look = self.look_about(target).await.map_err(unavailable)?;
        let shown = printable(target.as_bytes());
        let taking = requested(target, &look.snapshot, &look.ownership).map_err(|why| match why {
            NotTaken::Nothing => CallError::NoSuchTarget { target: shown.clone() },
            NotTaken::OfALease(lease) => refused(format!("{shown}: {}", self.whose(lease))),
            NotTaken::Unread
            | NotTaken::Protected
            | NotTaken::Doubtful
            | NotTaken::AnotherKind
            | NotTaken::Elsewhere
            | NotTaken::Unprovable
            | NotTaken::Root => refused(format!("{shown}: {why}")),
        })?;
        let id = self.take(&taking).await;
        self.note_cause(id, Because::User(caller.uid));
        self.end_and_wait(id).await
    }

    fn whose(&self, lease: LeaseId) -> String {
        let state = self.shared.state.borrow();
        match state.get(lease).map(|record| record.state) {
            Some(LeaseState::Open) => {
                format!(
                    "lease {lease} has it, and its owner lives; `hostler reclaim --lease {lease}` ends it"
                )
            }
            Some(_) | None => {
                format!(
                    "lease {lease} has it, and is over; `hostler reclaim --lease {lease}` tries again now"
                )
            }
        }
    }

    /// Opens a lease for what is to be taken back. It is durable when this returns.
    pub(super) async fn take(&self, taking: &Taking) -> LeaseId {
        let id = self.shared.state.borrow_mut().take_number();
        let lease = self.lease_for(taking, id);
        let mut record = Record::new(lease.clone());
        record.state = LeaseState::Closing;
        self.shared.state.borrow_mut().insert(record);
        self.record(vec![Entry::Lease { lease: Box::new(lease) }]).await;
        self.shared.metrics.leases_opened.inc();
        tracing::info!(lease = id.0, name = taking.name, "lease {id}: opened by hostlerd: {}", taking.name);
        id
    }

    /// The lease that something would be taken back under.
    pub(super) fn lease_for(&self, taking: &Taking, id: LeaseId) -> Lease {
        taking.lease(id, own_process(), &self.shared.boot, now_ms())
    }

    /// How much the look has to read that a lease's plan is made from. What the daemon opened is nobody's,
    /// so nothing is done against anybody who holds it, be it a call that the kernel would not refuse.
    pub(super) fn depth_for(&self, id: LeaseId) -> SnapshotDepth {
        if self.has_one_attempt(id) { SnapshotDepth::Holders } else { SnapshotDepth::Ownership }
    }

    pub(super) fn has_one_attempt(&self, id: LeaseId) -> bool {
        let state = self.shared.state.borrow();
        state.get(id).is_some_and(|record| match record.lease.opener {
            Opener::Client => false,
            Opener::Policy | Opener::Administrator => true,
        })
    }

    /// Ends a lease although something of it is left.
    pub(super) async fn give_up(&self, id: LeaseId) {
        let record = self.shared.state.borrow_mut().remove(id, now_ms());
        let Some(record) = record else { return };
        let report = record.report.borrow().clone().unwrap_or_default();
        let is_left = |outcome: Outcome| matches!(outcome, Outcome::Pinned | Outcome::Unknown);
        let left = report.resources.iter().filter(|resource| is_left(resource.outcome)).count();
        tracing::warn!(
            lease = id.0,
            name = record.lease.name,
            left,
            "lease {id}: given up, {left} of {} resources are still there and are nobody's again: {}",
            report.resources.len(),
            record.lease.name
        );
        self.shared.measured.set(None);
        self.record(vec![Entry::Looked { lease: id, report }, Entry::Ended { lease: id }]).await;
    }
}

/// The daemon's own process: the owner of what it opens itself.
fn own_process() -> ProcessIdentity {
    let pid = std::process::id();
    // Its own `stat` can always be read where there is a procfs, and without one nothing else works.
    ProcessIdentity { pid, start: processes::start_time(pid).unwrap_or(StartTime(0)) }
}
