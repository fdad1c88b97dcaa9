//! Frozen file systems (`fsfreeze(8)`), and ending that.
//!
//! A frozen file system survives its unmounting: `freeze_super` in `fs/super.c` takes a reference of
//! its own that only a thaw gives back. Then nothing shows the file system any more but its folder
//! in sysfs, where its type has one, and its device stays in use.

use std::io;
use std::os::fd::AsFd;

use super::block_calls;

/// Thaws the file system that an open directory or file lies on.
///
/// # Errors
/// As [`is_not_frozen`] tells when there was nothing to thaw; `EBADF` for a descriptor of `O_PATH`.
pub fn thaw(directory: impl AsFd) -> io::Result<()> {
    block_calls::thaw(directory)
}

/// Whether an error of [`thaw`] only says that the file system is not frozen: `EINVAL` of
/// `thaw_super`, or `EOPNOTSUPP` of a type that cannot be (`ioctl_fsthaw`).
#[must_use]
pub fn is_not_frozen(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP))
}
