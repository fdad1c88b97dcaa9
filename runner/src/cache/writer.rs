//! What is being written into the cache, and not yet part of it.
//!
//! Both kinds are locked as long as their owner lives; see `store` for what that is good for.

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::path::Path;

use super::digest::{Digest, Hasher};
use super::partial::WORTH_KEEPING;
use super::store::{Cache, Identity, StoreError};

/// A temporary directory of the cache.
#[derive(Debug)]
pub struct Scratch {
    directory: tempfile::TempDir,
    /// Held as long as the directory is there: tells sweepers that its owner lives.
    _lock: File,
}

impl Scratch {
    pub(super) fn new(directory: tempfile::TempDir, lock: File) -> Self {
        Self { directory, _lock: lock }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.directory.path()
    }
}

/// Content on its way into the cache. Dropped before [`Writer::commit`], it leaves nothing, unless it can be
/// gone on with.
pub struct Writer<'a> {
    cache: &'a Cache,
    file: tempfile::NamedTempFile,
    hasher: Hasher,
    size: u64,
    pieces: u32,
    is_resumable: bool,
}

impl<'a> Writer<'a> {
    pub(super) fn new(cache: &'a Cache, file: tempfile::NamedTempFile) -> Self {
        Self { cache, file, hasher: Hasher::default(), size: 0, pieces: 0, is_resumable: false }
    }

    /// One that stays when it is dropped, once there is enough of it.
    pub(super) fn resumable(cache: &'a Cache, file: tempfile::NamedTempFile) -> Self {
        Self { is_resumable: true, ..Self::new(cache, file) }
    }

    /// Takes up what the file has already, if that can be the beginning of so many bytes.
    pub(super) fn take_up(&mut self, size: Option<u64>) -> Result<(), StoreError> {
        let path = self.file.path().to_owned();
        let failed = |source| StoreError::Read { path, source };
        let mut buffer = vec![0; 1 << 18];
        loop {
            match self.file.as_file_mut().read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => {
                    self.hasher.update(&buffer[..count]);
                    self.size += count as u64;
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(failed(error)),
            }
        }
        if size.is_some_and(|size| self.size > size) {
            return self.restart();
        }
        if self.size > 0 {
            // Of how many answers it is, nobody knows any more.
            self.pieces = 2;
        }
        self.keep_or_not();
        Ok(())
    }

    fn keep_or_not(&mut self) {
        self.file.disable_cleanup(self.is_resumable && self.size >= WORTH_KEEPING);
    }

    /// Bytes written so far.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The digest of what was written so far.
    pub(super) fn digest(&self) -> Digest {
        self.hasher.clone().finish()
    }

    /// From how many answers what was written so far comes.
    pub(super) fn pieces(&self) -> u32 {
        self.pieces
    }

    /// What comes next is of another answer.
    pub(super) fn begin(&mut self) {
        self.pieces += 1;
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), StoreError> {
        if let Err(source) = self.file.write_all(bytes) {
            // The disk is full or broken: nothing of it stays, and what it took is free again.
            self.is_resumable = false;
            self.keep_or_not();
            return Err(StoreError::Write { path: self.file.path().to_owned(), source });
        }
        self.hasher.update(bytes);
        self.size += bytes.len() as u64;
        self.keep_or_not();
        Ok(())
    }

    /// Throws away what was written and begins anew.
    ///
    /// # Errors
    /// The file cannot be emptied.
    pub fn restart(&mut self) -> Result<(), StoreError> {
        if self.size == 0 {
            self.pieces = 0;
            return Ok(());
        }
        let file = self.file.as_file_mut();
        let emptied = file.set_len(0).and_then(|()| file.rewind());
        emptied.map_err(|source| StoreError::Write { path: self.file.path().to_owned(), source })?;
        self.hasher = Hasher::default();
        self.size = 0;
        self.pieces = 0;
        self.keep_or_not();
        Ok(())
    }

    /// Puts the content in its place, if it is what it should be.
    ///
    /// # Errors
    /// It is not, or cannot be written; nothing is kept then.
    pub fn commit(mut self, digest: Digest, size: u64) -> Result<File, StoreError> {
        let found = std::mem::take(&mut self.hasher).finish();
        // From here on it is what it should be, or nothing to go on with.
        self.file.disable_cleanup(false);
        if found != digest || self.size != size {
            return Err(StoreError::Mismatch {
                wanted: digest,
                wanted_size: size,
                found,
                found_size: self.size,
            });
        }
        let path = self.cache.path(digest);
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)
                .map_err(|source| StoreError::Directory { path: directory.to_owned(), source })?;
        }
        let cache = self.cache;
        let lock = match cache.note_use(digest)? {
            Some(lock) => lock,
            None => cache.shared()?,
        };
        self.publish(&path)?;
        drop(lock);
        let failed = |source| StoreError::Read { path: path.clone(), source };
        let file = File::open(&path).map_err(failed)?;
        cache.remember_verified(digest, Identity::of(&file).map_err(failed)?);
        Ok(file)
    }

    /// Gives the file its name. It is not forced to the disk, which takes longer than most files take to come:
    /// whoever reads it checks it first, so after a power cut it is found damaged and fetched again. A mirror
    /// has its whole file system written before a snapshot counts.
    pub(super) fn publish(self, path: &Path) -> Result<(), StoreError> {
        let failed = |source| StoreError::Write { path: path.to_owned(), source };
        // The file keeps its lock until it is closed here; its name is then no temporary one.
        self.file.persist(path).map_err(|error| failed(error.error))?;
        Ok(())
    }
}
