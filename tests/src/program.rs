//! The programs under test, and running commands to their end.

use std::ffi::OsStr;
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

use crate::failure::OrFail;
use crate::patience::stretched;

/// How long any single command of a test may take.
const COMMAND_TIME: Duration = Duration::from_secs(30);

/// Where cargo put a program of this workspace: beside the test's own file.
///
/// # Panics
/// When it is not there, with what to do. It is never built here: a test that runs cargo waits for
/// the lock of the cargo that runs it.
#[must_use]
#[track_caller]
pub fn path(name: &str) -> PathBuf {
    let own = std::env::current_exe().or_fail("finding the test's own file");
    let profile = own.parent().and_then(|deps| deps.parent()).or_fail("the folder above the test's file");
    let program = profile.join(name);
    assert!(
        program.is_file(),
        "{} is missing: build the programs first with `cargo build --workspace`, or run `make test`",
        program.display()
    );
    program
}

/// Where cargo keeps what it makes.
///
/// # Panics
/// When the test's own file is not in there.
#[must_use]
#[track_caller]
pub fn target_directory() -> PathBuf {
    let own = std::env::current_exe().or_fail("finding the test's own file");
    own.ancestors().nth(3).or_fail("the folder above the profile's").to_owned()
}

/// How a command ended, and all it said.
#[derive(Clone, Debug)]
pub struct Ended {
    /// What a shell would show: the exit status, or 128 and the signal's number.
    pub status: i32,
    /// The signal that ended it.
    pub signal: Option<i32>,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Ended {
    fn of(output: &Output) -> Self {
        let signal = output.status.signal();
        let status = output.status.code().or(signal.map(|signal| 128 + signal));
        Self {
            status: status.unwrap_or(-1),
            signal,
            stdout: String::from_utf8_lossy(&output.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Its standard output, when it succeeded.
    ///
    /// # Panics
    /// When it did not.
    #[track_caller]
    pub fn succeeded(self) -> String {
        assert_eq!(self.status, 0, "the command failed: {}{}", self.stdout, self.stderr);
        self.stdout
    }
}

/// Runs a command to its end, with nothing on its standard input unless `command` says otherwise.
///
/// # Panics
/// When it cannot be started, or does not end in time; it is killed then.
#[track_caller]
pub fn finish(command: &mut Command) -> Ended {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let child = command.spawn().or_fail(format_args!("starting {command:?}"));
    let pid = child.id();
    let (done, result) = mpsc::channel();
    let waiter = std::thread::spawn(move || {
        // The test may have given up.
        let _ = done.send(child.wait_with_output());
    });
    let limit = stretched(COMMAND_TIME);
    match result.recv_timeout(limit) {
        Ok(output) => {
            waiter.join().or_fail_join();
            Ended::of(&output.or_fail(format_args!("waiting for {command:?}")))
        }
        Err(_) => {
            crate::place::kill(pid);
            panic!("{command:?} did not end within {limit:?}");
        }
    }
}

/// Runs a command to its end, and reads nothing of what it says: what it started may live on and keep
/// its output open.
///
/// # Panics
/// When it cannot be started, or does not end in time; it is killed then.
#[track_caller]
pub fn run(command: &mut Command) -> ExitStatus {
    let mut child = command.spawn().or_fail(format_args!("starting {command:?}"));
    let pid = child.id();
    let started = std::time::Instant::now();
    while started.elapsed() < stretched(COMMAND_TIME) {
        if let Some(status) = child.try_wait().or_fail(format_args!("waiting for {command:?}")) {
            return status;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    crate::place::kill(pid);
    let _ = child.wait();
    panic!("{command:?} did not end within {:?}", stretched(COMMAND_TIME));
}

/// Runs a program with arguments to its end, and wants it to succeed.
///
/// # Panics
/// When it does not.
#[track_caller]
pub fn succeed<A: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = A>) -> String {
    finish(Command::new(program).args(arguments)).succeeded()
}

trait Joined {
    fn or_fail_join(self);
}

impl Joined for std::thread::Result<()> {
    #[track_caller]
    fn or_fail_join(self) {
        assert!(self.is_ok(), "a helper thread of the test panicked");
    }
}
