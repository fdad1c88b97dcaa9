//! What was seen of the host at one look.

use std::collections::{BTreeMap, BTreeSet};

use hostler_protocol::lease::LeaseId;
use serde::{Deserialize, Serialize};

use super::bytes;
use super::identity::{
    BackingFile, CgroupIdentity, DeviceNumber, DirectoryIdentity, DiskSequence, MapIdentity, MountIdentity,
    MountNamespace, NbdIdentity, ProcessIdentity, ResourceIdentity, SwapIdentity,
};
use super::policy::{Match, Qemu};

/// How much a look reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotDepth {
    /// What ownership and plans need.
    Ownership,
    /// What the status and the metrics show: also which processes are qemu's.
    Status,
    /// What explains why something is stuck: what every process holds, but not the qemus.
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
    /// Not bound any more, and `partx` left partitions on it that lie about the next image.
    Leftover,
}

/// A partition of a block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Partition {
    /// Its number on its disk, from 1.
    pub number: u32,
    /// Its own device number.
    pub device: DeviceNumber,
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
    /// Its partitions.
    pub partitions: Vec<Partition>,
}

/// A device-mapper map or md array.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Map {
    /// Which.
    pub identity: MapIdentity,
    /// Its name, as sysfs has it: `vg-root`, `md0`. What removes a map names it so, and checks its
    /// device number; else it is for people.
    pub name: String,
    /// The device-mapper's uuid, which tells who made it (`LVM-…`, `CRYPT-LUKS2-…`, `part1-…`); for
    /// people.
    pub uuid: String,
    /// The block devices that it is built on, whole ones or partitions.
    pub lower: Vec<DeviceNumber>,
    /// Its partitions.
    pub partitions: Vec<Partition>,
}

/// A connected network block device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nbd {
    /// N of `/dev/nbdN`.
    pub number: u32,
    /// The device's own number.
    pub device: DeviceNumber,
    /// Which connection; absent when the process that sysfs names could not be found. It may be in
    /// use all the same.
    pub identity: Option<NbdIdentity>,
    /// Its partitions.
    pub partitions: Vec<Partition>,
}

/// An area that the kernel swaps to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Swap {
    /// Which.
    pub identity: SwapIdentity,
    /// Where, as `/proc/swaps` says: `swapoff` takes a path, and only one of a swap area in use.
    #[serde(with = "super::bytes")]
    pub path: Vec<u8>,
}

/// A file system that is in use on block devices, whether or not anything shows a mount of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Filesystem {
    /// Its type: `ext4`, `btrfs`.
    pub kind: String,
    /// The number that sysfs gave its folder when it began to live, and gives to no other (`kernfs_get_ino`).
    pub instance: u64,
    /// The devices it lies on; several for btrfs.
    pub blocks: Vec<DeviceNumber>,
    /// The number that its mounts show, where that is another (btrfs), and could be learnt.
    pub shown_as: Vec<DeviceNumber>,
    /// Frozen, as far as the file system lets anybody see it.
    pub frozen: Option<bool>,
}

/// A FUSE connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FuseConnection {
    /// The device number that its mounts show.
    pub device: DeviceNumber,
    /// Requests that its server has not answered yet.
    pub waiting: u64,
}

/// A mount namespace other than the host's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespace {
    /// Which, by inode: what `/proc/PID/ns/mnt` shows.
    pub namespace: MountNamespace,
    /// The number that is never given again (Linux 6.11, `NS_GET_MNTNS_ID`). It does not tell which of two
    /// is older: Linux 6.18 gives each processor a supply of its own.
    pub unique: Option<u64>,
    /// It belongs to another user namespace than the daemon: what it got from its maker is locked in
    /// it.
    pub other_user_namespace: bool,
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
    #[serde(with = "super::bytes")]
    pub point: Vec<u8>,
    /// Which part of the file system is mounted.
    #[serde(with = "super::bytes")]
    pub root: Vec<u8>,
    /// The type of the file system.
    pub filesystem: String,
    /// What was mounted, as whoever mounted it called it. Never decided on.
    #[serde(with = "super::bytes")]
    pub source: Vec<u8>,
    /// The peer group that it shares its mounts with (`shared:N`).
    pub peers: Option<u64>,
    /// The peer group that it gets mounts from (`master:N`).
    pub master: Option<u64>,
    /// The file system's own options, as mountinfo's last column has them: only for overlays, whose
    /// layers stand there. Text, so it tells what holds, and never whose anything is.
    #[serde(with = "super::bytes")]
    pub layers: Vec<u8>,
    /// The user for whom a FUSE file system was mounted, in the own namespace. It only ever says that a
    /// mount is somebody else's.
    #[serde(default)]
    pub user: Option<u32>,
}

impl Mount {
    /// How many bytes its texts take between a worker and the daemon.
    #[must_use]
    pub fn text_length(&self) -> usize {
        let texts = [&self.point, &self.root, &self.source, &self.layers];
        texts.map(|text| bytes::length(text)).into_iter().sum::<usize>() + 6 * self.filesystem.len()
    }
}

/// Where a process stands in the tree of files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
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
    /// Opened with `O_PATH`, as `open_tree(2)` does.
    pub is_path: bool,
    /// The mount namespace that it is a file of, when it is an nsfs file.
    pub namespace: Option<MountNamespace>,
    /// `/proc`'s text for it. Enough to tell a person; never decided on.
    #[serde(with = "super::bytes")]
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
    #[serde(with = "super::bytes")]
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
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
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
    /// All but what an event told of: nothing else was looked at, so nothing follows from what is not there.
    Unasked,
    /// Another namespace's mounts.
    Namespace(MountNamespace, String),
    /// The list of mount namespaces: one that is not listed may hold anything.
    Namespaces(String),
    /// Block devices besides loop devices: maps, network block devices, swap, file systems.
    Blocks(String),
    /// The list of processes.
    Processes(String),
    /// What a process holds.
    Process(u32, String),
    /// A lease's control group.
    Cgroup(LeaseId, String),
    /// A claimed directory could not be searched.
    Claim(LeaseId, String),
    /// What a rule is about, or what `[protect]` protects, could not be told.
    Criterion(String),
}

impl Gap {
    /// One line for a person.
    #[must_use]
    pub fn sentence(&self) -> String {
        match self {
            Self::Loops(cause) => format!("loop devices could not be listed: {cause}"),
            Self::Loop(number, cause) => format!("/dev/loop{number} could not be asked: {cause}"),
            Self::Unasked => "only what is new was looked at".to_owned(),
            Self::Mounts(cause) => format!("mounts could not be listed: {cause}"),
            Self::Namespace(namespace, cause) => {
                format!("the mounts of namespace {} could not be listed: {cause}", namespace.0)
            }
            Self::Namespaces(cause) => format!("mount namespaces could not be listed: {cause}"),
            Self::Blocks(cause) => format!("block devices could not be listed: {cause}"),
            Self::Processes(cause) => format!("processes could not be listed: {cause}"),
            Self::Process(pid, cause) => format!("what process {pid} holds could not be read: {cause}"),
            Self::Cgroup(lease, cause) => {
                format!("the control group of lease {lease} could not be read: {cause}")
            }
            Self::Claim(lease, cause) => {
                format!("a directory that lease {lease} claimed could not be searched: {cause}")
            }
            Self::Criterion(sentence) => sentence.clone(),
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
    /// Device-mapper maps and md arrays.
    pub maps: Vec<Map>,
    /// Connected network block devices.
    pub nbds: Vec<Nbd>,
    /// Swap areas.
    pub swaps: Vec<Swap>,
    /// File systems in use on block devices.
    pub filesystems: Vec<Filesystem>,
    /// FUSE connections.
    pub fuse: Vec<FuseConnection>,
    /// Mounts: all of the host's namespace, a mount after the one it is on (so of two on one point the
    /// upper one comes later), and else in mountinfo's order; then, of every other namespace, those that
    /// lie on a block device of this snapshot (but not on the one of the host's root) or on FUSE,
    /// overlays, nsfs files, and all that is mounted on those, but for what is mounted on a namespace's
    /// root.
    pub mounts: Vec<Mount>,
    /// The mount namespaces besides the host's, with and without processes.
    pub namespaces: Vec<Namespace>,
    /// Processes.
    pub processes: Vec<Process>,
    /// Members of each lease's control group, and of those below it.
    pub members: BTreeMap<LeaseId, Vec<ProcessIdentity>>,
    /// Control groups of leases that are there.
    pub cgroups: BTreeMap<LeaseId, CgroupIdentity>,
    /// Scratch directories that are there.
    pub directories: Vec<UnderClaim<DirectoryIdentity>>,
    /// Leases that claimed a directory below one that another lease claimed.
    pub inner_claims: Vec<UnderClaim<LeaseId>>,
    /// Backing files of loop devices that lie below claims.
    pub claimed_files: Vec<UnderClaim<BackingFile>>,
    /// Mounts whose mount points lie below claims.
    pub claimed_mounts: Vec<UnderClaim<MountIdentity>>,
    /// What the rules are about.
    pub matches: Vec<Match>,
    /// What `[protect]` names, or may name: where that cannot be told, it is protected.
    pub protected: BTreeSet<ResourceIdentity>,
    /// Processes of qemu. Only at [`SnapshotDepth::Status`].
    pub qemus: Option<Vec<Qemu>>,
    /// What could not be read.
    pub gaps: Vec<Gap>,
}
