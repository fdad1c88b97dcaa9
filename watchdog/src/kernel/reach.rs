//! Finding the way to a mount again: the directory that its mount point is in, and its name there.
//!
//! No path that was seen before is trusted. It is opened without following any symbolic link, and what
//! it leads to is compared by number. Where something else was mounted over a directory on the way, the
//! mount is still there below it, and no path leads to it; see [`hidden`].

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::mount::{OpenTreeFlags, open_tree};

use super::visit::{Visit, standing_in};
use super::{calls, mounts};
use crate::model::{Mount, MountNumber};

/// The way to a mount, in the namespace that is visited.
#[derive(Debug)]
pub struct Reached {
    directory: OwnedFd,
    name: OsString,
}

impl Reached {
    /// Whether this mount is what the name leads to, right now.
    ///
    /// # Errors
    /// What `statx(2)` says.
    pub fn is(&self, mount: &Mount) -> io::Result<bool> {
        Ok(number_at(&self.directory, &self.name, mount)? == mount.identity.number)
    }

    /// Opens the root of what is mounted there.
    ///
    /// # Errors
    /// What `openat2(2)` says.
    pub fn open(&self, flags: OFlags) -> io::Result<OwnedFd> {
        open_step(
            self.directory.as_fd(),
            Path::new(&self.name),
            flags | OFlags::NOFOLLOW,
            ResolveFlags::empty(),
        )
    }

    /// Runs `act` with a relative path that leads there, from the process's current directory. It has
    /// one name only, so nobody can put anything in its way but at its end.
    ///
    /// # Errors
    /// What `act` says.
    pub fn standing_beside<T>(&self, act: impl FnOnce(&OsStr) -> io::Result<T>) -> io::Result<T> {
        standing_in(&self.directory, || act(&self.name))?
    }
}

/// The way to a mount; `None` when there is none, because something is mounted on it or at its place.
///
/// # Errors
/// What opening says, but for what only means that the way is another by now.
pub fn reach(visit: &Visit, mount: &Mount) -> io::Result<Option<Reached>> {
    if let Some(reached) = seen(mount)? {
        return Ok(Some(reached));
    }
    let table = mounts::table(visit)?;
    hidden(mount, &table, DEPTH_LIMIT)
}

/// Opens the root directory of exactly this mount; `None` when no way leads there.
///
/// # Errors
/// As [`reach`].
pub fn open_root(visit: &Visit, mount: &Mount) -> io::Result<Option<OwnedFd>> {
    if let Some(root) = open_seen_root(mount)? {
        return Ok(Some(root));
    }
    hidden_root(mount, &mounts::table(visit)?, DEPTH_LIMIT)
}

/// How many mounts that hide each other are looked below.
const DEPTH_LIMIT: usize = 16;

/// Which number tells a mount on this kernel.
pub(super) fn number_at(directory: impl AsFd, name: &OsStr, mount: &Mount) -> io::Result<MountNumber> {
    let unique = match mount.identity.number {
        MountNumber::Unique(_) => true,
        MountNumber::Reusable(_) => false,
    };
    mounts::number_at(directory, name, unique)
}

/// The way that its path tells.
fn seen(mount: &Mount) -> io::Result<Option<Reached>> {
    let point = Path::new(OsStr::from_bytes(&mount.point));
    let (Some(above), Some(name)) = (point.parent(), point.file_name()) else { return Ok(None) };
    let directory = match open_path(CWD, above, ResolveFlags::empty()) {
        Ok(directory) => directory,
        Err(error) if is_another_way(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    checked(Reached { directory, name: name.to_owned() }, mount)
}

fn checked(reached: Reached, mount: &Mount) -> io::Result<Option<Reached>> {
    match reached.is(mount) {
        Ok(is_it) => Ok(is_it.then_some(reached)),
        Err(error) if is_another_way(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The root of a mount that its path leads to; `None` when it leads elsewhere.
///
/// # Errors
/// What opening says, but for what only means that it leads elsewhere.
pub fn open_seen_root(mount: &Mount) -> io::Result<Option<OwnedFd>> {
    let point = Path::new(OsStr::from_bytes(&mount.point));
    match open_path(CWD, point, ResolveFlags::empty()) {
        Ok(root) if number_at(&root, OsStr::new(""), mount)? == mount.identity.number => Ok(Some(root)),
        Ok(_) => Ok(None),
        Err(error) if is_another_way(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// What opening says when a path leads elsewhere than it did.
fn is_another_way(error: &io::Error) -> bool {
    const WAYS: [i32; 5] = [libc::ENOENT, libc::ENOTDIR, libc::ELOOP, libc::ESTALE, libc::EXDEV];
    error.raw_os_error().is_some_and(|error| WAYS.contains(&error))
}

/// The way to a mount below something that was mounted over a directory of its path.
///
/// Its own parent mount has the directory still. A clone of that mount alone, which nobody else sees, has
/// nothing mounted on it, so there the path leads to the directory. Its file handle then opens the same
/// directory on the real mount, which needs no path. (`open_tree(2)`, `open_by_handle_at(2)`.) What is
/// mounted over it is neither moved nor touched.
///
/// Not to be had that way: a mount whose parent is covered as a whole, since all that leads to a mount
/// leads to the topmost one on its root; and file systems without file handles, such as most overlays.
fn hidden(mount: &Mount, table: &[Mount], depth: usize) -> io::Result<Option<Reached>> {
    let Some(parent) = parent_of(mount, table) else { return Ok(None) };
    let Some(below) = below(&mount.point, &parent.point) else { return Ok(None) };
    let (Some(above), Some(name)) = (below.parent(), below.file_name()) else { return Ok(None) };
    let Some(root) = (match open_seen_root(parent)? {
        Some(root) => Some(root),
        None => hidden_root(parent, table, depth)?,
    }) else {
        return Ok(None);
    };
    let flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let found = open_tree(&root, "", flags).map_err(io::Error::from).and_then(|clone| {
        let how = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV;
        let directory = open_path(clone.as_fd(), above, how)?;
        calls::file_handle(&directory)
    });
    // Where a user namespace locks what is mounted on it, it may not be cloned (`EINVAL`); where there
    // are no handles, that is said (`EOPNOTSUPP`).
    let Ok((kind, handle)) = found else { return Ok(None) };
    let directory = match standing_in(&root, || calls::open_handle(CWD, kind, &handle))? {
        Ok(directory) => directory,
        Err(error) if is_another_way(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    checked(Reached { directory, name: name.to_owned() }, mount)
}

fn hidden_root(mount: &Mount, table: &[Mount], depth: usize) -> io::Result<Option<OwnedFd>> {
    let Some(depth) = depth.checked_sub(1) else { return Ok(None) };
    let Some(reached) = hidden(mount, table, depth)? else { return Ok(None) };
    let root = reached.open(OFlags::PATH | OFlags::DIRECTORY)?;
    Ok((number_at(&root, OsStr::new(""), mount)? == mount.identity.number).then_some(root))
}

fn parent_of<'table>(mount: &Mount, table: &'table [Mount]) -> Option<&'table Mount> {
    let parent = mount.parent?;
    table.iter().find(|other| other.short_number == parent)
}

/// Pure: where a mount point is, seen from the root of the mount that it is on.
fn below<'point>(point: &'point [u8], parent: &[u8]) -> Option<&'point Path> {
    let rest = point.strip_prefix(parent)?;
    let rest = if parent == b"/" { rest } else { rest.strip_prefix(b"/")? };
    Some(Path::new(OsStr::from_bytes(rest)))
}

/// The longest part of a path that is opened at once: the kernel takes no more than 4,096 bytes, and a
/// mount point may be longer, since whoever makes it can go there step by step.
const PART_LIMIT: usize = 3_000;

/// Opens a directory without asking its file system for anything, and without following any link.
pub(super) fn open_path(from: impl AsFd, path: &Path, how: ResolveFlags) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    let bytes = path.as_os_str().as_bytes();
    let mut parts = parts(if bytes.is_empty() { b"." } else { bytes }, PART_LIMIT).into_iter();
    let first = parts.next().unwrap_or(b".");
    let mut directory = open_step(from.as_fd(), Path::new(OsStr::from_bytes(first)), flags, how)?;
    for part in parts {
        directory = open_step(directory.as_fd(), Path::new(OsStr::from_bytes(part)), flags, how)?;
    }
    Ok(directory)
}

fn open_step(
    from: std::os::fd::BorrowedFd<'_>,
    path: &Path,
    flags: OFlags,
    how: ResolveFlags,
) -> io::Result<OwnedFd> {
    let how = how | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    Ok(openat2(from, path, flags | OFlags::CLOEXEC, Mode::empty(), how)?)
}

/// Pure: a path in parts that are each no longer than `limit`, as far as its names allow. All but the
/// first are relative.
fn parts(path: &[u8], limit: usize) -> Vec<&[u8]> {
    let mut parts = Vec::new();
    let mut rest = path;
    while rest.len() > limit {
        let Some(slash) = rest[..limit].iter().rposition(|byte| *byte == b'/').filter(|slash| *slash > 0)
        else {
            break;
        };
        parts.push(&rest[..slash]);
        rest = &rest[slash + 1..];
    }
    parts.push(rest);
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_where_a_mount_point_is_on_its_parent() {
        assert_eq!(below(b"/a/b c/d", b"/a"), Some(Path::new("b c/d")));
        assert_eq!(below(b"/a", b"/"), Some(Path::new("a")));
        assert_eq!(below(b"/ab", b"/a"), None);
        assert_eq!(below(b"/x", b"/a"), None);
        // Stacked: it is on the other's root, and has no name there.
        assert_eq!(below(b"/a", b"/a"), None);
    }

    #[test]
    fn a_path_is_cut_between_its_names() {
        assert_eq!(parts(b"/aa/bb/cc", 100), [b"/aa/bb/cc"]);
        assert_eq!(parts(b"/aa/bb/cc", 4), [&b"/aa"[..], b"bb", b"cc"]);
        assert_eq!(parts(b"/aa/bb/cc", 7), [&b"/aa/bb"[..], b"cc"]);
        assert_eq!(parts(b"a/b", 2), [&b"a"[..], b"b"]);
        // No name is longer than 255 bytes, so this is only to end.
        assert_eq!(parts(b"/aaaaaaaaa", 4), [b"/aaaaaaaaa"]);
    }
}
