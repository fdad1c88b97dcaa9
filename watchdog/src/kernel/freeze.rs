//! Frozen file systems (`fsfreeze(8)`), and ending that.
//!
//! A frozen file system survives its unmounting: `freeze_super` in `fs/super.c` takes a reference of
//! its own that only a thaw gives back. Then nothing shows the file system any more but its folder
//! in sysfs, where its type has one, and its device stays in use.

use std::io;
use std::os::fd::AsFd;

use super::block_calls;

/// What a thaw found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thawed {
    /// It was frozen, and is not any more.
    Done,
    /// It was not frozen.
    NotFrozen,
}

/// Thaws the file system that an open directory lies on. The directory is opened for reading: the
/// kernel takes no `O_PATH` descriptor for this.
///
/// # Errors
/// What `FITHAW` says, but for `EINVAL`, which means that it is not frozen.
pub fn thaw(directory: impl AsFd) -> io::Result<Thawed> {
    match block_calls::thaw(directory) {
        Ok(()) => Ok(Thawed::Done),
        // `thaw_super` of a file system that is not frozen by user space.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(Thawed::NotFrozen),
        // A type without a way to freeze is never frozen (`ioctl_fsthaw`).
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(Thawed::NotFrozen),
        Err(error) => Err(error),
    }
}
