//! Looks at every byte that the cache has.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use crate::stop::{Stop, Stopped};

use super::digest::Digest;
use super::store::{Cache, Identity, StoreError, hash};

/// What was found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Audit {
    /// Files that are what they should be.
    pub intact: u64,
    /// Their bytes.
    pub bytes: u64,
    /// What was damaged, and removed.
    pub damaged: Vec<Digest>,
}

impl Cache {
    /// Checks the digest of every file, several at a time, and removes those that are damaged. Tells
    /// `progress` the bytes so far, from several threads.
    ///
    /// # Errors
    /// The cache cannot be read or written, or it is time to give up.
    pub fn audit(&self, stop: &Stop, progress: &(dyn Fn(u64) + Sync)) -> Result<Audit, AuditError> {
        let contents = self.contents()?;
        let threads = std::thread::available_parallelism().map_or(1, |count| count.get().min(4));
        let next = AtomicUsize::new(0);
        let done = AtomicU64::new(0);
        let found = Mutex::new(Audit::default());
        let work = || -> Result<(), AuditError> {
            while let Some(content) = contents.get(next.fetch_add(1, Ordering::Relaxed)) {
                stop.check()?;
                let intact = self.is_intact(content.digest)?;
                progress(done.fetch_add(content.size, Ordering::Relaxed) + content.size);
                let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
                match intact {
                    Some(true) => {
                        found.intact += 1;
                        found.bytes += content.size;
                    }
                    Some(false) => found.damaged.push(content.digest),
                    // Somebody else has found it damaged, or it was evicted meanwhile.
                    None => {}
                }
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
            threads
                .into_iter()
                .try_for_each(|thread| thread.join().unwrap_or(Err(AuditError::Stopped(Stopped::Asked))))
        })?;
        let mut found = found.into_inner().unwrap_or_else(PoisonError::into_inner);
        found.damaged.sort_unstable();
        Ok(found)
    }

    /// Is the file what its name says? One that is not is removed. `None` when it is not there.
    fn is_intact(&self, digest: Digest) -> Result<Option<bool>, StoreError> {
        let path = self.path(digest);
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(StoreError::Read { path, source }),
        };
        let identity = Identity::of(&file).map_err(|source| StoreError::Read { path, source })?;
        // An unreadable sector is damage too.
        if hash(&mut file).is_ok_and(|found| found == digest) {
            return Ok(Some(true));
        }
        Ok(self.remove_damaged(digest, identity)?.then_some(false))
    }
}

/// Why not everything was looked at.
#[derive(Debug, thiserror::Error)]
pub enum AuditError {
    /// The cache fails.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Nobody wants it any more.
    #[error("the check was given up")]
    Stopped(#[from] Stopped),
}
