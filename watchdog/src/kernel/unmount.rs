//! Unmounting exactly one mount, in whatever namespace it is.
//!
//! For worker processes: it goes to the mount's namespace and comes back, see [`super::visit`].

use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;

use nix::mount::{MntFlags, MsFlags, umount2};
use rustix::fs::{FileType, OFlags, fstat};

use super::reach::{self, Reached, reach};
use super::visit::{Visit, standing_in};
use super::{freeze, mounts, namespaces};
use crate::model::{Mount, MountIdentity, MountNamespace, MountNumber, UnmountHow};

/// How an attempt to unmount went, as the calls said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unmounted {
    /// `umount2` succeeded.
    Done,
    /// The mount, or its whole namespace, was not there any more.
    Gone,
    /// Something else is mounted at its place, or above it, and no way leads past it.
    OtherOnTop,
    /// It is there, and a user namespace locks it: only the end of its namespace frees it.
    Locked,
}

/// Unmounts exactly the mount with this identity.
///
/// The directory that its mount point is in is opened without following any symbolic link, the mount on
/// top of the last name is compared by number, and `umount2` is given that name alone from there, so
/// that no directory on the way can be swapped in between. (Whoever mounts on that very name between the
/// comparison and the call has his mount taken instead. That is root, or in a directory of his own a user
/// who may mount FUSE file systems; he loses what he mounted over something that was being unmounted.)
///
/// # Errors
/// What `umount2` says, such as `EBUSY`; and what says that the namespace cannot be entered.
pub fn unmount(
    identity: &MountIdentity,
    short_number: u64,
    point: &[u8],
    how: UnmountHow,
) -> io::Result<Unmounted> {
    let Some(visit) = visit(identity.namespace)? else { return Ok(Unmounted::Gone) };
    // Where the mount is now is not where it was when it was seen.
    let find = || find(&visit, identity, short_number, point);
    let Some(mount) = find()? else { return Ok(Unmounted::Gone) };
    if mount.point == b"/" {
        let refused = "the root of a namespace is never unmounted";
        return Err(io::Error::new(io::ErrorKind::InvalidInput, refused));
    }
    let Some(reached) = reach(&visit, &mount)? else { return Ok(Unmounted::OtherOnTop) };
    let flags = match how {
        UnmountHow::Plain => MntFlags::empty(),
        UnmountHow::Thawed => {
            thaw(&reached, &mount)?;
            MntFlags::empty()
        }
        // It takes the topmost mount whatever was opened, and all that is mounted on it.
        UnmountHow::Lazy => MntFlags::MNT_DETACH,
    };
    if !reached.is(&mount)? {
        return Ok(Unmounted::OtherOnTop);
    }
    let unmounted = reached.standing_beside(|name| {
        let name = CString::new(name.as_bytes()).map_err(io::Error::other)?;
        Ok(umount2(name.as_c_str(), flags | MntFlags::UMOUNT_NOFOLLOW)?)
    });
    match unmounted {
        Ok(()) => Ok(Unmounted::Done),
        Err(error) if find()?.is_none() => {
            tracing::debug!("unmounting said {error}, and the mount is gone");
            Ok(Unmounted::Gone)
        }
        Err(_) if !reached.is(&mount).unwrap_or(false) => Ok(Unmounted::OtherOnTop),
        // "Not mounted", as the manual has it; but it is, by number. The kernel says the same of a mount
        // that came from a namespace with more privileges (`MNT_LOCKED`, mount_namespaces(7)).
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(Unmounted::Locked),
        Err(error) => Err(error),
    }
}

/// Parts exactly the mount with this identity from its peers: what is unmounted from it afterwards stays
/// mounted on them.
///
/// Unmounting goes on to the peers and slaves of the mount that the unmounted one is *on*
/// (`propagate_umount` in the kernel's `fs/pnode.c`); whether the unmounted one is shared itself does not
/// matter, and making it private prevents nothing. It is made a slave, not private: so it still gets what
/// is mounted on its former peers, as whoever uses this namespace is used to. Both end that its peers get
/// what is mounted on it, and its own slaves become slaves of a peer. The privileged tests try each shape.
///
/// # Errors
/// When it cannot be reached, because something is mounted over it, or still has peers afterwards.
pub fn part_from_peers(identity: &MountIdentity) -> io::Result<()> {
    let Some(visit) = visit(identity.namespace)? else { return Ok(()) };
    let shared = || {
        let found = find_any(&visit, identity)?;
        Ok::<_, io::Error>(found.filter(|mount| mount.peers.is_some()))
    };
    let Some(mount) = shared()? else { return Ok(()) };
    let root: OwnedFd = reach::open_root(&visit, &mount)?.ok_or_else(|| {
        let cause = "the mount it is on shares its mounts with a bystander's and cannot be reached to be parted from it";
        io::Error::new(io::ErrorKind::ResourceBusy, cause)
    })?;
    // The current directory itself is on that mount, whatever was mounted there since.
    let nothing = None::<&std::ffi::CStr>;
    standing_in(&root, || nix::mount::mount(nothing, c".", nothing, MsFlags::MS_SLAVE, nothing))??;
    match shared()? {
        None => Ok(()),
        Some(_) => Err(io::Error::other("the mount it is on still shares its mounts with a bystander's")),
    }
}

/// Whether exactly the mount with this identity is there, in whatever namespace.
///
/// # Errors
/// What says that the namespace cannot be entered, or its table not be read.
pub fn is_mounted(identity: &MountIdentity) -> io::Result<bool> {
    let Some(visit) = visit(identity.namespace)? else { return Ok(false) };
    Ok(find_any(&visit, identity)?.is_some())
}

/// Goes to a namespace; `None` when there is none with this inode.
fn visit(namespace: MountNamespace) -> io::Result<Option<Visit>> {
    if mounts::namespace_of(None)? == namespace {
        return Visit::at_home().map(Some);
    }
    namespaces::open_by_inode(namespace)?.map(Visit::to).transpose()
}

/// The mount with this identity, as it is now.
fn find(
    visit: &Visit,
    identity: &MountIdentity,
    short_number: u64,
    point: &[u8],
) -> io::Result<Option<Mount>> {
    let same_place = |mount: &Mount| match identity.number {
        MountNumber::Unique(_) => true,
        // The number may be another builder's by now, of the same kind of file system.
        MountNumber::Reusable(_) => mount.point == point,
    };
    let found = find_any(visit, identity)?;
    Ok(found.filter(|mount| mount.short_number == short_number && same_place(mount)))
}

fn find_any(visit: &Visit, identity: &MountIdentity) -> io::Result<Option<Mount>> {
    let found = match identity.number {
        MountNumber::Unique(unique) => mounts::one_of(visit, unique)?,
        MountNumber::Reusable(_) => {
            mounts::table(visit)?.into_iter().find(|mount| mount.identity.number == identity.number)
        }
    };
    Ok(found.filter(|mount| mount.identity == *identity))
}

/// Thaws the file system of exactly this mount. Opening the root of a frozen file system does not wait
/// for it, as only writing does.
fn thaw(reached: &Reached, mount: &Mount) -> io::Result<()> {
    // What a file is has to be known before it is opened: opening a device does something.
    let kind = FileType::from_raw_mode(fstat(reached.open(OFlags::PATH)?)?.st_mode);
    if !matches!(kind, FileType::Directory | FileType::RegularFile) {
        return Ok(());
    }
    let root = reached.open(OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY)?;
    if reach::number_at(&root, std::ffi::OsStr::new(""), mount)? != mount.identity.number {
        return Err(io::Error::new(io::ErrorKind::ResourceBusy, "something else was mounted over it"));
    }
    match freeze::thaw(&root) {
        Err(error) if freeze::is_not_frozen(&error) => Ok(()),
        result => result,
    }
}
