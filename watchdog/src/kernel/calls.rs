//! The system calls that no library wraps safely, but for those on block devices and file systems,
//! which are in `block_calls`. These two are the only files of this crate with `unsafe` in them.
#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use linux_raw_sys::general::{LSMT_ROOT, STATMOUNT_MNT_BASIC, mnt_id_req, statmount as statmount_buffer};

/// The two numbers that a mount has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MountNumbers {
    /// The number that is never given again.
    pub unique: u64,
    /// The number in mountinfo.
    pub short: u64,
}

const STATMOUNT: libc::c_long = 457;
const LISTMOUNT: libc::c_long = 458;
/// Size of `struct mnt_id_req` with `mnt_ns_id` (`MNT_ID_REQ_SIZE_VER1`).
const REQUEST_SIZE: u32 = 32;
const LIST_CHUNK: usize = 4096;

/// The unique numbers of all mounts of a mount namespace (`listmount(2)`, Linux 6.8); `None` means
/// the caller's own.
///
/// # Errors
/// `ENOSYS` on older kernels.
pub fn list_mounts(namespace: Option<u64>) -> io::Result<Vec<u64>> {
    let mut all = Vec::new();
    let mut request = mnt_id_req {
        size: REQUEST_SIZE,
        spare: 0,
        mnt_id: LSMT_ROOT as i64 as u64,
        param: 0,
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

/// The numbers of one mount by its unique one (`statmount(2)`, Linux 6.8).
///
/// # Errors
/// `ENOENT` when it is gone.
pub fn mount_numbers(namespace: Option<u64>, unique: u64) -> io::Result<MountNumbers> {
    let request = mnt_id_req {
        size: REQUEST_SIZE,
        spare: 0,
        mnt_id: unique,
        param: u64::from(STATMOUNT_MNT_BASIC),
        mnt_ns_id: namespace.unwrap_or(0),
    };
    let mut answer = MaybeUninit::<statmount_buffer>::zeroed();
    // SAFETY: the request is live and sized as above; the kernel writes at most as many bytes as
    // the answer has.
    let result = unsafe {
        libc::syscall(STATMOUNT, &raw const request, answer.as_mut_ptr(), size_of::<statmount_buffer>(), 0u32)
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: statmount is plain integers, for which all zeroes is a value.
    let answer = unsafe { answer.assume_init() };
    Ok(MountNumbers { unique: answer.mnt_id, short: u64::from(answer.mnt_id_old) })
}

/// Largest file handle the kernel makes (`MAX_HANDLE_SZ`).
const HANDLE_LIMIT: usize = 128;

#[repr(C)]
struct HandleBuffer {
    bytes: u32,
    kind: i32,
    data: [u8; HANDLE_LIMIT],
}

/// The handle that finds a directory again after its descriptor is gone (`name_to_handle_at(2)`).
///
/// # Errors
/// `EOPNOTSUPP` where the file system has none.
pub fn file_handle(directory: impl AsFd) -> io::Result<(i32, Vec<u8>)> {
    let mut buffer = HandleBuffer { bytes: HANDLE_LIMIT as u32, kind: 0, data: [0; HANDLE_LIMIT] };
    let mut mount: libc::c_int = 0;
    // SAFETY: the path is a NUL-terminated empty string, the buffer says how many bytes it has,
    // and both pointers are valid for what the kernel writes.
    let result = unsafe {
        libc::syscall(
            libc::SYS_name_to_handle_at,
            directory.as_fd().as_raw_fd(),
            c"".as_ptr(),
            &raw mut buffer,
            &raw mut mount,
            libc::AT_EMPTY_PATH,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let length = (buffer.bytes as usize).min(HANDLE_LIMIT);
    Ok((buffer.kind, buffer.data[..length].to_vec()))
}

/// Opens the directory that a handle names, on the file system that `on` lies on
/// (`open_by_handle_at(2)`, needs `CAP_DAC_READ_SEARCH`). No path is resolved.
///
/// # Errors
/// `ESTALE` when it is gone.
pub fn open_handle(on: impl AsFd, kind: i32, bytes: &[u8]) -> io::Result<OwnedFd> {
    if bytes.len() > HANDLE_LIMIT {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let mut buffer = HandleBuffer { bytes: bytes.len() as u32, kind, data: [0; HANDLE_LIMIT] };
    buffer.data[..bytes.len()].copy_from_slice(bytes);
    // SAFETY: the buffer is live and says how many bytes of it count.
    let result = unsafe {
        libc::syscall(
            libc::SYS_open_by_handle_at,
            on.as_fd().as_raw_fd(),
            &raw mut buffer,
            libc::O_RDONLY | libc::O_DIRECTORY | libc::O_CLOEXEC | libc::O_NOFOLLOW,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just returned this descriptor to us, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(result as i32) })
}

/// Takes over a descriptor that was handed to this process at its start (systemd's
/// `LISTEN_FDS`). To be called once for each, before any other code opens files.
///
/// # Errors
/// `EBADF` when there is no such descriptor.
pub fn inherited(descriptor: i32) -> io::Result<OwnedFd> {
    // SAFETY: F_GETFD on any number is harmless; it tells whether the descriptor is open.
    if unsafe { libc::fcntl(descriptor, libc::F_GETFD) } < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, and the caller promises that nobody else in this process owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
}
