//! Why something is still there: holders, each with a reason out of a closed set.

use serde::{Deserialize, Serialize};

/// How a holder keeps something from being freed.
///
/// The set is closed and complete from the start, so that scripts can match on it; which of them
/// the daemon can already find is told by ARCHITECTURE.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reason {
    /// A mount of the device, in the host's namespace.
    Mounted,
    /// A mount in a mount namespace other than the host's.
    ForeignNamespace,
    /// A mount on a directory of this one.
    ChildMount,
    /// A mount on the very same mount point, above this one.
    StackedMount,
    /// An open file of a mount that was detached lazily.
    DetachedMountFd,
    /// A descriptor from `open_tree(2)`.
    OpenTree,
    /// The device itself is open.
    OpenDeviceFd,
    /// A process's current or root directory, its program, or an open file.
    CwdOrRoot,
    /// A mapped file.
    Mapping,
    /// An overlay built on it.
    OverlayLower,
    /// The file system is frozen.
    Frozen,
    /// It is swapped on.
    Swap,
    /// A file on it is swapped on.
    Swapfile,
    /// A loop device whose backing file lies on it.
    NestedLoop,
    /// A device-mapper map.
    Map,
    /// A partition of it.
    Partition,
    /// A FUSE server that does not answer.
    FuseHung,
    /// The mount is locked by a user namespace.
    MntLocked,
    /// The kernel frees it at the last close.
    AutoclearPending,
    /// A live owner's, or nobody's: it must not be touched.
    Bystander,
    /// It cannot be known.
    Unknown,
}

impl Reason {
    /// The word for it in messages and metrics.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Mounted => "mounted",
            Self::ForeignNamespace => "foreign_namespace",
            Self::ChildMount => "child_mount",
            Self::StackedMount => "stacked_mount",
            Self::DetachedMountFd => "detached_mount_fd",
            Self::OpenTree => "open_tree",
            Self::OpenDeviceFd => "open_device_fd",
            Self::CwdOrRoot => "cwd_or_root",
            Self::Mapping => "mapping",
            Self::OverlayLower => "overlay_lower",
            Self::Frozen => "frozen",
            Self::Swap => "swap",
            Self::Swapfile => "swapfile",
            Self::NestedLoop => "nested_loop",
            Self::Map => "map",
            Self::Partition => "partition",
            Self::FuseHung => "fuse_hung",
            Self::MntLocked => "mnt_locked",
            Self::AutoclearPending => "autoclear_pending",
            Self::Bystander => "bystander",
            Self::Unknown => "unknown",
        }
    }
}

/// A thing and what holds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// What it is, for a person: `loop /dev/loop3 (backing file …)`.
    pub what: String,
    /// Whose it is, for a person; empty when nobody's.
    pub whose: String,
    /// What holds it.
    pub holders: Vec<Holder>,
}

/// One holder.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// How it holds.
    pub reason: Reason,
    /// The command an administrator could run to end just this; empty when there is none.
    pub remedy: String,
    /// The holder, and what holds it in turn.
    pub by: Held,
}
