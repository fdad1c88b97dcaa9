//! Identities: what tells a resource from one that later has the same name.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A block device or file system by number, as `stat(2)` gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DeviceNumber {
    /// Which driver.
    pub major: u32,
    /// Which of its devices.
    pub minor: u32,
}

impl fmt::Display for DeviceNumber {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}:{}", self.major, self.minor)
    }
}

impl DeviceNumber {
    /// Reads `MAJOR:MINOR`, as sysfs and mountinfo write it.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (major, minor) = text.trim().split_once(':')?;
        Some(Self { major: major.parse().ok()?, minor: minor.parse().ok()? })
    }
}

/// A disk's sequence number: the kernel counts it up each time any disk is attached or detached, so
/// no two attachments share one (Linux 5.15, `diskseq` in sysfs).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DiskSequence(pub u64);

/// The file behind a loop device, as the kernel holds it (`lo_device`, `lo_inode`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BackingFile {
    /// The file system it lies on, as `stat(2)` numbers it.
    pub device: DeviceNumber,
    /// Its inode number there.
    pub inode: u64,
}

/// One attachment of a loop device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LoopIdentity {
    /// N of `/dev/loopN`.
    pub number: u32,
    /// Which attachment.
    pub sequence: DiskSequence,
    /// What is attached.
    pub backing: BackingFile,
}

/// What puts several block devices, or one in another way, together as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MapKind {
    /// A device-mapper map: a logical volume, an opened LUKS container, a partition by kpartx.
    DeviceMapper,
    /// An md array.
    Array,
}

/// A block device that the kernel builds on others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MapIdentity {
    /// What builds it.
    pub kind: MapKind,
    /// Its device number.
    pub device: DeviceNumber,
    /// Its disk sequence number: a later map of the same number has another.
    pub sequence: DiskSequence,
}

/// One connection of a network block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NbdIdentity {
    /// N of `/dev/nbdN`.
    pub number: u32,
    /// The process that serves it or keeps it connected, as sysfs's `pid` tells.
    pub server: ProcessIdentity,
}

/// An area that the kernel swaps to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SwapIdentity {
    /// A whole block device or partition.
    Device(DeviceNumber),
    /// A file.
    File(BackingFile),
    /// A file that no path leads to any more: the place of its path in `/proc/swaps`.
    Unreachable(u32),
}

/// A mount namespace by the inode number of its nsfs file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MountNamespace(pub u64);

/// A mount's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MountNumber {
    /// Never given again while the host is up (Linux 6.8, `STATX_MNT_ID_UNIQUE`).
    Unique(u64),
    /// The first column of mountinfo on older kernels, which is given again after an unmount: only
    /// trusted together with all else that [`MountIdentity`] holds.
    Reusable(u64),
}

/// One mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct MountIdentity {
    /// Its number.
    pub number: MountNumber,
    /// The namespace it is in.
    pub namespace: MountNamespace,
    /// The file system that is mounted.
    pub device: DeviceNumber,
}

/// A process's start, in clock ticks since boot (field 22 of `/proc/PID/stat`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StartTime(pub u64);

/// One process: its number, and when it started, because numbers are given again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ProcessIdentity {
    /// Its number in the initial pid namespace.
    pub pid: u32,
    /// When it started.
    pub start: StartTime,
}

/// A directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct DirectoryIdentity {
    /// The file system it lies on.
    pub device: DeviceNumber,
    /// Its inode number there.
    pub inode: u64,
}

/// A control group: its directory's inode number, which the kernel does not give again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct CgroupIdentity(pub u64);

/// One boot of the host (`/proc/sys/kernel/random/boot_id`): all identities but directories end
/// with it.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BootId(pub String);

/// Any resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ResourceIdentity {
    /// A process.
    Process(ProcessIdentity),
    /// A mount.
    Mount(MountIdentity),
    /// A loop device.
    Loop(LoopIdentity),
    /// A device-mapper map or md array.
    Map(MapIdentity),
    /// A connected network block device.
    Nbd(NbdIdentity),
    /// An area that is swapped to.
    Swap(SwapIdentity),
    /// A scratch directory.
    Directory(DirectoryIdentity),
    /// A lease's own control group.
    Cgroup(CgroupIdentity),
}

impl ResourceIdentity {
    /// What kind of resource it is.
    #[must_use]
    pub fn kind(&self) -> hostler_protocol::resource::Kind {
        use hostler_protocol::resource::Kind;
        match self {
            Self::Process(_) => Kind::Process,
            Self::Mount(_) => Kind::Mount,
            Self::Loop(_) => Kind::Loop,
            Self::Map(_) => Kind::Map,
            Self::Nbd(_) => Kind::Nbd,
            Self::Swap(_) => Kind::Swap,
            Self::Directory(_) => Kind::Directory,
            Self::Cgroup(_) => Kind::Cgroup,
        }
    }
}
