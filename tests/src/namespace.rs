//! Mount namespaces that a test makes, each with a process in it or kept by a file.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use crate::failure::{OrFail, wait_until};
use crate::place::{Place, kill};
use crate::probe::{self, MountSeen};
use crate::program;

/// A mount namespace with a process in it that sleeps. It ends when this is dropped.
#[derive(Debug)]
pub struct Namespace {
    child: Child,
    inode: u64,
}

impl Namespace {
    /// A copy of the test's own, in which everything propagates as it does here.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn new(place: &Place) -> Self {
        Self::with(place, &["--mount"])
    }

    /// The same, of a user namespace of its own: what was mounted before is locked in it.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn of_another_user(place: &Place) -> Self {
        Self::with(place, &["--user", "--map-root-user", "--mount"])
    }

    fn with(place: &Place, kinds: &[&str]) -> Self {
        let mut unshare = place.command("unshare");
        unshare.args(kinds).args(["--propagation", "unchanged", "sleep", "600"]).current_dir("/");
        let child = unshare.stdin(Stdio::null()).spawn().or_fail("starting a process in a namespace");
        let namespace =
            |pid: &str| fs::metadata(format!("/proc/{pid}/ns/mnt")).map(|status| status.ino()).ok();
        let pid = child.id().to_string();
        let limit = Duration::from_secs(10);
        wait_until("a namespace of its own", limit, || {
            let sleeps = fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name == "sleep\n");
            sleeps && namespace(&pid).is_some_and(|inode| Some(inode) != namespace("thread-self"))
        });
        Self { inode: namespace(&pid).or_fail("the namespace's inode"), child }
    }

    /// The process in it.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its inode.
    #[must_use]
    pub fn inode(&self) -> u64 {
        self.inode
    }

    /// Runs a program in it to its end.
    ///
    /// # Panics
    /// When it does not succeed.
    pub fn run<A: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = A>) -> String {
        let pid = self.pid().to_string();
        let mut all: Vec<std::ffi::OsString> = ["-t", &pid, "-m", "--"].map(Into::into).to_vec();
        all.extend(arguments.into_iter().map(|argument| argument.as_ref().to_owned()));
        program::succeed("nsenter", all)
    }

    /// Its mounts below a directory.
    ///
    /// # Panics
    /// When mountinfo cannot be read.
    #[must_use]
    pub fn mounts_below(&self, directory: &Path) -> Vec<MountSeen> {
        let mounts = probe::mounts_of(&self.pid().to_string());
        mounts.into_iter().filter(|mount| mount.point.starts_with(directory)).collect()
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        kill(self.child.id());
        let _ = self.child.wait();
    }
}

/// Makes a namespace that its file `$1` keeps, and runs script `$2` in it.
///
/// The kernel allows a namespace's file to be mounted in older namespaces only, and tells their age by
/// their numbers. Since Linux 6.18 each processor has a supply of numbers of its own, so a new namespace
/// can have a smaller one than an older one, and is refused (`EINVAL`). On the processor with the
/// greatest numbers it is not.
const KEEP: &str = r#"
    for cpu in $(seq 0 $(($(nproc --all) - 1))); do
        taskset -c "$cpu" unshare --mount="$1" --propagation=unchanged sh -ec "$2" && exit 0
    done
    exit 1
"#;

/// A mount namespace that no process is in, after a script ran in it: its file is mounted at `file`, which
/// is made. Unmounting that ends it. Returns its inode. The script finds in `$keep` a script that makes
/// another one with `sh "$keep" FILE SCRIPT`.
///
/// # Panics
/// When it cannot be made.
pub fn keep_by_file(place: &Place, file: &Path, script: &str) -> u64 {
    let keep = place.path("keep.sh");
    fs::write(&keep, KEEP).or_fail("writing the script that keeps a namespace");
    fs::write(file, "").or_fail("making a file for a namespace");
    let script = format!("keep='{}'; {script}", keep.display());
    program::succeed("sh", [keep.as_os_str(), file.as_os_str(), OsStr::new(&script)]);
    fs::metadata(file).or_fail("the namespace's file").ino()
}
