//! Runs one tool: both its streams, its end, the clock and the wish to stop, in one poll loop.

use std::io::{self, Read};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};

use crate::stop::{Stop, Stopped};

use super::spawner;
use super::tool::{Finished, ToolError};

/// The most output that is kept of either stream, in bytes. What is beyond this is dropped, so that
/// it can neither fill memory nor hold up the tool.
const MOST_OUTPUT: usize = 1024 * 1024;

pub(super) fn run(
    program: &Path,
    mut command: Command,
    limit: Duration,
    stop: &Stop,
) -> Result<Finished, ToolError> {
    let failed = |source: io::Error| ToolError::Start { tool: program.to_owned(), source };
    stop.check().map_err(|source| ToolError::Stopped { tool: program.to_owned(), source })?;
    let until = Instant::now() + limit;
    command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        // The terminal's ^C is for the runner, which ends its tools in order.
        .process_group(0);
    let mut owned = Owned(spawner::spawn(command).map_err(failed)?);
    let mut heard = Heard::new(&mut owned.0).map_err(failed)?;
    let over = heard.listen(until, stop).map_err(failed)?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let tool = program.to_owned();
    match over {
        Over::Ended => {}
        Over::Deadline => {
            return Err(ToolError::Deadline { tool, limit, stderr: text(&heard.stderr.kept) });
        }
        Over::Stopped(source) => return Err(ToolError::Stopped { tool, source }),
    }
    let status = owned.0.wait().map_err(failed)?;
    Ok(Finished { tool, status, stdout: heard.stdout.kept, stderr: text(&heard.stderr.kept) })
}

/// A tool that cannot outlive its owner.
struct Owned(Child);

impl Drop for Owned {
    fn drop(&mut self) {
        // One that has been waited for has a status, and its number may be another's by now.
        if let Ok(None) = self.0.try_wait() {
            // Its whole group: it may be a script around the real one.
            let _ = kill_process_group(Pid::from_child(&self.0), Signal::KILL);
            let _ = self.0.wait();
        }
    }
}

enum Over {
    Ended,
    Deadline,
    Stopped(Stopped),
}

struct Stream<S> {
    open: Option<S>,
    kept: Vec<u8>,
}

struct Heard {
    process: OwnedFd,
    stdout: Stream<std::process::ChildStdout>,
    stderr: Stream<std::process::ChildStderr>,
}

impl Heard {
    fn new(child: &mut Child) -> io::Result<Self> {
        let process = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let streams = [stdout.as_ref().map(|one| one.as_fd()), stderr.as_ref().map(|one| one.as_fd())];
        for stream in streams.into_iter().flatten() {
            rustix::io::ioctl_fionbio(stream, true)?;
        }
        Ok(Self {
            process,
            stdout: Stream { open: stdout, kept: Vec::new() },
            stderr: Stream { open: stderr, kept: Vec::new() },
        })
    }

    fn listen(&mut self, until: Instant, stop: &Stop) -> io::Result<Over> {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(stop.left(left)).map_err(io::Error::other)?;
            let ended = {
                let mut polled = vec![PollFd::new(&self.process, PollFlags::IN)];
                polled.extend(self.stdout.open.as_ref().map(|stream| PollFd::new(stream, PollFlags::IN)));
                polled.extend(self.stderr.open.as_ref().map(|stream| PollFd::new(stream, PollFlags::IN)));
                polled.extend(stop.wish().map(|wish| PollFd::from_borrowed_fd(wish, PollFlags::IN)));
                match poll(&mut polled, Some(&timeout)) {
                    Ok(_) | Err(rustix::io::Errno::INTR) => {}
                    Err(error) => return Err(error.into()),
                }
                !polled[0].revents().is_empty()
            };
            self.stdout.take()?;
            self.stderr.take()?;
            // A grandchild may keep the pipes open; what it says belongs to nobody.
            if ended {
                return Ok(Over::Ended);
            }
            if let Err(stopped) = stop.check() {
                return Ok(Over::Stopped(stopped));
            }
            if Instant::now() >= until {
                return Ok(Over::Deadline);
            }
        }
    }
}

impl<S: Read> Stream<S> {
    /// Reads what is there; drops the stream at its end.
    fn take(&mut self) -> io::Result<()> {
        let mut buffer = [0; 16 * 1024];
        // Not for ever: the clock has to be looked at as well.
        for _ in 0..64 {
            let Some(open) = &mut self.open else {
                return Ok(());
            };
            match open.read(&mut buffer) {
                Ok(0) => self.open = None,
                Ok(length) => {
                    let room = MOST_OUTPUT.saturating_sub(self.kept.len()).min(length);
                    self.kept.extend_from_slice(&buffer[..room]);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::tool::Tool;
    use super::*;
    use crate::cancel::Cancel;

    const LONG: Duration = Duration::from_secs(60);

    fn shell(script: &str) -> Tool {
        Tool::at("/bin/sh".into()).arguments(["-c", script])
    }

    fn is_gone(pid: &str) -> bool {
        // A zombie is reaped by whoever inherited it.
        let gone = || {
            std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()))
                .map_or(true, |text| text.contains(") Z "))
        };
        (0..500).any(|_| {
            std::thread::sleep(Duration::from_millis(10));
            gone()
        })
    }

    #[test]
    fn both_streams_are_kept_and_the_environment_is_not() {
        let script = "env; echo err >&2; exit 3";
        let finished = shell(script).variable("X", "1").run(LONG, &Stop::default()).unwrap();
        assert_eq!(finished.status.code(), Some(3));
        let stdout = String::from_utf8(finished.stdout.clone()).unwrap();
        let mut names: Vec<&str> =
            stdout.lines().filter_map(|line| line.split_once('=').map(|pair| pair.0)).collect();
        names.sort_unstable();
        assert_eq!(names, ["LC_ALL", "PATH", "PWD", "X"]);
        assert_eq!(finished.failure().to_string(), "/bin/sh failed (exit status: 3), and said: err");
    }

    #[test]
    fn a_tool_that_hangs_is_ended_with_all_it_started() {
        let started = Instant::now();
        let script = "echo slow >&2; sleep 60 & echo $! >&2; wait";
        let error = shell(script).run(Duration::from_millis(300), &Stop::default()).unwrap_err();
        let ToolError::Deadline { stderr, .. } = error else { panic!("{error}") };
        let pid = stderr.strip_prefix("slow\n").unwrap();
        assert!(is_gone(pid), "process {pid}");
        assert!(started.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn the_wish_to_stop_is_heard_before_and_while_a_tool_runs() {
        let cancel = Arc::new(Cancel::new().unwrap());
        let stop = Stop::new(Arc::clone(&cancel));
        let tool = shell("exec sleep 60");
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(200));
                cancel.cancel();
            });
            for _ in ["while", "before"] {
                let error = tool.run(LONG, &stop).unwrap_err();
                assert_eq!(Stopped::cause_of(&error), Some(Stopped::Asked), "{error}");
            }
        });
    }

    #[test]
    fn a_tool_does_not_outlast_the_time_of_its_caller() {
        let stop = Stop::default().within(Duration::from_millis(200));
        let started = Instant::now();
        let error = shell("exec sleep 60").run(LONG, &stop).unwrap_err();
        assert_eq!(Stopped::cause_of(&error), Some(Stopped::Late), "{error}");
        assert!(started.elapsed() < Duration::from_secs(20));
    }

    #[test]
    fn endless_output_is_dropped_and_does_not_hold_up_the_deadline() {
        let tool = shell("while :; do echo 0123456789012345678901234567890123456789; done");
        let error = tool.run(Duration::from_millis(500), &Stop::default()).unwrap_err();
        assert!(matches!(error, ToolError::Deadline { .. }), "{error}");
        let tool = shell("head -c 3000000 /dev/zero");
        assert_eq!(tool.run(LONG, &Stop::default()).unwrap().stdout.len(), MOST_OUTPUT);
    }
}
