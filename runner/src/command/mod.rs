//! `hostler run`: a command under a lease, as if Hostler were not there.
//!
//! The command is started by a launcher, which is this same program: it waits until the watchdog
//! has put it under the lease, and then becomes the command. So there is no moment in which the
//! command runs and is not tracked, and its process number is the launcher's.

mod launch;
mod supervise;

pub use launch::{LAUNCH, become_command};
pub use supervise::{Ended, supervise};
