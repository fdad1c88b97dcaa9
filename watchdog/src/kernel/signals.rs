//! Ending processes through pidfds, so that a number given again is never hit.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::processes;
use crate::model::ProcessIdentity;

/// A pidfd of exactly this process; `None` when it is gone.
///
/// # Errors
/// What `pidfd_open(2)` says else.
pub fn open(identity: ProcessIdentity) -> io::Result<Option<OwnedFd>> {
    let Some(pid) = i32::try_from(identity.pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
    let pidfd = match pidfd_open(pid, PidfdFlags::empty()) {
        Ok(pidfd) => pidfd,
        // The number of a process that is gone lives on in a group or session that it led, and in a thread that
        // got it; the kernel then says `EINVAL`, or since Linux 6.16 `ENOENT`.
        Err(rustix::io::Errno::SRCH | rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => {
            return Ok(None);
        }
        Err(error) => return Err(error.into()),
    };
    // The descriptor is of whoever has the number now. Its start is read after it was opened: if
    // it is the right one, so is the descriptor.
    match processes::start_time(identity.pid) {
        Ok(start) if start == identity.start => Ok(Some(pidfd)),
        Ok(_) => Ok(None),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

/// The process that a pidfd is of; `None` when it has been waited for.
///
/// # Errors
/// When the descriptor is no pidfd.
pub fn process_of(pidfd: impl AsFd) -> io::Result<Option<ProcessIdentity>> {
    use std::os::fd::AsRawFd;
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_fd().as_raw_fd()))?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Pid:"))
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "that descriptor is no pidfd"))?;
    // -1 after the process was waited for, 0 when it is not in this pid namespace.
    let Some(pid) = line.trim().parse::<u32>().ok().filter(|pid| *pid > 0) else { return Ok(None) };
    match processes::start_time(pid) {
        Ok(start) if !has_ended(pidfd.as_fd())? => Ok(Some(ProcessIdentity { pid, start })),
        Ok(_) => Ok(None),
        Err(error) if is_gone(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Whether the process has ended (it may still wait to be waited for).
///
/// # Errors
/// What `poll(2)` says.
pub fn has_ended(pidfd: impl AsFd) -> io::Result<bool> {
    let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut polled = [PollFd::new(&pidfd, PollFlags::IN)];
    Ok(poll(&mut polled, Some(&zero))? > 0)
}

/// Sends a signal; a process that is gone already is no error.
///
/// # Errors
/// `EPERM` and its like.
pub fn send(pidfd: impl AsFd, signal: Signal) -> io::Result<()> {
    match pidfd_send_signal(pidfd, signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Waits until all have ended or the time is over; returns those that have not.
///
/// # Errors
/// What `poll(2)` says.
pub fn wait_for_all(mut pidfds: Vec<&OwnedFd>, limit: Duration) -> io::Result<Vec<&OwnedFd>> {
    let deadline = Instant::now() + limit;
    loop {
        let mut running = Vec::with_capacity(pidfds.len());
        for pidfd in pidfds {
            if !has_ended(pidfd)? {
                running.push(pidfd);
            }
        }
        pidfds = running;
        let left = deadline.saturating_duration_since(Instant::now());
        let (Some(first), false) = (pidfds.first(), left.is_zero()) else { return Ok(pidfds) };
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        // All must end, so it is enough to wake when the first one does.
        match poll(&mut [PollFd::new(*first, PollFlags::IN)], Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::process::CommandExt as _;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_process_is_gone_although_its_group_has_its_number() {
        let mut shell = Command::new("sh");
        let mut shell = shell
            .args(["-c", "sleep 60 >/dev/null & echo; read -r wait"])
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("a shell");
        let mut begun = [0];
        shell.stdout.take().expect("piped").read_exact(&mut begun).expect("its line");
        let start = processes::start_time(shell.id()).expect("it lives");
        let identity = ProcessIdentity { pid: shell.id(), start };
        assert!(open(identity).expect("it lives").is_some());
        drop(shell.stdin.take());
        let ended = shell.wait();
        let now = open(identity);
        // Whatever comes of it, the one that it left in its group ends.
        let group = Pid::from_raw(i32::try_from(identity.pid).expect("a number")).expect("not 0");
        rustix::process::kill_process_group(group, Signal::KILL).expect("there is one");
        ended.expect("it ended");
        assert!(now.expect("it can be told").is_none());
    }
}
