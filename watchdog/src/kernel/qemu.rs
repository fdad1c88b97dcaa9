//! Processes of qemu, and what they have open. For lists only: nothing is ever done to them.

use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, statx};

use super::holds;
use crate::model::{Process, Qemu};

/// Smaller files are logs, keys and the like.
const SMALLEST_DISK: u64 = 1024 * 1024;
/// How many disks of one process are told.
const DISK_LIMIT: usize = 32;

/// The processes of qemu among these. What cannot be read of one is left out. `proc` is where procfs is
/// mounted.
#[must_use]
pub fn list(proc: &Path, processes: &[Process]) -> Vec<Qemu> {
    let running = processes.iter().filter(|process| !process.ended);
    running.filter_map(|process| describe(proc, process)).collect()
}

fn describe(proc: &Path, process: &Process) -> Option<Qemu> {
    let directory = proc.join(process.identity.pid.to_string());
    // Reading the link resolves nothing, so it cannot hang.
    let program = fs::read_link(directory.join("exe")).ok()?;
    let program = program_name(program.as_os_str().as_bytes())?.to_vec();
    let unit = fs::read(directory.join("cgroup")).map(|text| holds::unit(&text)).unwrap_or_default();
    let age_ms = age_ms(proc, process.identity.start.0).unwrap_or(0);
    Some(Qemu { process: process.identity, program, unit, disks: disks(&directory), age_ms })
}

/// The file's name, when it is one of qemu's. A program that was replaced since shows as deleted.
fn program_name(path: &[u8]) -> Option<&[u8]> {
    let path = path.strip_suffix(b" (deleted)").unwrap_or(path);
    let name = path.rsplit(|byte| *byte == b'/').next()?;
    (name.starts_with(b"qemu-system-") || name == b"qemu-nbd").then_some(name)
}

fn disks(process: &Path) -> Vec<Vec<u8>> {
    let mut found: Vec<Vec<u8>> = Vec::new();
    let Ok(descriptors) = fs::read_dir(process.join("fd")) else { return found };
    for entry in descriptors.flatten() {
        let link = entry.path();
        let Ok(path) = fs::read_link(&link) else { continue };
        let path = path.into_os_string().into_vec();
        if is_disk(&link) && !is_memory(&path) && !found.contains(&path) {
            found.push(path);
        }
    }
    found.sort();
    found.truncate(DISK_LIMIT);
    found
}

/// A regular file of some size, or a block device. Asks no file system, so it cannot hang.
fn is_disk(link: &Path) -> bool {
    let flags = AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    let Ok(status) = statx(CWD, link, flags, StatxFlags::TYPE | StatxFlags::SIZE) else { return false };
    match FileType::from_raw_mode(u32::from(status.stx_mode)) {
        FileType::BlockDevice => true,
        FileType::RegularFile => status.stx_size >= SMALLEST_DISK,
        _ => false,
    }
}

/// A guest's memory is a file without a name (`memfd_create(2)`).
fn is_memory(path: &[u8]) -> bool {
    path.starts_with(b"/memfd:")
}

/// How long ago, in milliseconds, something was that happened so many clock ticks after boot.
fn age_ms(proc: &Path, start_ticks: u64) -> Option<u64> {
    let uptime = fs::read_to_string(proc.join("uptime")).ok()?;
    Some(age_from(&uptime, start_ticks, rustix::param::clock_ticks_per_second()))
}

fn age_from(uptime: &str, start_ticks: u64, ticks_per_second: u64) -> u64 {
    let seconds: f64 = uptime.split_whitespace().next().and_then(|word| word.parse().ok()).unwrap_or(0.0);
    let started_ms = start_ticks.saturating_mul(1000) / ticks_per_second.max(1);
    ((seconds * 1000.0) as u64).saturating_sub(started_ms)
}

#[cfg(test)]
mod tests {
    use super::super::fixture::Tree;
    use super::*;
    use crate::model::{ProcessIdentity, StartTime, fixture};

    fn process(pid: u32, ended: bool) -> Process {
        let identity = ProcessIdentity { pid, start: StartTime(1000) };
        Process { identity, ended, ..fixture::process(pid, 1) }
    }

    #[test]
    fn a_program_is_qemu_by_its_files_name() {
        for (path, name) in [
            ("/usr/bin/qemu-system-x86_64", Some("qemu-system-x86_64")),
            ("/opt/qemu-nbd (deleted)", Some("qemu-nbd")),
            ("/usr/bin/qemu-img", None),
            ("/usr/bin/qemu-nbd-wrapper", None),
            ("/qemu-system-x86_64/sh", None),
        ] {
            assert_eq!(program_name(path.as_bytes()), name.map(str::as_bytes), "{path}");
        }
    }

    #[test]
    fn lists_the_disks_of_what_runs_and_nothing_else() {
        let tree = Tree::new()
            .file("uptime", "25.50 100.00\n")
            .file("big", vec![0; 1024 * 1024])
            .file("small", "x")
            .link("7/exe", "/usr/bin/qemu-system-aarch64")
            .file("7/cgroup", "0::/ci.slice/job.scope\n")
            .link("7/fd/3", "../../big")
            .link("7/fd/4", "../../small")
            .link("7/fd/5", "../../big")
            .link("8/exe", "/bin/sh")
            .link("9/exe", "/usr/bin/qemu-nbd");
        let processes = [process(7, false), process(8, false), process(9, true), process(10, false)];
        let found = list(tree.path(), &processes);
        let expected = Qemu {
            process: processes[0].identity,
            program: b"qemu-system-aarch64".to_vec(),
            unit: "/ci.slice/job.scope".to_owned(),
            disks: vec![b"../../big".to_vec()],
            age_ms: 25_500 - 1_000_000 / rustix::param::clock_ticks_per_second(),
        };
        assert_eq!(found, [expected]);
    }
}
