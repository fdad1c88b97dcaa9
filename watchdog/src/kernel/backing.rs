//! The backing file of a loop device, found again by the name that sysfs shows for it.
//!
//! The name is as the reader's namespace sees it, and others can make it read as any path: what it leads
//! to is that file only when its device and inode are what the loop device says. Nothing is opened but a
//! place in the tree of files (`O_PATH`), and no symbolic link is followed.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, StatxFlags, openat2, statx};
use rustix::io::Errno;

use crate::model::{BackingFile, DeviceNumber};

/// What a path leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Named {
    /// Which file.
    pub identity: BackingFile,
    /// Whose it is.
    pub uid: u32,
    /// How many names it has.
    pub names: u32,
}

const WAY: ResolveFlags = ResolveFlags::NO_SYMLINKS.union(ResolveFlags::NO_MAGICLINKS);

/// What a path leads to; `None` when that is nothing, or a symbolic link on the way.
///
/// # Errors
/// What `openat2(2)` and `statx(2)` say.
pub fn at(path: &Path) -> io::Result<Option<Named>> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = match openat2(CWD, path, flags, Mode::empty(), WAY) {
        Ok(file) => file,
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let wanted = StatxFlags::INO | StatxFlags::UID | StatxFlags::NLINK;
    let status = statx(&file, "", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, wanted)?;
    let device = DeviceNumber { major: status.stx_dev_major, minor: status.stx_dev_minor };
    let identity = BackingFile { device, inode: status.stx_ino };
    Ok(Some(Named { identity, uid: status.stx_uid, names: status.stx_nlink }))
}

/// Opens a directory that the configuration names; `None` when it is not there.
///
/// # Errors
/// What `openat2(2)` says, and what to do about a symbolic link: whoever can change one on the way could
/// make the name mean any directory.
pub fn open_directory(path: &Path) -> io::Result<Option<OwnedFd>> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    match openat2(CWD, path, flags, Mode::empty(), WAY) {
        Ok(directory) => Ok(Some(directory)),
        Err(Errno::NOENT) => Ok(None),
        Err(Errno::LOOP) => Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "a symbolic link is on the way; write the path that it leads to",
        )),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    #[test]
    fn a_name_leads_to_its_file_and_to_no_other_by_a_link() {
        let place = tempfile::tempdir().expect("a temporary directory");
        let path = |name: &str| place.path().join(name);
        fs::write(path("image"), "x").expect("fresh");
        symlink(path("image"), path("link")).expect("fresh");
        symlink(place.path(), path("up")).expect("fresh");
        let image = fs::metadata(path("image")).expect("there");
        let named = at(&path("image")).expect("readable").expect("there");
        assert_eq!((named.identity.inode, named.uid, named.names), (image.ino(), image.uid(), 1));
        fs::hard_link(path("image"), path("other")).expect("fresh");
        assert_eq!(at(&path("other")).expect("readable").map(|named| named.names), Some(2));
        for nothing in ["image (deleted)", "image/x", "up/image"] {
            assert_eq!(at(&path(nothing)).expect("readable"), None, "{nothing}");
        }
        // The link itself, which backs nothing.
        assert_ne!(at(&path("link")).expect("readable").map(|named| named.identity.inode), Some(image.ino()));
        assert!(open_directory(place.path()).expect("readable").is_some());
        assert!(open_directory(&path("none")).expect("readable").is_none());
        let refused = open_directory(&path("up")).expect_err("a link").to_string();
        assert!(refused.contains("write the path that it leads to"), "{refused}");
    }
}
