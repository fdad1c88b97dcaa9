//! The stacks of block devices that builders make of image files, each down to a mounted file system.
//!
//! A [`Shape`] is a script: a lease's owner runs it, or the test itself for what must survive beside
//! it. Only for a guest of `hostler-vm`: names of maps, volume groups and arrays are the host's.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use crate::blocks::{self, BlockSeen};
use crate::failure::OrFail;
use crate::place::{self, Mounts, Place};
use crate::probe;
use crate::program;

/// What a builder stacks. Each is mounted on `mnt` in the end, some also on `mnt2`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// ext4 on a loop device, with binds of the host's `/dev`, `/proc` and `/sys` in it.
    Plain,
    /// The same, bound with all that is mounted below.
    Recursive,
    /// Two partitions of a loop device, by `losetup --partscan`.
    Partitions,
    /// XFS on a loop device.
    Xfs,
    /// btrfs on a loop device: its mount shows a device number of its own.
    Btrfs,
    /// An overlay whose lower directory is squashfs on a loop device.
    Overlay,
    /// Two partitions of a loop device, as maps that `kpartx` makes.
    Kpartx,
    /// A linear map over a loop device.
    Linear,
    /// Two logical volumes of a volume group on a loop device.
    Lvm,
    /// An encrypted loop device.
    Luks,
    /// An array of two loop devices that mirror each other.
    Raid1,
    /// A qcow2 image that `qemu-nbd` serves, in the background.
    Nbd,
    /// A logical volume on an encrypted array.
    Tower,
}

/// `$tag` is a name that no other stack has; the current directory is where it is built. Sizes are
/// the least that the tools take.
const PLAIN: &str = r#"
    truncate -s 8M image; mke2fs -q -F -t ext4 image
    loop=$(losetup --find --show image)
    mkdir mnt; mount "$loop" mnt; mkdir mnt/dev mnt/proc mnt/sys
    mount --bind /dev mnt/dev; mount --bind /proc mnt/proc; mount --bind /sys mnt/sys
"#;
const RECURSIVE: &str = r#"
    umount mnt/dev mnt/sys; mount --rbind /dev mnt/dev; mount --rbind /sys mnt/sys
"#;
const TWO_PARTITIONS: &str = r#"
    truncate -s 24M image; printf 'label: dos\n,8M\n,8M\n' | sfdisk --quiet image
"#;
const PARTITIONS: &str = r#"
    loop=$(losetup --find --show --partscan image)
    # udev makes the nodes.
    tries=0
    until [ -b "${loop}p1" ] && [ -b "${loop}p2" ]; do
        tries=$((tries + 1)); [ "$tries" -lt 300 ]; sleep 0.1
    done
    mke2fs -q -F -t ext4 "${loop}p1"; mke2fs -q -F -t ext4 "${loop}p2"
    mkdir mnt mnt2; mount "${loop}p1" mnt; mount "${loop}p2" mnt2
"#;
const XFS: &str = r#"
    truncate -s 300M image; mkfs.xfs -q image
    loop=$(losetup --find --show image)
    mkdir mnt; mount "$loop" mnt
"#;
const BTRFS: &str = r#"
    truncate -s 128M image; mkfs.btrfs -q image
    loop=$(losetup --find --show image)
    mkdir mnt; mount "$loop" mnt
"#;
const OVERLAY: &str = r#"
    mkdir tree lower upper work mnt; echo lower >tree/file
    mksquashfs tree image -quiet -no-progress >/dev/null
    loop=$(losetup --find --show --read-only image)
    mount -t squashfs "$loop" lower
    mount -t overlay -o lowerdir=lower,upperdir=upper,workdir=work overlay mnt
"#;
const KPARTX: &str = r#"
    loop=$(losetup --find --show image)
    kpartx -a -s "$loop"
    map=/dev/mapper/${loop#/dev/}
    mke2fs -q -F -t ext4 "${map}p1"; mke2fs -q -F -t ext4 "${map}p2"
    mkdir mnt mnt2; mount "${map}p1" mnt; mount "${map}p2" mnt2
"#;
const LINEAR: &str = r#"
    truncate -s 8M image
    loop=$(losetup --find --show image)
    dmsetup create "$tag" --table "0 $(blockdev --getsz "$loop") linear $loop 0"
    mke2fs -q -F -t ext4 "/dev/mapper/$tag"
    mkdir mnt; mount "/dev/mapper/$tag" mnt
"#;
const LVM: &str = r#"
    truncate -s 32M image
    loop=$(losetup --find --show image)
    pvcreate -q "$loop"; vgcreate -q "$tag" "$loop"
    lvcreate -q -y -Wn -L 8M -n root "$tag"; lvcreate -q -y -Wn -L 8M -n home "$tag"
    mke2fs -q -F -t ext4 "/dev/$tag/root"; mke2fs -q -F -t ext4 "/dev/$tag/home"
    mkdir mnt mnt2; mount "/dev/$tag/root" mnt; mount "/dev/$tag/home" mnt2
"#;
const LUKS: &str = r#"
    truncate -s 24M image; printf secret >key
    luks() { cryptsetup --batch-mode --key-file key "$@"; }
    loop=$(losetup --find --show image)
    luks luksFormat --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 "$loop"
    luks open "$loop" "$tag"
    mke2fs -q -F -t ext4 "/dev/mapper/$tag"
    mkdir mnt; mount "/dev/mapper/$tag" mnt
"#;
const RAID1: &str = r#"
    truncate -s 16M one two
    one=$(losetup --find --show one); two=$(losetup --find --show two)
    mdadm --create "/dev/md/$tag" --quiet --run --homehost=any --metadata=1.2 --bitmap=none \
        --level=1 --raid-devices=2 --assume-clean "$one" "$two"
    mke2fs -q -F -t ext4 "/dev/md/$tag"
    mkdir mnt; mount "/dev/md/$tag" mnt
"#;
const NBD: &str = r#"
    modprobe nbd
    truncate -s 8M raw; mke2fs -q -F -t ext4 raw
    qemu-img convert -f raw -O qcow2 raw image; rm raw
    # Another test may take the same one at the same time: then that is refused.
    node=
    for number in 0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15; do
        [ ! -e "/sys/block/nbd$number/pid" ] || continue
        if qemu-nbd --format=qcow2 --connect="/dev/nbd$number" "$PWD/image" 2>nbd.log; then
            node=/dev/nbd$number; break
        fi
    done
    [ -n "$node" ] || { cat nbd.log >&2; exit 1; }
    mkdir mnt; mount "$node" mnt
"#;
const TOWER: &str = r#"
    truncate -s 64M one two; printf secret >key
    one=$(losetup --find --show one); two=$(losetup --find --show two)
    mdadm --create "/dev/md/$tag" --quiet --run --homehost=any --metadata=1.2 --bitmap=none \
        --level=1 --raid-devices=2 --assume-clean "$one" "$two"
    luks() { cryptsetup --batch-mode --key-file key "$@"; }
    luks luksFormat --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 "/dev/md/$tag"
    luks open "/dev/md/$tag" "$tag-crypt"
    pvcreate -q "/dev/mapper/$tag-crypt"; vgcreate -q "$tag" "/dev/mapper/$tag-crypt"
    lvcreate -q -y -Wn -L 8M -n root "$tag"
    mke2fs -q -F -t ext4 "/dev/$tag/root"
    mkdir mnt; mount "/dev/$tag/root" mnt
"#;

impl Shape {
    /// A word for it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Recursive => "recursive",
            Self::Partitions => "partitions",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
            Self::Overlay => "overlay",
            Self::Kpartx => "kpartx",
            Self::Linear => "linear",
            Self::Lvm => "lvm",
            Self::Luks => "luks",
            Self::Raid1 => "raid1",
            Self::Nbd => "nbd",
            Self::Tower => "tower",
        }
    }

    /// The script, for `sh -eu`. `who` makes the names that are the host's its own.
    #[must_use]
    pub fn script(self, who: &str) -> String {
        let parts: &[&str] = match self {
            Self::Plain => &[PLAIN],
            Self::Recursive => &[PLAIN, RECURSIVE],
            Self::Partitions => &[TWO_PARTITIONS, PARTITIONS],
            Self::Xfs => &[XFS],
            Self::Btrfs => &[BTRFS],
            Self::Overlay => &[OVERLAY],
            Self::Kpartx => &[TWO_PARTITIONS, KPARTX],
            Self::Linear => &[LINEAR],
            Self::Lvm => &[LVM],
            Self::Luks => &[LUKS],
            Self::Raid1 => &[RAID1],
            Self::Nbd => &[NBD],
            Self::Tower => &[TOWER],
        };
        // Descriptor 9 and up may be the test's own; the tools of LVM complain about them.
        format!(
            "tag=hostler-{who}-{}\nexport LVM_SUPPRESS_FD_WARNINGS=1 MDADM_NO_SYSTEMCTL=1\n{}",
            self.name(),
            parts.concat()
        )
    }

    /// The kinds of block devices that it has, as the watchdog's report calls them, sorted.
    #[must_use]
    pub fn kinds(self) -> Vec<&'static str> {
        match self {
            Self::Plain | Self::Recursive | Self::Partitions | Self::Xfs | Self::Btrfs | Self::Overlay => {
                vec!["loop"]
            }
            Self::Linear | Self::Luks => vec!["loop", "map"],
            Self::Kpartx | Self::Lvm => vec!["loop", "map", "map"],
            Self::Raid1 => vec!["loop", "loop", "map"],
            Self::Nbd => vec!["nbd"],
            Self::Tower => vec!["loop", "loop", "map", "map", "map"],
        }
    }
}

/// A stack that is nobody's lease's, as a bystander. It takes itself away when it is dropped.
#[derive(Debug)]
pub struct Stack {
    directory: PathBuf,
    blocks: Vec<BlockSeen>,
    mounts: BTreeSet<(PathBuf, u64)>,
}

impl Stack {
    /// Builds one in a directory.
    ///
    /// # Panics
    /// When it cannot be built.
    #[must_use]
    pub fn new(place: &Place, directory: &Path, shape: Shape) -> Self {
        let mut command = place.command("/bin/sh");
        command.args(["-eu", "-c", &shape.script("bystander")]).current_dir(directory);
        // The server of an nbd device keeps what it gets open, so nothing here waits for a pipe's end.
        let said = directory.join("said");
        let file = || fs::File::options().create(true).append(true).open(&said).or_fail("making a log");
        command.stdin(Stdio::null()).stdout(file()).stderr(file());
        // From here on, dropping it takes away what there is.
        let mut stack = Self { directory: directory.to_owned(), blocks: Vec::new(), mounts: BTreeSet::new() };
        let status = program::run(&mut command);
        let text = fs::read_to_string(&said).unwrap_or_default();
        assert!(status.success(), "building a bystander, {}, failed: {text}", shape.name());
        fs::write(directory.join("mnt/note"), "do not touch").or_fail("writing on the bystander");
        stack.blocks = blocks::made_of_files_below(directory);
        stack.mounts = stack.mounts_now();
        let mut kinds: Vec<_> = stack.blocks.iter().filter_map(BlockSeen::kind).collect();
        kinds.sort_unstable();
        assert_eq!(kinds, shape.kinds(), "the bystander is not what it should be: {:?}", stack.blocks);
        stack
    }

    fn mounts_now(&self) -> BTreeSet<(PathBuf, u64)> {
        let below = probe::mounts_below(&self.directory);
        below.into_iter().map(|mount| (mount.point, mount.number)).collect()
    }

    /// Its block devices, the lowest first.
    #[must_use]
    pub fn blocks(&self) -> &[BlockSeen] {
        &self.blocks
    }

    /// Fails the test when anything about it is not as it was made.
    ///
    /// # Panics
    /// When something of it was touched.
    #[track_caller]
    pub fn assert_untouched(&self) {
        assert_eq!(blocks::made_of_files_below(&self.directory), self.blocks, "the bystander's devices");
        assert_eq!(self.mounts_now(), self.mounts, "the bystander's mounts");
        let note =
            fs::read_to_string(self.directory.join("mnt/note")).or_fail("reading the bystander's note");
        assert_eq!(note, "do not touch");
        // A device that lost what it is made of still shows what is in memory.
        fs::write(self.directory.join("mnt/second"), "also").or_fail("writing on the bystander");
        let folder = fs::File::open(self.directory.join("mnt")).or_fail("opening the bystander's root");
        rustix::fs::syncfs(&folder).or_fail("writing on the bystander's devices");
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        place::unmount_below(&self.directory, Mounts::Hosts);
        blocks::remove_made_of_files_below(&self.directory);
    }
}
