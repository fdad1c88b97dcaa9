//! File systems that are in use on block devices, as sysfs shows them, whether or not anything shows a
//! mount of them.
//!
//! Only some types have a folder in sysfs; those that have none (squashfs, vfat, iso9660) are seen by
//! their mounts only.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::fcntl::{FcntlArg, fcntl};
use rustix::io::pread;

use super::block;
use super::detached::Detached;
use crate::model::{DeviceNumber, Filesystem};

/// The types that have a folder per device, `/sys/fs/TYPE/NAME`, for as long as the file system lives.
const ONE_DEVICE: [&str; 5] = ["ext4", "xfs", "f2fs", "erofs", "nilfs2"];

/// All that sysfs shows, and not yet whether they are frozen, or as what their mounts are shown. `sys` is
/// where sysfs is mounted.
///
/// # Errors
/// When sysfs cannot be read.
pub fn list(sys: &Path) -> io::Result<Vec<Filesystem>> {
    let mut found = Vec::new();
    for kind in ONE_DEVICE {
        for name in names(&sys.join("fs").join(kind))? {
            // Beside the devices there are folders such as `features` and `stats`.
            let Some(device) = if_there(block::device(&sys.join("class/block").join(&name)))? else {
                continue;
            };
            let Some(instance) = instance(sys, kind, &name)? else { continue };
            found.push(filesystem(kind, instance, vec![device]));
        }
    }
    for name in names(&sys.join("fs/btrfs"))? {
        let devices = sys.join("fs/btrfs").join(&name).join("devices");
        let mut blocks = Vec::new();
        for name in names(&devices)? {
            blocks.extend(if_there(block::device(&devices.join(name)))?);
        }
        // `features` has no devices.
        if !blocks.is_empty()
            && let Some(instance) = instance(sys, "btrfs", &name)?
        {
            blocks.sort_unstable();
            found.push(filesystem("btrfs", instance, blocks));
        }
    }
    found.sort_by(|one, other| one.blocks.cmp(&other.blocks));
    Ok(found)
}

/// The number of its folder, which is there for as long as the file system lives.
fn instance(sys: &Path, kind: &str, name: &str) -> io::Result<Option<u64>> {
    let folder = if_there(fs::symlink_metadata(sys.join("fs").join(kind).join(name)))?;
    Ok(folder.map(|folder| folder.ino()))
}

fn filesystem(kind: &str, instance: u64, blocks: Vec<DeviceNumber>) -> Filesystem {
    Filesystem { kind: kind.to_owned(), instance, blocks, shown_as: Vec::new(), frozen: None }
}

/// The names in a folder; none when it is not there, as it is for a type that is not loaded.
fn names(directory: &Path) -> io::Result<Vec<String>> {
    let Some(entries) = if_there(fs::read_dir(directory))? else { return Ok(Vec::new()) };
    let mut names = Vec::new();
    for entry in entries {
        names.extend(entry?.file_name().into_string().ok());
    }
    Ok(names)
}

fn if_there<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(error) if block::is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether the ext4 that lives on a device is frozen; `None` when that cannot be told.
///
/// No interface of the kernel tells it, but the file system's own mark on the disk does. One with a
/// journal that is mounted for writing is marked as needing recovery for as long as it is
/// (`ext4_setup_super`); a freeze empties the journal and takes the mark away (`ext4_freeze` in
/// `fs/ext4/super.c`), a thaw puts it back (`ext4_unfreeze`). Mounted read-only it has no mark either
/// way, and without a journal never one: there it cannot be told. The same holds for all other types,
/// whose marks do not follow a freeze.
///
/// The mark is in memory for as long as the file system lives, and reading it may read the device all the
/// same, since the kernel reads whole pages. So this may hang with the device; of a map that is
/// suspended nothing is read.
///
/// # Errors
/// What opening or reading says.
pub fn is_ext4_frozen(sys: &Path, proc: &Path, device: DeviceNumber) -> io::Result<Option<bool>> {
    let name = block::name(sys, device)?;
    // Its first line is `rw` or `ro`, whatever single mounts of it say (`ext4_seq_options_show`).
    let options = block::read_if_there(&proc.join("fs/ext4").join(name).join("options"))?;
    let is_writable = options.is_some_and(|options| options.starts_with(b"rw\n"));
    // What is read of a suspended map waits until it is resumed.
    let suspended = block::read_if_there(&block::directory(sys, device).join("dm/suspended"))?;
    let is_suspended = suspended.is_some_and(|suspended| suspended.starts_with(b"1"));
    if !is_writable || is_suspended {
        return Ok(None);
    }
    let node = block::open_node(sys, device)?;
    let mut superblock = [0; SUPERBLOCK_SIZE];
    let count = pread(&node, &mut superblock, SUPERBLOCK_PLACE)?;
    Ok(if count == SUPERBLOCK_SIZE { is_marked_frozen(&superblock) } else { None })
}

const SUPERBLOCK_PLACE: u64 = 1024;
const SUPERBLOCK_SIZE: usize = 1024;

/// Pure: from the superblock of an ext4 that is mounted for writing (`struct ext4_super_block`).
fn is_marked_frozen(superblock: &[u8; SUPERBLOCK_SIZE]) -> Option<bool> {
    const MAGIC: (usize, u16) = (0x38, 0xef53);
    const HAS_JOURNAL: (usize, u32) = (0x5c, 0x4);
    const NEEDS_RECOVERY: (usize, u32) = (0x60, 0x4);
    let flags = |place: usize| {
        let bytes = superblock[place..place + 4].try_into().expect("four bytes are four");
        u32::from_le_bytes(bytes)
    };
    let is_ext4 = superblock[MAGIC.0..MAGIC.0 + 2] == MAGIC.1.to_le_bytes();
    if !is_ext4 || flags(HAS_JOURNAL.0) & HAS_JOURNAL.1 == 0 {
        return None;
    }
    Some(flags(NEEDS_RECOVERY.0) & NEEDS_RECOVERY.1 == 0)
}

/// The number that the mounts of the living btrfs on a device show.
///
/// The kernel shows the number of a btrfs (`0:43`) in mountinfo and its devices in sysfs, and nowhere
/// both. What mountinfo calls the source is a path that somebody once gave. To open the root of one
/// of its mounts and ask would make an unmount fail that comes in that moment, and needs a mount that
/// can be reached. So it is mounted once more, attached nowhere; and what the kernel itself has as its
/// number is read off a lock, because `stat(2)` of a file on a btrfs shows the number of its subvolume.
/// (An inotify watch would tell it too, and take 20 ms to end, for which the file system could not.)
///
/// For that moment the file system does not end when its last other mount does, so this is done once in
/// the life of one, and only for what a decision needs. May hang with the device.
///
/// # Errors
/// What the calls say.
pub fn number_of_btrfs(sys: &Path, device: DeviceNumber) -> io::Result<Option<DeviceNumber>> {
    let mount = Detached::of_living_btrfs(&block::node_path(sys, device)?)?;
    let root = mount.root()?;
    // A reader's lock on one byte of the root directory, which is no place that anybody else locks. It
    // ends with the descriptor.
    let lock = libc::flock {
        l_type: libc::F_RDLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 1 << 62,
        l_len: 1,
        l_pid: 0,
    };
    fcntl(&root, FcntlArg::F_OFD_SETLK(&lock))?;
    let text = fs::read_to_string(format!("/proc/thread-self/fdinfo/{}", root.as_raw_fd()))?;
    Ok(locked_device(&text))
}

/// The device in `lock: 1: OFDLCK ADVISORY  READ -1 00:27:256 …`, the super block's own in hexadecimal
/// (`lock_get_status` in `fs/locks.c`).
fn locked_device(fdinfo: &str) -> Option<DeviceNumber> {
    let lock = fdinfo.lines().find_map(|line| line.strip_prefix("lock:"))?;
    let mut parts = lock.split_whitespace().nth(5)?.split(':');
    let mut number = || u32::from_str_radix(parts.next()?, 16).ok();
    Some(DeviceNumber { major: number()?, minor: number()? })
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{Tree, device_number as number};
    use super::*;

    #[test]
    fn lists_what_lives_on_devices_and_nothing_else() {
        // 6.18, with an ext4 on a loop device, an xfs on a partition, and a btrfs on two loop devices.
        let tree = Tree::new()
            .file("class/block/loop0/dev", "7:0\n")
            .file("class/block/loop1p2/dev", "259:1\n")
            .file("class/block/loop2/dev", "7:2\n")
            .file("class/block/loop3/dev", "7:3\n")
            .file("fs/ext4/loop0/session_write_kbytes", "1\n")
            .file("fs/ext4/features/lazy_itable_init", "supported\n")
            .file("fs/xfs/loop1p2/log/log_head_lsn", "1:2\n")
            .file("fs/xfs/stats/stats", "extent_alloc 0 0 0 0\n")
            .file("fs/btrfs/features/free_space_tree", "2\n")
            .directory("fs/btrfs/2778b64b-20fa-41f6-b96d-0d1762d98c42/allocation")
            .link(
                "fs/btrfs/2778b64b-20fa-41f6-b96d-0d1762d98c42/devices/loop3",
                "../../../../class/block/loop3",
            )
            .link(
                "fs/btrfs/2778b64b-20fa-41f6-b96d-0d1762d98c42/devices/loop2",
                "../../../../class/block/loop2",
            );
        let of = |folder: &str| fs::metadata(tree.path().join("fs").join(folder)).expect("there").ino();
        assert_eq!(
            list(tree.path()).expect("readable"),
            [
                filesystem("ext4", of("ext4/loop0"), vec![number(7, 0)]),
                filesystem(
                    "btrfs",
                    of("btrfs/2778b64b-20fa-41f6-b96d-0d1762d98c42"),
                    vec![number(7, 2), number(7, 3)]
                ),
                filesystem("xfs", of("xfs/loop1p2"), vec![number(259, 1)]),
            ]
        );
    }

    #[test]
    fn a_kernel_without_any_of_these_types_has_no_such_file_system() {
        assert_eq!(list(Tree::new().path()).expect("nothing there"), []);
    }

    #[test]
    fn a_lock_shows_the_number_that_the_kernel_has() {
        // 6.18, of the root of a btrfs that mountinfo shows as 0:39.
        let fdinfo = "pos:\t0\nflags:\t02100000\nmnt_id:\t84\nino:\t256\nlock:\t1: OFDLCK ADVISORY  READ -1 \
            00:27:256 4611686018427387904 4611686018427387904\n";
        assert_eq!(locked_device(fdinfo), Some(number(0, 39)));
        assert_eq!(locked_device(&fdinfo.replace("00:27", "fe:100")), Some(number(254, 256)));
        assert_eq!(locked_device("pos:\t0\nflags:\t02100000\n"), None);
    }

    /// The flags of a superblock made by `mke2fs -t ext4` (e2fsprogs 1.47) and mounted by 6.18.
    fn superblock(compatible: u32, incompatible: u32) -> [u8; SUPERBLOCK_SIZE] {
        let mut bytes = [0; SUPERBLOCK_SIZE];
        bytes[0x38..0x3a].copy_from_slice(&[0x53, 0xef]);
        bytes[0x5c..0x60].copy_from_slice(&compatible.to_le_bytes());
        bytes[0x60..0x64].copy_from_slice(&incompatible.to_le_bytes());
        bytes
    }

    #[test]
    fn a_freeze_takes_the_recovery_mark_away() {
        assert_eq!(is_marked_frozen(&superblock(0x3c, 0x2c6)), Some(false));
        assert_eq!(is_marked_frozen(&superblock(0x3c, 0x2c2)), Some(true));
    }

    #[test]
    fn without_a_journal_there_is_no_mark_to_tell_by() {
        assert_eq!(is_marked_frozen(&superblock(0x38, 0x2c2)), None);
        assert_eq!(is_marked_frozen(&[0; SUPERBLOCK_SIZE]), None);
    }

    #[test]
    fn one_that_is_mounted_read_only_or_cannot_be_read_may_be_frozen_or_not() {
        let tree = Tree::new()
            .file("sys/block/loop0/uevent", "DEVNAME=loop0\n")
            .link("sys/dev/block/7:0", "../../block/loop0")
            .file("proc/fs/ext4/loop0/options", "ro\nbsddf\nnogrpid\n");
        // Its device is not even opened, nor is a map that is suspended.
        let suspended = Tree::new()
            .file("sys/block/dm-0/uevent", "DEVNAME=dm-0\n")
            .file("sys/block/dm-0/dm/suspended", "1\n")
            .link("sys/dev/block/254:0", "../../block/dm-0")
            .file("proc/fs/ext4/dm-0/options", "rw\nbsddf\n");
        let frozen =
            is_ext4_frozen(&suspended.path().join("sys"), &suspended.path().join("proc"), number(254, 0));
        assert_eq!(frozen.expect("readable"), None);
        let frozen = is_ext4_frozen(&tree.path().join("sys"), &tree.path().join("proc"), number(7, 0));
        assert_eq!(frozen.expect("readable"), None);
    }
}
