//! A process that a test holds by its pidfd.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::failure::{OrFail, wait_until};
use crate::place::{Place, kill};
use crate::probe::ProcessSeen;

/// The process. It ends when this is dropped.
#[derive(Debug)]
pub struct Sleeper {
    child: Child,
    /// Its pidfd.
    pub pidfd: OwnedFd,
}

impl Sleeper {
    /// Starts one, of the test user or of root.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn start(place: &Place, of_user: bool) -> Self {
        Self::run(if of_user { place.command_of_user("sleep") } else { place.command("sleep") })
    }

    /// Starts one by a command that becomes `sleep`.
    ///
    /// # Panics
    /// When it cannot be started.
    #[must_use]
    pub fn run(mut command: Command) -> Self {
        let child = command.arg("600").stdin(Stdio::null()).spawn().or_fail("starting a sleeper");
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).or_fail("a pidfd");
        // Until then it is still root's shell on its way.
        wait_until("sleep", Duration::from_secs(5), || {
            std::fs::read(format!("/proc/{}/comm", child.id())).is_ok_and(|name| name == b"sleep\n")
        });
        Self { child, pidfd }
    }

    /// Its number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Whether it runs.
    #[must_use]
    pub fn runs(&self) -> bool {
        ProcessSeen::find(self.pid()).is_some_and(ProcessSeen::runs)
    }
}

impl AsFd for Sleeper {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        kill(self.child.id());
        let _ = self.child.wait();
    }
}
