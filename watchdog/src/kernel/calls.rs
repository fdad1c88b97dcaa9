//! The system calls that no library wraps safely, but for those on block devices and on namespaces and
//! mounts, which are in `block_calls` and `namespace_calls`. These three are the only files of this
//! crate with `unsafe` in them.
#![expect(unsafe_code, reason = "system calls without a safe wrapper")]

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// Which process a caller of [`fork`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Forked {
    /// The one that called.
    Parent,
    /// Its copy.
    Child,
}

/// Makes a copy of this process, which nobody has to wait for once [`never_wait`] was called.
///
/// # Errors
/// What `fork(2)` says, and when this process has more than one thread: what the others hold locked would
/// stay so in the copy for ever.
pub fn fork() -> io::Result<Forked> {
    if std::fs::read_dir("/proc/self/task")?.count() != 1 {
        return Err(io::Error::other("a process with threads cannot be copied"));
    }
    // SAFETY: this is the only thread, so the copy finds no lock held and may do anything.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => Ok(Forked::Child),
        _ => Ok(Forked::Parent),
    }
}

/// Has the kernel forget this process's children when they end.
pub fn never_wait() {
    // SAFETY: no handler is installed, only the disposition changed; nothing in an origin or a worker waits
    // for a child.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_IGN) };
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

/// Opens the directory that a handle names, on the mount that `on` lies on (`open_by_handle_at(2)`,
/// needs `CAP_DAC_READ_SEARCH`), with `O_PATH`. No path is resolved.
///
/// # Errors
/// `ESTALE` when it is gone, `EBADF` when `on` was opened with `O_PATH` itself: unlike other calls, this
/// one takes no such descriptor. It takes the current directory, though, however that was opened.
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
            libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC | libc::O_NOFOLLOW,
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
