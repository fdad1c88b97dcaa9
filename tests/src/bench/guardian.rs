//! Who clears a bench's place when the bench itself cannot: it was killed, or its terminal was closed.
//!
//! A place clears itself when it is dropped, which a signal prevents. A measurement takes minutes, and
//! whoever waits for it presses Ctrl-C.

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use crate::failure::OrFail;
use crate::place::Place;

const SCRIPT: &str = include_str!("guardian.sh");

/// A shell that waits for the end of this process, in the mount namespace of whoever made it.
#[derive(Debug)]
pub struct Guardian {
    shell: Child,
}

impl Guardian {
    /// Has a place watched over.
    ///
    /// # Panics
    /// When the shell cannot be started.
    #[must_use]
    pub fn of(place: &Place) -> Self {
        let shell = Command::new("bash")
            .args(["-c", SCRIPT, "guardian"])
            .arg(place.root())
            .args(place.groups())
            // Not in the terminal's foreground group: what ends the bench spares it.
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        Self { shell: shell.or_fail("starting a guardian") }
    }

    /// What a death of this process does: its end of the pipe is closed. Returns when the place is clear.
    pub fn leave_it_to_the_guardian(mut self) {
        drop(self.shell.stdin.take());
        let _ = self.shell.wait();
    }
}

impl Drop for Guardian {
    fn drop(&mut self) {
        // The place clears itself. A guardian that is gone already is as good.
        if let Some(mut pipe) = self.shell.stdin.take() {
            let _ = pipe.write_all(b"done\n");
        }
        let _ = self.shell.wait();
    }
}
