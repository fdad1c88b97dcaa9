//! Starting the command: the launcher's two halves.
//!
//! The launcher stops itself (SIGSTOP), which only its parent notices, and goes on when the parent
//! lets it. That needs no descriptor that the command would inherit, and until then the launcher
//! dies with its parent. It takes any SIGCONT for the parent's: who may signal it may as well start
//! the command itself, and gains nothing by starting it early.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};

use nix::sys::signal::{SigSet, SigmaskHow, Signal as UnixSignal, sigprocmask};
use rustix::process::{
    Pid, Signal, WaitIdOptions, getpid, getppid, kill_process, set_parent_process_death_signal,
};

use crate::calls::ignore;

/// The hidden subcommand that the launcher is:
/// `hostler __launch PARENT BLOCKED IGNORED COMMAND ARGUMENT…`. BLOCKED is the numbers of the signals
/// that `hostler` blocked for itself, with commas between; IGNORED those that were ignored when it
/// started and that it hears.
pub const LAUNCH: &str = "__launch";

/// What this process does about signals, and the command is to start without.
#[derive(Clone, Copy, Debug)]
pub(super) struct Own<'a> {
    /// Those that it has blocked.
    pub(super) blocked: &'a SigSet,
    /// Those that it no longer ignores.
    pub(super) heard: &'a SigSet,
}

/// A started launcher that waits to be let go.
#[derive(Debug)]
pub(super) struct Waiting {
    child: Child,
}

impl Waiting {
    /// Starts a launcher for `command`, and returns once it waits.
    pub(super) fn start(command: &[OsString], own: Own<'_>) -> io::Result<Self> {
        let mut child = Command::new("/proc/self/exe")
            .arg(LAUNCH)
            .arg(std::process::id().to_string())
            .arg(numbers(own.blocked))
            .arg(numbers(own.heard))
            .args(command)
            .spawn()?;
        let pid = pid_of(&child);
        let how = WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        let waited =
            rustix::io::retry_on_intr(|| rustix::process::waitid(rustix::process::WaitId::Pid(pid), how));
        match waited {
            Ok(Some(status)) if status.stopped() => Ok(Self { child }),
            Ok(_) => {
                let status = child.wait()?;
                Err(io::Error::other(format!("the launcher ended early ({status})")))
            }
            Err(error) => {
                child.kill()?;
                child.wait()?;
                Err(error.into())
            }
        }
    }

    pub(super) fn pid(&self) -> Pid {
        pid_of(&self.child)
    }

    /// Lets it become the command.
    pub(super) fn go(self) -> io::Result<Pid> {
        let pid = self.pid();
        // Take the stop's notice away, so that it is not mistaken for one of the command's.
        let _stopped = rustix::process::waitid(
            rustix::process::WaitId::Pid(pid),
            WaitIdOptions::STOPPED | WaitIdOptions::NOHANG,
        )?;
        kill_process(pid, Signal::CONT)?;
        Ok(pid)
    }

    /// Ends it without having become anything.
    pub(super) fn abandon(mut self) -> io::Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_child(child)
}

/// Waits to be let go, then becomes the command. Returns only when that failed, with the exit status
/// that a shell would give.
#[must_use]
pub fn become_command(arguments: &[OsString]) -> u8 {
    let [parent, blocked, ignored, program, arguments @ ..] = arguments else { return 2 };
    match wait_for_word(parent) {
        Ok(()) => {}
        Err(error) => {
            tell(&format!("hostler: the launcher could not wait for the watchdog: {error}"));
            return 126;
        }
    }
    for signal in &signals(ignored) {
        if let Err(error) = ignore(signal) {
            tell(&format!("hostler: the launcher could not ignore {signal} again: {error}"));
            return 126;
        }
    }
    // A mask is inherited over exec: the command would never hear a Ctrl-C. One that came in the
    // meantime ends this process here, as it would have ended the command.
    let blocked = signals(blocked);
    if let Err(error) = sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&blocked), None) {
        tell(&format!("hostler: the launcher could not unblock signals: {error}"));
        return 126;
    }
    let error = Command::new(program).args(arguments).exec();
    let program = hostler_protocol::text::printable(program.as_encoded_bytes());
    tell(&format!("hostler: {program}: {error}"));
    if error.kind() == io::ErrorKind::NotFound { 127 } else { 126 }
}

/// A set of signals as an argument.
fn numbers(set: &SigSet) -> String {
    let numbers: Vec<String> = set.iter().map(|signal| (signal as i32).to_string()).collect();
    numbers.join(",")
}

/// The set that such an argument stands for; only a signal's number counts.
fn signals(argument: &OsStr) -> SigSet {
    let numbers = argument.to_str().unwrap_or_default().split(',');
    numbers.filter_map(|number| UnixSignal::try_from(number.parse::<i32>().ok()?).ok()).collect()
}

fn wait_for_word(parent: &OsStr) -> io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let expected = parent.to_str().and_then(|text| text.parse().ok()).and_then(Pid::from_raw);
    // A parent that died before the line above is not noticed by it.
    if expected.is_none() || getppid() != expected {
        return Err(io::Error::other("the parent is gone"));
    }
    kill_process(getpid(), Signal::STOP)?;
    // From here on the command lives as long as it likes; the watchdog knows it.
    set_parent_process_death_signal(None)?;
    Ok(())
}

fn tell(line: &str) {
    use std::io::Write;
    // Standard error may be closed; the exit status still tells.
    let _ = writeln!(io::stderr(), "{line}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_of_signals_survives_being_an_argument() {
        let set: SigSet =
            [UnixSignal::SIGINT, UnixSignal::SIGTERM, UnixSignal::SIGCHLD].into_iter().collect();
        assert_eq!(signals(OsStr::new(&numbers(&set))), set);
        assert_eq!(signals(OsStr::new("")), SigSet::empty());
        assert_eq!(signals(OsStr::new("x,,999,2")), [UnixSignal::SIGINT].into_iter().collect());
    }
}
