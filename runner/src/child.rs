//! Runs a short-lived helper program: cleared environment, deadline, what it said.
//!
//! The child is killed and reaped when time is up, when someone wants to stop, and when the caller
//! goes away. Deliberately absent: input to the child, and output of more than a few pages.

use std::io::{self, Read};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::cancel::Cancel;

/// The most output that is kept of either stream, in bytes; the child is ended when it prints more.
const MOST_OUTPUT: usize = 1024 * 1024;

/// Why a helper was of no help.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChildError {
    /// It could not be started.
    #[error("could not start {program}")]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It could not be waited for.
    #[error("could not wait for {program}")]
    Wait {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It took too long.
    #[error("{program} was not done after {}; it was ended", humantime::format_duration(*.deadline))]
    TimedOut {
        /// The program.
        program: PathBuf,
        /// Its time.
        deadline: Duration,
    },
    /// Someone wanted to stop.
    #[error("{program} was ended because it was told to stop")]
    Cancelled {
        /// The program.
        program: PathBuf,
    },
    /// It printed without end.
    #[error("{program} printed more than {MOST_OUTPUT} bytes; it was ended")]
    Overlong {
        /// The program.
        program: PathBuf,
    },
    /// It failed.
    #[error("{program} failed ({status}): {stderr}")]
    Failed {
        /// The program.
        program: PathBuf,
        /// How it ended.
        status: std::process::ExitStatus,
        /// What it said, without control characters.
        stderr: String,
    },
}

/// What a helper printed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// On its standard output.
    pub stdout: String,
    /// On its standard error.
    pub stderr: String,
}

/// A command with nothing in its environment but a locale and a search path.
#[must_use]
pub fn command(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.env_clear().env("LC_ALL", "C.UTF-8").env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    command
}

/// Runs `command` to its end, which must be a success.
///
/// # Errors
/// See [`ChildError`]; the child is gone then.
pub fn output(
    mut command: Command,
    deadline: Duration,
    cancel: Option<&Cancel>,
) -> Result<Output, ChildError> {
    let program = PathBuf::from(command.get_program());
    let spawned = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn();
    let child = spawned.map_err(|source| ChildError::Spawn { program: program.clone(), source })?;
    let mut owned = Owned(child);
    let gathered = gather(&mut owned, &program, deadline, cancel)?;
    let wait = |source| ChildError::Wait { program: program.clone(), source };
    let status = owned.0.wait().map_err(wait)?;
    let [stdout, stderr] = gathered.map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
    if status.success() {
        Ok(Output { stdout, stderr })
    } else {
        Err(ChildError::Failed { program, status, stderr: printable(&stderr) })
    }
}

fn printable(text: &str) -> String {
    let kept: String =
        text.trim().chars().filter(|&character| character == '\n' || !character.is_control()).collect();
    let skipped = kept.chars().count().saturating_sub(2000);
    kept.chars().skip(skipped).collect()
}

struct Owned(std::process::Child);

impl Drop for Owned {
    fn drop(&mut self) {
        // Both do nothing for a child that has been waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Reads both streams until the child has ended.
fn gather(
    owned: &mut Owned,
    program: &Path,
    deadline: Duration,
    cancel: Option<&Cancel>,
) -> Result<[Vec<u8>; 2], ChildError> {
    let wait = |source: io::Error| ChildError::Wait { program: program.to_owned(), source };
    let pid = i32::try_from(owned.0.id()).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| wait(io::Error::other("it has no process id")))?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|error| wait(error.into()))?;
    let mut stdout = owned.0.stdout.take();
    let mut stderr = owned.0.stderr.take();
    let mut gathered = [Vec::new(), Vec::new()];
    let until = Instant::now() + deadline;
    let streams =
        [stdout.as_ref().map(|stream| stream.as_fd()), stderr.as_ref().map(|stream| stream.as_fd())];
    for stream in streams.into_iter().flatten() {
        rustix::io::ioctl_fionbio(stream, true).map_err(|error| wait(error.into()))?;
    }
    loop {
        let ended = {
            let mut polled = vec![PollFd::new(&pidfd, PollFlags::IN)];
            polled.extend(cancel.map(|cancel| PollFd::new(cancel, PollFlags::IN)));
            polled.extend(stdout.as_ref().map(|stream| PollFd::new(stream, PollFlags::IN)));
            polled.extend(stderr.as_ref().map(|stream| PollFd::new(stream, PollFlags::IN)));
            let left = until.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).map_err(|error| wait(io::Error::other(error)))?;
            match poll(&mut polled, Some(&timeout)) {
                Ok(0) => {
                    return Err(ChildError::TimedOut { program: program.to_owned(), deadline });
                }
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(wait(error.into())),
            }
            !polled[0].revents().is_empty()
        };
        if cancel.is_some_and(Cancel::is_cancelled) {
            return Err(ChildError::Cancelled { program: program.to_owned() });
        }
        if !read_available(&mut stdout, &mut gathered[0]).map_err(wait)?
            || !read_available(&mut stderr, &mut gathered[1]).map_err(wait)?
        {
            return Err(ChildError::Overlong { program: program.to_owned() });
        }
        // A grandchild may keep the pipes open; what it says belongs to nobody.
        if ended {
            return Ok(gathered);
        }
        if Instant::now() >= until {
            return Err(ChildError::TimedOut { program: program.to_owned(), deadline });
        }
    }
}

/// Reads what is there; drops the stream at its end. `false` when it is more than is kept.
fn read_available<S: Read>(stream: &mut Option<S>, gathered: &mut Vec<u8>) -> io::Result<bool> {
    let mut buffer = [0; 16 * 1024];
    while let Some(open) = stream {
        match open.read(&mut buffer) {
            Ok(0) => *stream = None,
            Ok(length) if gathered.len() + length > MOST_OUTPUT => return Ok(false),
            Ok(length) => gathered.extend_from_slice(&buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = command(Path::new("/bin/sh"));
        command.arg("-c").arg(script);
        command
    }

    #[test]
    fn both_streams_are_kept_and_the_environment_is_not() {
        let script = "echo out; echo \"err ${HOME-none}\" >&2";
        let output = output(shell(script), Duration::from_secs(20), None).unwrap();
        assert_eq!(output.stdout, "out\n");
        assert_eq!(output.stderr, "err none\n");
    }

    #[test]
    fn a_failure_tells_what_the_program_said() {
        let error =
            output(shell("printf 'no \\033[2Jluck' >&2; exit 3"), Duration::from_secs(20), None).unwrap_err();
        assert_eq!(error.to_string(), "/bin/sh failed (exit status: 3): no [2Jluck");
    }

    #[test]
    fn a_program_that_hangs_is_ended() {
        let started = Instant::now();
        let error = output(shell("exec sleep 60"), Duration::from_millis(200), None).unwrap_err();
        assert!(matches!(error, ChildError::TimedOut { .. }));
        assert!(started.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn the_wish_to_stop_is_heard() {
        let cancel = Cancel::new().unwrap();
        cancel.cancel();
        let error = output(shell("exec sleep 60"), Duration::from_secs(60), Some(&cancel));
        assert!(matches!(error, Err(ChildError::Cancelled { .. })));
    }

    #[test]
    fn endless_output_is_cut_off() {
        let error = output(
            shell("while :; do echo 0123456789012345678901234567890123456789; done"),
            Duration::from_secs(60),
            None,
        );
        assert!(matches!(error, Err(ChildError::Overlong { .. })));
    }
}
