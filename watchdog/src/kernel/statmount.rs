//! What the kernel tells of a single mount: `statmount(2)`, as `<linux/mount.h>` lays it out.
//!
//! Two questions are asked. [`basics`] costs a third of a line of mountinfo and tells the numbers, which
//! are enough to know whether a mount matters; [`whole`] tells all that mountinfo does.

use std::io;
use std::mem::offset_of;

use linux_raw_sys::general::{
    OVERLAYFS_SUPER_MAGIC, STATMOUNT_FS_SUBTYPE, STATMOUNT_FS_TYPE, STATMOUNT_MNT_BASIC, STATMOUNT_MNT_OPTS,
    STATMOUNT_MNT_POINT, STATMOUNT_MNT_ROOT, STATMOUNT_SB_BASIC, STATMOUNT_SB_SOURCE, statmount as layout,
};

use super::{mountinfo, namespace_calls};
use crate::model::DeviceNumber;

/// Where the strings begin.
const FIXED: usize = size_of::<layout>();
/// The largest answer that is asked for again with more room: mount points may be longer than a path may
/// be, and this is more than any that a person ever wrote.
const LIMIT: usize = 1024 * 1024;

/// The numbers of a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Basics {
    /// The number that is never given again.
    pub unique: u64,
    /// The same of the mount it is on; its own when it is on none.
    pub parent: u64,
    /// The number in mountinfo.
    pub short: u64,
    /// The same of the mount it is on.
    pub parent_short: u64,
    /// The file system's device number.
    pub device: DeviceNumber,
    /// The file system's magic number, which tells its kind.
    pub magic: u64,
    /// The file system is mounted for reading only.
    pub read_only: bool,
    /// The peer group that it shares its mounts with.
    pub peers: Option<u64>,
    /// The peer group that it gets mounts from.
    pub master: Option<u64>,
}

/// All that mountinfo tells of a mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Whole {
    /// Its numbers.
    pub basics: Basics,
    /// Which part of the file system is mounted.
    pub root: Vec<u8>,
    /// Where it is mounted, relative to the caller's root, or to that of the other namespace; empty when
    /// no path leads there from it.
    pub point: Vec<u8>,
    /// The file system's type, with its subtype: `fuse.sshfs`.
    pub filesystem: String,
    /// What was mounted, in the mounter's words; `None` when the kernel did not tell (before Linux
    /// 6.13), or there is nothing to tell.
    pub source: Option<Vec<u8>>,
    /// The file system's own options, as mountinfo has them, of an overlay; else empty.
    pub options: Vec<u8>,
}

/// The numbers of one mount; `None` for the caller's own namespace.
///
/// # Errors
/// `ENOENT` when there is no such mount in that namespace.
pub fn basics(namespace: Option<u64>, unique: u64) -> io::Result<Basics> {
    let mut buffer = [0u8; FIXED];
    let mask = STATMOUNT_SB_BASIC | STATMOUNT_MNT_BASIC;
    namespace_calls::stat_mount(namespace, unique, u64::from(mask), &mut buffer)?;
    Ok(parse_basics(&buffer))
}

/// The short number of one mount of the caller's own namespace: the cheapest question.
///
/// # Errors
/// `ENOENT` when there is no such mount.
pub fn short_number(unique: u64) -> io::Result<u64> {
    let mut buffer = [0u8; FIXED];
    namespace_calls::stat_mount(None, unique, u64::from(STATMOUNT_MNT_BASIC), &mut buffer)?;
    Ok(parse_basics(&buffer).short)
}

/// All of one mount. `buffer` is kept by the caller, since one mount is rarely asked for alone.
///
/// # Errors
/// `ENOENT` when there is no such mount in that namespace.
pub fn whole(namespace: Option<u64>, basics: &Basics, buffer: &mut Vec<u8>) -> io::Result<Whole> {
    const ALL: u32 = STATMOUNT_SB_BASIC
        | STATMOUNT_MNT_BASIC
        | STATMOUNT_MNT_ROOT
        | STATMOUNT_MNT_POINT
        | STATMOUNT_FS_TYPE
        | STATMOUNT_FS_SUBTYPE
        | STATMOUNT_SB_SOURCE;
    // The options are the dearest part, and matter for overlays only.
    let options = if basics.magic == u64::from(OVERLAYFS_SUPER_MAGIC) { STATMOUNT_MNT_OPTS } else { 0 };
    let mask = u64::from(ALL | options);
    if buffer.len() < 2 * FIXED {
        buffer.resize(8 * FIXED, 0);
    }
    loop {
        match namespace_calls::stat_mount(namespace, basics.unique, mask, buffer) {
            Ok(()) => return parse_whole(buffer),
            Err(error) if error.raw_os_error() == Some(libc::EOVERFLOW) && buffer.len() < LIMIT => {
                buffer.resize(buffer.len() * 4, 0);
            }
            Err(error) => return Err(error),
        }
    }
}

/// Whether this kernel tells of a mount all that mountinfo does: what was mounted came last (Linux 6.13).
/// `unique` is any mount of the own namespace that has a source.
#[must_use]
pub fn tells_all(unique: u64) -> bool {
    let whole = basics(None, unique).and_then(|basics| whole(None, &basics, &mut Vec::new()));
    whole.is_ok_and(|whole| whole.source.is_some())
}

fn number_at<const LENGTH: usize>(bytes: &[u8], offset: usize) -> [u8; LENGTH] {
    let mut number = [0; LENGTH];
    number.copy_from_slice(&bytes[offset..offset + LENGTH]);
    number
}

fn short_at(bytes: &[u8], offset: usize) -> u32 {
    u32::from_ne_bytes(number_at(bytes, offset))
}

fn long_at(bytes: &[u8], offset: usize) -> u64 {
    u64::from_ne_bytes(number_at(bytes, offset))
}

/// Pure. `bytes` are at least as many as the fixed part has.
fn parse_basics(bytes: &[u8]) -> Basics {
    const READ_ONLY: u32 = 1;
    let group = |offset| Some(long_at(bytes, offset)).filter(|group| *group != 0);
    Basics {
        unique: long_at(bytes, offset_of!(layout, mnt_id)),
        parent: long_at(bytes, offset_of!(layout, mnt_parent_id)),
        short: u64::from(short_at(bytes, offset_of!(layout, mnt_id_old))),
        parent_short: u64::from(short_at(bytes, offset_of!(layout, mnt_parent_id_old))),
        device: DeviceNumber {
            major: short_at(bytes, offset_of!(layout, sb_dev_major)),
            minor: short_at(bytes, offset_of!(layout, sb_dev_minor)),
        },
        magic: long_at(bytes, offset_of!(layout, sb_magic)),
        read_only: short_at(bytes, offset_of!(layout, sb_flags)) & READ_ONLY != 0,
        peers: group(offset_of!(layout, mnt_peer_group)),
        master: group(offset_of!(layout, mnt_master)),
    }
}

/// Pure.
fn parse_whole(bytes: &[u8]) -> io::Result<Whole> {
    let told = long_at(bytes, offset_of!(layout, mask));
    let string = |flag: u32, offset: usize| {
        if told & u64::from(flag) == 0 {
            return Ok(None);
        }
        let begin = FIXED + short_at(bytes, offset) as usize;
        let rest = bytes.get(begin..).unwrap_or_default();
        let end = rest.iter().position(|byte| *byte == 0);
        let end = end.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a string without end"))?;
        Ok::<_, io::Error>(Some(rest[..end].to_vec()))
    };
    let basics = parse_basics(bytes);
    let root = string(STATMOUNT_MNT_ROOT, offset_of!(layout, mnt_root))?;
    let point = string(STATMOUNT_MNT_POINT, offset_of!(layout, mnt_point))?;
    let kind = string(STATMOUNT_FS_TYPE, offset_of!(layout, fs_type))?.unwrap_or_default();
    let mut filesystem = String::from_utf8_lossy(&kind).into_owned();
    if let Some(subtype) = string(STATMOUNT_FS_SUBTYPE, offset_of!(layout, fs_subtype))? {
        filesystem.push('.');
        filesystem.push_str(&String::from_utf8_lossy(&subtype));
    }
    let source = string(STATMOUNT_SB_SOURCE, offset_of!(layout, sb_source))?;
    let mut options = Vec::new();
    if let Some(own) = string(STATMOUNT_MNT_OPTS, offset_of!(layout, mnt_opts))? {
        // Mountinfo begins them with how the file system is mounted. Of all strings here they are the
        // only ones that come escaped, just as in mountinfo (seen on Linux 6.18).
        options.extend_from_slice(if basics.read_only { b"ro," } else { b"rw," });
        options.extend_from_slice(&mountinfo::unescape(&own));
    }
    Ok(Whole {
        basics,
        root: root.unwrap_or_default(),
        point: point.unwrap_or_default(),
        filesystem,
        source,
        options,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An answer for an overlay, laid out by hand after `<linux/mount.h>`.
    fn answer() -> Vec<u8> {
        let mut bytes = vec![0u8; 512];
        let strings: [(usize, &[u8]); 6] = [
            (4, b"lowerdir=/a\\040b,upperdir=/u"),
            (36, b"overlay"),
            (104, b"/"),
            (108, b"/m \xff\n"),
            (120, b"sub"),
            (124, b"ov"),
        ];
        for (offset, string) in strings {
            let begin = (bytes.len() - 512) as u32;
            bytes[offset..offset + 4].copy_from_slice(&begin.to_ne_bytes());
            bytes.extend_from_slice(string);
            bytes.push(0);
        }
        for (offset, value) in [(20, 41u32), (32, 1), (56, 92), (60, 89)] {
            bytes[offset..offset + 4].copy_from_slice(&value.to_ne_bytes());
        }
        let longs =
            [(8, 0x3bfu64), (24, 0x794c_7630), (40, 2_147_489_526), (48, 2_147_489_503), (80, 7), (88, 3)];
        for (offset, value) in longs {
            bytes[offset..offset + 8].copy_from_slice(&value.to_ne_bytes());
        }
        bytes
    }

    #[test]
    fn reads_what_the_kernel_lays_out() {
        let whole = parse_whole(&answer()).expect("whole");
        assert_eq!(
            whole,
            Whole {
                basics: Basics {
                    unique: 2_147_489_526,
                    parent: 2_147_489_503,
                    short: 92,
                    parent_short: 89,
                    device: DeviceNumber { major: 0, minor: 41 },
                    magic: 0x794c_7630,
                    read_only: true,
                    peers: Some(7),
                    master: Some(3),
                },
                root: b"/".to_vec(),
                point: b"/m \xff\n".to_vec(),
                filesystem: "overlay.sub".to_owned(),
                source: Some(b"ov".to_vec()),
                options: b"ro,lowerdir=/a b,upperdir=/u".to_vec(),
            }
        );
    }

    #[test]
    fn what_the_kernel_did_not_tell_is_absent() {
        let mut bytes = vec![0u8; 512];
        bytes[8] = 3;
        let whole = parse_whole(&bytes).expect("nothing but numbers");
        assert_eq!((whole.source, whole.point, whole.filesystem), (None, Vec::new(), String::new()));
        assert!(whole.options.is_empty());
    }

    #[test]
    fn a_string_beyond_the_answer_is_refused() {
        let mut bytes = answer();
        bytes.truncate(bytes.len() - 1);
        assert_eq!(parse_whole(&bytes).map_err(|error| error.kind()), Err(io::ErrorKind::InvalidData));
    }
}
