//! What is on the host, read from `/proc` and `/sys` by code of the tests' own.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};

use crate::failure::OrFail;

/// `STATX_MNT_ID_UNIQUE`, Linux 6.8.
const UNIQUE: StatxFlags = StatxFlags::from_bits_retain(0x4000);

/// A line of mountinfo.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountSeen {
    /// The first column.
    pub number: u64,
    /// The number of the mount that it is on.
    pub parent: u64,
    /// The device, `MAJOR:MINOR`.
    pub device: String,
    /// Where it is mounted.
    pub point: PathBuf,
    /// Its peer group, when it is shared.
    pub peers: Option<u64>,
    /// The file system's type.
    pub filesystem: String,
    /// The file system's own options, last on the line.
    pub options: String,
}

/// The mounts of the calling thread's namespace.
///
/// # Panics
/// When mountinfo is not as `proc_pid_mountinfo(5)` says.
#[must_use]
pub fn mounts() -> Vec<MountSeen> {
    mounts_of("thread-self")
}

/// The mounts of a process's namespace, by its number.
///
/// # Panics
/// As [`mounts`].
#[must_use]
pub fn mounts_of(process: &str) -> Vec<MountSeen> {
    let bytes = fs::read(format!("/proc/{process}/mountinfo")).or_fail("reading mountinfo");
    bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).map(mount).collect()
}

fn mount(line: &[u8]) -> MountSeen {
    let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
    let dash = fields.iter().position(|field| *field == b"-").or_fail("the dash in a line of mountinfo");
    let text = |index: usize| {
        let field = fields.get(index).or_fail("a field of mountinfo");
        String::from_utf8_lossy(field).into_owned()
    };
    MountSeen {
        number: text(0).parse().or_fail("a mount's number"),
        parent: text(1).parse().or_fail("the number of a mount's parent"),
        device: text(2),
        point: PathBuf::from(OsString::from_vec(unescape(fields[4]))),
        peers: (6..dash).find_map(|index| text(index).strip_prefix("shared:")?.parse().ok()),
        filesystem: text(dash + 1),
        options: text(dash + 3),
    }
}

/// `\OOO` is how mountinfo writes what would break its lines.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let octal = after
            .get(..3)
            .filter(|_| *first == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match octal {
            Some(byte) => {
                plain.push(byte);
                rest = &after[3..];
            }
            None => {
                plain.push(*first);
                rest = after;
            }
        }
    }
    plain
}

/// The mounts at and below a directory.
#[must_use]
pub fn mounts_below(directory: &Path) -> Vec<MountSeen> {
    mounts().into_iter().filter(|mount| mount.point.starts_with(directory)).collect()
}

/// The number of the topmost mount that a path lies on: never given again on Linux 6.8 and later.
///
/// # Panics
/// When the path cannot be looked at.
#[must_use]
pub fn mount_number(path: &Path) -> u64 {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    statx(CWD, path, flags, UNIQUE).or_fail(format_args!("statx of {}", path.display())).stx_mnt_id
}

/// Whether this kernel gives each mount a number that no other gets (Linux 6.8). Where it does not,
/// a mount cannot be told from an earlier one of the same number.
///
/// # Panics
/// When `/` cannot be looked at.
#[must_use]
pub fn mounts_are_numbered_once() -> bool {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    let told = statx(CWD, "/", flags, UNIQUE).or_fail("statx of /").stx_mask;
    told & UNIQUE.bits() != 0
}

/// A bound loop device, as sysfs shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LoopSeen {
    /// N of `/dev/loopN`.
    pub number: u32,
    /// Which attachment.
    pub sequence: u64,
    /// The backing file's path, with " (deleted)" where it was removed.
    pub backing: PathBuf,
}

/// The bound loop devices of the host. Opens none of them.
///
/// # Panics
/// When sysfs cannot be read.
#[must_use]
pub fn loops() -> Vec<LoopSeen> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/block").or_fail("reading /sys/block") {
        let Ok(entry) = entry else { continue };
        let name = entry.file_name();
        let number = name.to_str().and_then(|name| name.strip_prefix("loop")?.parse().ok());
        // Other tests bind and free devices all the time: what went meanwhile is not there.
        let Ok(backing) = fs::read(entry.path().join("loop/backing_file")) else { continue };
        let Ok(sequence) = fs::read_to_string(entry.path().join("diskseq")) else { continue };
        if let (Some(number), Ok(sequence)) = (number, sequence.trim().parse()) {
            let backing = PathBuf::from(OsString::from_vec(backing.trim_ascii_end().to_vec()));
            found.push(LoopSeen { number, sequence, backing });
        }
    }
    found.sort_by_key(|device| device.number);
    found
}

/// The loop devices whose backing files lie below a directory, removed ones included.
#[must_use]
pub fn loops_below(directory: &Path) -> Vec<LoopSeen> {
    loops().into_iter().filter(|device| device.backing.starts_with(directory)).collect()
}

/// The loop device that a file is behind.
///
/// # Panics
/// When there is none.
#[must_use]
#[track_caller]
pub fn loop_of(file: &Path) -> LoopSeen {
    let found = loops().into_iter().find(|device| device.backing == file);
    found.or_fail(format_args!("the loop device of {}", file.display()))
}

/// A process: its number and when it started, so that another of the same number is another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ProcessSeen {
    /// Its number.
    pub pid: u32,
    /// Field 22 of its `stat`.
    pub start: u64,
}

impl ProcessSeen {
    /// The process that has this number now.
    ///
    /// # Panics
    /// When none has.
    #[must_use]
    #[track_caller]
    pub fn of(pid: u32) -> Self {
        let (_, start) = stat(pid).or_fail(format_args!("process {pid}"));
        Self { pid, start }
    }

    /// The same, where it may be gone.
    #[must_use]
    pub fn find(pid: u32) -> Option<Self> {
        stat(pid).map(|(_, start)| Self { pid, start })
    }

    /// Whether it runs (one that only waits to be waited for does not).
    #[must_use]
    pub fn runs(self) -> bool {
        stat(self.pid).is_some_and(|(state, start)| start == self.start && !matches!(state, 'Z' | 'X'))
    }
}

fn stat(pid: u32) -> Option<(char, u64)> {
    let text = fs::read(format!("/proc/{pid}/stat")).ok()?;
    let text = String::from_utf8_lossy(&text);
    let fields: Vec<&str> = text.rsplit_once(')')?.1.split_whitespace().collect();
    Some((fields.first()?.chars().next()?, fields.get(19)?.parse().ok()?))
}

/// The state letter of a process (`R`, `S`, `T`, …); `None` when it is gone.
#[must_use]
pub fn state(pid: u32) -> Option<char> {
    stat(pid).map(|(state, _)| state)
}

/// The open descriptors of a process.
#[must_use]
pub fn descriptors(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// The number that a script wrote into a file as a process's.
///
/// # Panics
/// When no such file appears within seconds.
#[must_use]
#[track_caller]
pub fn pid_from(file: &Path) -> ProcessSeen {
    let limit = std::time::Duration::from_secs(10);
    let (pid, _) = crate::failure::wait_for(format_args!("a pid in {}", file.display()), limit, || {
        // Half a write has no newline yet.
        fs::read_to_string(file).ok()?.strip_suffix('\n')?.trim().parse().ok()
    });
    ProcessSeen::of(pid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_names_with_every_kind_of_byte() {
        let line =
            b"36 35 98:0 / /a\\040b\\012c\\134d\xff rw,noatime master:1 - ext3 /dev/root rw,errors=continue";
        let seen = mount(line);
        assert_eq!(seen.point.into_os_string().into_vec(), b"/a b\nc\\d\xff");
        let seen = mount(line);
        assert_eq!((seen.number, seen.device.as_str(), seen.filesystem.as_str()), (36, "98:0", "ext3"));
        assert_eq!(seen.options, "rw,errors=continue");
    }
}
