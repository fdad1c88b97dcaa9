//! Plans: finished lists of steps that leave no choice to whoever acts.

use hostler_protocol::lease::LeaseId;
use serde::{Deserialize, Serialize};

use super::ResourceIdentity;
use super::identity::{
    CgroupIdentity, DeviceNumber, DirectoryIdentity, LoopIdentity, MapIdentity, MapKind, MountIdentity,
    NbdIdentity, ProcessIdentity, SwapIdentity,
};

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
    /// Abort a FUSE connection: whoever waits for its server gets an error instead.
    AbortFuse {
        /// The mount that is the lease's.
        mount: MountIdentity,
    },
    /// Stop swapping to an area.
    SwapOff {
        /// Which.
        swap: SwapIdentity,
        /// Its path, as `/proc/swaps` has it.
        path: Vec<u8>,
        /// The loop device, map or the like that it is, is a partition of, or is a file on, when that is
        /// the lease's: the area's own number is given again.
        #[serde(default)]
        on: Option<Box<ResourceIdentity>>,
    },
    /// Unmount one mount, in the namespace it is in.
    Unmount {
        /// Which.
        mount: MountIdentity,
        /// Its number in mountinfo, to find it by.
        short_number: u64,
        /// Where it was, as its namespace sees it; for people and as a place to look, checked by
        /// identity.
        point: Vec<u8>,
        /// The mount it is on, which has to be parted from its peers first: otherwise a bystander's
        /// mount would go with this one.
        apart_from: Option<MountIdentity>,
        /// Whether its namespace is another than the host's; for people.
        #[serde(default)]
        is_elsewhere: bool,
        /// How.
        how: UnmountHow,
    },
    /// Free a file system that nothing shows a mount of: thaw it, and stop swapping to files on it.
    ReleaseFilesystem {
        /// Its type.
        kind: String,
        /// The device it lies on, which is the lease's.
        device: DeviceNumber,
        /// The loop device, map or the like that `device` is or is a part of.
        resource: Box<ResourceIdentity>,
        /// Paths of swap files, as `/proc/swaps` has them, that may be on it.
        swap_files: Vec<Vec<u8>>,
    },
    /// Remove a device-mapper map, or stop an md array.
    RemoveMap {
        /// Which.
        map: MapIdentity,
        /// Its name.
        name: String,
    },
    /// Disconnect a network block device.
    DisconnectNbd {
        /// Which.
        nbd: NbdIdentity,
    },
    /// Detach one loop device, after its partitions were removed.
    DetachLoop {
        /// Which attachment.
        identity: LoopIdentity,
        /// The numbers of its partitions.
        partitions: Vec<u32>,
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

/// How a mount is unmounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UnmountHow {
    /// Only when nothing holds it.
    Plain,
    /// The file system is thawed first: unmounted frozen, it would keep its device for ever.
    Thawed,
    /// Lazily: it goes out of sight, and out of the way of others, and is not free.
    Lazy,
}

impl Step {
    /// What it acts on.
    #[must_use]
    pub fn resources(&self) -> Vec<ResourceIdentity> {
        match self {
            Self::EndProcesses { processes, .. } => {
                processes.iter().copied().map(ResourceIdentity::Process).collect()
            }
            other => other.resource().into_iter().collect(),
        }
    }

    /// Whether it acts on a resource.
    #[must_use]
    pub fn acts_on(&self, resource: ResourceIdentity) -> bool {
        match (self, resource) {
            (Self::EndProcesses { processes, .. }, ResourceIdentity::Process(process)) => {
                processes.contains(&process)
            }
            (other, resource) => other.resource() == Some(resource),
        }
    }

    /// The one resource that it acts on; `None` when that is several processes.
    fn resource(&self) -> Option<ResourceIdentity> {
        Some(match self {
            Self::EndProcesses { .. } => return None,
            Self::AbortFuse { mount } | Self::Unmount { mount, .. } => ResourceIdentity::Mount(*mount),
            Self::SwapOff { swap, .. } => ResourceIdentity::Swap(*swap),
            Self::ReleaseFilesystem { resource, .. } => **resource,
            Self::RemoveMap { map, .. } => ResourceIdentity::Map(*map),
            Self::DisconnectNbd { nbd } => ResourceIdentity::Nbd(*nbd),
            Self::DetachLoop { identity, .. } => ResourceIdentity::Loop(*identity),
            Self::RemoveDirectory { directory, .. } => ResourceIdentity::Directory(*directory),
            Self::RemoveCgroup { cgroup, .. } => ResourceIdentity::Cgroup(*cgroup),
        })
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
            Self::AbortFuse { mount } => format!("abort the FUSE connection of mount {}", mount.device),
            Self::SwapOff { path, .. } => format!("stop swapping to {}", printable(path)),
            Self::Unmount { mount, point, apart_from, is_elsewhere, how, .. } => {
                let how = match how {
                    UnmountHow::Plain => "unmount",
                    UnmountHow::Thawed => "thaw and unmount",
                    UnmountHow::Lazy => "unmount lazily, which frees nothing,",
                };
                let apart =
                    if apart_from.is_some() { ", apart from a bystander's mount of the same" } else { "" };
                let place = if *is_elsewhere {
                    format!(" in mount namespace {}", mount.namespace.0)
                } else {
                    String::new()
                };
                format!("{how} {}{place}{apart}", printable(point))
            }
            Self::ReleaseFilesystem { kind, device, .. } => {
                format!("thaw the {kind} file system on {device}, which is mounted nowhere")
            }
            Self::RemoveMap { map, name } => match map.kind {
                MapKind::DeviceMapper => format!("remove map {}", printable(name.as_bytes())),
                MapKind::Array => format!("stop array {}", printable(name.as_bytes())),
            },
            Self::DisconnectNbd { nbd } => format!("disconnect /dev/nbd{}", nbd.number),
            Self::DetachLoop { identity, partitions } if partitions.is_empty() => {
                format!("detach /dev/loop{}", identity.number)
            }
            Self::DetachLoop { identity, partitions } => {
                format!(
                    "remove {} partitions of /dev/loop{} and detach it",
                    partitions.len(),
                    identity.number
                )
            }
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
    /// The mount is there and may not be unmounted where it is: a user namespace locks it.
    Locked,
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
            Self::Locked => "a user namespace locks it".to_owned(),
            Self::Failed { cause } => format!("failed: {cause}"),
            Self::Hung { doing } => format!("hangs: {doing}"),
        }
    }
}
