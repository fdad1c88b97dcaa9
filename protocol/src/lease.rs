//! Leases as clients see them.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::resource::{Kind, Outcome, ResourceView};
use crate::why::Reason;

/// A lease's number: counted up by the daemon, never given twice, not even after a restart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct LeaseId(pub u64);

impl fmt::Display for LeaseId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(formatter)
    }
}

/// Fences off whoever still holds an earlier right to a lease: every request that changes a lease
/// names the epoch it was given, and any other is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Epoch(pub u64);

/// How the daemon knows which processes are a lease's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Tracking {
    /// A cgroup of its own: nothing that is started in it leaves by itself.
    Cgroup,
    /// Descent from the adopted process: what loses its parent between two looks is lost.
    Descent,
}

/// Where a lease is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LeaseState {
    /// The owner lives.
    Open,
    /// The owner is gone or closed it, and the grace runs.
    Closing,
    /// What it left is being taken back.
    Reclaiming,
    /// Something it left cannot be taken back now; it is tried again.
    Pinned,
    /// Nothing of it is left.
    Ended,
}

/// One lease.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LeaseView {
    /// Its number.
    pub lease: LeaseId,
    /// What its client called it.
    pub name: String,
    /// Whose it is.
    pub uid: u32,
    /// The owner's process number.
    pub owner_pid: u32,
    /// Where it is in its life.
    pub state: LeaseState,
    /// How its processes are known.
    pub tracking: Tracking,
    /// Seconds since it was opened.
    pub age_seconds: f64,
    /// What belongs to it now.
    pub resources: Vec<ResourceView>,
    /// How the last attempt to take back ended, when there was one.
    pub report: Option<Report>,
}

/// What became of one resource.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ResourceOutcome {
    /// What it is.
    pub kind: Kind,
    /// Its name, fit to be printed.
    pub name: String,
    /// What became of it, by a second look.
    pub outcome: Outcome,
    /// What pins it.
    pub reasons: Vec<Reason>,
    /// One sentence for a person, such as who holds it; empty when there is nothing to add.
    pub detail: String,
}

/// What became of all that a lease left.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Nothing is left.
    pub complete: bool,
    /// Seconds from the moment the lease ended until the last look.
    pub seconds: f64,
    /// Each resource.
    pub resources: Vec<ResourceOutcome>,
}
