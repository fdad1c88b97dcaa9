//! Runs a tool of the host to its end: gpgv, mke2fs, debugfs, e2fsck.
//!
//! A tool gets a cleared environment, no input, and a deadline after which it is killed; it is reaped
//! on every way out. Deliberately absent: shells, and a search of the caller's `PATH`, which an
//! ordinary user's environment could bend.

use std::ffi::{OsStr, OsString};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// Where Debian keeps its tools; an ordinary user's `PATH` often lacks the `sbin` directories.
const DIRECTORIES: [&str; 6] =
    ["/usr/sbin", "/usr/bin", "/sbin", "/bin", "/usr/local/sbin", "/usr/local/bin"];

/// A tool talks little; what is beyond this is dropped, so that it cannot fill memory.
const OUTPUT_LIMIT: u64 = 16 << 20;

/// Why a tool has no result.
#[derive(Debug, thiserror::Error)]
pub enum ToolError {
    /// It is not installed.
    #[error("{tool} is not installed: install the package {package}")]
    Missing {
        /// The tool.
        tool: &'static str,
        /// The Debian package that has it.
        package: &'static str,
    },
    /// It cannot be started, or watched.
    #[error("cannot run {}", tool.display())]
    Start {
        /// The tool.
        tool: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// It was killed because it took too long.
    #[error("{} was killed after {} s without a result: look at the load of this host and its disk{}", tool.display(), limit.as_secs(), said(stderr))]
    Deadline {
        /// The tool.
        tool: PathBuf,
        /// The time it was given.
        limit: Duration,
        /// What it said until then.
        stderr: String,
    },
    /// It ended, and not well.
    #[error("{} failed ({status}){}", tool.display(), said(stderr))]
    Failed {
        /// The tool.
        tool: PathBuf,
        /// How it ended.
        status: ExitStatus,
        /// What it said.
        stderr: String,
    },
}

fn said(stderr: &str) -> String {
    match stderr.trim() {
        "" => ", and said nothing".to_owned(),
        text => format!(", and said: {text}"),
    }
}

/// A tool of the host and the package it comes in.
#[derive(Clone, Copy, Debug)]
pub struct HostTool {
    /// Name of the program.
    pub name: &'static str,
    /// Debian package, for the message when it is missing.
    pub package: &'static str,
}

/// What a tool left.
#[derive(Debug)]
pub struct Finished {
    /// The program that ran.
    pub tool: PathBuf,
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error, as text.
    pub stderr: String,
}

impl Finished {
    /// Demands exit status 0.
    ///
    /// # Errors
    /// Another status, with what the tool said.
    pub fn success(self) -> Result<Self, ToolError> {
        if self.status.success() {
            return Ok(self);
        }
        Err(self.failure())
    }

    /// The error that this end means, for callers with a stricter notion of success.
    #[must_use]
    pub fn failure(self) -> ToolError {
        ToolError::Failed { tool: self.tool, status: self.status, stderr: self.stderr }
    }
}

impl HostTool {
    /// The path of the tool.
    ///
    /// # Errors
    /// It is not installed.
    pub fn find(self) -> Result<PathBuf, ToolError> {
        DIRECTORIES
            .iter()
            .map(|directory| Path::new(directory).join(self.name))
            .find(|path| path.is_file())
            .ok_or(ToolError::Missing { tool: self.name, package: self.package })
    }

    /// Runs the tool in `directory` with `arguments` and the variables of `environment` alone.
    ///
    /// # Errors
    /// It cannot be run, or the `limit` is reached. An exit status other than 0 is no error here.
    pub fn run<A: AsRef<OsStr>>(
        self,
        arguments: &[A],
        environment: &[(&str, OsString)],
        directory: &Path,
        limit: Duration,
    ) -> Result<Finished, ToolError> {
        let tool = self.find()?;
        let started = Instant::now();
        let child = Command::new(&tool)
            .args(arguments)
            .env_clear()
            .env("LC_ALL", "C")
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .envs(environment.iter().map(|(name, value)| (name, value)))
            .current_dir(directory)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn();
        let start = |source| ToolError::Start { tool: tool.clone(), source };
        let mut child = Reaped(child.map_err(start)?);
        let stdout = child.0.stdout.take();
        let stderr = child.0.stderr.take();
        let (ended, stdout, stderr) = std::thread::scope(|scope| {
            let stdout = scope.spawn(move || collect(stdout));
            let stderr = scope.spawn(move || collect(stderr));
            let ended = wait(&child.0, started + limit);
            if !matches!(ended, Ok(true)) {
                // Ends the readers too; the tools that run here leave no children behind.
                child.kill();
            }
            (ended, stdout.join().unwrap_or_default(), stderr.join().unwrap_or_default())
        });
        let stderr = String::from_utf8_lossy(&stderr).into_owned();
        if !ended.map_err(|source| start(source.into()))? {
            return Err(ToolError::Deadline { tool, limit, stderr });
        }
        let status = child.0.wait().map_err(start)?;
        Ok(Finished { tool, status, stdout, stderr })
    }
}

/// A child that cannot outlive its owner.
struct Reaped(Child);

impl Reaped {
    fn kill(&mut self) {
        // Both only fail when the child is already gone, which is what they are for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Reaped {
    fn drop(&mut self) {
        self.kill();
    }
}

fn collect(pipe: Option<impl Read>) -> Vec<u8> {
    let mut bytes = Vec::new();
    if let Some(mut pipe) = pipe {
        // A broken pipe ends the text early; the exit status tells what happened.
        let _ = pipe.by_ref().take(OUTPUT_LIMIT).read_to_end(&mut bytes);
        let _ = std::io::copy(&mut pipe, &mut std::io::sink());
    }
    bytes
}

/// Waits for the end of a child; false when the deadline comes first.
fn wait(child: &Child, deadline: Instant) -> rustix::io::Result<bool> {
    let process = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut events = [PollFd::new(&process, PollFlags::IN)];
        match poll(&mut events, Some(&timeout)) {
            Ok(0) => return Ok(false),
            Ok(_) => return Ok(true),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SH: HostTool = HostTool { name: "sh", package: "dash" };

    #[test]
    fn output_status_and_a_clean_environment() {
        let finished = SH
            .run(
                &["-c", "env; echo bad >&2; exit 3"],
                &[("X", "1".into())],
                Path::new("/"),
                Duration::from_secs(20),
            )
            .expect("runs");
        assert_eq!(finished.status.code(), Some(3));
        let stdout = String::from_utf8_lossy(&finished.stdout).into_owned();
        let mut names: Vec<&str> =
            stdout.lines().filter_map(|line| line.split_once('=').map(|pair| pair.0)).collect();
        names.sort_unstable();
        assert_eq!(names, ["LC_ALL", "PATH", "PWD", "X"]);
        assert!(finished.failure().to_string().ends_with("and said: bad"));
    }

    #[test]
    fn a_deadline_kills() {
        let started = Instant::now();
        let error = SH
            .run(&["-c", "echo slow >&2; exec sleep 60"], &[], Path::new("/"), Duration::from_millis(300))
            .expect_err("too slow");
        assert!(matches!(error, ToolError::Deadline { .. }), "{error}");
        assert!(started.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn a_missing_tool_names_its_package() {
        let tool = HostTool { name: "no-such-tool", package: "tools" };
        assert_eq!(
            tool.find().expect_err("missing").to_string(),
            "no-such-tool is not installed: install the package tools"
        );
    }
}
