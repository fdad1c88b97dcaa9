//! Standing between a shell and the command without being noticed.
//!
//! The command stays in this process's group and session, so the terminal's signals (Ctrl-C,
//! Ctrl-Z, a closed window) reach it by themselves, and only those that a process sent are passed
//! on. One that a process sends to the whole group (`kill -TERM -PGID`, as `timeout` does) therefore
//! reaches the command twice: nothing tells it from one that was sent to this process alone. When the command stops, this process stops too, so that the shell's job
//! control works.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use nix::sys::signal::{SigSet, SigmaskHow, Signal, sigprocmask};
use nix::sys::signalfd::{SfdFlags, SignalFd, siginfo};
use rustix::process::{Pid, WaitId, WaitIdOptions, WaitIdStatus, kill_process, waitid};

use crate::calls::restore_default;

use super::launch::{Own, Waiting};

/// How the command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// With this exit status.
    Exited(u8),
    /// By this signal.
    Killed(i32),
}

/// The signals that are passed on.
const PASSED_ON: [Signal; 14] = [
    Signal::SIGHUP,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGTERM,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGALRM,
    Signal::SIGVTALRM,
    Signal::SIGPROF,
    Signal::SIGWINCH,
    Signal::SIGIO,
    Signal::SIGPWR,
    Signal::SIGTSTP,
    Signal::SIGCONT,
];

/// Where a signal came from (`si_code`, `sigaction(2)`): above 0 it is the kernel's, such as the
/// terminal's.
fn is_from_the_kernel(information: &siginfo) -> bool {
    information.ssi_code > 0
}

/// Runs `command` to its end. `adopt` is given its pidfd before it runs; when that fails it is never
/// run.
///
/// # Errors
/// `adopt`'s, or when the command cannot be started or followed.
pub fn supervise<E: From<io::Error>>(
    command: &[OsString],
    adopt: impl FnOnce(&OwnedFd) -> Result<(), E>,
) -> Result<Ended, E> {
    // Blocked before the command starts, so that none is lost. The launcher unblocks for the
    // command those that were not blocked already: a mask is inherited.
    let mut signals: SigSet = PASSED_ON.into_iter().collect();
    signals.add(Signal::SIGCHLD);
    // One who started this process may ignore SIGCHLD, which is inherited: then nobody hears of a
    // child's end, and there is nothing to wait for.
    let mut heard = SigSet::empty();
    if restore_default(Signal::SIGCHLD).map_err(io::Error::from)? {
        heard.add(Signal::SIGCHLD);
    }
    let mut before = SigSet::empty();
    sigprocmask(SigmaskHow::SIG_BLOCK, Some(&signals), Some(&mut before)).map_err(io::Error::from)?;
    let added = signals.iter().filter(|signal| !before.contains(*signal)).collect();
    let own = Own { blocked: &added, heard: &heard };
    let result = follow(command, &signals, own, adopt);
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&before), None).map_err(io::Error::from)?;
    result
}

fn follow<E: From<io::Error>>(
    command: &[OsString],
    signals: &SigSet,
    own: Own<'_>,
    adopt: impl FnOnce(&OwnedFd) -> Result<(), E>,
) -> Result<Ended, E> {
    let arriving = SignalFd::with_flags(signals, SfdFlags::SFD_CLOEXEC).map_err(io::Error::from)?;
    let waiting = Waiting::start(command, own)?;
    let pidfd = rustix::process::pidfd_open(waiting.pid(), rustix::process::PidfdFlags::empty())
        .map_err(io::Error::from)?;
    if let Err(error) = adopt(&pidfd) {
        waiting.abandon()?;
        return Err(error);
    }
    let pid = waiting.go()?;
    loop {
        let Some(information) = arriving.read_signal().map_err(io::Error::from)? else { continue };
        let Ok(signal) = Signal::try_from(information.ssi_signo as i32) else { continue };
        if signal == Signal::SIGCHLD {
            if let Some(ended) = look_at(pid)? {
                return Ok(ended);
            }
        } else if !is_from_the_kernel(&information)
            && information.ssi_pid != pid.as_raw_nonzero().get() as u32
        {
            pass_on(pidfd.as_fd(), signal)?;
        }
    }
}

fn pass_on(pidfd: std::os::fd::BorrowedFd<'_>, signal: Signal) -> io::Result<()> {
    let number = rustix::process::Signal::from_named_raw(signal as i32);
    let Some(signal) = number else { return Ok(()) };
    match rustix::process::pidfd_send_signal(pidfd, signal) {
        // It ended meanwhile, which is noticed next; or it is another user's by now, such as sudo,
        // whom this one may send nothing.
        Ok(()) | Err(rustix::io::Errno::SRCH | rustix::io::Errno::PERM) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// What became of the command; `None` while it lives.
fn look_at(pid: Pid) -> io::Result<Option<Ended>> {
    let how = WaitIdOptions::EXITED | WaitIdOptions::STOPPED | WaitIdOptions::NOHANG;
    loop {
        let Some(status) = waitid(WaitId::Pid(pid), how)? else { return Ok(None) };
        if let Some(ended) = ended(&status) {
            return Ok(Some(ended));
        }
        if status.stopped() {
            // Stop as well; whoever continues this process continues the command.
            kill_process(rustix::process::getpid(), rustix::process::Signal::STOP)?;
            match kill_process(pid, rustix::process::Signal::CONT) {
                Ok(()) | Err(rustix::io::Errno::SRCH | rustix::io::Errno::PERM) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn ended(status: &WaitIdStatus) -> Option<Ended> {
    if let Some(code) = status.exit_status() {
        // The kernel keeps the low eight bits.
        return Some(Ended::Exited((code & 0xff) as u8));
    }
    status.terminating_signal().map(Ended::Killed)
}
