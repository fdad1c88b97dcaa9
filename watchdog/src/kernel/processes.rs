//! Processes, as `/proc` shows them.
//!
//! Read without a library: a host may run thousands, each look reads them all, and most of what a
//! library parses is not wanted. Of 2,000 processes that takes 11 ms, and 119 ms with what they hold,
//! as long as the kernel takes to tell it; with the crate procfs it took a quarter more. Everything of
//! one process is read below one descriptor of its folder, so it is of that process, or an error, also
//! when its number is given again meanwhile.

use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::buffer::spare_capacity;
use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, StatxFlags, fstat, openat, statx};

use super::holds;
use crate::model::{DeviceNumber, Process, ProcessIdentity, SnapshotDepth, StartTime};

/// When a process started: what tells it from a later one of the same number.
///
/// # Errors
/// `NotFound` when it is gone.
pub fn start_time(pid: u32) -> io::Result<StartTime> {
    start_time_in(Path::new("/proc"), pid)
}

/// The same, with procfs mounted at `proc`.
///
/// # Errors
/// `NotFound` when it is gone.
pub fn start_time_in(proc: &Path, pid: u32) -> io::Result<StartTime> {
    let text = fs::read(proc.join(format!("{pid}/stat")))?;
    Ok(parse_stat(&text).ok_or_else(not_stat)?.start)
}

fn not_stat() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "stat is not as documented")
}

/// The real user of a process: whoever started it, also when it is a setuid program.
///
/// # Errors
/// `NotFound` when it is gone.
pub fn real_user(pid: u32) -> io::Result<u32> {
    status_field(Path::new("/proc"), pid, "Uid:")
}

/// The process that a thread is of.
///
/// # Errors
/// `NotFound` when it is gone.
pub fn of_thread(proc: &Path, thread: u32) -> io::Result<u32> {
    status_field(proc, thread, "Tgid:")
}

/// The first number on a line of `status`.
fn status_field(proc: &Path, pid: u32, name: &str) -> io::Result<u32> {
    let bytes = fs::read(proc.join(format!("{pid}/status")))?;
    // The first line has the name that the process gave itself, of any bytes but a newline.
    let text = String::from_utf8_lossy(&bytes);
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("status has no {name}")))
}

/// Whether a process has a block device open by any of its descriptors.
///
/// # Errors
/// `NotFound` when it is gone.
pub fn has_open(proc: &Path, pid: u32, device: DeviceNumber) -> io::Result<bool> {
    for entry in fs::read_dir(proc.join(format!("{pid}/fd")))? {
        let wanted = StatxFlags::TYPE;
        let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
        // One that was closed meanwhile is not open.
        let Ok(status) = statx(CWD, entry?.path(), flags, wanted) else { continue };
        let node = DeviceNumber { major: status.stx_rdev_major, minor: status.stx_rdev_minor };
        let is_block = FileType::from_raw_mode(u32::from(status.stx_mode)) == FileType::BlockDevice;
        if is_block && node == device {
            return Ok(true);
        }
    }
    Ok(false)
}

/// What is read of `stat`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Stat {
    name: Vec<u8>,
    state: u8,
    parent: u32,
    flags: u32,
    start: StartTime,
}

/// `/proc/PID/stat`. The second field is the process's name in parentheses, and may itself hold
/// parentheses and spaces: fields are counted from the last closing one.
fn parse_stat(text: &[u8]) -> Option<Stat> {
    let begin = text.iter().position(|byte| *byte == b'(')? + 1;
    let end = text.iter().rposition(|byte| *byte == b')').filter(|end| *end >= begin)?;
    let mut fields = text.get(end + 2..)?.split(|byte| matches!(byte, b' ' | b'\n'));
    // Their numbers in proc_pid_stat(5) are 3, 4, 9 and 22.
    let state = *fields.next()?.first()?;
    let parent = number(fields.next()?)?;
    let flags = number(fields.nth(4)?)?;
    let start = StartTime(number(fields.nth(12)?)?);
    Some(Stat { name: text[begin..end].to_vec(), state, parent, flags, start })
}

fn number<T: std::str::FromStr>(field: &[u8]) -> Option<T> {
    std::str::from_utf8(field).ok()?.parse().ok()
}

/// What was found, and of which processes something could not be read.
pub type Listed = (Vec<Process>, Vec<(u32, String)>);

/// All processes but kernel threads. `proc` is where procfs is mounted. `may_look` is asked before it is
/// read what a process holds, which may hang with its memory, and can refuse.
///
/// # Errors
/// When the folder itself cannot be read.
pub fn list(proc: &Path, depth: SnapshotDepth, may_look: &mut dyn FnMut(u32) -> bool) -> io::Result<Listed> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let proc = openat(CWD, proc, flags, Mode::empty())?;
    let mut processes = Vec::new();
    let mut unreadable = Vec::new();
    let mut buffer = Vec::new();
    for entry in Dir::read_from(&proc)? {
        let entry = entry?;
        let Some(pid) = number(entry.file_name().to_bytes()) else { continue };
        match describe(proc.as_fd(), pid, depth, may_look, &mut buffer) {
            Ok(Some((process, failure))) => {
                processes.push(process);
                unreadable.extend(failure.map(|cause| (pid, cause.to_string())));
            }
            Ok(None) => {}
            // A process that went while it was read is not there.
            Err(error) if is_gone(&error) => {}
            Err(error) => unreadable.push((pid, error.to_string())),
        }
    }
    Ok((processes, unreadable))
}

/// Whether an error only says that a process has ended.
#[must_use]
pub fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

/// A process, and the first thing of it that could not be read; `None` for a kernel thread.
fn describe(
    proc: BorrowedFd<'_>,
    pid: u32,
    depth: SnapshotDepth,
    may_look: &mut dyn FnMut(u32) -> bool,
    buffer: &mut Vec<u8>,
) -> io::Result<Option<(Process, Option<io::Error>)>> {
    /// `PF_KTHREAD` (`include/linux/sched.h`).
    const KERNEL_THREAD: u32 = 0x0020_0000;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory: OwnedFd = openat(proc, pid.to_string(), flags, Mode::empty())?;
    read_line(&directory, "stat", buffer)?;
    let stat = parse_stat(buffer).ok_or_else(not_stat)?;
    if stat.flags & KERNEL_THREAD != 0 {
        return Ok(None);
    }
    let mut process = Process {
        identity: ProcessIdentity { pid, start: stat.start },
        parent: stat.parent,
        // The folder's owner is the process's effective user, whether or not it may be dumped
        // (`task_dump_owner` in fs/proc/base.c).
        uid: fstat(&directory)?.st_uid,
        name: stat.name,
        ended: matches!(stat.state, b'Z' | b'X'),
        namespace: holds::namespace(directory.as_fd()),
        current_directory: None,
        root_directory: None,
        program: None,
        files: Vec::new(),
        mapped: Vec::new(),
        unit: String::new(),
    };
    let failure = match depth {
        SnapshotDepth::Ownership | SnapshotDepth::Status => None,
        SnapshotDepth::Holders if process.ended => None,
        SnapshotDepth::Holders if !may_look(pid) => Some(io::Error::other("looking into it hung before")),
        SnapshotDepth::Holders => holds::read(directory.as_fd(), &mut process, buffer).err(),
    };
    // One that has ended meanwhile holds nothing any more.
    Ok(Some((process, failure.filter(|error| !is_gone(error)))))
}

/// Reads a file of one line, in one call when it fits.
fn read_line(directory: impl AsFd, name: &str, buffer: &mut Vec<u8>) -> io::Result<()> {
    const LONGEST: usize = 4096;
    let file = openat(directory, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    buffer.clear();
    buffer.reserve(LONGEST);
    rustix::io::read(&file, spare_capacity(buffer))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{Tree, device_number};
    use super::*;

    #[test]
    fn a_name_cannot_shift_the_fields() {
        let line = b"42 (a) 1 2 ) x) S 7 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 777 1000 10\n";
        let stat = Stat {
            name: b"a) 1 2 ) x".to_vec(),
            state: b'S',
            parent: 7,
            flags: 4_194_560,
            start: StartTime(777),
        };
        assert_eq!(parse_stat(line), Some(stat));
    }

    #[test]
    fn what_is_no_stat_line_is_refused() {
        for line in [b"".as_slice(), b"42 (x", b"42 (x)", b"42 (x) S 1", b"42 )x( S 1"] {
            assert_eq!(parse_stat(line), None);
        }
    }

    #[test]
    fn a_thread_is_of_a_process() {
        let tree = Tree::new().file("43/status", "Name:\tTgid:\t9\nUmask:\t0022\nTgid:\t42\nPid:\t43\n");
        assert_eq!(of_thread(tree.path(), 43).expect("there"), 42);
        assert!(is_gone(&of_thread(tree.path(), 44).expect_err("absent")));
    }

    #[test]
    fn kernel_threads_are_left_out_and_the_ended_hold_nothing() {
        let tree = Tree::new()
            .file("2/stat", "2 (kthreadd) S 0 0 0 0 -1 2129984 0 0 0 0 0 0 0 0 20 0 1 0 3 0 0\n")
            .file("42/stat", "42 (sh) Z 1 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 777 0 0\n")
            .file("self/stat", "");
        let (processes, unreadable) =
            list(tree.path(), SnapshotDepth::Holders, &mut |_| true).expect("readable");
        assert_eq!(unreadable, []);
        let found: Vec<_> =
            processes.iter().map(|one| (one.identity.pid, one.ended, one.namespace, one.parent)).collect();
        assert_eq!(found, [(42, true, None, 1)]);
    }

    #[test]
    fn one_that_hung_before_is_there_and_what_it_holds_is_not_known() {
        let own = std::process::id();
        let (processes, unreadable) =
            list(Path::new("/proc"), SnapshotDepth::Holders, &mut |pid| pid != own).expect("readable");
        let found = processes.iter().find(|one| one.identity.pid == own).expect("listed");
        assert!(found.current_directory.is_none() && found.files.is_empty());
        let cause = unreadable.iter().find(|(pid, _)| *pid == own).map(|(_, cause)| cause.as_str());
        assert_eq!(cause, Some("looking into it hung before"));
    }

    #[test]
    fn finds_itself() {
        let (processes, _) =
            list(Path::new("/proc"), SnapshotDepth::Holders, &mut |_| true).expect("readable");
        let own = processes.iter().find(|process| process.identity.pid == std::process::id());
        let own = own.expect("this test is a process");
        assert!(!own.ended);
        assert!(own.current_directory.is_some() && own.program.is_some());
        assert!(!own.mapped.is_empty());
        assert_eq!(start_time(own.identity.pid).expect("alive"), own.identity.start);
    }

    #[test]
    fn only_who_has_a_device_open_has() {
        let device = device_number(7, 0);
        assert!(!has_open(Path::new("/proc"), std::process::id(), device).expect("alive"));
    }
}
