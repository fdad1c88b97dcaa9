//! Plans: finished lists of steps that leave no choice to whoever acts.

use hostler_protocol::lease::LeaseId;
use serde::{Deserialize, Serialize};

use super::ResourceIdentity;
use super::identity::{CgroupIdentity, DirectoryIdentity, LoopIdentity, MountIdentity, ProcessIdentity};

/// One thing to do, with the identity to check right before it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "do")]
pub enum Step {
    /// Ask processes to end, wait, then kill those that are left.
    EndProcesses {
        /// The processes.
        processes: Vec<ProcessIdentity>,
        /// The lease's control group, which is killed as a whole at the end so that nothing born
        /// in between escapes.
        cgroup: Option<(CgroupIdentity, String)>,
        /// How long they have to end by themselves, in milliseconds.
        term_timeout_ms: u64,
    },
    /// Unmount one mount.
    Unmount {
        /// Which.
        mount: MountIdentity,
        /// Its number in mountinfo, to find it by.
        short_number: u64,
        /// Where it was; for people and as a place to look, checked by identity.
        point: Vec<u8>,
    },
    /// Unmount one mount, after the mount it is on was parted from its peers: otherwise a
    /// bystander's mount would go with it.
    UnmountApart {
        /// Which.
        mount: MountIdentity,
        /// Its number in mountinfo, to find it by.
        short_number: u64,
        /// Where it was; for people.
        point: Vec<u8>,
        /// The mount it is on, which is the lease's own.
        parent: MountIdentity,
    },
    /// Detach one loop device.
    DetachLoop {
        /// Which attachment.
        identity: LoopIdentity,
    },
    /// Remove a scratch directory with all it holds.
    RemoveDirectory {
        /// Which.
        directory: DirectoryIdentity,
        /// Whose.
        lease: LeaseId,
        /// Where it was; for people.
        path: String,
    },
    /// Remove the lease's control group.
    RemoveCgroup {
        /// Which.
        cgroup: CgroupIdentity,
        /// Where it is.
        path: String,
    },
}

impl Step {
    /// What it acts on.
    #[must_use]
    pub fn resources(&self) -> Vec<ResourceIdentity> {
        match self {
            Self::EndProcesses { processes, .. } => {
                processes.iter().copied().map(ResourceIdentity::Process).collect()
            }
            Self::Unmount { mount, .. } | Self::UnmountApart { mount, .. } => {
                vec![ResourceIdentity::Mount(*mount)]
            }
            Self::DetachLoop { identity } => vec![ResourceIdentity::Loop(*identity)],
            Self::RemoveDirectory { directory, .. } => vec![ResourceIdentity::Directory(*directory)],
            Self::RemoveCgroup { cgroup, .. } => vec![ResourceIdentity::Cgroup(*cgroup)],
        }
    }

    /// What it does, for a person.
    #[must_use]
    pub fn sentence(&self) -> String {
        use hostler_protocol::text::printable;
        match self {
            Self::EndProcesses { processes, term_timeout_ms, .. } => {
                let pids: Vec<String> = processes.iter().map(|process| process.pid.to_string()).collect();
                format!(
                    "end process {} (SIGTERM, after {:.1} s SIGKILL)",
                    pids.join(", "),
                    *term_timeout_ms as f64 / 1000.0
                )
            }
            Self::Unmount { point, .. } => format!("unmount {}", printable(point)),
            Self::UnmountApart { point, .. } => {
                format!("unmount {}, apart from a bystander's mount of the same", printable(point))
            }
            Self::DetachLoop { identity } => format!("detach /dev/loop{}", identity.number),
            Self::RemoveDirectory { path, .. } => format!("remove directory {path}"),
            Self::RemoveCgroup { path, .. } => format!("remove control group {path}"),
        }
    }
}

/// What is to be done for one lease, in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// The steps.
    pub steps: Vec<Step>,
}

/// How a step went, as the calls said. Whether it worked is decided by a second look only.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "result")]
pub enum StepResult {
    /// Every call succeeded.
    Done,
    /// What was to be acted on was not there any more.
    Gone,
    /// Something else has its name now; nothing was done.
    Replaced,
    /// A call failed.
    Failed {
        /// Which call, and the error.
        cause: String,
    },
    /// It did not end in time, and its worker was given up.
    Hung {
        /// What it was doing.
        doing: String,
    },
}

impl StepResult {
    /// How it went, for a person.
    #[must_use]
    pub fn sentence(&self) -> String {
        match self {
            Self::Done => "done".to_owned(),
            Self::Gone => "it was gone".to_owned(),
            Self::Replaced => "something else has its name, nothing was done".to_owned(),
            Self::Failed { cause } => format!("failed: {cause}"),
            Self::Hung { doing } => format!("hangs: {doing}"),
        }
    }
}
