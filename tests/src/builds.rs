//! Builds of images: real packages out of a cache that all tests share, and qemu, real or played.
//!
//! The cache lies below cargo's target directory, so that only the first run downloads. It belongs to
//! root and has a directory in it for the user that builds, as root's own cache has.

use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use crate::failure::{OrFail, wait_for};
use crate::place::{Place, USER};
use crate::probe::ProcessSeen;
use crate::program;

/// How long a stage may take to begin: those before it download, unpack and boot.
const PATIENCE: Duration = Duration::from_secs(150);

/// The shared cache, as root names it.
///
/// # Panics
/// When it cannot be made.
#[must_use]
pub fn shared_cache() -> PathBuf {
    let base = program::target_directory().join("package-cache");
    let own = base.join(USER.to_string());
    fs::create_dir_all(&own).or_fail("making the shared cache");
    chown(&own, Some(USER), Some(USER)).or_fail("giving the shared cache to its user");
    base
}

/// The part of the shared cache that belongs to [`USER`].
#[must_use]
pub fn users_cache() -> PathBuf {
    shared_cache().join(USER.to_string())
}

/// A cache of the test's own with what the shared one has, but for the verdict about accelerators.
///
/// # Panics
/// When it cannot be made.
#[must_use]
pub fn own_cache(place: &Place) -> PathBuf {
    let (shared, cache) = (users_cache(), place.directory_of_user("cache"));
    // Not all there is: builds for root work in there, and what is temporary goes meanwhile.
    for part in ["sha256", "metadata"] {
        let from = shared.join(part);
        if from.exists() {
            program::succeed(
                "cp",
                ["-a".as_ref(), "--reflink=auto".as_ref(), from.as_os_str(), cache.as_os_str()],
            );
        }
    }
    cache
}

/// Writes the smallest recipe there is: the essential packages and apt. `more` is put at its end.
///
/// # Panics
/// When it cannot be written.
#[must_use]
pub fn recipe(place: &Place, name: &str, more: &str) -> PathBuf {
    let path = place.path(format!("{name}.toml"));
    let text = format!(
        "kind = \"debian\"\n[image]\nname = \"{name}\"\nsize = \"1GiB\"\n[debian]\nsource = \"host-apt\"\nsuite = \"bookworm\"\narchitecture = \"amd64\"\npackages = []\n{more}"
    );
    fs::write(&path, text).or_fail("writing the recipe");
    path
}

/// Puts programs of the test's own before the host's: a directory for `PATH`.
///
/// # Panics
/// When they cannot be written.
#[must_use]
pub fn stand_ins(place: &Place, programs: &[(&str, &str)]) -> PathBuf {
    let folder = place.directory("stand-ins");
    for (name, text) in programs {
        let path = folder.join(name);
        fs::write(&path, text).or_fail("writing a stand-in");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).or_fail("making it a program");
    }
    // What a guest tells of an image with one package, where qemu has its own files and may read.
    let own = place.path("share/qemu");
    fs::create_dir_all(&own).or_fail("making a directory");
    let status = "Package: played\nStatus: install ok installed\nArchitecture: all\nVersion: 1\n";
    let told = ["os-release", "dpkg-status", "rpm-packages"];
    for name in told {
        let text = if name == "dpkg-status" { status } else { "" };
        fs::write(own.join(name), text).or_fail("writing what a guest tells");
    }
    let mut tar = Command::new("tar");
    program::finish(tar.args(["--create", "--file=told.tar"]).args(told).current_dir(&own)).succeeded();
    folder
}

/// Plays qemu and the guest in it: it finds the nonce where a guest would and gives it back at once, so
/// that the stages after the guest are reached in seconds. When a finished disk is booted, it hangs.
pub const PLAYED_QEMU: &str = r#"#!/bin/bash
if [ "$1" = --version ]; then qemu-img --version | sed 's/^qemu-img/QEMU emulator/'; exit; fi
last= initrd= disk= told=
for argument; do
    case $last in
    -initrd) initrd=$argument ;;
    -drive)
        disk=$argument
        case $argument in *id=disk1,*) told=${argument##*file.filename=} ;; esac
        ;;
    esac
    last=$argument
done
if [ -z "$initrd" ]; then exec sleep 600; fi
nonce=$(grep -aoP 'nonce\x00+\K[0-9a-f]{32}' "$initrd")
if [ -z "$disk" ]; then
    echo "hostler-canary $nonce" >&100
else
    if [ -n "$told" ]; then cat "${0%/*}/../share/qemu/told.tar" 1<>"$told"; fi
    echo "stage played" >&101
    echo "done $nonce" >&101
fi
sleep 0.5
"#;

/// A build that runs; killed when it is dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    log: PathBuf,
}

impl Running {
    /// Starts one, with what it says in a file, as in the log of a CI job.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn start(place: &Place, command: Command) -> Self {
        Self::start_logging_to(place.path("build.log"), command)
    }

    /// The same with a log of its own, for several at once.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn start_logging_to(log: PathBuf, mut command: Command) -> Self {
        let file = || File::options().create(true).append(true).open(&log).or_fail("opening the build's log");
        // One after the other in one place: what the one before said is of no interest.
        file().set_len(0).or_fail("emptying the build's log");
        let child = command.stdin(Stdio::null()).stdout(file()).stderr(file()).spawn();
        Self { child: child.or_fail("starting the build"), log }
    }

    /// What it said.
    #[must_use]
    pub fn said(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Its own process: the shell that entered the control groups became it.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until a stage begins.
    ///
    /// # Panics
    /// When the build ends before, or it takes too long.
    #[track_caller]
    pub fn wait_for_stage(&mut self, stage: &str) {
        self.wait_for(format_args!("stage {stage}"), |said| {
            said.contains(&format!("hostler: {stage}: start\n"))
        });
    }

    /// Waits until something is so, as long as the build runs.
    ///
    /// # Panics
    /// When the build ends before, or it takes too long.
    #[track_caller]
    pub fn wait_for(&mut self, what: impl std::fmt::Display, is_so: impl Fn(&str) -> bool) {
        let said = || fs::read_to_string(&self.log).unwrap_or_default();
        let child = &mut self.child;
        wait_for(format_args!("{what} of the build"), PATIENCE, || {
            let ended = child.try_wait().or_fail("looking at the build");
            let said = said();
            assert!(ended.is_none(), "the build ended before {what}:\n{said}");
            is_so(&said).then_some(())
        });
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(&mut self) {
        // Gone already is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Whether it has ended.
    ///
    /// # Panics
    /// When that cannot be told.
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().or_fail("looking at the build").is_some()
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// When it does not end within `limit`.
    #[track_caller]
    pub fn finish(&mut self, limit: Duration) -> ExitStatus {
        let child = &mut self.child;
        wait_for("the end of the build", limit, || child.try_wait().or_fail("waiting for the build")).0
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            eprintln!("the build said:\n{}", self.said());
        }
    }
}

/// A process, and what it may do.
#[derive(Clone, PartialEq, Eq)]
pub struct Confined {
    /// Which.
    pub process: ProcessSeen,
    /// The program's name and its arguments.
    pub command: Vec<String>,
    /// `/proc/PID/status`.
    status: String,
    /// The network namespace.
    pub network: PathBuf,
    /// The user namespace.
    pub users: PathBuf,
}

impl std::fmt::Debug for Confined {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "{} {:?}", self.process.pid, self.command)
    }
}

impl Confined {
    /// The processes of a place, but for those that are gone before they are looked at.
    #[must_use]
    pub fn all(place: &Place) -> Vec<Self> {
        place.processes().into_iter().filter_map(Self::of).collect()
    }

    fn of(pid: u32) -> Option<Self> {
        let folder = PathBuf::from(format!("/proc/{pid}"));
        let before = ProcessSeen::find(pid)?;
        let line = fs::read(folder.join("cmdline")).ok()?;
        let words = line.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned());
        let seen = Self {
            process: before,
            command: words.collect(),
            status: fs::read_to_string(folder.join("status")).ok()?,
            network: fs::read_link(folder.join("ns/net")).ok()?,
            users: fs::read_link(folder.join("ns/user")).ok()?,
        };
        // The same process, with the same program, at the end of the look.
        let again = fs::read(folder.join("cmdline")).ok()?;
        (ProcessSeen::find(pid)? == before && again == line && !line.is_empty()).then_some(seen)
    }

    /// A field of its status.
    ///
    /// # Panics
    /// When the kernel has no such field.
    #[must_use]
    #[track_caller]
    pub fn field(&self, name: &str) -> &str {
        let line = self.status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.or_fail(format_args!("field {name} of process {}", self.process.pid)).trim()
    }

    /// The name of its program, without its folder.
    #[must_use]
    pub fn program(&self) -> &str {
        let first = self.command.first().map_or("", String::as_str);
        first.rsplit('/').next().unwrap_or("")
    }

    /// Whether an argument has this in it.
    #[must_use]
    pub fn mentions(&self, text: &str) -> bool {
        self.command.iter().any(|word| word.contains(text))
    }

    /// Fails the test when it could do anything that another ordinary user could not.
    ///
    /// # Panics
    /// When it can.
    #[track_caller]
    pub fn assert_ordinary(&self, user: u32) {
        let numbers = [user.to_string(), user.to_string(), user.to_string(), user.to_string()].join("\t");
        assert_eq!(self.field("Uid"), numbers, "{:?}", self.command);
        for set in ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"] {
            assert_eq!(self.field(set), "0000000000000000", "{set} of {:?}", self.command);
        }
        assert_eq!(self.field("NoNewPrivs"), "1", "{:?}", self.command);
    }
}

/// The entries of a directory whose names begin with a dot: what is unfinished.
#[must_use]
pub fn unfinished(directory: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"."))
        .map(|entry| entry.path())
        .collect()
}
