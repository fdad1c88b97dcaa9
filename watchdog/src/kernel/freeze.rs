//! Thawing file systems that `FIFREEZE` or `fsfreeze(8)` froze.

use std::io;
use std::os::fd::AsFd;

use super::namespace_calls;

/// Thaws the file system that an open directory or file lies on.
///
/// # Errors
/// `EINVAL` when it is not frozen, `EBADF` for a descriptor of `O_PATH`.
pub fn thaw(directory: impl AsFd) -> io::Result<()> {
    namespace_calls::thaw(directory)
}
