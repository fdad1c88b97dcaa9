//! A test's own place on the host: a directory, control groups, and whatever is made in them.
//!
//! Everything a test starts runs in the place's control groups, and every file lies below its
//! directory. So what is left at the end can be found without asking the daemon, and removed
//! without touching anything else.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::failure::{OrFail, wait_until};
use crate::{blocks, probe, program};

/// The user and group that unprivileged parts of privileged tests run as: a number that no user has,
/// so that nothing has to be set up and nothing of the host belongs to it.
pub const USER: u32 = 61_923;

/// Sends SIGKILL to a process that this test started and has not waited for yet.
pub fn kill(pid: u32) {
    signal(pid, Signal::SIGKILL);
}

/// Sends any signal to such a process. One that is gone is no error.
pub fn signal(pid: u32, signal: Signal) {
    if let Ok(pid) = i32::try_from(pid) {
        let _ = nix::sys::signal::kill(Pid::from_raw(pid), signal);
    }
}

/// Among which mounts a test runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mounts {
    /// In a namespace of its own.
    Own,
    /// In the host's: only where the test has the host to itself.
    Hosts,
}

/// The place.
#[derive(Debug)]
pub struct Place {
    directory: PathBuf,
    mounts: Mounts,
    groups: Vec<PathBuf>,
}

impl Place {
    /// Makes a place with a directory that every user can enter, and a group in each control group
    /// hierarchy that `hostlerd` may use.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn new(name: &str, mounts: Mounts) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let own =
            format!("hostler-tests-{}-{}-{name}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let above = fs::canonicalize(std::env::temp_dir()).or_fail("finding the temporary directory");
        let directory = above.join(&own);
        fs::create_dir(&directory).or_fail(format_args!("making {}", directory.display()));
        // From here on, dropping it removes what there is.
        let mut place = Self { directory, mounts, groups: Vec::new() };
        let open_to_all = fs::Permissions::from_mode(0o755);
        fs::set_permissions(&place.directory, open_to_all).or_fail("opening the place to all users");
        for above in hierarchies() {
            let group = above.join(&own);
            fs::create_dir(&group).or_fail(format_args!("making {}", group.display()));
            place.groups.push(group);
        }
        place
    }

    /// The place's directory.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.directory
    }

    /// Among which mounts it is.
    #[must_use]
    pub fn mounts(&self) -> Mounts {
        self.mounts
    }

    /// A path below the place's directory.
    #[must_use]
    pub fn path(&self, below: impl AsRef<Path>) -> PathBuf {
        self.directory.join(below)
    }

    /// Makes a directory below the place's.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn directory(&self, below: impl AsRef<Path>) -> PathBuf {
        let path = self.path(below);
        fs::create_dir_all(&path).or_fail(format_args!("making {}", path.display()));
        path
    }

    /// Makes a directory that belongs to [`USER`].
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn directory_of_user(&self, below: impl AsRef<Path>) -> PathBuf {
        let path = self.directory(below);
        std::os::unix::fs::chown(&path, Some(USER), Some(USER)).or_fail("giving a directory away");
        path
    }

    /// A new ext4 image of that many MiB.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn image(&self, below: impl AsRef<Path>, mebibytes: u64) -> PathBuf {
        let path = self.path(below);
        make_image(&path, mebibytes);
        path
    }

    /// A command that runs in the place's control groups.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        // A test may have hidden a hierarchy.
        const ENTER: &str = r#"while [ "$1" != -- ]; do
                if [ -d "$1" ]; then echo $$ >"$1/cgroup.procs" || exit 99; fi; shift
            done
            shift; exec "$@""#;
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(ENTER).arg("sh").args(&self.groups).arg("--").arg(program.as_ref());
        // A group of its own, so that a Ctrl-C at the terminal goes to the tests first.
        command.process_group(0);
        command
    }

    /// The same as [`USER`], with no privileges.
    #[must_use]
    pub fn command_of_user(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = self.command("setpriv");
        let user = USER.to_string();
        command.args(["--reuid", &user, "--regid", &user, "--clear-groups", "--"]).arg(program.as_ref());
        command
    }

    /// The place's own control groups, one in each hierarchy.
    #[must_use]
    pub fn groups(&self) -> &[PathBuf] {
        &self.groups
    }

    /// The directories of leases' control groups below the place's.
    #[must_use]
    pub fn lease_groups(&self) -> Vec<PathBuf> {
        self.groups.iter().flat_map(|group| groups_below(group)).collect()
    }

    /// The processes in the place's control groups, and in groups below them.
    #[must_use]
    pub fn processes(&self) -> Vec<u32> {
        let mut all: Vec<u32> = self
            .groups
            .iter()
            .flat_map(|group| std::iter::once(group.clone()).chain(groups_below(group)))
            .flat_map(|group| fs::read_to_string(group.join("cgroup.procs")))
            .flat_map(|text| text.lines().filter_map(|line| line.parse().ok()).collect::<Vec<_>>())
            .collect();
        all.sort_unstable();
        all.dedup();
        all
    }

    /// What a test left, in words; empty when nothing.
    #[must_use]
    pub fn left(&self) -> Vec<String> {
        let mut left: Vec<String> = Vec::new();
        for pid in self.processes() {
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).replace('\0', " ");
            left.push(format!("process {pid} ({command})"));
        }
        for mount in probe::mounts_below(&self.directory) {
            left.push(format!("mount {:?}", mount.point));
        }
        for block in blocks::made_of_files_below(&self.directory) {
            left.push(format!("/dev/{} ({:?})", block.name, block.block));
        }
        for group in self.lease_groups() {
            left.push(format!("control group {}", group.display()));
        }
        left
    }

    /// Fails the test when it left anything, with a little patience for what the kernel frees late.
    ///
    /// # Panics
    /// When something is left.
    #[track_caller]
    pub fn assert_clean(&self) {
        let patience = std::time::Instant::now() + Duration::from_secs(3);
        while !self.left().is_empty() && std::time::Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(self.left(), Vec::<String>::new(), "the test left something behind");
    }

    /// Ends and frees whatever is left. The place itself stays.
    pub fn empty(&self) {
        for pid in self.processes() {
            kill(pid);
        }
        let patience = std::time::Instant::now() + Duration::from_secs(5);
        while !self.processes().is_empty() && std::time::Instant::now() < patience {
            for pid in self.processes() {
                kill(pid);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        unmount_below(&self.directory, self.mounts);
        blocks::remove_made_of_files_below(&self.directory);
        for group in self.lease_groups() {
            let _ = fs::remove_dir(group);
        }
    }

    /// Removes whatever is left, and the place. For the end, whatever that was.
    pub fn clear(&self) {
        self.empty();
        // A process that was killed while it waited for a file system takes a moment to leave.
        let patience = std::time::Instant::now() + Duration::from_secs(2);
        for group in &self.groups {
            while fs::remove_dir(group).is_err() && group.exists() && std::time::Instant::now() < patience {
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.clear();
    }
}

/// Unmounts what is mounted at and below a directory, from the top. For the end: it is not looked at
/// whether that worked.
pub fn unmount_below(directory: &Path, mounts: Mounts) {
    let all = probe::mounts();
    let is_below = |seen: &probe::MountSeen| seen.point.starts_with(directory);
    let mut parted = false;
    for seen in all.iter().rev().filter(|seen| is_below(seen)) {
        // A bind of a shared mount is its peer: what is unmounted below the one goes from the other,
        // too. So where that other one is not the test's, the two are parted first; and not elsewhere,
        // because copies in other namespaces only go as long as they follow.
        let parent = all.iter().find(|other| other.number == seen.parent).filter(|parent| is_below(parent));
        let has_peer = |group: u64| all.iter().any(|other| other.peers == Some(group) && !is_below(other));
        if let Some(parent) = parent
            && parent.peers.is_some_and(has_peer)
        {
            let _ = mount(None::<&str>, &parent.point, None::<&str>, MsFlags::MS_PRIVATE, None::<&str>);
            parted = true;
        }
        let _ = umount2(&seen.point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    }
    if parted && mounts == Mounts::Hosts {
        // What was parted stays in udev's namespace, and even twice: systemd moves a copy of the tree over
        // the first one, where nobody can reach it. It goes with that namespace.
        let _ = Command::new("systemctl").args(["restart", "systemd-udevd.service"]).output();
    }
}

/// Makes an ext4 image.
///
/// # Panics
/// When it cannot be made.
pub fn make_image(path: &Path, mebibytes: u64) {
    let file = fs::File::create(path).or_fail(format_args!("making {}", path.display()));
    file.set_len(mebibytes * 1024 * 1024).or_fail("giving the image its size");
    // Without a journal and with few inodes it is made and mounted in milliseconds.
    let options = ["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-N", "128"];
    program::succeed("mke2fs", options.iter().map(OsStr::new).chain([path.as_os_str()]));
}

/// Where groups for a test can be made: this process's own place in the version 2 hierarchy, and in
/// those of version 1 that `hostlerd` knows how to use.
fn hierarchies() -> Vec<PathBuf> {
    let own = fs::read_to_string("/proc/thread-self/cgroup").or_fail("reading /proc/thread-self/cgroup");
    let mut found = Vec::new();
    // Builders bind hierarchies elsewhere; the first of each is the host's.
    let mut seen = BTreeSet::new();
    for mount in probe::mounts() {
        let controller = match mount.filesystem.as_str() {
            "cgroup2" => "",
            "cgroup" if mount.options.split(',').any(|option| option == "pids") => "pids",
            _ => continue,
        };
        let place = own.lines().find_map(|line| {
            let mut fields = line.splitn(3, ':').skip(1);
            let is_it = fields.next()?.split(',').any(|name| name == controller);
            is_it.then(|| fields.next()).flatten()
        });
        if let Some(place) = place
            && seen.insert(mount.device)
        {
            found.push(mount.point.join(place.trim_start_matches('/')));
        }
    }
    assert!(!found.is_empty(), "no control group hierarchy is mounted that tests can use");
    found
}

/// All groups below one, the deepest first.
fn groups_below(group: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(group).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(groups_below(&entry.path()));
            found.push(entry.path());
        }
    }
    found
}

/// Waits until none of these processes runs any more.
///
/// # Panics
/// When one still does after `limit`.
#[track_caller]
pub fn wait_for_end(processes: &[probe::ProcessSeen], limit: Duration) {
    wait_until("the end of processes", limit, || processes.iter().all(|process| !process.runs()));
}
