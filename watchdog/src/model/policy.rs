//! The administrator's rules for what no lease has, and what a look says of them.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use hostler_protocol::lease::{Epoch, LeaseId, Tracking};
use hostler_protocol::text::printable;
use serde::{Deserialize, Serialize};

use super::identity::{BootId, DiskSequence, ProcessIdentity, ResourceIdentity};
use super::lease::{Lease, Phase};

/// What a resource has to be for a rule to be about it, or for `[protect]` to protect it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Criterion {
    /// A loop device by its backing file: all that is given has to be so.
    Loop {
        /// A directory that the file lies below.
        backing_under: Option<PathBuf>,
        /// Whose the file is.
        uid: Option<u32>,
    },
    /// A mount in the host's namespace.
    Mount {
        /// A directory that the mount point lies below.
        mounted_under: PathBuf,
    },
}

impl fmt::Display for Criterion {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |path: &PathBuf| printable(path.as_os_str().as_encoded_bytes());
        match self {
            Self::Loop { backing_under: Some(path), uid: None } => {
                write!(formatter, "backing_under {}", shown(path))
            }
            Self::Loop { backing_under: None, uid: Some(uid) } => write!(formatter, "uid {uid}"),
            Self::Loop { backing_under: Some(path), uid: Some(uid) } => {
                write!(formatter, "backing_under {} and uid {uid}", shown(path))
            }
            Self::Loop { backing_under: None, uid: None } => write!(formatter, "every loop device"),
            Self::Mount { mounted_under } => write!(formatter, "mounted_under {}", shown(mounted_under)),
        }
    }
}

/// What is done with what a rule takes for leaked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Action {
    /// Nothing: it is shown how often it was seen.
    #[default]
    Observe,
    /// It is shown as quarantined, and left.
    Quarantine,
    /// It is shown as quarantined, and taken back at the sweep after that.
    Reclaim,
}

/// A rule for what no lease has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// What it is called, fit to be printed.
    pub name: String,
    /// What it is about.
    pub criterion: Criterion,
    /// How long a resource has to stay unchanged.
    pub min_age: Duration,
    /// How many sweeps in a row have to see it unchanged; at least 1.
    pub observations: u32,
    /// What follows.
    pub action: Action,
}

/// That a resource is what a criterion asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Match {
    /// The criterion. It is told whole: the rules may be others by the time that this is read.
    pub criterion: Criterion,
    /// The resource.
    pub what: ResourceIdentity,
}

/// Who opened a lease.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Opener {
    /// Somebody who claims what belongs to it.
    #[default]
    Client,
    /// The daemon, for what a rule takes for leaked.
    Policy,
    /// The daemon, for what an administrator wants taken back.
    Administrator,
}

/// What the daemon is to take back of what no lease has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Taking {
    /// The rule that takes it for leaked, when it is one.
    pub rule: Option<String>,
    /// What the lease for it is called, fit to be printed.
    pub name: String,
    /// On whose word.
    pub opener: Opener,
    /// All of it: nothing else is touched.
    pub what: BTreeSet<ResourceIdentity>,
}

impl Taking {
    /// The lease of the daemon's own that it is taken back under: over from the start, with nothing but
    /// what it names. `daemon` is the daemon's own process, and `now_ms` is in milliseconds since 1970.
    #[must_use]
    pub fn lease(&self, id: LeaseId, daemon: ProcessIdentity, boot: &BootId, now_ms: u64) -> Lease {
        let mut lease = Lease {
            id,
            epoch: Epoch(now_ms),
            name: self.name.clone(),
            opener: self.opener,
            uid: 0,
            owner: daemon,
            tracking: Tracking::Descent,
            cgroup: None,
            owner_inside: false,
            phase: Phase::Over,
            claims: Vec::new(),
            loops: BTreeSet::new(),
            mounts: BTreeSet::new(),
            processes: BTreeSet::new(),
            maps: BTreeSet::new(),
            namespaces: BTreeSet::new(),
            namespaces_there: None,
            loops_before: DiskSequence(0),
            mounts_before: BTreeSet::new(),
            boot: boot.clone(),
            evidence_closed: true,
            owner_handle: None,
            opened_at_ms: now_ms,
            deadline_ms: None,
        };
        for resource in &self.what {
            match *resource {
                ResourceIdentity::Loop(identity) => {
                    lease.loops.insert(identity);
                }
                ResourceIdentity::Mount(identity) => {
                    lease.mounts.insert(identity);
                }
                ResourceIdentity::Map(identity) => {
                    lease.maps.insert(identity);
                }
                // None of these is ever taken for leaked by a rule or on request.
                ResourceIdentity::Process(_)
                | ResourceIdentity::Nbd(_)
                | ResourceIdentity::Swap(_)
                | ResourceIdentity::Directory(_)
                | ResourceIdentity::Cgroup(_) => {}
            }
        }
        lease
    }
}

/// A qemu process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Qemu {
    /// Which.
    pub process: ProcessIdentity,
    /// Its program's file name.
    pub program: Vec<u8>,
    /// Its control group's path, fit to be printed.
    pub unit: String,
    /// The paths of its disks, as `/proc` has them: text for people.
    pub disks: Vec<Vec<u8>>,
    /// How long it runs, in milliseconds.
    pub age_ms: u64,
}
