//! A build under a lease of its own.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;

use hostler_protocol::lease::{Epoch, LeaseId, Tracking};
use hostler_protocol::methods::{BuildResult, ReportBuild};
use hostler_runner::build::registrar::{Ending, Registrar};
use hostler_runner::cache::Counted;
use hostler_runner::watchdog::{Lease, WatchdogError};
use rustix::process::{PidfdFlags, getpid, pidfd_open};

/// A build's lease. The build itself is under it, so that every process it starts is born there.
#[derive(Debug)]
pub(crate) struct Registration {
    lease: Lease,
}

impl Registration {
    /// Opens a lease that this process owns and is under.
    ///
    /// # Errors
    /// See [`WatchdogError`].
    pub(crate) fn open(socket: &Path, name: &str) -> Result<Self, WatchdogError> {
        let lease = Lease::open(socket, name)?;
        let own = pidfd_open(getpid(), PidfdFlags::empty())
            .map_err(|error| WatchdogError::Socket(io::Error::from(error)))?;
        lease.adopt(&own)?;
        Ok(Self { lease })
    }

    /// Ends the lease. What the build left, if anything, is taken back; should the watchdog be gone by
    /// now, it does so when it is back.
    pub(crate) fn close(&self) -> Result<(), WatchdogError> {
        self.lease.close().map(drop)
    }
}

impl Registrar for Registration {
    fn claim_directory(&self, directory: BorrowedFd<'_>) -> io::Result<()> {
        self.lease.claim(directory, true).map_err(io::Error::other)
    }

    fn adopt(&self, process: BorrowedFd<'_>) -> io::Result<()> {
        match self.lease.opened().tracking {
            // Born under the lease.
            Tracking::Cgroup => Ok(()),
            // Should this process die before the watchdog's next look, the other would have lost the
            // parent that tells whose it is.
            Tracking::Descent => self.lease.adopt(process).map_err(io::Error::other),
        }
    }

    fn report(&self, ending: Ending, seconds: f64, counted: Counted) {
        let result = match ending {
            Ending::Succeeded => BuildResult::Succeeded,
            Ending::Failed => BuildResult::Failed,
            Ending::Cancelled => BuildResult::Cancelled,
        };
        let report = ReportBuild {
            // Filled in by the lease.
            lease: LeaseId(0),
            epoch: Epoch(0),
            result,
            seconds,
            upstream_bytes: counted.upstream_bytes,
            cached_bytes: counted.cache_bytes,
            upstream_files: counted.upstream_files,
            cached_files: counted.cache_files,
            upstream_failures: counted.upstream_faults,
        };
        // Only a number in a metric is lost.
        if let Err(error) = self.lease.report_build(report) {
            tracing::debug!(%error, "the watchdog could not be told how the build ended");
        }
    }
}
