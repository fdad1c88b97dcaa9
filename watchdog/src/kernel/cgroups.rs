//! Control groups: one per lease, below the owner's own.
//!
//! Below the owner's, not below the daemon's: the limits that the host set for a CI job keep
//! holding for what it starts, and stopping the job's unit still ends all of it. No controller is
//! enabled, so version 2's rule against processes in inner groups does not bite.
//!
//! Works on version 2, on hybrid hosts (version 2 beside version 1) and on pure version 1.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use hostler_protocol::lease::{Epoch, LeaseId};

use super::{mountinfo, signals};
use crate::model::{CgroupIdentity, ProcessIdentity};

/// A mounted hierarchy in which groups for leases can be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    /// Where it is mounted.
    pub root: PathBuf,
    /// The controller column of `/proc/PID/cgroup` that names a process's place in it; empty for
    /// version 2.
    pub controller: String,
}

/// The version 1 controllers that a group of ours may be made in, the most harmless first: they
/// have no limits that a fresh group would have to be given.
const VERSION_1: [&str; 3] = ["pids", "freezer", "name=systemd"];

/// Finds the hierarchy to use among the mounts: version 2 wherever it is mounted.
///
/// Pure: `mountinfo` and `options` are read by [`detect`].
#[must_use]
pub fn choose(
    entries: &[mountinfo::Entry],
    controllers_of: impl Fn(&Path) -> Vec<String>,
) -> Option<Hierarchy> {
    let path = |entry: &mountinfo::Entry| {
        PathBuf::from(std::ffi::OsString::from(String::from_utf8_lossy(&entry.point).into_owned()))
    };
    let whole = |entry: &&mountinfo::Entry| entry.root == b"/";
    if let Some(entry) = entries.iter().filter(whole).find(|entry| entry.filesystem == "cgroup2") {
        return Some(Hierarchy { root: path(entry), controller: String::new() });
    }
    VERSION_1.iter().find_map(|wanted| {
        let entry = entries
            .iter()
            .filter(whole)
            .filter(|entry| entry.filesystem == "cgroup")
            .find(|entry| controllers_of(&path(entry)).iter().any(|name| name == wanted))?;
        Some(Hierarchy { root: path(entry), controller: (*wanted).to_owned() })
    })
}

/// Finds the hierarchy to use on this host; `None` where none is mounted whole.
///
/// # Errors
/// When mountinfo cannot be read.
pub fn detect() -> io::Result<Option<Hierarchy>> {
    let bytes = fs::read("/proc/thread-self/mountinfo")?;
    let mut entries =
        mountinfo::parse(&bytes).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    // One that something else is mounted over is listed all the same.
    entries.retain(|entry| is_group(Path::new(std::ffi::OsStr::from_bytes(&entry.point))));
    Ok(choose(&entries, |point| {
        // Version 1 shows its controllers only in the mount's options, which end the line.
        let text = String::from_utf8_lossy(&bytes);
        let point = point.to_string_lossy();
        text.lines()
            .filter(|line| line.split(' ').nth(4) == Some(&point))
            .flat_map(|line| line.rsplit(' ').next().unwrap_or_default().split(','))
            .map(str::to_owned)
            .collect()
    }))
}

/// Whether a directory is a control group.
fn is_group(path: &Path) -> bool {
    path.join("cgroup.procs").exists()
}

/// Where a process is in the hierarchy, from the text of its `/proc/PID/cgroup`. Pure.
#[must_use]
pub fn place<'a>(hierarchy: &Hierarchy, text: &'a str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':');
        let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
        let is_it = if hierarchy.controller.is_empty() {
            controllers.is_empty()
        } else {
            controllers.split(',').any(|name| name == hierarchy.controller)
        };
        // A path that leads out of the reader's own cgroup namespace cannot be reached.
        (is_it && path.starts_with('/') && !path.split('/').any(|part| part == "..")).then_some(path)
    })
}

/// Where a lease's group is to be: below the one that `owner_pid` is in. Its name holds the epoch as
/// well, so that neither a group that a crash left nor another daemon's is in the way.
///
/// # Errors
/// When the owner is gone, or in no group that can be reached.
pub fn place_for(hierarchy: &Hierarchy, owner_pid: u32, lease: LeaseId, epoch: Epoch) -> io::Result<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{owner_pid}/cgroup"))?;
    let place = place(hierarchy, &text).ok_or_else(|| {
        io::Error::new(io::ErrorKind::NotFound, "the owner is in no group of this hierarchy")
    })?;
    let parent = hierarchy.root.join(place.trim_start_matches('/'));
    let path = parent.join(format!("hostler-lease-{lease}-{:x}", epoch.0));
    if !is_group(&parent) {
        let cause = format!("{} is no control group any more", parent.display());
        return Err(io::Error::new(io::ErrorKind::NotFound, cause));
    }
    Ok(path)
}

/// Makes a lease's group.
///
/// # Errors
/// Where groups cannot be made: not mounted, read-only, not the daemon's to change.
pub fn create(path: &Path) -> io::Result<CgroupIdentity> {
    fs::create_dir(path)?;
    identity(path)
}

/// Removes a group that was made for a lease which was never opened: it has no processes. One that
/// is not there, or is no control group, is left as it is.
///
/// # Errors
/// `EBUSY` when it has processes all the same.
pub fn remove_unused(path: &Path) -> io::Result<()> {
    if is_group(path) { fs::remove_dir(path) } else { Ok(()) }
}

/// A group's identity.
///
/// # Errors
/// `NotFound` when it is gone.
pub fn identity(path: &Path) -> io::Result<CgroupIdentity> {
    Ok(CgroupIdentity(fs::metadata(path)?.ino()))
}

/// Puts exactly this process into a group; what it starts afterwards is born there. `false` when it is gone.
///
/// A process can only be moved by its number. As long as it is not waited for nobody else has that, so if it
/// is there afterwards it was it that was moved. Else whoever may have been moved goes to the group above.
///
/// # Errors
/// What the kernel says against the move.
pub fn enter(path: &Path, process: ProcessIdentity) -> io::Result<bool> {
    let is_there = || Ok::<_, io::Error>(signals::open(process)?.is_some());
    if !is_there()? {
        return Ok(false);
    }
    match write_existing(&path.join("cgroup.procs"), &process.pid.to_string()) {
        Ok(()) => {}
        Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(false),
        Err(error) => return Err(error),
    }
    if is_there()? {
        return Ok(true);
    }
    if let (true, Some(above)) = (members(path)?.contains(&process.pid), path.parent()) {
        write_existing(&above.join("cgroup.procs"), &process.pid.to_string())?;
    }
    Ok(false)
}

/// The processes of a group and of all groups below it.
///
/// # Errors
/// `NotFound` when the group is gone.
pub fn members(path: &Path) -> io::Result<Vec<u32>> {
    let mut pids = Vec::new();
    let mut groups = vec![path.to_owned()];
    while let Some(group) = groups.pop() {
        let listed = fs::read_to_string(group.join("cgroup.procs"));
        match listed {
            Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok())),
            Err(error) if group != path && is_gone(&error) => continue,
            // A threaded group lists no processes; its threads' leader is in the parent.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
            Err(error) => return Err(error),
        }
        groups.extend(below(&group)?);
    }
    // 0 stands for a process outside the reader's pid namespace: it cannot be named.
    pids.retain(|pid| *pid != 0);
    pids.sort_unstable();
    pids.dedup();
    Ok(pids)
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

fn below(group: &Path) -> io::Result<Vec<PathBuf>> {
    let mut groups = Vec::new();
    for entry in fs::read_dir(group)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            groups.push(entry.path());
        }
    }
    Ok(groups)
}

/// Kills all processes of a group, also those born meanwhile (`cgroup.kill`, Linux 5.14).
///
/// # Errors
/// `NotFound` on version 1 and older kernels.
pub fn kill(path: &Path) -> io::Result<()> {
    write_existing(&path.join("cgroup.kill"), "1")
}

/// Not `fs::write`: that would make a file of this name if the folder were no control group.
fn write_existing(path: &Path, text: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).open(path)?;
    io::Write::write_all(&mut file, text.as_bytes())
}

/// Removes a group and those below it.
///
/// # Errors
/// `EBUSY` while it has processes.
pub fn remove(path: &Path) -> io::Result<()> {
    for group in below(path)? {
        remove(&group)?;
    }
    fs::remove_dir(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &[u8] = b"30 20 0:26 / /sys/fs/cgroup ro - tmpfs tmpfs ro\n\
        31 30 0:27 / /sys/fs/cgroup/unified rw shared:9 - cgroup2 cgroup2 rw\n\
        32 30 0:28 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n";

    fn controllers(point: &Path) -> Vec<String> {
        vec![point.file_name().expect("a mount point has a name").to_string_lossy().into_owned()]
    }

    #[test]
    fn prefers_version_2_wherever_it_is() {
        let entries = mountinfo::parse(HYBRID).expect("valid");
        let chosen = choose(&entries, controllers).expect("there is one");
        assert_eq!(chosen.root, Path::new("/sys/fs/cgroup/unified"));
        assert_eq!(chosen.controller, "");
    }

    #[test]
    fn takes_a_harmless_controller_of_version_1() {
        let entries = mountinfo::parse(
            b"31 30 0:27 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n\
              32 30 0:28 / /sys/fs/cgroup/freezer rw - cgroup cgroup rw,freezer\n",
        )
        .expect("valid");
        let chosen = choose(&entries, controllers).expect("there is one");
        assert_eq!(chosen.controller, "freezer");
        assert_eq!(choose(&entries[..1], controllers), None);
    }

    #[test]
    fn finds_a_process_in_either_version() {
        let text = "12:pids:/jobs/7\n1:name=systemd:/x\n0::/user.slice/a:b\n";
        let version_2 = Hierarchy { root: PathBuf::from("/c"), controller: String::new() };
        let version_1 = Hierarchy { root: PathBuf::from("/c"), controller: "pids".to_owned() };
        assert_eq!(place(&version_2, text), Some("/user.slice/a:b"));
        assert_eq!(place(&version_1, text), Some("/jobs/7"));
    }

    #[test]
    fn does_not_leave_its_own_namespace() {
        let version_2 = Hierarchy { root: PathBuf::from("/c"), controller: String::new() };
        assert_eq!(place(&version_2, "0::/../other\n"), None);
    }

    #[test]
    fn a_process_that_has_ended_is_not_moved_by_its_number() {
        let mut child =
            std::process::Command::new("cat").stdin(std::process::Stdio::piped()).spawn().expect("a process");
        let start = super::super::processes::start_time(child.id()).expect("it lives");
        let process = ProcessIdentity { pid: child.id(), start };
        let group = tempfile::tempdir().expect("a temporary directory");
        fs::write(group.path().join("cgroup.procs"), "").expect("fresh");
        let written = || fs::read_to_string(group.path().join("cgroup.procs")).expect("there");
        // Whoever has the number by now has another start.
        let another = ProcessIdentity { start: crate::model::StartTime(start.0 + 1), ..process };
        assert!(!enter(group.path(), another).expect("nobody to move"));
        assert_eq!(written(), "");
        assert!(enter(group.path(), process).expect("it lives"));
        assert_eq!(written(), process.pid.to_string());
        drop(child.stdin.take());
        child.wait().expect("it ends");
        assert!(!enter(group.path(), process).expect("nobody to move"));
    }
}
