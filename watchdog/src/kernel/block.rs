//! What sysfs shows of block devices of every kind, and opening one by its number.
//!
//! `directory` is always a device's folder (`/sys/block/loop3`, `/sys/block/loop3/loop3p1`), `sys`
//! where sysfs is mounted. Nothing here opens a device but [`open_node`] and its like, so the rest
//! never hangs, whatever the device's driver waits for.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, open, openat2};

use crate::model::{DeviceNumber, DiskSequence, Partition};

/// Whether an error only says that a device went while it was looked at. A file of sysfs that is open
/// when its device goes answers `ENODEV`.
#[must_use]
pub fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV | libc::ENXIO))
}

/// Reads what there is of a device, once more where it just goes; `None` when it is gone then.
///
/// The kernel takes a device away file by file, and its folder last. Until then a file may be missing, or
/// answer `EINVAL` (of a map: `dm_attr_show`) or `EBUSY` (of an array: `md_attr_show`). An error that
/// stays while the folder does is one.
///
/// # Errors
/// What `read` says.
pub fn unless_gone<T>(directory: &Path, read: impl Fn() -> io::Result<Option<T>>) -> io::Result<Option<T>> {
    const TRIES: usize = 10;
    const INTERVAL: Duration = Duration::from_millis(2);
    let mut result = read();
    for _ in 1..TRIES {
        if result.is_ok() {
            break;
        }
        if !directory.exists() {
            return Ok(None);
        }
        std::thread::sleep(INTERVAL);
        result = read();
    }
    result
}

/// A file that is there only sometimes.
///
/// # Errors
/// What reading says, but for what only means that it is not there.
pub fn read_if_there(path: &Path) -> io::Result<Option<Vec<u8>>> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// The folders of whole disks, with their names, in no order.
///
/// # Errors
/// When sysfs cannot be read.
pub fn disks(sys: &Path) -> io::Result<Vec<(String, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(sys.join("block"))? {
        let entry = entry?;
        // The kernel's own names are ASCII.
        if let Ok(name) = entry.file_name().into_string() {
            found.push((name, entry.path()));
        }
    }
    Ok(found)
}

/// A device's number.
///
/// # Errors
/// When it is gone, or the file holds something else.
pub fn device(directory: &Path) -> io::Result<DeviceNumber> {
    let text = fs::read_to_string(directory.join("dev"))?;
    DeviceNumber::parse(&text).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, format!("{} is no device number", text.trim()))
    })
}

/// A whole disk's sequence number; `None` before Linux 5.15.
///
/// # Errors
/// What reading says.
pub fn sequence(directory: &Path) -> io::Result<Option<DiskSequence>> {
    match fs::read_to_string(directory.join("diskseq")) {
        Ok(text) => {
            text.trim().parse().map(|sequence| Some(DiskSequence(sequence))).map_err(io::Error::other)
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// A whole disk's partitions, by number. Only folders named like the disk can be some
/// (`bdev_add_partition` in `block/partitions/core.c` names them so), so no other is looked into.
///
/// # Errors
/// What reading says.
pub fn partitions(directory: &Path) -> io::Result<Vec<Partition>> {
    let Some(disk) = directory.file_name() else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let is_named_so = entry.file_name().as_encoded_bytes().starts_with(disk.as_encoded_bytes());
        if !is_named_so {
            continue;
        }
        let path = entry.path();
        let Some(number) = read_if_there(&path.join("partition"))? else { continue };
        let number = String::from_utf8_lossy(&number).trim().parse().map_err(io::Error::other)?;
        match device(&path) {
            Ok(device) => found.push(Partition { number, device }),
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    found.sort_unstable();
    Ok(found)
}

/// The devices that a device is built on, as its `slaves` links tell: each leads to the folder of a
/// disk or partition.
///
/// # Errors
/// What reading says.
pub fn lower(directory: &Path) -> io::Result<Vec<DeviceNumber>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory.join("slaves"))? {
        match device(&entry?.path()) {
            Ok(device) => found.push(device),
            Err(error) if is_gone(&error) => {}
            Err(error) => return Err(error),
        }
    }
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

/// A device's folder by its number, under `dev/block`.
#[must_use]
pub fn directory(sys: &Path, device: DeviceNumber) -> PathBuf {
    sys.join(format!("dev/block/{device}"))
}

/// The kernel's name for a device (`loop3`, `dm-0`).
///
/// # Errors
/// `NotFound` when it is gone.
pub fn name(sys: &Path, device: DeviceNumber) -> io::Result<String> {
    let link = fs::read_link(directory(sys, device))?;
    let name = link.file_name().and_then(|name| name.to_str());
    name.map(str::to_owned).ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
}

/// Whether a device is a whole disk, or a partition of it.
///
/// # Errors
/// `NotFound` when the disk is gone.
pub fn is_part_of(sys: &Path, disk: DeviceNumber, device: DeviceNumber) -> io::Result<bool> {
    let directory = fs::canonicalize(directory(sys, disk))?;
    Ok(disk == device || partitions(&directory)?.iter().any(|partition| partition.device == device))
}

/// Where a device's node is, as the kernel itself names it (`DEVNAME` of its `uevent`), once it has
/// been seen to be that device's.
///
/// # Errors
/// `NotFound` when the device or its node is gone, `InvalidData` when the node is another device's.
pub fn node_path(sys: &Path, device: DeviceNumber) -> io::Result<PathBuf> {
    let (path, _) = node(sys, device, OFlags::PATH)?;
    Ok(path)
}

/// Opens a device for reading only: a writer would block mounts where the kernel was built without
/// `BLK_DEV_WRITE_MOUNTED`. May hang with the device.
///
/// # Errors
/// As [`node_path`], and what opening says.
pub fn open_node(sys: &Path, device: DeviceNumber) -> io::Result<OwnedFd> {
    node(sys, device, OFlags::RDONLY | OFlags::NONBLOCK).map(|(_, node)| node)
}

/// Whether the kernel itself holds a device: a mounted file system, swap, a map or array built on
/// it. Each claims its device, and a device that is claimed cannot be opened with `O_EXCL`
/// (`bd_prepare_to_claim` in `block/bdev.c`).
///
/// # Errors
/// As [`open_node`].
pub fn is_claimed(sys: &Path, device: DeviceNumber) -> io::Result<bool> {
    match node(sys, device, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::EXCL) {
        Ok(_) => Ok(false),
        Err(error) if error.raw_os_error() == Some(libc::EBUSY) => Ok(true),
        Err(error) => Err(error),
    }
}

fn node(sys: &Path, device: DeviceNumber, flags: OFlags) -> io::Result<(PathBuf, OwnedFd)> {
    let uevent = fs::read_to_string(directory(sys, device).join("uevent"))?;
    let name = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME="));
    let name = name.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "uevent has no DEVNAME"))?;
    let path = Path::new("/dev").join(name);
    // What only is at that place is not opened before it is known to be this device's node: to open
    // another's may do something.
    let found =
        openat2(CWD, &path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::NO_SYMLINKS)?;
    if node_device(&found)? != Some(device) {
        let message = format!("{} is not the node of {device}", path.display());
        return Err(io::Error::new(io::ErrorKind::InvalidData, message));
    }
    if flags.contains(OFlags::PATH) {
        return Ok((path, found));
    }
    // Through the descriptor, so that it is the very node that was just looked at.
    let again = format!("/proc/thread-self/fd/{}", found.as_raw_fd());
    Ok((path, open(again, flags | OFlags::CLOEXEC, Mode::empty())?))
}

/// The device that a descriptor is the node of; `None` when it is of anything else.
///
/// # Errors
/// What `fstat(2)` says.
pub fn node_device(node: impl AsFd) -> io::Result<Option<DeviceNumber>> {
    let status = fstat(node)?;
    let is_block = FileType::from_raw_mode(status.st_mode) == FileType::BlockDevice;
    Ok(is_block.then(|| DeviceNumber {
        major: rustix::fs::major(status.st_rdev),
        minor: rustix::fs::minor(status.st_rdev),
    }))
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{Tree, device_number as number};
    use super::*;

    /// `/sys/block/loop0` of a 6.18 kernel after `losetup` and `partx -a`.
    fn loop_with_partitions() -> Tree {
        Tree::new()
            .file("block/loop0/dev", "7:0\n")
            .file("block/loop0/diskseq", "64\n")
            .file("block/loop0/loop/backing_file", "/srv/image\n")
            .file("block/loop0/loop0p2/dev", "259:1\n")
            .file("block/loop0/loop0p2/partition", "2\n")
            .file("block/loop0/loop0p1/dev", "259:0\n")
            .file("block/loop0/loop0p1/partition", "1\n")
            .file("block/loop0/queue/rotational", "0\n")
            .file("block/loop0/uevent", "MAJOR=7\nMINOR=0\nDEVNAME=loop0\nDEVTYPE=disk\nDISKSEQ=64\n")
            .link("dev/block/7:0", "../../block/loop0")
    }

    #[test]
    fn a_disk_has_its_number_sequence_and_partitions_in_order() {
        let tree = loop_with_partitions();
        let directory = tree.path().join("block/loop0");
        assert_eq!(device(&directory).expect("there"), number(7, 0));
        assert_eq!(sequence(&directory).expect("there"), Some(DiskSequence(64)));
        let partition = |number, device| Partition { number, device };
        assert_eq!(
            partitions(&directory).expect("there"),
            [partition(1, number(259, 0)), partition(2, number(259, 1))]
        );
        assert_eq!(name(tree.path(), number(7, 0)).expect("there"), "loop0");
        for (device, is_part) in [((7, 0), true), ((259, 1), true), ((259, 2), false), ((7, 1), false)] {
            let device = number(device.0, device.1);
            assert_eq!(is_part_of(tree.path(), number(7, 0), device).expect("there"), is_part, "{device}");
        }
    }

    #[test]
    fn a_disk_of_an_old_kernel_has_no_sequence() {
        let tree = Tree::new().file("block/loop0/dev", "7:0\n");
        assert_eq!(sequence(&tree.path().join("block/loop0")).expect("there"), None);
    }

    #[test]
    fn a_device_that_goes_while_it_is_read_is_not_there_and_an_error_that_stays_is_one() {
        let tree = loop_with_partitions();
        let directory = tree.path().join("block/loop0");
        let refused = || Err::<Option<()>, _>(io::Error::from_raw_os_error(libc::EINVAL));
        let error = unless_gone(&directory, refused).expect_err("its folder stays");
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
        let once = std::cell::Cell::new(true);
        let refused_once = || if once.take() { refused() } else { Ok(Some(())) };
        assert_eq!(unless_gone(&directory, refused_once).expect("read the second time"), Some(()));
        assert_eq!(unless_gone(&tree.path().join("block/loop9"), refused).expect("gone"), None);
    }

    #[test]
    fn a_device_that_is_gone_is_no_other() {
        let tree = loop_with_partitions();
        let error = node_path(tree.path(), number(7, 1)).expect_err("no such device");
        assert!(is_gone(&error));
        assert!(is_gone(&device(&tree.path().join("block/loop1")).expect_err("no such device")));
    }

    #[test]
    fn a_node_of_another_device_is_refused() {
        // Every host has /dev/null, which is no block device at all.
        let tree = Tree::new()
            .file("block/loop0/uevent", "MAJOR=7\nMINOR=0\nDEVNAME=null\n")
            .link("dev/block/7:0", "../../block/loop0");
        let error = open_node(tree.path(), number(7, 0)).expect_err("the wrong node");
        assert_eq!(error.to_string(), "/dev/null is not the node of 7:0");
    }
}
