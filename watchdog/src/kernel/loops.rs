//! Loop devices: what sysfs lists, what the device itself says, and detaching.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::Path;

use hostler_protocol::text::printable;
use linux_raw_sys::loop_device::LO_FLAGS_AUTOCLEAR;
use rustix::fs::{Mode, OFlags, open};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;

use super::{Acted, Found, block, block_calls as calls};
use crate::model::{BackingFile, DeviceNumber, DiskSequence, LoopDevice, LoopIdentity, LoopState};

/// The major number of loop devices (the kernel's `devices.txt`).
const LOOP_MAJOR: u32 = 7;

/// The loop devices that sysfs shows as bound, not yet asked, and those that are not bound and have
/// partitions left. `sys` is where sysfs is mounted.
///
/// # Errors
/// When sysfs cannot be read.
pub fn list(sys: &Path) -> io::Result<Vec<LoopDevice>> {
    let mut devices = Vec::new();
    let partitioned = partitioned(sys)?;
    for (name, directory) in block::disks(sys)? {
        let Some(number) = number_in(&name) else { continue };
        // Hosts keep the nodes of all devices that they ever had at once, and most are of no attachment.
        let may_have_partitions = partitioned.as_ref().is_none_or(|some| some.contains(&number));
        if may_have_partitions || directory.join("loop").exists() {
            let describe = || describe(&directory, number, may_have_partitions);
            devices.extend(block::unless_gone(&directory, describe)?);
        }
    }
    devices.sort_by_key(|device| device.number);
    Ok(devices)
}

/// The same of one device; `None` when it is not in use.
///
/// # Errors
/// As [`list`].
pub fn one(sys: &Path, number: u32) -> io::Result<Option<LoopDevice>> {
    match describe(&sys.join(format!("block/loop{number}")), number, true) {
        Err(error) if block::is_gone(&error) => Ok(None),
        result => result,
    }
}

/// N of the loop device that a device number is of, whole or by a partition; `None` for any other.
#[must_use]
pub fn number_of(sys: &Path, device: DeviceNumber) -> Option<u32> {
    // A partition's folder is in that of its disk: `…/block/loop3/loop3p1`.
    let link = fs::read_link(block::directory(sys, device)).ok()?;
    let names = link.iter().rev().take(2).filter_map(|name| name.to_str());
    names.into_iter().find_map(number_in)
}

/// The loop devices that have partitions, by what sysfs lists in one folder; `None` where that is not
/// there.
fn partitioned(sys: &Path) -> io::Result<Option<HashSet<u32>>> {
    let entries = match fs::read_dir(sys.join("class/block")) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut found = HashSet::new();
    for entry in entries {
        let name = entry?.file_name();
        // `loop3p1`: the name of a disk that ends in a digit has a `p` after it (`disk_name` in
        // `block/genhd.c`).
        let disk = name.to_str().and_then(|name| name.rsplit_once('p')).map(|(disk, _)| disk);
        found.extend(disk.and_then(number_in));
    }
    Ok(Some(found))
}

fn number_in(name: &str) -> Option<u32> {
    name.strip_prefix("loop")?.parse().ok()
}

fn describe(directory: &Path, number: u32, may_have_partitions: bool) -> io::Result<Option<LoopDevice>> {
    // The `loop` folder is there only while the device is bound. A path may be longer than the kernel shows
    // (ENAMETOOLONG); the device is bound all the same.
    let backing = match block::read_if_there(&directory.join("loop/backing_file")) {
        Err(_) if directory.join("loop").exists() => Some(UNREADABLE.as_bytes().to_vec()),
        read => read?,
    };
    let partitions = if may_have_partitions { block::partitions(directory)? } else { Vec::new() };
    // Partitions that `partx` made (BLKPG_ADD_PARTITION) outlive the detach unless the device was
    // attached with LO_FLAGS_PARTSCAN: `__loop_clr_fd` drops them only then.
    let state = match backing {
        Some(_) => LoopState::Unread,
        None if partitions.is_empty() => return Ok(None),
        None => LoopState::Leftover,
    };
    let backing = backing.unwrap_or_default();
    let autoclear = fs::read_to_string(directory.join("loop/autoclear")).is_ok_and(|text| text.trim() == "1");
    Ok(Some(LoopDevice {
        number,
        device: block::device(directory)?,
        sequence: block::sequence(directory)?,
        state,
        backing_text: printable(backing.strip_suffix(b"\n").unwrap_or(&backing)),
        autoclear,
        partitions,
    }))
}

/// What stands for the name of a backing file that sysfs does not tell.
const UNREADABLE: &str = "(a path that the kernel does not tell)";

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
    let sets_it = |word: &str| word.starts_with("max_loop=") || word.starts_with("loop.max_loop=");
    let was_set = command_line.split_whitespace().any(sets_it);
    (devices <= value && (was_set || value != MADE_AT_START)).then_some(value)
}

/// Whether a device that was asked is still attached as it was then, with no partition less. Opens
/// nothing, so it does not hang.
#[must_use]
pub fn is_unchanged(sys: &Path, device: &LoopDevice) -> bool {
    let directory = sys.join(format!("block/loop{}", device.number));
    let is_attachment = block::sequence(&directory).is_ok_and(|sequence| sequence == device.sequence);
    // Few devices have any, and looking for them takes longer than all the rest.
    is_attachment
        && (device.partitions.is_empty()
            || block::partitions(&directory)
                .is_ok_and(|now| device.partitions.iter().all(|partition| now.contains(partition))))
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
    let Some(device) = block::node_device(node)?.filter(|device| device.major == LOOP_MAJOR) else {
        return Ok(None);
    };
    // With `max_part` a device has several minor numbers, so its own is not its number: sysfs knows.
    let name = block::name(Path::new("/sys"), device)?;
    Ok(number_in(&name))
}

fn status(node: impl AsFd) -> io::Result<(BackingFile, bool)> {
    let status = calls::loop_status(node)?;
    // `lo_device` is encoded as the kernel's new_encode_dev / huge_encode_dev, which is stat's own.
    let device =
        DeviceNumber { major: rustix::fs::major(status.device), minor: rustix::fs::minor(status.device) };
    let autoclear = status.flags & LO_FLAGS_AUTOCLEAR as u32 != 0;
    Ok((BackingFile { device, inode: status.inode }, autoclear))
}

/// The number of `/dev/loopN`'s device.
///
/// # Errors
/// `NotFound` when there is none.
pub fn device(sys: &Path, number: u32) -> io::Result<DeviceNumber> {
    block::device(&sys.join(format!("block/loop{number}")))
}

/// What an open loop device is attached to; `None` when it is not. While it is open that cannot become
/// something else. May hang as [`ask`] does.
///
/// # Errors
/// What the calls say.
pub fn attachment(node: impl AsFd, number: u32) -> io::Result<Option<LoopIdentity>> {
    let backing = match status(&node) {
        Ok((backing, _)) => backing,
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => return Ok(None),
        Err(error) => return Err(error),
    };
    let sequence = DiskSequence(calls::disk_sequence(&node)?);
    Ok(Some(LoopIdentity { number, sequence, backing }))
}

/// Opens exactly this attachment, and holds it.
///
/// The order is what makes it exact: once the device is held open and has answered that it is
/// bound, it cannot be bound to anything else, so a sequence number that is right then stays right
/// for as long as the descriptor is open.
///
/// # Errors
/// What opening or the calls say.
pub fn hold(identity: &LoopIdentity) -> io::Result<Found> {
    let node = match open_node(identity.number) {
        Ok(node) => node,
        Err(error) if block::is_gone(&error) => return Ok(Found::Gone),
        Err(error) => return Err(error),
    };
    Ok(match attachment(&node, identity.number)? {
        None => Found::Gone,
        Some(found) if found == *identity => Found::It(node),
        Some(_) => Found::Replaced,
    })
}

/// Detaches exactly this attachment, once these partitions of it are removed.
///
/// The kernel forgets partitions at a detach only when it made them itself. Those of `partx` would
/// stay and lie about the next image, and nobody could remove them from that image without harm.
/// So they go first, while the device is held; and one that is still open keeps the device attached,
/// because a detach would only be put off until its last close.
///
/// # Errors
/// What opening or the calls say, and which partition could not be removed.
pub fn detach(identity: &LoopIdentity, partitions: &[u32]) -> io::Result<Acted> {
    let node = match hold(identity)? {
        Found::It(node) => node,
        Found::Gone => return Ok(Acted::Gone),
        Found::Replaced => return Ok(Acted::Replaced),
    };
    for number in partitions {
        match calls::delete_partition(&node, *number) {
            Ok(()) => {}
            // Somebody else removed it, or the kernel read the table again.
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => {}
            Err(error) => {
                let device = identity.number;
                let message = format!("removing partition {number} of /dev/loop{device}: {error}");
                return Err(io::Error::new(error.kind(), message));
            }
        }
    }
    match calls::loop_clear(&node) {
        Ok(()) => Ok(Acted::Done),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(Acted::Gone),
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
    use super::super::fixture::{Tree, device_number as number};
    use super::*;
    use crate::model::Partition;

    #[test]
    fn a_path_that_the_kernel_does_not_tell_hides_no_device() {
        // Reading a directory fails, as reading a path of more than 4,095 bytes does.
        let tree = Tree::new()
            .file("block/loop1/dev", "7:1\n")
            .file("block/loop1/loop/backing_file", "/a.img\n")
            .file("block/loop2/dev", "7:2\n")
            .directory("block/loop2/loop/backing_file");
        let found = list(tree.path()).expect("readable");
        let texts: Vec<_> =
            found.iter().map(|one| (one.number, one.state, one.backing_text.as_str())).collect();
        assert_eq!(texts, [(1, LoopState::Unread, "/a.img"), (2, LoopState::Unread, UNREADABLE)]);
    }

    #[test]
    fn tells_an_attachment_from_a_later_one() {
        let tree = Tree::new()
            .file("block/loop1/diskseq", "65\n")
            .file("block/loop1/loop1p1/dev", "259:0\n")
            .file("block/loop1/loop1p1/partition", "1\n")
            .file("block/loop1/loop1p2/dev", "259:1\n")
            .file("block/loop1/loop1p2/partition", "2\n");
        let device = |number: u32, sequence, partitions: &[(u32, u32)]| LoopDevice {
            number,
            device: DeviceNumber { major: 7, minor: number },
            sequence,
            state: LoopState::Closing,
            backing_text: String::new(),
            autoclear: false,
            partitions: partitions
                .iter()
                .map(|(number, minor)| Partition {
                    number: *number,
                    device: DeviceNumber { major: 259, minor: *minor },
                })
                .collect(),
        };
        let unchanged = |device: LoopDevice| is_unchanged(tree.path(), &device);
        let now = Some(DiskSequence(65));
        assert!(unchanged(device(1, now, &[])));
        assert!(unchanged(device(1, now, &[(1, 0), (2, 1)])));
        assert!(!unchanged(device(1, now, &[(1, 1)])));
        assert!(!unchanged(device(1, Some(DiskSequence(64)), &[])));
        assert!(!unchanged(device(1, None, &[])));
        assert!(!unchanged(device(2, now, &[])));
    }

    #[test]
    fn lists_what_is_bound_and_what_has_partitions_left() {
        // A 6.18 kernel: loop0 as always, loop1 attached with AUTOCLEAR, loop2 detached after
        // `partx -a`, vda no loop device.
        let tree = Tree::new()
            .file("block/loop0/dev", "7:0\n")
            .file("block/loop0/diskseq", "1\n")
            .file("block/loop1/dev", "7:1\n")
            .file("block/loop1/diskseq", "65\n")
            .file("block/loop1/loop/backing_file", "/srv/an image\n")
            .file("block/loop1/loop/autoclear", "1\n")
            .file("block/loop2/dev", "7:2\n")
            .file("block/loop2/diskseq", "66\n")
            .file("block/loop2/loop2p1/dev", "259:0\n")
            .file("block/loop2/loop2p1/partition", "1\n")
            .file("block/vda/dev", "254:0\n")
            .file("block/vda/vda1/partition", "1\n");
        let bound = LoopDevice {
            number: 1,
            device: number(7, 1),
            sequence: Some(DiskSequence(65)),
            state: LoopState::Unread,
            backing_text: "/srv/an image".to_owned(),
            autoclear: true,
            partitions: Vec::new(),
        };
        let left = LoopDevice {
            number: 2,
            device: number(7, 2),
            sequence: Some(DiskSequence(66)),
            state: LoopState::Leftover,
            backing_text: String::new(),
            autoclear: false,
            partitions: vec![Partition { number: 1, device: number(259, 0) }],
        };
        assert_eq!(list(tree.path()).expect("readable"), [bound, left]);
    }

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
