//! Who may begin to write or use something, and who may sweep and evict: one lock of all processes.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt;
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::store::{Cache, StoreError};

/// For one that lists or evicts, which takes a while where there is much.
const SHARED_PATIENCE: Duration = Duration::from_secs(120);
/// For all others, which hold the lock for moments only; less than a build has that is told to stop.
const ALONE_PATIENCE: Duration = Duration::from_secs(4);

impl Cache {
    /// The lock under which nobody sweeps or evicts.
    pub(super) fn shared(&self) -> Result<File, StoreError> {
        self.locked(FlockOperation::NonBlockingLockShared, SHARED_PATIENCE)
    }

    /// The lock under which nobody else begins to use or write anything.
    pub(super) fn alone(&self) -> Result<File, StoreError> {
        self.locked(FlockOperation::NonBlockingLockExclusive, ALONE_PATIENCE)
    }

    /// Never waits in the kernel: one that is stopped with the lock would stop all others.
    fn locked(&self, how: FlockOperation, patience: Duration) -> Result<File, StoreError> {
        let lock = self.birth_lock()?;
        let path = || self.root().join("lock");
        let deadline = Instant::now() + patience;
        loop {
            match flock(&lock, how) {
                Ok(()) => return Ok(lock),
                Err(Errno::WOULDBLOCK | Errno::INTR) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(Errno::WOULDBLOCK | Errno::INTR) => {
                    return Err(StoreError::Locked { path: path(), patience });
                }
                Err(error) => return Err(StoreError::Write { path: path(), source: error.into() }),
            }
        }
    }

    pub(super) fn birth_lock(&self) -> Result<File, StoreError> {
        let path = self.root().join("lock");
        OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(|source| StoreError::Write { path, source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_that_another_keeps_is_not_waited_for_without_end() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let cache = Cache::open(directory.path()).expect("usable");
        let stopped = Cache::open(directory.path()).expect("usable");
        let lock = stopped.alone().expect("free");
        let patience = Duration::from_millis(50);
        let error = cache.locked(FlockOperation::NonBlockingLockShared, patience).expect_err("it is locked");
        assert!(matches!(error, StoreError::Locked { .. }), "{error}");
        drop(lock);
        cache.locked(FlockOperation::NonBlockingLockShared, patience).expect("free again");
    }
}
