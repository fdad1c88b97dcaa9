//! The calls on block devices and file systems that no library wraps safely: ioctls, `swapoff(2)`.
//!
//! Each takes a descriptor, so what it acts on was opened, and its identity checked, by the caller.
#![expect(unsafe_code, reason = "ioctls and system calls without a safe wrapper")]

use std::ffi::CStr;
use std::io;
use std::mem::{MaybeUninit, size_of};
use std::os::fd::{AsFd, AsRawFd};

use linux_raw_sys::ioctl::{
    BLKGETDISKSEQ, BLKPG, DM_DEV_REMOVE, DM_DEV_STATUS, FITHAW, NBD_CLEAR_SOCK, NBD_DISCONNECT,
};
use linux_raw_sys::loop_device::{LOOP_CLR_FD, LOOP_GET_STATUS64, loop_info64};

use crate::model::DeviceNumber;

/// `STOP_ARRAY`: `_IO(MD_MAJOR, 0x32)` (`linux/raid/md_u.h`).
const STOP_ARRAY: u32 = 0x0932;

mod generated {
    use super::{
        BLKGETDISKSEQ, BLKPG, DM_DEV_REMOVE, DM_DEV_STATUS, FITHAW, LOOP_CLR_FD, LOOP_GET_STATUS64,
        MapRequest, NBD_CLEAR_SOCK, NBD_DISCONNECT, PartitionRequest, STOP_ARRAY, loop_info64,
    };
    nix::ioctl_read_bad!(loop_get_status64, LOOP_GET_STATUS64, loop_info64);
    nix::ioctl_none_bad!(loop_clr_fd, LOOP_CLR_FD);
    nix::ioctl_read_bad!(blkgetdiskseq, BLKGETDISKSEQ, u64);
    nix::ioctl_write_ptr_bad!(blkpg, BLKPG, PartitionRequest);
    nix::ioctl_readwrite_bad!(dm_dev_status, DM_DEV_STATUS, MapRequest);
    nix::ioctl_readwrite_bad!(dm_dev_remove, DM_DEV_REMOVE, MapRequest);
    nix::ioctl_none_bad!(stop_array, STOP_ARRAY);
    nix::ioctl_none_bad!(nbd_disconnect, NBD_DISCONNECT);
    nix::ioctl_none_bad!(nbd_clear_sock, NBD_CLEAR_SOCK);
    nix::ioctl_none_bad!(fithaw, FITHAW);
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

/// `struct blkpg_partition`.
#[repr(C)]
struct PartitionName {
    start: i64,
    length: i64,
    number: i32,
    device_name: [u8; 64],
    volume_name: [u8; 64],
}

/// `struct blkpg_ioctl_arg`.
#[repr(C)]
struct PartitionRequest {
    operation: i32,
    flags: i32,
    length: i32,
    data: *mut PartitionName,
}

/// `BLKPG_DEL_PARTITION` on a whole disk: the kernel forgets a partition; what is on the disk stays.
///
/// # Errors
/// `ENXIO` when there is no such partition, `EBUSY` when somebody has it open.
pub fn delete_partition(disk: impl AsFd, number: u32) -> io::Result<()> {
    const DELETE: i32 = 2;
    let number = number.try_into().map_err(io::Error::other)?;
    let mut name = PartitionName { start: 0, length: 0, number, device_name: [0; 64], volume_name: [0; 64] };
    let request = PartitionRequest {
        operation: DELETE,
        flags: 0,
        length: size_of::<PartitionName>() as i32,
        data: &raw mut name,
    };
    // SAFETY: the request is live and points to a live PartitionName, whose size it tells; the kernel
    // only reads them.
    unsafe { generated::blkpg(disk.as_fd().as_raw_fd(), &raw const request) }?;
    Ok(())
}

const MAP_NAME_LENGTH: usize = 128;
const MAP_UUID_LENGTH: usize = 129;

/// `struct dm_ioctl` (`linux/dm-ioctl.h`).
#[repr(C)]
struct MapRequest {
    version: [u32; 3],
    data_size: u32,
    data_start: u32,
    target_count: u32,
    open_count: i32,
    flags: u32,
    event: u32,
    padding: u32,
    device: u64,
    name: [u8; MAP_NAME_LENGTH],
    uuid: [u8; MAP_UUID_LENGTH],
    data: [u8; 7],
}

impl MapRequest {
    fn new() -> Self {
        Self {
            // The interface of Linux 2.6.0: the kernel refuses another major number only.
            version: [4, 0, 0],
            data_size: size_of::<Self>() as u32,
            data_start: size_of::<Self>() as u32,
            target_count: 0,
            open_count: 0,
            flags: 0,
            event: 0,
            padding: 0,
            device: 0,
            name: [0; MAP_NAME_LENGTH],
            uuid: [0; MAP_UUID_LENGTH],
            data: [0; 7],
        }
    }
}

/// What the device-mapper says of a map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapStatus {
    /// Its name: no two maps have one at a time.
    pub name: Vec<u8>,
    /// Its uuid; mostly empty but for what LVM, cryptsetup and kpartx make.
    pub uuid: Vec<u8>,
    /// How often it is open.
    pub open_count: i32,
}

/// `DM_DEV_STATUS` of the map with a device number. `control` is `/dev/mapper/control`.
///
/// # Errors
/// `ENXIO` when there is none.
pub fn map_status(control: impl AsFd, device: DeviceNumber) -> io::Result<MapStatus> {
    let mut request = MapRequest::new();
    request.device = rustix::fs::makedev(device.major, device.minor);
    // SAFETY: the request is live and tells its own size, beyond which the kernel writes nothing.
    unsafe { generated::dm_dev_status(control.as_fd().as_raw_fd(), &raw mut request) }?;
    Ok(MapStatus {
        name: until_nul(&request.name),
        uuid: until_nul(&request.uuid),
        open_count: request.open_count,
    })
}

/// `DM_DEV_REMOVE` of the map that has this name and uuid, by the uuid if it has one, else by the name:
/// the kernel takes one of them only.
///
/// # Errors
/// `ENXIO` when there is none, `EBUSY` when it is open.
pub fn map_remove(control: impl AsFd, status: &MapStatus) -> io::Result<()> {
    let mut request = MapRequest::new();
    let (field, value): (&mut [u8], &[u8]) = if status.uuid.is_empty() {
        (&mut request.name, &status.name)
    } else {
        (&mut request.uuid, &status.uuid)
    };
    // A byte is left for the NUL that ends it.
    if value.len() >= field.len() {
        return Err(io::Error::from_raw_os_error(libc::ENAMETOOLONG));
    }
    field[..value.len()].copy_from_slice(value);
    // SAFETY: the request is live and tells its own size, beyond which the kernel writes nothing.
    unsafe { generated::dm_dev_remove(control.as_fd().as_raw_fd(), &raw mut request) }?;
    Ok(())
}

fn until_nul(bytes: &[u8]) -> Vec<u8> {
    bytes.split(|byte| *byte == 0).next().unwrap_or_default().to_vec()
}

/// `STOP_ARRAY` of an md array.
///
/// # Errors
/// `EBUSY` when anybody besides the caller has it open, `ENODEV` when it is stopped already.
pub fn array_stop(array: impl AsFd) -> io::Result<()> {
    // SAFETY: the request takes no argument; the descriptor is borrowed for the call.
    unsafe { generated::stop_array(array.as_fd().as_raw_fd()) }?;
    Ok(())
}

/// `NBD_DISCONNECT`: asks the server to end the connection. May wait for it to take the message.
///
/// # Errors
/// `EINVAL` when nothing is connected.
pub fn nbd_disconnect(device: impl AsFd) -> io::Result<()> {
    // SAFETY: the request takes no argument; the descriptor is borrowed for the call.
    unsafe { generated::nbd_disconnect(device.as_fd().as_raw_fd()) }?;
    Ok(())
}

/// `NBD_CLEAR_SOCK`: ends the connection, whether or not the server agrees.
///
/// # Errors
/// Hardly any: it succeeds on a device that is not connected, too.
pub fn nbd_clear_socket(device: impl AsFd) -> io::Result<()> {
    // SAFETY: the request takes no argument; the descriptor is borrowed for the call.
    unsafe { generated::nbd_clear_sock(device.as_fd().as_raw_fd()) }?;
    Ok(())
}

/// `FITHAW`: ends a freeze of the file system that an open file or directory lies on.
///
/// # Errors
/// `EINVAL` when it is not frozen.
pub fn thaw(file: impl AsFd) -> io::Result<()> {
    // SAFETY: the kernel reads no argument (`ioctl_fsthaw` in fs/ioctl.c); the descriptor is borrowed
    // for the call.
    unsafe { generated::fithaw(file.as_fd().as_raw_fd()) }?;
    Ok(())
}

/// `swapoff(2)`. Reads all that was swapped out back first, so it may take long; a signal ends it.
///
/// # Errors
/// `EINVAL` when what the path leads to is no swap area in use, `ENOMEM` when what was swapped out
/// does not fit into memory.
pub fn swap_off(path: &CStr) -> io::Result<()> {
    // SAFETY: the path is a live string that ends with NUL.
    match unsafe { libc::swapoff(path.as_ptr()) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn requests_have_the_kernels_layout() {
        // As `linux/dm-ioctl.h` and `linux/blkpg.h` lay them out on 64-bit machines.
        assert_eq!((size_of::<MapRequest>(), offset_of!(MapRequest, data)), (312, 305));
        assert_eq!((offset_of!(MapRequest, device), offset_of!(MapRequest, name)), (40, 48));
        assert_eq!((size_of::<PartitionName>(), offset_of!(PartitionName, number)), (152, 16));
        assert_eq!((size_of::<PartitionRequest>(), offset_of!(PartitionRequest, data)), (24, 16));
    }

    #[test]
    fn a_name_that_is_too_long_for_the_kernel_is_not_cut() {
        let nothing = std::fs::File::open("/dev/null").expect("every host has it");
        for (name, uuid) in [(vec![b'x'; 128], Vec::new()), (Vec::new(), vec![b'x'; 129])] {
            let error = map_remove(&nothing, &MapStatus { name, uuid, open_count: 0 }).expect_err("too long");
            assert_eq!(error.raw_os_error(), Some(libc::ENAMETOOLONG));
        }
    }
}
