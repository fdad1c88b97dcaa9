//! What a build tells the watchdog.
//!
//! A build hands over proofs of possession, never names: the descriptor of its scratch directory
//! and the pidfd of each machine before it runs. Deliberately absent: how the watchdog is reached.

use std::io;
use std::os::fd::BorrowedFd;

use crate::cache::Counted;

/// How a build ended, for the watchdog's count of builds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ending {
    /// An image was delivered.
    Succeeded,
    /// None was.
    Failed,
    /// It was told to stop.
    Cancelled,
}

/// Takes what a build registers. Called from the build's own thread.
pub trait Registrar: Send + Sync {
    /// Takes over a directory: what is in it is the build's, and goes when the build is gone.
    ///
    /// # Errors
    /// When the watchdog refuses.
    fn claim_directory(&self, directory: BorrowedFd<'_>) -> io::Result<()>;

    /// Takes over a process, which does nothing until this returns.
    ///
    /// # Errors
    /// When the watchdog refuses.
    fn adopt(&self, process: BorrowedFd<'_>) -> io::Result<()>;

    /// Hears how the build ended, how many seconds it took, and what it downloaded. A watchdog that cannot be told does
    /// not change the ending.
    fn report(&self, ending: Ending, seconds: f64, counted: Counted);
}

/// There is no watchdog.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unregistered;

impl Registrar for Unregistered {
    fn claim_directory(&self, _: BorrowedFd<'_>) -> io::Result<()> {
        Ok(())
    }

    fn adopt(&self, _: BorrowedFd<'_>) -> io::Result<()> {
        Ok(())
    }

    fn report(&self, _: Ending, _: f64, _: Counted) {}
}
