//! The system calls on mount namespaces, single mounts and mount events that no library wraps safely.
#![expect(unsafe_code, reason = "ioctls and system calls without a safe wrapper")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use linux_raw_sys::general::{LSMT_ROOT, mnt_id_req};
use linux_raw_sys::ioctl::NS_GET_USERNS;

const STATMOUNT: libc::c_long = 457;
const LISTMOUNT: libc::c_long = 458;
/// Size of `struct mnt_id_req` with `mnt_ns_id` (`MNT_ID_REQ_SIZE_VER1`). A kernel that knows only the
/// first version takes it as long as that field is 0, and says `E2BIG` otherwise.
const REQUEST_SIZE: u32 = 32;
const LIST_CHUNK: usize = 4096;

/// The unique numbers of the mounts of a mount namespace, in rising order (`listmount(2)`, Linux 6.8):
/// those above `after`, which is 0 for all. `None` means the caller's own namespace, any other needs
/// `mnt_ns_id` (Linux 6.11). Opens nothing, so it pins nothing.
///
/// # Errors
/// `ENOSYS` and `E2BIG` on older kernels, `ENOENT` when there is no such namespace any more.
pub fn list_mounts(namespace: Option<u64>, after: u64) -> io::Result<Vec<u64>> {
    let mut all: Vec<u64> = Vec::new();
    let mut request = mnt_id_req {
        size: REQUEST_SIZE,
        spare: 0,
        mnt_id: LSMT_ROOT as i64 as u64,
        param: after,
        mnt_ns_id: namespace.unwrap_or(0),
    };
    loop {
        let mut chunk = [0u64; LIST_CHUNK];
        // SAFETY: the request is a live mnt_id_req whose size field says how much of it there is,
        // and the kernel writes at most LIST_CHUNK numbers to a buffer of that many.
        let count =
            unsafe { libc::syscall(LISTMOUNT, &raw const request, chunk.as_mut_ptr(), LIST_CHUNK, 0u32) };
        if count < 0 {
            return Err(io::Error::last_os_error());
        }
        let count = count as usize;
        all.extend_from_slice(&chunk[..count]);
        match all.last() {
            Some(last) if count == LIST_CHUNK => request.param = *last,
            Some(_) | None => return Ok(all),
        }
    }
}

/// What the kernel tells of one mount, as it lays it out (`statmount(2)`, Linux 6.8).
///
/// # Errors
/// `ENOENT` when there is no such mount in that namespace, `EOVERFLOW` when the buffer is too small for
/// the strings that were asked for.
pub fn stat_mount(namespace: Option<u64>, unique: u64, mask: u64, buffer: &mut [u8]) -> io::Result<()> {
    let request = mnt_id_req {
        size: REQUEST_SIZE,
        spare: 0,
        mnt_id: unique,
        param: mask,
        mnt_ns_id: namespace.unwrap_or(0),
    };
    // SAFETY: the request is live and sized as above; the kernel writes at most as many bytes as
    // the buffer says it has, and needs no alignment to copy them.
    let result =
        unsafe { libc::syscall(STATMOUNT, &raw const request, buffer.as_mut_ptr(), buffer.len(), 0u32) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// `struct mnt_ns_info` of `<linux/nsfs.h>`.
#[repr(C)]
struct NamespaceInfo {
    size: u32,
    mounts: u32,
    number: u64,
}

/// Which way to go from one mount namespace to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Neighbour {
    /// `NS_MNT_GET_PREV`.
    Previous,
    /// `NS_MNT_GET_NEXT`.
    Next,
}

/// The mount namespace before or after another one in the kernel's list of all of them, with its number
/// (Linux 6.12); `None` at the end. The descriptor pins it: it is to be closed at once.
///
/// # Errors
/// `ENOTTY` on older kernels.
pub fn neighbour(namespace: impl AsFd, which: Neighbour) -> io::Result<Option<(OwnedFd, u64)>> {
    // _IOR(0xb7, 11 or 12, struct mnt_ns_info): rustix and linux-raw-sys have no name for them yet.
    let request: libc::c_ulong = match which {
        Neighbour::Next => 0x8010_b70b,
        Neighbour::Previous => 0x8010_b70c,
    };
    let mut info = NamespaceInfo { size: size_of::<NamespaceInfo>() as u32, mounts: 0, number: 0 };
    // SAFETY: the request's number says that the kernel writes a mnt_ns_info, which `info` is laid out as.
    let result = unsafe { libc::ioctl(namespace.as_fd().as_raw_fd(), request, &raw mut info) };
    if result < 0 {
        let error = io::Error::last_os_error();
        return if error.raw_os_error() == Some(libc::ENOENT) { Ok(None) } else { Err(error) };
    }
    // SAFETY: the kernel has just returned this descriptor to us, and nobody else has it.
    let descriptor = unsafe { OwnedFd::from_raw_fd(result) };
    Ok(Some((descriptor, info.number)))
}

/// The number of a mount namespace that is never given again (`NS_GET_MNTNS_ID`, Linux 6.11).
///
/// # Errors
/// `ENOTTY` on older kernels.
pub fn namespace_number(namespace: impl AsFd) -> io::Result<u64> {
    const NS_GET_MNTNS_ID: libc::c_ulong = 0x8008_b705;
    let mut number = 0u64;
    // SAFETY: the request's number says that the kernel writes one u64, to a pointer valid for it.
    let result = unsafe { libc::ioctl(namespace.as_fd().as_raw_fd(), NS_GET_MNTNS_ID, &raw mut number) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(number) }
}

/// The user namespace that a namespace belongs to (`NS_GET_USERNS`, Linux 4.9).
///
/// # Errors
/// `EPERM` when it is none below the caller's.
pub fn user_namespace(namespace: impl AsFd) -> io::Result<OwnedFd> {
    // SAFETY: the request takes no argument; the descriptor is borrowed for the call.
    let result = unsafe { libc::ioctl(namespace.as_fd().as_raw_fd(), libc::c_ulong::from(NS_GET_USERNS), 0) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned this descriptor to us, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(result) })
}

/// What `fanotify_init(2)` is asked for: events about mounts (`FAN_REPORT_MNT`, Linux 6.14), each with a
/// pidfd of whoever caused it, on a descriptor that is closed on exec and never blocks.
const EVENT_FLAGS: libc::c_uint = 0x4000 | libc::FAN_REPORT_PIDFD | libc::FAN_CLOEXEC | libc::FAN_NONBLOCK;

/// A group of fanotify that tells of the mounts that come and go in a mount namespace (Linux 6.14). The
/// mark does not pin the namespace, whose descriptor may be closed.
///
/// # Errors
/// `EINVAL` on older kernels.
pub fn watch_mounts(namespace: impl AsFd) -> io::Result<OwnedFd> {
    /// `FAN_MARK_MNTNS`.
    const MARK_NAMESPACE: libc::c_uint = 0x110;
    /// `FAN_MNT_ATTACH | FAN_MNT_DETACH`.
    const ATTACH_AND_DETACH: u64 = 0x0300_0000;
    // SAFETY: fanotify_init takes two numbers and touches no memory of ours.
    let result = unsafe { libc::fanotify_init(EVENT_FLAGS, 0) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned this descriptor to us, and nobody else has it.
    let group = unsafe { OwnedFd::from_raw_fd(result) };
    // SAFETY: both descriptors live through the call; a null path means the descriptor itself.
    let marked = unsafe {
        libc::fanotify_mark(
            group.as_raw_fd(),
            libc::FAN_MARK_ADD | MARK_NAMESPACE,
            ATTACH_AND_DETACH,
            namespace.as_fd().as_raw_fd(),
            std::ptr::null(),
        )
    };
    if marked < 0 { Err(io::Error::last_os_error()) } else { Ok(group) }
}

/// Takes over a descriptor that the kernel wrote into an event; `None` for the negative numbers that
/// stand for none.
pub(super) fn from_event(descriptor: i32) -> Option<OwnedFd> {
    // SAFETY: a number that is not negative is a descriptor that the kernel made for the reader of the
    // event that it stands in, and each event is read once.
    (descriptor >= 0).then(|| unsafe { OwnedFd::from_raw_fd(descriptor) })
}
