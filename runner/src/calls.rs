//! The calls that are unsafe in Rust's eyes: what a signal does, and what runs between fork and exec.
//!
//! One call per function, each with the reason why it holds. Deliberately absent: any decision.

#![expect(
    unsafe_code,
    reason = "sigaction(2) can install code, and code between fork and exec may do little: their wrappers are unsafe whatever they are used for"
)]

use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use nix::sys::signal::{SigHandler, Signal, signal};
use rustix::process::{getpid, getppid, set_parent_process_death_signal};

/// Gives a signal its default action. Rust's runtime ignores SIGPIPE and handles SIGSEGV and SIGBUS
/// (to tell stack overflows): raising one of them would not end this process as it ended a command.
///
/// Whether it was ignored before.
///
/// # Errors
/// What `sigaction(2)` says, such as for SIGKILL, which always has it.
pub fn restore_default(which: Signal) -> nix::Result<bool> {
    // SAFETY: the default action is the kernel's, so no code of this process runs in a signal's
    // context because of it.
    let before = unsafe { signal(which, SigHandler::SigDfl) };
    before.map(|before| matches!(before, SigHandler::SigIgn))
}

/// Has a signal ignored.
///
/// # Errors
/// As above.
pub(crate) fn ignore(which: Signal) -> nix::Result<()> {
    // SAFETY: as above; nothing is run when the signal comes.
    let before = unsafe { signal(which, SigHandler::SigIgn) };
    before.map(drop)
}

/// Has what `command` starts killed once the thread that starts it has ended
/// (`PR_SET_PDEATHSIG`, prctl(2)), however that comes about.
pub(crate) fn die_with_the_starter(command: &mut Command) {
    let parent = getpid();
    let arrange = move || -> io::Result<()> {
        set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        // A parent that died before the line above is not noticed by it.
        if getppid() == Some(parent) { Ok(()) } else { Err(rustix::io::Errno::SRCH.into()) }
    };
    // SAFETY: the child of a process with several threads may only do what is safe in a signal
    // handler until it executes a program. These are two plain system calls; nothing is allocated,
    // locked or shared.
    unsafe { command.pre_exec(arrange) };
}
