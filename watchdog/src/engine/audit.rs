//! What is done, told for whoever looks later: one event of the log for each thing that was done to a lease
//! or a resource. Under systemd each field is one of the journal's (`HOSTLER_EVENT=step`).

use std::fmt;

use hostler_protocol::lease::LeaseId;
use hostler_protocol::text::printable;

use super::Engine;
use super::lifecycle::Caller;
use crate::model::{Claim, Lease, ResourceIdentity, Step, StepResult};

/// On whose word a lease's things are taken back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Because {
    /// Its owner has ended, now or while the daemon was not there.
    OwnerEnded,
    /// Its deadline has passed.
    Deadline,
    /// A user closed it, or asked for what no lease has.
    User(u32),
    /// A rule of `[[policy]]`.
    Rule,
    /// It was over before the daemon started.
    Restart,
}

impl fmt::Display for Because {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::OwnerEnded => formatter.write_str("owner ended"),
            Self::Deadline => formatter.write_str("deadline"),
            Self::User(user) => write!(formatter, "user {user}"),
            Self::Rule => formatter.write_str("rule"),
            Self::Restart => formatter.write_str("restart"),
        }
    }
}

/// Identities as the journal of leases writes them.
fn written(resources: &[ResourceIdentity]) -> String {
    serde_json::to_string(resources).unwrap_or_else(|error| error.to_string())
}

impl Engine {
    /// Notes who has a lease's things taken back: whoever was first.
    pub(super) fn note_cause(&self, id: LeaseId, because: Because) {
        if let Some(record) = self.shared.state.borrow_mut().get_mut(id) {
            record.because.get_or_insert(because);
        }
    }

    /// One step was done, or tried.
    pub(super) fn tell_step(
        &self,
        lease: &Lease,
        round: u32,
        index: usize,
        step: &Step,
        result: &StepResult,
    ) {
        let because = self.shared.state.borrow().get(lease.id).and_then(|record| record.because);
        let (id, does, said) = (lease.id, step.sentence(), result.sentence());
        tracing::info!(
            event = "step",
            lease = id.0,
            name = lease.name,
            uid = lease.uid,
            because = because.map(tracing::field::display),
            round,
            step = index,
            identity = written(&step.resources()),
            does,
            result = said,
            "lease {id}: {does}: {said}"
        );
    }

    /// A process was put under a lease, or a loop device.
    pub(super) fn tell_registered(&self, caller: Caller, lease: LeaseId, resource: ResourceIdentity) {
        tracing::info!(
            event = "registered",
            lease = lease.0,
            uid = caller.uid,
            by_pid = caller.process.map(|process| process.pid),
            identity = written(&[resource]),
            "lease {lease}: user {} put a {} under it",
            caller.uid,
            resource.kind().name()
        );
    }

    /// A directory was claimed.
    pub(super) fn tell_claimed(&self, caller: Caller, lease: LeaseId, claim: &Claim) {
        let path = printable(claim.path.as_bytes());
        tracing::info!(
            event = "claimed",
            lease = lease.0,
            uid = caller.uid,
            by_pid = caller.process.map(|process| process.pid),
            identity = written(&[ResourceIdentity::Directory(claim.directory)]),
            scratch = claim.scratch,
            path,
            "lease {lease}: user {} claimed {path}{}",
            caller.uid,
            if claim.scratch { ", to be removed with it" } else { "" }
        );
    }
}
