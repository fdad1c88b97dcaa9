//! What a signal does to this process.
//!
//! Rust's runtime ignores SIGPIPE and handles SIGSEGV and SIGBUS (to tell stack overflows): raising
//! one of them would not end this process as it ended the command.

#![expect(
    unsafe_code,
    reason = "sigaction(2) can install code, so its wrappers are unsafe even where none is"
)]

use nix::sys::signal::{SigHandler, Signal, signal};

/// Gives a signal its default action.
///
/// # Errors
/// What `sigaction(2)` says, such as for SIGKILL, which always has it.
pub fn restore_default(which: Signal) -> nix::Result<()> {
    // SAFETY: the default action is the kernel's, so no code of this process runs in a signal's
    // context because of it.
    let before = unsafe { signal(which, SigHandler::SigDfl) };
    before.map(drop)
}
