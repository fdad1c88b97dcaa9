//! Claimed directories: finding things below them, and removing them.
//!
//! Everything starts at a descriptor and goes down with `openat2(2)`, never following a symbolic
//! link, so that whoever owns the tree cannot lead the daemon out of it.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, Statx, StatxFlags, fstat, openat, openat2,
    statat, statx, unlinkat,
};

use super::visit::standing_in;
use super::{calls, mounts, reach};
use crate::model::{BackingFile, Claim, DeviceNumber, DirectoryIdentity, Mount, MountNumber};

/// A directory's identity.
///
/// # Errors
/// `InvalidInput` when the descriptor is of something else.
pub fn identity(directory: impl AsFd) -> io::Result<DirectoryIdentity> {
    let status = known(directory, StatxFlags::TYPE | StatxFlags::INO)?;
    if FileType::from_raw_mode(u32::from(status.stx_mode)) != FileType::Directory {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "that descriptor is of no directory"));
    }
    let device = DeviceNumber { major: status.stx_dev_major, minor: status.stx_dev_minor };
    Ok(DirectoryIdentity { device, inode: status.stx_ino })
}

/// What the kernel knows of a file without asking its file system, which may hang.
fn known(file: impl AsFd, what: StatxFlags) -> io::Result<Statx> {
    Ok(statx(file, "", AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC, what)?)
}

fn device_number(device: u64) -> DeviceNumber {
    DeviceNumber { major: rustix::fs::major(device), minor: rustix::fs::minor(device) }
}

/// Whose a directory is, as far as the kernel knows without asking its file system.
///
/// # Errors
/// What `statx(2)` says.
pub fn owner(directory: impl AsFd) -> io::Result<u32> {
    Ok(known(directory, StatxFlags::UID)?.stx_uid)
}

/// Whether anybody at all may make entries in a directory.
///
/// # Errors
/// What `statx(2)` says.
pub fn is_everybodys(directory: impl AsFd) -> io::Result<bool> {
    Ok(u32::from(known(directory, StatxFlags::MODE)?.stx_mode) & 0o002 != 0)
}

/// Whether a descriptor was opened for writing.
///
/// # Errors
/// What `fcntl(2)` says.
pub fn is_writable(descriptor: impl AsFd) -> io::Result<bool> {
    let flags = rustix::fs::fcntl_getfl(descriptor)?;
    Ok(flags.intersects(OFlags::WRONLY | OFlags::RDWR) && !flags.contains(OFlags::PATH))
}

/// Where a directory is now, as the kernel shows it to this process; for people, and as a hint.
///
/// # Errors
/// What `readlink(2)` says.
pub fn path(directory: impl AsFd) -> io::Result<PathBuf> {
    std::fs::read_link(format!("/proc/self/fd/{}", directory.as_fd().as_raw_fd()))
}

/// Whether a directory has been removed: it has no link left, only our descriptor.
///
/// # Errors
/// What `fstat(2)` says.
pub fn is_removed(directory: impl AsFd) -> io::Result<bool> {
    Ok(known(directory, StatxFlags::NLINK)?.stx_nlink == 0)
}

/// The number of the mount that a directory was opened on.
///
/// # Errors
/// What `statx(2)` says.
pub fn mount_of(directory: impl AsFd) -> io::Result<MountNumber> {
    match mounts::number_at(&directory, OsStr::new(""), true) {
        Err(error) if error.kind() == io::ErrorKind::Unsupported => {
            mounts::number_at(&directory, OsStr::new(""), false)
        }
        result => result,
    }
}

/// A directory whose file system has no file handles: where it was on the very mount that it was claimed on, as
/// long as what is there has its number.
fn find_by_path(claim: &Claim, mounts: &[&Mount]) -> io::Result<OwnedFd> {
    let error = |kind, cause: &str| Err(io::Error::new(kind, cause.to_owned()));
    if !can_be_found_again(claim) {
        return error(
            io::ErrorKind::Unsupported,
            "its file system has no file handles, so it cannot be told from another after a restart",
        );
    }
    let Some(mount) = mounts.iter().find(|mount| Some(mount.identity.number) == claim.mount) else {
        return error(io::ErrorKind::NotFound, "its file system is not mounted any more");
    };
    let hidden = || error(io::ErrorKind::ResourceBusy, "it is not where it was claimed any more");
    let Some(root) = reach::open_seen_root(mount)? else { return hidden() };
    let Ok(below) = Path::new(&claim.path).strip_prefix(OsStr::from_bytes(&mount.point)) else {
        return hidden();
    };
    let found = reach::open_path(&root, below, ResolveFlags::BENEATH | ResolveFlags::NO_XDEV)?;
    if identity(&found).is_ok_and(|found| found == claim.directory) { Ok(found) } else { hidden() }
}

/// Whether a claimed directory can be found again once no descriptor of it is left.
#[must_use]
pub fn can_be_found_again(claim: &Claim) -> bool {
    // A path that could not be printed as it is, is not what it says.
    claim.handle.is_some()
        || matches!(claim.mount, Some(MountNumber::Unique(_))) && !claim.path.contains('\\')
}

/// Opens a claimed directory again, after a restart, by its file handle: no path is resolved but
/// that of a mount point of its file system, which is checked by the result's identity.
///
/// The mount that it was claimed on is tried first: a bind mount of the same file system shows other
/// paths, or has other mounts on it. For worker processes, as it goes to that mount for a moment; see
/// [`super::visit`].
///
/// # Errors
/// `ESTALE` when it is gone, `NotFound` when its file system is mounted nowhere; `Unsupported` when it
/// never had a handle, and its mount's number could be another one's by now.
pub fn reopen(claim: &Claim, mounts: &[&Mount]) -> io::Result<OwnedFd> {
    let Some((kind, bytes)) = &claim.handle else {
        return find_by_path(claim, mounts);
    };
    let is_it = |mount: &&&Mount| Some(mount.identity.number) == claim.mount;
    // A subvolume of btrfs has a number of its own, which no mount shows.
    let may_be = |mount: &&&Mount| {
        !is_it(mount) && (mount.device() == claim.directory.device || mount.filesystem == "btrfs")
    };
    let is_unmistakable = is_unmistakable(*kind, bytes, claim.directory.device);
    let mut last = if mounts.iter().any(|mount| is_it(&mount) || may_be(&mount)) {
        let cause = if is_unmistakable {
            "something is mounted over all mounts of its file system"
        } else {
            "the mount that it was claimed on is gone, and its file system cannot be told from another there"
        };
        io::Error::new(io::ErrorKind::ResourceBusy, cause)
    } else {
        io::Error::new(io::ErrorKind::NotFound, "its file system is not mounted any more")
    };
    let others = mounts.iter().filter(may_be).filter(|_| is_unmistakable);
    for mount in mounts.iter().filter(is_it).chain(others) {
        let root = match reach::open_seen_root(mount) {
            Ok(Some(root)) => root,
            Ok(None) => continue,
            Err(error) => {
                last = error;
                continue;
            }
        };
        match standing_in(&root, || calls::open_handle(CWD, *kind, bytes))? {
            Ok(directory) if identity(&directory)? == claim.directory => return Ok(directory),
            Ok(_) => {}
            // A handle is of a file system, so what one mount of it says they all say.
            Err(error) if is_stale(&error) && mount.device() == claim.directory.device => return Err(error),
            Err(error) => last = error,
        }
    }
    Err(last)
}

/// Whether a handle that opens on a device of that number is of the same directory: device numbers of loop and
/// network block devices are given again within seconds, and an inode whose generation is 0 (the root of an
/// ext4, and all that `mke2fs -d` makes) is opened on any file system that has one of that number.
fn is_unmistakable(kind: i32, handle: &[u8], device: DeviceNumber) -> bool {
    /// `FILEID_INO32_GEN` and `FILEID_INO32_GEN_PARENT` of `linux/exportfs.h`: inode, generation.
    const WITH_GENERATION: [i32; 2] = [1, 2];
    /// Loop and network block devices (the kernel's `devices.txt`).
    const GIVEN_AGAIN: [u32; 2] = [7, 43];
    let is_without = WITH_GENERATION.contains(&kind) && handle.get(4..8).is_none_or(|it| it == [0; 4]);
    !is_without && !GIVEN_AGAIN.contains(&device.major)
}

fn is_stale(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ESTALE)
}

/// The file at `hint`, when it lies below the directory on the same file system: its identity, for
/// comparison with what a loop device says of its backing file. `None` when nothing is there.
///
/// # Errors
/// What `openat2(2)` says, but for what only means that nothing is there.
pub fn file_below(directory: impl AsFd, hint: &Path) -> io::Result<Option<BackingFile>> {
    let base = path(&directory)?;
    let Ok(relative) = hint.strip_prefix(&base) else { return Ok(None) };
    let how = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_XDEV
        | ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match openat2(&directory, relative, flags, Mode::empty(), how) {
        Ok(file) => {
            let status = fstat(&file)?;
            Ok(Some(BackingFile { device: device_number(status.st_dev), inode: status.st_ino }))
        }
        Err(error) if is_elsewhere(error) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn is_elsewhere(error: rustix::io::Errno) -> bool {
    use rustix::io::Errno;
    matches!(error, Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV)
}

/// Removes a directory with all it holds.
///
/// Never follows a link, never crosses onto another mount: what is mounted below stays, and makes
/// this fail.
///
/// # Errors
/// The first thing that could not be removed.
pub fn remove(directory: impl AsFd) -> io::Result<()> {
    empty(directory.as_fd(), 0)?;
    let own = identity(&directory)?;
    let up = openat2(
        &directory,
        "..",
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS,
    )?;
    let current = path(&directory)?;
    let name = current.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let status = statat(&up, name, AtFlags::SYMLINK_NOFOLLOW)?;
    if (DirectoryIdentity { device: device_number(status.st_dev), inode: status.st_ino }) != own {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it was renamed while it was removed"));
    }
    Ok(unlinkat(&up, name, AtFlags::REMOVEDIR)?)
}

/// A tree deeper than this is not a scratch directory but an attack on this process's descriptors.
const DEPTH_LIMIT: usize = 512;

fn empty(directory: std::os::fd::BorrowedFd<'_>, depth: usize) -> io::Result<()> {
    if depth == DEPTH_LIMIT {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "directories are nested deeper than 512"));
    }
    // A directory that is changed while it is read may not show all; it is read until it is empty.
    loop {
        let mut names = Vec::new();
        let reader =
            openat(directory, ".", OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
        for entry in Dir::new(reader)? {
            let entry = entry?;
            if entry.file_name() != c"." && entry.file_name() != c".." {
                names.push((entry.file_name().to_owned(), entry.file_type()));
            }
        }
        if names.is_empty() {
            return Ok(());
        }
        for (name, kind) in names {
            match kind {
                FileType::Directory => remove_directory(directory, &name, depth)?,
                _ => match unlinkat(directory, &name, AtFlags::empty()) {
                    Ok(()) | Err(rustix::io::Errno::NOENT) => {}
                    Err(rustix::io::Errno::ISDIR) => remove_directory(directory, &name, depth)?,
                    Err(error) => return Err(named(error, &name)),
                },
            }
        }
    }
}

fn remove_directory(
    parent: std::os::fd::BorrowedFd<'_>,
    name: &std::ffi::CStr,
    depth: usize,
) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let how = ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH;
    match openat2(parent, name, flags, Mode::empty(), how) {
        Ok(directory) => {
            empty(directory.as_fd(), depth + 1)?;
            unlinkat(parent, name, AtFlags::REMOVEDIR).map_err(|error| named(error, name))
        }
        Err(rustix::io::Errno::NOENT) => Ok(()),
        Err(rustix::io::Errno::XDEV) => {
            let name = hostler_protocol::text::printable(name.to_bytes());
            Err(io::Error::new(io::ErrorKind::ResourceBusy, format!("something is mounted on {name}")))
        }
        Err(error) => Err(named(error, name)),
    }
}

fn named(error: rustix::io::Errno, name: &std::ffi::CStr) -> io::Error {
    let name = hostler_protocol::text::printable(name.to_bytes());
    let error = io::Error::from(error);
    io::Error::new(error.kind(), format!("{name}: {error}"))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    fn open(path: &Path) -> OwnedFd {
        rustix::fs::open(path, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .expect("a directory of this test")
    }

    #[test]
    fn a_handle_without_generation_or_of_a_device_that_is_given_again_may_be_of_another() {
        let (disk, again) = (DeviceNumber { major: 254, minor: 0 }, DeviceNumber { major: 7, minor: 3 });
        let (root, made) = ([2, 0, 0, 0, 0, 0, 0, 0], [12, 0, 0, 0, 0x5c, 1, 0, 9]);
        assert!(is_unmistakable(1, &made, disk));
        assert!(!is_unmistakable(1, &made, again));
        assert!(!is_unmistakable(1, &root, disk));
        assert!(!is_unmistakable(1, &[2], disk));
        // What a file system of another kind writes there is its own.
        assert!(is_unmistakable(0x4d, &root, disk));
    }

    #[test]
    fn removes_a_tree_and_not_what_links_lead_to() {
        let place = tempfile::tempdir().expect("a temporary directory");
        let outside = place.path().join("outside");
        fs::create_dir_all(outside.join("kept")).expect("fresh");
        fs::write(outside.join("file"), "kept").expect("fresh");
        let scratch = place.path().join("scratch");
        fs::create_dir_all(scratch.join("a/b/c")).expect("fresh");
        fs::write(scratch.join("a/b/file"), "x").expect("fresh");
        symlink(&outside, scratch.join("a/link")).expect("fresh");
        symlink(outside.join("file"), scratch.join("link")).expect("fresh");
        fs::hard_link(outside.join("file"), scratch.join("hard")).expect("fresh");

        let directory = open(&scratch);
        remove(&directory).expect("ours to remove");
        assert!(!scratch.exists());
        assert!(is_removed(&directory).expect("still open"));
        assert_eq!(fs::read_to_string(outside.join("file")).expect("untouched"), "kept");
        assert!(outside.join("kept").is_dir());
    }

    #[test]
    fn finds_a_file_below_and_none_beside() {
        let place = tempfile::tempdir().expect("a temporary directory");
        let claimed = place.path().join("claimed");
        fs::create_dir(&claimed).expect("fresh");
        fs::write(claimed.join("image"), "x").expect("fresh");
        fs::write(place.path().join("other"), "x").expect("fresh");
        symlink(place.path().join("other"), claimed.join("link")).expect("fresh");
        let directory = open(&claimed);
        let found = |path: PathBuf| file_below(&directory, &path).expect("readable");
        use std::os::unix::fs::MetadataExt;
        let image = fs::metadata(claimed.join("image")).expect("there");
        assert_eq!(found(claimed.join("image")).map(|file| file.inode), Some(image.ino()));
        assert_eq!(found(claimed.join("image (deleted)")), None);
        assert_eq!(found(place.path().join("other")), None);
        assert_eq!(found(claimed.join("../other")), None);
        // The link itself is found, not what it leads to: its inode is nobody's backing file.
        let other = fs::metadata(place.path().join("other")).expect("there");
        assert_ne!(found(claimed.join("link")).map(|file| file.inode), Some(other.ino()));
    }

    #[test]
    fn a_directory_is_found_again_by_its_handle() {
        let place = tempfile::tempdir().expect("a temporary directory");
        let directory = open(place.path());
        match calls::file_handle(&directory) {
            Ok((_, bytes)) => assert!(!bytes.is_empty()),
            // An overlay or tmpfs without export support: then the claim has no handle.
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::EOPNOTSUPP)),
        }
    }
}
