//! What was seen of the host at one look.

use std::collections::BTreeMap;

use hostler_protocol::lease::LeaseId;
use serde::{Deserialize, Serialize};

use super::identity::{
    BackingFile, CgroupIdentity, DeviceNumber, DirectoryIdentity, DiskSequence, MountIdentity,
    MountNamespace, ProcessIdentity,
};

/// How much a look reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotDepth {
    /// What ownership and plans need.
    Ownership,
    /// What explains why something is stuck: also what every process holds, and the mounts of
    /// other namespaces.
    Holders,
}

/// What a loop device is bound to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LoopState {
    /// Bound, and asked: its backing file is known.
    Bound(BackingFile),
    /// Detached while somebody has it open: sysfs still shows a backing file, and the kernel ends
    /// it at the last close.
    Closing,
    /// sysfs says that it is bound, and the device was not asked or did not answer.
    Unread,
}

/// A loop device in use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoopDevice {
    /// N of `/dev/loopN`.
    pub number: u32,
    /// The device's own number.
    pub device: DeviceNumber,
    /// Which attachment; absent before Linux 5.15.
    pub sequence: Option<DiskSequence>,
    /// What it is bound to.
    pub state: LoopState,
    /// sysfs's text for the backing file, fit to be printed. Never decided on: it is as the
    /// reader's namespace sees it, and others can make it read as any path.
    pub backing_text: String,
    /// The kernel detaches it at the last close.
    pub autoclear: bool,
    /// Its partitions' device numbers.
    pub partitions: Vec<DeviceNumber>,
}

/// A mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Which.
    pub identity: MountIdentity,
    /// The number in mountinfo's first column, which fdinfo and mountinfo refer to.
    pub short_number: u64,
    /// The mount it is on, by the same kind of number; absent for a namespace's root.
    pub parent: Option<u64>,
    /// Where it is mounted, as the kernel's bytes.
    pub point: Vec<u8>,
    /// Which part of the file system is mounted.
    pub root: Vec<u8>,
    /// The type of the file system.
    pub filesystem: String,
    /// What was mounted, as whoever mounted it called it. Never decided on.
    pub source: Vec<u8>,
    /// Propagates to and from other mounts.
    pub shared: bool,
}

/// Where a process stands in the tree of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Place {
    /// The mount, by mountinfo's number.
    pub mount: u64,
    /// The file system.
    pub device: DeviceNumber,
}

/// A file that a process has open.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileHold {
    /// The descriptor's number.
    pub descriptor: u32,
    /// The mount it was opened on.
    pub place: Place,
    /// The device, when the file is a block device's node.
    pub block_device: Option<DeviceNumber>,
    /// `/proc`'s text for it. Enough to tell a person; never decided on.
    pub text: Vec<u8>,
}

/// A process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Which.
    pub identity: ProcessIdentity,
    /// Its parent's number.
    pub parent: u32,
    /// Whose it is.
    pub uid: u32,
    /// Its name, as it calls itself.
    pub name: Vec<u8>,
    /// A zombie: ended, and not yet waited for. It holds nothing.
    pub ended: bool,
    /// Its mount namespace; absent when it may not be read.
    pub namespace: Option<MountNamespace>,
    /// Its current directory. Only at [`SnapshotDepth::Holders`], as are the next ones.
    pub current_directory: Option<Place>,
    /// Its root directory.
    pub root_directory: Option<Place>,
    /// Its program.
    pub program: Option<Place>,
    /// Its open files.
    pub files: Vec<FileHold>,
    /// The file systems it has files mapped of.
    pub mapped: Vec<DeviceNumber>,
    /// Where systemd or another manager put it: the control group's path, for people.
    pub unit: String,
}

/// That something lies below a claimed directory, found by descriptor and never by text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnderClaim<T> {
    /// Whose claim.
    pub lease: LeaseId,
    /// What lies below it.
    pub what: T,
}

/// Something that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Gap {
    /// The list of loop devices.
    Loops(String),
    /// One loop device did not answer.
    Loop(u32, String),
    /// The host's mounts.
    Mounts(String),
    /// Another namespace's mounts.
    Namespace(MountNamespace, String),
    /// The list of processes.
    Processes(String),
    /// What a process holds.
    Process(u32, String),
    /// A lease's control group.
    Cgroup(LeaseId, String),
    /// A claimed directory could not be searched.
    Claim(LeaseId, String),
}

impl Gap {
    /// One line for a person.
    #[must_use]
    pub fn sentence(&self) -> String {
        match self {
            Self::Loops(cause) => format!("loop devices could not be listed: {cause}"),
            Self::Loop(number, cause) => format!("/dev/loop{number} could not be asked: {cause}"),
            Self::Mounts(cause) => format!("mounts could not be listed: {cause}"),
            Self::Namespace(namespace, cause) => {
                format!("the mounts of namespace {} could not be listed: {cause}", namespace.0)
            }
            Self::Processes(cause) => format!("processes could not be listed: {cause}"),
            Self::Process(pid, cause) => format!("what process {pid} holds could not be read: {cause}"),
            Self::Cgroup(lease, cause) => {
                format!("the control group of lease {lease} could not be read: {cause}")
            }
            Self::Claim(lease, cause) => {
                format!("a directory that lease {lease} claimed could not be searched: {cause}")
            }
        }
    }
}

/// The host at one look.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The namespace whose mounts are `mounts`: the host's.
    pub namespace: Option<MountNamespace>,
    /// Loop devices in use.
    pub loops: Vec<LoopDevice>,
    /// Mounts of the host's namespace, in mountinfo's order: a mount comes after its parent, and
    /// of two on one point the upper one comes later.
    pub mounts: Vec<Mount>,
    /// Mounts of loop devices in other namespaces.
    pub foreign_mounts: Vec<Mount>,
    /// Processes.
    pub processes: Vec<Process>,
    /// Members of each lease's control group, and of those below it.
    pub members: BTreeMap<LeaseId, Vec<ProcessIdentity>>,
    /// Control groups of leases that are there.
    pub cgroups: BTreeMap<LeaseId, CgroupIdentity>,
    /// Scratch directories that are there.
    pub directories: Vec<UnderClaim<DirectoryIdentity>>,
    /// Backing files of loop devices that lie below claims.
    pub claimed_files: Vec<UnderClaim<BackingFile>>,
    /// Mounts whose mount points lie below claims.
    pub claimed_mounts: Vec<UnderClaim<MountIdentity>>,
    /// What could not be read.
    pub gaps: Vec<Gap>,
}
