//! Mounts that are attached nowhere (`fsopen(2)`, `fsmount(2)`).
//!
//! A file system that nothing shows a mount of can only be reached by mounting it again. Attached
//! somewhere, such a mount would be seen by everybody for that moment: it could be walked into,
//! copied into a namespace that is just being made, or propagate into others, and then keep the very
//! device that it was to free. A mount that is attached nowhere is seen by nobody, and ends with the
//! only descriptor of it, also when this process is killed.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, openat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen,
};

/// How a file system is mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// For reading and writing.
    Writing,
    /// For reading only.
    ReadingOnly,
}

/// A mount that is attached nowhere.
#[derive(Debug)]
pub struct Detached {
    mount: OwnedFd,
}

impl Detached {
    /// A file system of the kernel's own.
    ///
    /// # Errors
    /// `ENODEV` when this kernel has none of that type, `ENOSYS` before Linux 5.2.
    pub fn of_kernel(kind: &str) -> io::Result<Self> {
        make(kind, &[], Access::Writing)
    }

    /// The file system that lives on a device already. What lives is used as it is: its options are
    /// those it was mounted with, and its journal is not touched. Most types can only be mounted again as
    /// they are, so the other access is tried too. But a btrfs that is mounted for reading only is writable
    /// from then on when it is mounted for writing (6.18).
    ///
    /// # Errors
    /// What the calls say: `EBUSY` when the device is in use otherwise.
    pub fn of_living(kind: &str, node: &Path, access: Access) -> io::Result<Self> {
        Self::living(kind, &[("source", node.as_os_str())], access)
    }

    /// The btrfs that lives on a device, for reading only; and of one that does not live nothing is written:
    /// `rescue=nologreplay` counts only for what is mounted anew, and allows no writing there
    /// (`btrfs_check_options` in `fs/btrfs/super.c`).
    ///
    /// # Errors
    /// What the calls say.
    pub fn of_living_btrfs(node: &Path) -> io::Result<Self> {
        let options = [("source", node.as_os_str()), ("rescue", "nologreplay".as_ref())];
        Self::living("btrfs", &options, Access::ReadingOnly)
    }

    fn living(kind: &str, options: &[(&str, &OsStr)], first: Access) -> io::Result<Self> {
        let mut busy = io::Error::from_raw_os_error(libc::EBUSY);
        let second = match first {
            Access::Writing => Access::ReadingOnly,
            Access::ReadingOnly => Access::Writing,
        };
        for kind in drivers_names(kind) {
            for access in [first, second] {
                match make(kind, options, access) {
                    // It lives under another name, or mounted the other way.
                    Err(error) if error.raw_os_error() == Some(libc::EBUSY) => busy = error,
                    made => return made,
                }
            }
        }
        Err(busy)
    }

    /// Its root, opened for reading.
    ///
    /// # Errors
    /// What `openat(2)` says.
    pub fn root(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        Ok(openat(&self.mount, ".", flags, Mode::empty())?)
    }

    /// A path to its root that leads there as long as this lives, in this thread only.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/thread-self/fd/{}/", self.mount.as_raw_fd()))
    }
}

/// The names that one driver mounts under. ext4's driver serves three types, shows all of them in
/// sysfs as its own, and finds what lives only under the name that it was mounted by: with another it
/// tries to claim the device anew, which answers `EBUSY`.
fn drivers_names(kind: &str) -> Vec<&str> {
    match kind {
        "ext4" => vec!["ext4", "ext3", "ext2"],
        "ext3" => vec!["ext3", "ext4", "ext2"],
        "ext2" => vec!["ext2", "ext4", "ext3"],
        other => vec![other],
    }
}

fn make(kind: &str, options: &[(&str, &OsStr)], access: Access) -> io::Result<Detached> {
    let context = fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (name, value) in options {
        fsconfig_set_string(&context, *name, *value)?;
    }
    match access {
        Access::Writing => {}
        Access::ReadingOnly => fsconfig_set_flag(&context, "ro")?,
    }
    fsconfig_create(&context)?;
    // Nothing in it is ever run or opened as a device, whatever it holds.
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    Ok(Detached { mount })
}
