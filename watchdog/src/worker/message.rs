//! What the daemon and a worker say to each other: JSON, ended by NUL, as on the public socket.

use hostler_protocol::lease::LeaseId;
use serde::{Deserialize, Serialize};

use crate::model::{
    CgroupIdentity, Claim, Criterion, DeviceNumber, Proof, Snapshot, SnapshotDepth, Step, StepResult, Wanted,
};

/// The largest request, in bytes. It is the daemon's own word, as long as what all users may claim together.
pub(super) const REQUEST_LIMIT: usize = 2 * 1024 * 1024 * 1024;
/// The largest answer. What users can make as large as they like is bounded before:
/// [`budget`](crate::kernel::budget) bounds mounts, [`fit`](super::fit) the rest.
pub(super) const ANSWER_LIMIT: usize = 256 * 1024 * 1024;

/// What a look needs to know of a lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseQuery {
    /// Which.
    pub lease: LeaseId,
    /// Its control group.
    pub cgroup: Option<(CgroupIdentity, String)>,
    /// Its directories.
    pub claims: Vec<ClaimQuery>,
}

/// A claimed directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClaimQuery {
    /// The claim.
    pub claim: Claim,
    /// The index of its descriptor among those passed, where it has no file handle.
    pub descriptor: Option<usize>,
}

/// How far a look goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Extent {
    /// The whole host.
    Host,
    /// Only what an event told of.
    Only {
        /// Loop devices.
        loops: Vec<u32>,
        /// Mounts of the own namespace, by the number that is never given again.
        mounts: Vec<u64>,
    },
}

/// What to look at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Query {
    /// How far.
    pub extent: Extent,
    /// How much to read.
    pub depth: SnapshotDepth,
    /// For which leases.
    pub leases: Vec<LeaseQuery>,
    /// What the rules for what no lease has are about.
    pub criteria: Vec<Criterion>,
    /// What `[protect]` protects.
    pub protected: Vec<Criterion>,
    /// Of which file systems the number that their mounts show is to be in the snapshot.
    pub numbers: Vec<NumberQuery>,
    /// Loop devices not to ask, because asking them hung before.
    pub avoid: Vec<u32>,
}

/// A file system whose mounts show another number than its devices have (btrfs).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NumberQuery {
    /// Which.
    pub instance: u64,
    /// What an earlier look learnt; absent when this one is to find it out, for which it mounts it.
    pub number: Option<DeviceNumber>,
}

impl Query {
    /// The whole host, on behalf of no lease and no rule.
    #[must_use]
    pub fn host(depth: SnapshotDepth) -> Self {
        Self {
            extent: Extent::Host,
            depth,
            leases: Vec::new(),
            criteria: Vec::new(),
            protected: Vec::new(),
            numbers: Vec::new(),
            avoid: Vec::new(),
        }
    }
}

impl ClaimQuery {
    /// The words in which a worker announces that it is about to look at it.
    pub(super) fn announced(&self, lease: LeaseId) -> String {
        format!("the directory {} that lease {lease} claimed", self.claim.path)
    }
}

impl Query {
    /// What hangs when this does, in the words in which it is announced: it, and the claimed directories on the
    /// same file system as the one that it is. A server that died hangs each of them, for as long each.
    pub(super) fn hanging_with(&self, announced: &str) -> Vec<String> {
        let claims = || {
            self.leases.iter().flat_map(|of| of.claims.iter().map(|claim| (claim.announced(of.lease), claim)))
        };
        let device = |claim: &ClaimQuery| claim.claim.directory.device;
        match claims().find(|(words, _)| words == announced) {
            Some((_, hung)) => {
                let same = claims().filter(|(_, claim)| device(claim) == device(hung));
                same.map(|(words, _)| words).collect()
            }
            None => vec![announced.to_owned()],
        }
    }
}

/// A step of a plan, with what it takes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    /// The step.
    pub step: Step,
    /// The claim that a step on a directory is about.
    pub claim: Option<ClaimQuery>,
}

/// What a worker is to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Look.
    Observe {
        /// At what.
        query: Query,
        /// What is not to be touched, in the words of [`Response::Touching`], because it hung before.
        skip: Vec<String>,
    },
    /// Do these steps, one after the other, and say of each how it went.
    Act(Vec<Task>),
    /// Look at a descriptor of the process whose pidfd comes beside this.
    Examine {
        /// Its number there.
        number: i32,
        /// What it ought to be of.
        wanted: Wanted,
    },
}

/// What a worker says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// It is there. Beside it comes a pidfd of it.
    Born,
    /// About to touch something that may hang: a loop device by number, or words.
    Touching {
        /// The loop device.
        device: Option<u32>,
        /// What it is, for a person.
        what: String,
    },
    /// What was seen.
    Seen(Box<Snapshot>),
    /// How the next step went.
    Acted(StepResult),
    /// What the descriptor is of, or why that cannot be told. Beside it comes a directory's that has no
    /// file handle, to be kept.
    Examined(Result<Proof, String>),
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Limits;
    use crate::model::{DirectoryIdentity, MountNumber};

    #[test]
    fn with_a_directory_hang_those_on_the_same_file_system() {
        let claim = |minor, path: &str| ClaimQuery {
            claim: Claim {
                directory: DirectoryIdentity { device: DeviceNumber { major: 0, minor }, inode: 1 },
                scratch: false,
                path: path.to_owned(),
                handle: None,
                mount: None,
            },
            descriptor: None,
        };
        let lease = |id, claims| LeaseQuery { lease: LeaseId(id), cgroup: None, claims };
        let leases = vec![
            lease(1, vec![claim(50, "/net/a"), claim(51, "/local")]),
            lease(2, vec![claim(50, "/net/b")]),
        ];
        let query = Query { leases, ..Query::host(SnapshotDepth::Ownership) };
        let words = |lease, path| format!("the directory {path} that lease {lease} claimed");
        assert_eq!(query.hanging_with(&words(2, "/net/b")), [words(1, "/net/a"), words(2, "/net/b")]);
        assert_eq!(query.hanging_with(&words(1, "/local")), [words(1, "/local")]);
        assert_eq!(query.hanging_with("processes"), ["processes"]);
    }

    #[test]
    fn what_all_users_may_claim_together_fits_into_one_request() {
        let device = DeviceNumber { major: u32::MAX, minor: u32::MAX };
        let claim = Claim {
            directory: DirectoryIdentity { device, inode: u64::MAX },
            scratch: true,
            // As `examine` keeps it, of characters that are written with two.
            path: "\\".repeat(super::super::examine::PATH_LIMIT),
            // MAX_HANDLE_SZ
            handle: Some((i32::MAX, vec![u8::MAX; 128])),
            mount: Some(MountNumber::Unique(u64::MAX)),
        };
        let claim = ClaimQuery { claim, descriptor: None };
        let of_claim = serde_json::to_vec(&claim).expect("text").len();
        let cgroup = Some((CgroupIdentity(u64::MAX), "\\".repeat(4096)));
        let lease = LeaseQuery { lease: LeaseId(u64::MAX), cgroup, claims: Vec::new() };
        let of_lease = serde_json::to_vec(&lease).expect("text").len();
        let Limits { users, leases, claims, .. } = Limits::default();
        let all = users * leases * (of_lease + claims * (of_claim + 1));
        assert!(all < REQUEST_LIMIT / 2, "{all}");
    }
}
