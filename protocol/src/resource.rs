//! Resources as clients see them, and the closed sets that describe them.

use serde::{Deserialize, Serialize};

use crate::lease::LeaseId;

/// What a resource is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A process.
    Process,
    /// A mount.
    Mount,
    /// A bound loop device.
    Loop,
    /// A device-mapper map or md array.
    Map,
    /// A connected network block device.
    Nbd,
    /// An area that the kernel swaps to.
    Swap,
    /// A scratch directory, to be removed with its lease.
    Directory,
    /// A lease's own control group.
    Cgroup,
}

impl Kind {
    /// Every kind, for metrics that must exist before the first resource does.
    pub const ALL: [Self; 8] = [
        Self::Process,
        Self::Mount,
        Self::Loop,
        Self::Map,
        Self::Nbd,
        Self::Swap,
        Self::Directory,
        Self::Cgroup,
    ];

    /// The word for it in messages and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Process => "process",
            Self::Mount => "mount",
            Self::Loop => "loop",
            Self::Map => "map",
            Self::Nbd => "nbd",
            Self::Swap => "swap",
            Self::Directory => "directory",
            Self::Cgroup => "cgroup",
        }
    }
}

/// What the daemon thinks of a resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// It belongs to a lease whose owner lives.
    Owned,
    /// Its lease is over: it will be taken back.
    Leaked,
    /// Its lease is over, and something that must not be touched holds it.
    Pinned,
    /// No lease has it, and a rule of the administrator's takes it for leaked.
    Quarantined,
    /// No lease has it; it is left alone.
    Bystander,
    /// Something about it could not be read; it is left alone.
    Unknown,
}

impl Verdict {
    /// Every verdict.
    pub const ALL: [Self; 6] =
        [Self::Owned, Self::Leaked, Self::Pinned, Self::Quarantined, Self::Bystander, Self::Unknown];

    /// The word for it in messages and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Owned => "owned",
            Self::Leaked => "leaked",
            Self::Pinned => "pinned",
            Self::Quarantined => "quarantined",
            Self::Bystander => "bystander",
            Self::Unknown => "unknown",
        }
    }
}

/// What became of a resource that was to be taken back, by a second look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// The daemon acted on it and it is gone.
    Reclaimed,
    /// It went by itself before the daemon acted on it.
    AlreadyGone,
    /// Its name is in use again by something else, which was not touched.
    Replaced,
    /// It is still there, and it is known what holds it.
    Pinned,
    /// Whether it is still there, or why, could not be learnt.
    Unknown,
}

impl Outcome {
    /// Every outcome.
    pub const ALL: [Self; 5] =
        [Self::Reclaimed, Self::AlreadyGone, Self::Replaced, Self::Pinned, Self::Unknown];

    /// The word for it in messages and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Reclaimed => "reclaimed",
            Self::AlreadyGone => "already_gone",
            Self::Replaced => "replaced",
            Self::Pinned => "pinned",
            Self::Unknown => "unknown",
        }
    }
}

/// One resource.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResourceView {
    /// What it is.
    pub kind: Kind,
    /// Its name, fit to be printed: a device, a mount point, a process number, a path.
    pub name: String,
    /// What else a person wants to know, such as a loop's backing file.
    pub detail: String,
    /// What the daemon thinks of it.
    pub verdict: Verdict,
    /// Whose it is.
    pub lease: Option<LeaseId>,
}
