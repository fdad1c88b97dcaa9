//! Loop devices: what sysfs lists, what the device itself says, and detaching.

use std::fs;
use std::io;
use std::path::Path;

use hostler_protocol::text::printable;
use linux_raw_sys::loop_device::LO_FLAGS_AUTOCLEAR;
use rustix::fs::{FileType, Mode, OFlags, fstat, open};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use super::block_calls as calls;
use crate::model::{BackingFile, DeviceNumber, DiskSequence, LoopDevice, LoopIdentity, LoopState, Partition};

/// The major number of loop devices (the kernel's `devices.txt`).
const LOOP_MAJOR: u32 = 7;

/// The loop devices that sysfs shows as bound, not yet asked. `sys` is where sysfs is mounted.
///
/// # Errors
/// When sysfs cannot be read.
pub fn list(sys: &Path) -> io::Result<Vec<LoopDevice>> {
    let mut devices = Vec::new();
    for entry in fs::read_dir(sys.join("block"))? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(number) = name.to_str().and_then(|name| name.strip_prefix("loop")?.parse().ok()) else {
            continue;
        };
        match describe(&entry.path(), number) {
            Ok(Some(device)) => devices.push(device),
            Ok(None) => {}
            // Loop devices come and go; a node that went while it was read is not there.
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    devices.sort_by_key(|device| device.number);
    Ok(devices)
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ENXIO))
}

fn describe(directory: &Path, number: u32) -> io::Result<Option<LoopDevice>> {
    // The `loop` folder is there only while the device is bound.
    let backing = match fs::read(directory.join("loop/backing_file")) {
        Ok(text) => text,
        Err(error) if is_gone(&error) => return Ok(None),
        Err(error) => return Err(error),
    };
    let device = read_device(&directory.join("dev"))?;
    let sequence = match fs::read_to_string(directory.join("diskseq")) {
        Ok(text) => text.trim().parse().ok().map(DiskSequence),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    let autoclear = fs::read_to_string(directory.join("loop/autoclear")).is_ok_and(|text| text.trim() == "1");
    let mut partitions = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.join("partition").exists() {
            let number = fs::read_to_string(path.join("partition"))?;
            let number = number.trim().parse().map_err(io::Error::other)?;
            partitions.push(Partition { number, device: read_device(&path.join("dev"))? });
        }
    }
    partitions.sort_unstable();
    Ok(Some(LoopDevice {
        number,
        device,
        sequence,
        state: LoopState::Unread,
        backing_text: printable(backing.strip_suffix(b"\n").unwrap_or(&backing)),
        autoclear,
        partitions,
    }))
}

fn read_device(path: &Path) -> io::Result<DeviceNumber> {
    let text = fs::read_to_string(path)?;
    DeviceNumber::parse(&text).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, format!("{} is no device number", text.trim()))
    })
}

/// How many loop devices the host can have; `None` when the kernel makes them on demand without
/// limit.
#[must_use]
pub fn limit() -> Option<u64> {
    let parameter = fs::read_to_string("/sys/module/loop/parameters/max_loop").ok()?;
    let command_line = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let is_device = |entry: io::Result<fs::DirEntry>| {
        entry.is_ok_and(|entry| entry.file_name().as_encoded_bytes().starts_with(b"loop"))
    };
    let devices = fs::read_dir("/sys/block")
        .map_or(0, |entries| entries.map(is_device).filter(|is_device| *is_device).count());
    limit_from(&parameter, &command_line, devices as u64)
}

/// How many loop devices are made at start where nobody set `max_loop`
/// (`CONFIG_BLK_DEV_LOOP_MIN_COUNT`'s default). Newer kernels show it as the parameter's value.
const MADE_AT_START: u64 = 8;

/// Pure: from the module's `max_loop`, the kernel's command line, and how many devices there are.
///
/// Only a `max_loop` that somebody set is a limit. Its value cannot be told from the default of the
/// same size, so then the command line decides; and where there are more devices than it says, it
/// limits nothing.
fn limit_from(parameter: &str, command_line: &str, devices: u64) -> Option<u64> {
    let value: u64 = parameter.trim().parse().ok().filter(|value| *value > 0)?;
    let was_set = command_line
        .split_whitespace()
        .any(|word| word.starts_with("max_loop=") || word.starts_with("loop.max_loop="));
    (devices <= value && (was_set || value != MADE_AT_START)).then_some(value)
}

/// Asks a listed device what it is bound to. May hang with the backing file's file system.
///
/// # Errors
/// What opening or asking says, but for the errors that mean "not bound", which make it
/// [`LoopState::Closing`].
pub fn ask(device: &mut LoopDevice) -> io::Result<()> {
    let node = open_node(device.number)?;
    match status(&node) {
        Ok((backing, autoclear)) => {
            // Only now, with the device held and known to be bound, is the sequence number that of
            // the same attachment.
            if let Ok(sequence) = calls::disk_sequence(&node) {
                device.sequence = Some(DiskSequence(sequence));
            }
            device.state = LoopState::Bound(backing);
            device.autoclear = autoclear;
            Ok(())
        }
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {
            device.state = LoopState::Closing;
            Ok(())
        }
        Err(error) => Err(error),
    }
}

/// Opens `/dev/loopN` for reading only: a writer would block mounts on some kernels.
fn open_node(number: u32) -> io::Result<OwnedFd> {
    let path = format!("/dev/loop{number}");
    let node =
        open(&path, OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK, Mode::empty())?;
    if is_loop_device(&node)? == Some(number) {
        Ok(node)
    } else {
        Err(io::Error::new(io::ErrorKind::InvalidData, format!("{path} is not loop device {number}")))
    }
}

/// The number of the loop device that a descriptor is of; `None` when it is of anything else.
///
/// # Errors
/// What `fstat(2)` says.
pub fn is_loop_device(node: impl AsFd) -> io::Result<Option<u32>> {
    let status = fstat(node)?;
    let is_block = FileType::from_raw_mode(status.st_mode) == FileType::BlockDevice;
    let (major, minor) = (rustix::fs::major(status.st_rdev), rustix::fs::minor(status.st_rdev));
    if !is_block || major != LOOP_MAJOR {
        return Ok(None);
    }
    // With `max_part` a device has several minor numbers, so its own is not its number: sysfs knows.
    let link = fs::read_link(format!("/sys/dev/block/{major}:{minor}"))?;
    let name = link.file_name().and_then(|name| name.to_str());
    Ok(name.and_then(|name| name.strip_prefix("loop")?.parse().ok()))
}

fn status(node: impl AsFd) -> io::Result<(BackingFile, bool)> {
    let status = calls::loop_status(node)?;
    // `lo_device` is encoded as the kernel's new_encode_dev / huge_encode_dev, which is stat's own.
    let device =
        DeviceNumber { major: rustix::fs::major(status.device), minor: rustix::fs::minor(status.device) };
    let autoclear = status.flags & LO_FLAGS_AUTOCLEAR as u32 != 0;
    Ok((BackingFile { device, inode: status.inode }, autoclear))
}

/// How an attempt to detach went, as the calls said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detached {
    /// `LOOP_CLR_FD` succeeded.
    Done,
    /// Nothing was attached any more.
    Gone,
    /// Something else was.
    Replaced,
}

/// Detaches exactly this attachment.
///
/// The order is what makes it exact: once the device is held open and has answered that it is
/// bound, it cannot be bound to anything else, so a sequence number that is right then stays right
/// for the call that follows.
///
/// # Errors
/// What opening or the calls say.
pub fn detach(identity: &LoopIdentity) -> io::Result<Detached> {
    let node = match open_node(identity.number) {
        Ok(node) => node,
        Err(error) if is_gone(&error) => return Ok(Detached::Gone),
        Err(error) => return Err(error),
    };
    let backing = match status(&node) {
        Ok((backing, _)) => backing,
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(Detached::Gone),
        Err(error) => return Err(error),
    };
    if DiskSequence(calls::disk_sequence(&node)?) != identity.sequence || backing != identity.backing {
        return Ok(Detached::Replaced);
    }
    match calls::loop_clear(&node) {
        Ok(()) => Ok(Detached::Done),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(Detached::Gone),
        Err(error) => Err(error),
    }
}

/// The text of sysfs for a device's backing file, as a path below a claimed directory can be
/// compared with: a hint where to look, never evidence.
#[must_use]
pub fn backing_hint(sys: &Path, number: u32) -> Option<std::path::PathBuf> {
    let bytes = fs::read(sys.join(format!("block/loop{number}/loop/backing_file"))).ok()?;
    let bytes = bytes.strip_suffix(b"\n").unwrap_or(&bytes);
    Some(std::path::PathBuf::from(std::ffi::OsStr::from_bytes(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_limit_that_was_set_is_one() {
        assert_eq!(limit_from("0\n", "quiet", 3), None);
        assert_eq!(limit_from("8\n", "quiet", 3), None);
        assert_eq!(limit_from("8\n", "quiet max_loop=8", 3), Some(8));
        assert_eq!(limit_from("64\n", "", 64), Some(64));
        assert_eq!(limit_from("64\n", "", 65), None);
        assert_eq!(limit_from("", "", 0), None);
    }
}
