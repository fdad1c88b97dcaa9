//! The system calls that no library wraps safely. `unsafe` is here and in `namespace_calls` only.
#![expect(unsafe_code, reason = "ioctls and system calls without a safe wrapper")]

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use linux_raw_sys::ioctl::BLKGETDISKSEQ;
use linux_raw_sys::loop_device::{LOOP_CLR_FD, LOOP_GET_STATUS64, loop_info64};

mod generated {
    use super::{BLKGETDISKSEQ, LOOP_CLR_FD, LOOP_GET_STATUS64, loop_info64};
    nix::ioctl_read_bad!(loop_get_status64, LOOP_GET_STATUS64, loop_info64);
    nix::ioctl_none_bad!(loop_clr_fd, LOOP_CLR_FD);
    nix::ioctl_read_bad!(blkgetdiskseq, BLKGETDISKSEQ, u64);
}

/// What a loop device says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoopStatus {
    /// `lo_device`: the file system of the backing file, encoded as `stat(2)` does.
    pub device: u64,
    /// `lo_inode`: the backing file's inode number.
    pub inode: u64,
    /// `lo_flags`.
    pub flags: u32,
}

/// `LOOP_GET_STATUS64`. May hang when the backing file's file system does.
///
/// # Errors
/// `ENXIO` when the device is not bound.
pub fn loop_status(device: impl AsFd) -> io::Result<LoopStatus> {
    let mut info = MaybeUninit::<loop_info64>::zeroed();
    // SAFETY: the descriptor is borrowed for the call, and the kernel writes one loop_info64 at
    // most to a pointer that is valid for it.
    unsafe { generated::loop_get_status64(device.as_fd().as_raw_fd(), info.as_mut_ptr()) }?;
    // SAFETY: loop_info64 is plain integers and bytes, so all zeroes, with or without what the
    // kernel wrote over them, is a value of it.
    let info = unsafe { info.assume_init() };
    Ok(LoopStatus { device: info.lo_device, inode: info.lo_inode, flags: info.lo_flags })
}

/// `LOOP_CLR_FD`. Success is no proof: with another opener it only asks for a detach at the last
/// close.
///
/// # Errors
/// `ENXIO` when the device is not bound, `EBUSY` on kernels before 5.3 when it is in use.
pub fn loop_clear(device: impl AsFd) -> io::Result<()> {
    // SAFETY: the request takes no argument; the descriptor is borrowed for the call.
    unsafe { generated::loop_clr_fd(device.as_fd().as_raw_fd()) }?;
    Ok(())
}

/// `BLKGETDISKSEQ` (Linux 5.15): the sequence number of what is attached now.
///
/// # Errors
/// `ENOTTY` on older kernels.
pub fn disk_sequence(device: impl AsFd) -> io::Result<u64> {
    let mut sequence = 0u64;
    // SAFETY: the kernel writes one u64 to a pointer that is valid for it.
    unsafe { generated::blkgetdiskseq(device.as_fd().as_raw_fd(), &raw mut sequence) }?;
    Ok(sequence)
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
