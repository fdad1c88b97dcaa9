//! The mount tables of this and other mount namespaces, and unmounting.

use std::collections::HashMap;
use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::mount::{MntFlags, umount2};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, ResolveFlags, StatxFlags, openat2, statx};

use super::{calls, mountinfo};
use crate::model::{Mount, MountIdentity, MountNamespace, MountNumber};

/// `STATX_MNT_ID_UNIQUE` (Linux 6.8), which rustix has no name for.
const MOUNT_NUMBER_UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);

/// The namespace that a process is in; without one the caller's.
///
/// # Errors
/// `ENOENT` when the process is gone, `EACCES` when it may not be looked at.
pub fn namespace_of(pid: Option<u32>) -> io::Result<MountNamespace> {
    let path = match pid {
        Some(pid) => format!("/proc/{pid}/ns/mnt"),
        None => "/proc/thread-self/ns/mnt".to_owned(),
    };
    // The link's text is `mnt:[INODE]`. Reading it opens nothing, so it pins nothing.
    let text = std::fs::read_link(path)?;
    let inode = text.to_str().and_then(|text| text.strip_prefix("mnt:[")?.strip_suffix(']')?.parse().ok());
    inode
        .map(MountNamespace)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not a namespace link"))
}

/// How often the table is read again when it changes meanwhile.
const READ_LIMIT: usize = 8;

/// All mounts of the caller's own namespace, in mountinfo's order.
///
/// Mountinfo has no unique numbers, so they are read beside it, before and after: only when nothing
/// came or went in between do the two fit together.
///
/// # Errors
/// What reading or parsing mountinfo says, and `WouldBlock` when the table does not hold still.
pub fn own() -> io::Result<(MountNamespace, Vec<Mount>)> {
    let namespace = namespace_of(None)?;
    for _ in 0..READ_LIMIT {
        let before = unique_numbers()?;
        let entries = read(Path::new("/proc/thread-self/mountinfo"))?;
        let Some(before) = before else {
            let of_entry = |entry: mountinfo::Entry| {
                let number = MountNumber::Reusable(entry.number);
                mount(entry, number, namespace)
            };
            return Ok((namespace, entries.into_iter().map(of_entry).collect()));
        };
        let mut known: Vec<u64> = before.values().copied().collect();
        let mut after = calls::list_mounts(None)?;
        known.sort_unstable();
        after.sort_unstable();
        if known != after {
            continue;
        }
        let numbered = entries.into_iter().filter_map(|entry| {
            let number = MountNumber::Unique(*before.get(&entry.number)?);
            Some(mount(entry, number, namespace))
        });
        return Ok((namespace, numbered.collect()));
    }
    Err(io::Error::new(io::ErrorKind::WouldBlock, "the mount table changed at each of several reads"))
}

/// The mounts of the namespace that a process is in, by mountinfo alone. The file is closed before
/// this returns: an open one would pin the namespace.
///
/// # Errors
/// What reading or parsing mountinfo says.
pub fn of_process(pid: u32, namespace: MountNamespace) -> io::Result<Vec<Mount>> {
    let entries = read(Path::new(&format!("/proc/{pid}/mountinfo")))?;
    let of_entry = |entry: mountinfo::Entry| {
        let number = MountNumber::Reusable(entry.number);
        mount(entry, number, namespace)
    };
    Ok(entries.into_iter().map(of_entry).collect())
}

fn mount(entry: mountinfo::Entry, number: MountNumber, namespace: MountNamespace) -> Mount {
    Mount {
        identity: MountIdentity { number, namespace, device: entry.device },
        short_number: entry.number,
        parent: (entry.parent != entry.number).then_some(entry.parent),
        point: entry.point,
        root: entry.root,
        filesystem: entry.filesystem,
        source: entry.source,
        peers: entry.peers,
        master: entry.master,
        layers: entry.layers,
    }
}

fn read(path: &Path) -> io::Result<Vec<mountinfo::Entry>> {
    let bytes = std::fs::read(path)?;
    mountinfo::parse(&bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
}

/// Mountinfo's numbers and the unique ones behind them; `None` before Linux 6.8.
fn unique_numbers() -> io::Result<Option<HashMap<u64, u64>>> {
    let listed = match calls::list_mounts(None) {
        Ok(listed) => listed,
        Err(error) if error.raw_os_error() == Some(libc::ENOSYS) => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut numbers = HashMap::with_capacity(listed.len());
    for unique in listed {
        match calls::mount_numbers(None, unique) {
            Ok(both) => {
                numbers.insert(both.short, both.unique);
            }
            // It went between the two calls.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(Some(numbers))
}

/// The number of the mount that `path`, seen from `directory`, lies on: of its topmost mount when
/// it is a mount point. Asks no file system for anything, so it does not hang.
///
/// # Errors
/// `ENOENT` and its like.
pub fn number_at(directory: impl AsFd, path: &OsStr, unique: bool) -> io::Result<MountNumber> {
    let wanted = if unique { MOUNT_NUMBER_UNIQUE } else { StatxFlags::MNT_ID };
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT | AtFlags::STATX_DONT_SYNC;
    let status = statx(directory, path, flags | AtFlags::EMPTY_PATH, wanted)?;
    if StatxFlags::from_bits_retain(status.stx_mask).contains(wanted) {
        Ok(if unique {
            MountNumber::Unique(status.stx_mnt_id)
        } else {
            MountNumber::Reusable(status.stx_mnt_id)
        })
    } else {
        Err(io::Error::from(io::ErrorKind::Unsupported))
    }
}

/// How an attempt to unmount went, as the calls said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmounted {
    /// `umount2` succeeded.
    Done,
    /// The mount was not there any more.
    Gone,
    /// Something else is mounted at its place, or above it.
    OtherOnTop,
}

/// Unmounts exactly the mount with this identity.
///
/// The mount point's parent directory is opened without following any symbolic link, the mount on
/// top of the last name is compared by number, and `umount2` is given that name below that
/// descriptor, so that no directory on the way can be swapped in between. (Whoever may mount on that very
/// name between the comparison and the call has his mount taken instead; that takes root.)
///
/// # Errors
/// What `umount2` says, such as `EBUSY`, or `EINVAL` for a mount locked by a user namespace.
pub fn unmount(identity: &MountIdentity, short_number: u64, point: &[u8]) -> io::Result<Unmounted> {
    // The table is read again here: where the mount is now is not where it was when it was seen.
    let (_, mounts) = own()?;
    let is_it = |mount: &&Mount| {
        let same_place = match identity.number {
            MountNumber::Unique(_) => true,
            // The number may be another builder's by now, of the same kind of file system.
            MountNumber::Reusable(_) => mount.point == point,
        };
        mount.identity == *identity && mount.short_number == short_number && same_place
    };
    let Some(mount) = mounts.iter().find(is_it) else {
        return Ok(Unmounted::Gone);
    };
    match reach(mount)? {
        Some((target, _parent)) => {
            umount2(target.as_c_str(), MntFlags::UMOUNT_NOFOLLOW)?;
            Ok(Unmounted::Done)
        }
        None => Ok(Unmounted::OtherOnTop),
    }
}

/// Makes exactly the mount with this identity private: what is unmounted below it afterwards stays
/// mounted below its peers (`mount_namespaces(7)`, "Shared subtrees").
///
/// # Errors
/// When it cannot be reached, because something is mounted over it, or still has peers afterwards.
pub fn part_from_peers(identity: &MountIdentity) -> io::Result<()> {
    let (_, mounts) = own()?;
    let is_shared = |mounts: &[Mount]| {
        mounts.iter().find(|mount| mount.identity == *identity).filter(|mount| mount.peers.is_some()).cloned()
    };
    let Some(mount) = is_shared(&mounts) else { return Ok(()) };
    let (target, _parent) = reach(&mount)?.ok_or_else(|| {
        let cause = "the mount it is on shares its mounts with a bystander's and cannot be reached to be parted from it";
        io::Error::new(io::ErrorKind::ResourceBusy, cause)
    })?;
    let nothing = None::<&std::ffi::CStr>;
    nix::mount::mount(nothing, target.as_c_str(), nothing, nix::mount::MsFlags::MS_PRIVATE, nothing)?;
    match is_shared(&own()?.1) {
        None => Ok(()),
        Some(_) => Err(io::Error::other("the mount it is on still shares its mounts with a bystander's")),
    }
}

/// A path that leads to exactly this mount, and the descriptor that it begins at and lives as long
/// as; `None` when something else is on top, or the mount point was moved.
fn reach(mount: &Mount) -> io::Result<Option<(CString, OwnedFd)>> {
    let point = Path::new(OsStr::from_bytes(&mount.point));
    let (Some(parent), Some(name)) = (point.parent(), point.file_name()) else {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "the root of a namespace is never unmounted",
        ));
    };
    let parent = match open_directory(parent) {
        Ok(parent) => parent,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let unique = match mount.identity.number {
        MountNumber::Unique(_) => true,
        MountNumber::Reusable(_) => false,
    };
    if number_at(&parent, name, unique)? != mount.identity.number {
        return Ok(None);
    }
    let mut target = format!("/proc/thread-self/fd/{}/", parent.as_raw_fd()).into_bytes();
    target.extend_from_slice(name.as_bytes());
    Ok(Some((CString::new(target).map_err(io::Error::other)?, parent)))
}

fn open_directory(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS)?)
}
