//! Processes, as `/proc` shows them.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use procfs::process::{MMapPath, Process as ProcProcess};
use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, statx};

use super::mounts;
use crate::model::{DeviceNumber, FileHold, Place, Process, ProcessIdentity, SnapshotDepth, StartTime};

/// When a process started: what tells it from a later one of the same number.
///
/// # Errors
/// `NotFound` when it is gone.
pub fn start_time(pid: u32) -> io::Result<StartTime> {
    let text = fs::read(format!("/proc/{pid}/stat"))?;
    parse_start_time(&text).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "stat has no field 22"))
}

/// The real user of a process: whoever started it, also when it is a setuid program.
///
/// # Errors
/// `NotFound` when it is gone.
pub fn real_user(pid: u32) -> io::Result<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Uid:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok())
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "status has no user"))
}

/// Field 22 of `/proc/PID/stat`. The second field is the process's name in parentheses, and may
/// itself hold parentheses and spaces: fields are counted from the last closing one.
fn parse_start_time(text: &[u8]) -> Option<StartTime> {
    let after_name = text.iter().rposition(|byte| *byte == b')')? + 2;
    let field = text.get(after_name..)?.split(|byte| *byte == b' ').nth(19)?;
    std::str::from_utf8(field).ok()?.parse().ok().map(StartTime)
}

/// What was found, and of which processes something could not be read.
pub type Listed = (Vec<Process>, Vec<(u32, String)>);

/// All processes but kernel threads. `proc` is where procfs is mounted.
///
/// # Errors
/// When the folder itself cannot be read.
pub fn list(proc: &Path, depth: SnapshotDepth) -> io::Result<Listed> {
    let mut processes = Vec::new();
    let mut unreadable = Vec::new();
    let all = procfs::process::all_processes_with_root(proc).map_err(io::Error::other)?;
    for entry in all {
        // A process that went while it was read is not there.
        let Ok(entry) = entry else { continue };
        let pid = entry.pid.unsigned_abs();
        match describe(&entry, depth, &mut unreadable) {
            Ok(Some(process)) => processes.push(process),
            Ok(None) => {}
            Err(procfs::ProcError::NotFound(_)) => {}
            Err(procfs::ProcError::Io(error, _)) if error.raw_os_error() == Some(libc::ESRCH) => {}
            Err(error) => unreadable.push((pid, error.to_string())),
        }
    }
    Ok((processes, unreadable))
}

fn describe(
    entry: &ProcProcess,
    depth: SnapshotDepth,
    unreadable: &mut Vec<(u32, String)>,
) -> procfs::ProcResult<Option<Process>> {
    const KERNEL_THREAD: u32 = 0x0020_0000;
    let stat = entry.stat()?;
    if stat.flags & KERNEL_THREAD != 0 {
        return Ok(None);
    }
    let pid = entry.pid.unsigned_abs();
    let mut process = Process {
        identity: ProcessIdentity { pid, start: StartTime(stat.starttime) },
        parent: stat.ppid.unsigned_abs(),
        uid: entry.uid()?,
        name: stat.comm.into_bytes(),
        ended: matches!(stat.state, 'Z' | 'X'),
        namespace: mounts::namespace_of(Some(pid)).ok(),
        current_directory: None,
        root_directory: None,
        program: None,
        files: Vec::new(),
        mapped: Vec::new(),
        unit: String::new(),
    };
    match depth {
        SnapshotDepth::Ownership => {}
        SnapshotDepth::Holders if process.ended => {}
        SnapshotDepth::Holders => {
            if let Err(error) = read_holds(entry, &mut process) {
                // One that went meanwhile holds nothing any more.
                if entry.is_alive() {
                    unreadable.push((pid, error.to_string()));
                }
            }
        }
    }
    Ok(Some(process))
}

fn read_holds(entry: &ProcProcess, process: &mut Process) -> procfs::ProcResult<()> {
    let pid = process.identity.pid;
    process.unit = entry
        .cgroups()?
        .into_iter()
        .find(|group| group.controllers.iter().all(String::is_empty) || group.hierarchy == 0)
        .map(|group| hostler_protocol::text::printable(group.pathname.as_bytes()))
        .unwrap_or_default();
    process.current_directory = place(&format!("/proc/{pid}/cwd"))?.map(|(place, _)| place);
    process.root_directory = place(&format!("/proc/{pid}/root"))?.map(|(place, _)| place);
    process.program = place(&format!("/proc/{pid}/exe"))?.map(|(place, _)| place);
    for file in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let file = file?;
        let Some(descriptor) = file.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let path = file.path();
        let Some((place, block_device)) = place(&path.to_string_lossy())? else { continue };
        let text = fs::read_link(&path).map(|text| text.into_os_string().into_vec()).unwrap_or_default();
        process.files.push(FileHold {
            descriptor,
            place,
            block_device,
            is_path: false,
            namespace: None,
            text,
        });
    }
    for map in entry.maps()? {
        let MMapPath::Path(_) = map.pathname else { continue };
        let device = DeviceNumber { major: map.dev.0.unsigned_abs(), minor: map.dev.1.unsigned_abs() };
        process.mapped.push(device);
    }
    process.mapped.sort_unstable();
    process.mapped.dedup();
    Ok(())
}

/// The mount and file system behind one of `/proc`'s links; `None` when the link leads nowhere
/// (no program, or closed meanwhile). With `AT_STATX_DONT_SYNC` no file system is asked, so a
/// stopped FUSE server does not hang it.
fn place(link: &str) -> io::Result<Option<(Place, Option<DeviceNumber>)>> {
    let wanted = StatxFlags::TYPE | StatxFlags::MNT_ID;
    let status = match statx(CWD, link, AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT, wanted) {
        Ok(status) => status,
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::SRCH) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let device = DeviceNumber { major: status.stx_dev_major, minor: status.stx_dev_minor };
    let is_block = FileType::from_raw_mode(u32::from(status.stx_mode)) == FileType::BlockDevice;
    let node = DeviceNumber { major: status.stx_rdev_major, minor: status.stx_rdev_minor };
    Ok(Some((Place { mount: status.stx_mnt_id, device }, is_block.then_some(node))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_shift_the_fields() {
        let line = b"42 (a) 1 2 ) x) S 1 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 777 1000 10";
        assert_eq!(parse_start_time(line), Some(StartTime(777)));
    }

    #[test]
    fn what_is_no_stat_line_is_refused() {
        assert_eq!(parse_start_time(b""), None);
        assert_eq!(parse_start_time(b"42 (x"), None);
        assert_eq!(parse_start_time(b"42 (x)"), None);
        assert_eq!(parse_start_time(b"42 (x) S 1"), None);
    }

    #[test]
    fn finds_itself() {
        let (processes, _) = list(Path::new("/proc"), SnapshotDepth::Holders).expect("procfs is readable");
        let own = processes.iter().find(|process| process.identity.pid == std::process::id());
        let own = own.expect("this test is a process");
        assert!(!own.ended);
        assert!(own.current_directory.is_some() && own.program.is_some());
        assert!(!own.files.is_empty());
        assert_eq!(start_time(own.identity.pid).expect("alive"), own.identity.start);
    }
}
