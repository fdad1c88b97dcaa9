//! Files on disk under the name of their digest.
//!
//! ```text
//! <root>/sha256/ab/abcd…   content, complete and checked before it got this name
//! <root>/temporary/…       files being written, each locked by its writer
//! <root>/lock              shared: something is being born or taken into use; exclusive: swept, evicted
//! ```
//!
//! Beside these, see `remembered`, `partial`, `uses` and `flight`.
//!
//! Any number of processes use one cache. A writer that is killed leaves a temporary file whose lock
//! the kernel has dropped: the next one that opens the cache takes it away. A reader checks size and
//! digest the first time in a process that it meets a file, and again whenever the file's change time
//! differs; a damaged file is removed, counted and reported as absent, so that it is fetched again.
//! Deliberately absent: what goes when it is too large (see `evict`), and the network.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read, Seek};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};

use super::digest::{Digest, Hasher};
use super::uses::Uses;
use super::writer::{Scratch, Writer};

/// Why the cache cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// No directory is known.
    #[error("no directory for the cache: set HOSTLER_CACHE or HOME")]
    NoDirectory,
    /// A directory cannot be made or listed.
    #[error("cannot use the cache directory {}: check its permissions, or set HOSTLER_CACHE", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file cannot be read.
    #[error("cannot read {} in the cache: check its permissions", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write {} in the cache: check its space and permissions", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// What is in use cannot be told.
    #[error(
        "cannot tell what of the cache is in use, so nothing is removed: {} cannot be read; check its permissions and its disk, or remove it while nothing uses the cache",
        path.display()
    )]
    Unread {
        /// The file that tells.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Another process keeps the cache locked.
    #[error(
        "another process has kept {} locked for {} s: is one stopped? `fuser -v` names it",
        path.display(),
        patience.as_secs()
    )]
    Locked {
        /// The lock.
        path: PathBuf,
        /// How long was waited.
        patience: Duration,
    },
    /// The limit is none.
    #[error("HOSTLER_CACHE_LIMIT is {0:?}, which is no size: write one such as 32GiB")]
    Limit(String),
    /// Content is not what it should be.
    #[error("the content has digest {found} ({found_size} bytes) instead of {wanted} ({wanted_size} bytes)")]
    Mismatch {
        /// What it should be.
        wanted: Digest,
        /// Bytes it should have.
        wanted_size: u64,
        /// What it is.
        found: Digest,
        /// Bytes it has.
        found_size: u64,
    },
}

impl StoreError {
    /// Is there no more space?
    #[must_use]
    pub fn is_full(&self) -> bool {
        let kind = match self {
            Self::Directory { source, .. } | Self::Read { source, .. } | Self::Write { source, .. } => {
                source.kind()
            }
            Self::NoDirectory
            | Self::Unread { .. }
            | Self::Locked { .. }
            | Self::Limit(_)
            | Self::Mismatch { .. } => return false,
        };
        matches!(kind, io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
    }
}

/// The cache directory.
#[derive(Debug)]
pub struct Cache {
    root: PathBuf,
    verified: Mutex<HashMap<Digest, Identity>>,
    damaged: AtomicU64,
    /// None where what this process uses is kept by something else.
    pub(super) uses: Option<Mutex<Uses>>,
}

/// A file as it was when its digest was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
    size: u64,
    changed: (i64, i64),
}

impl Identity {
    pub(super) fn of(file: &File) -> io::Result<Self> {
        let metadata = file.metadata()?;
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.len(),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        })
    }
}

impl Cache {
    /// Opens the cache at `root`, makes it where it is missing, and sweeps what dead writers left.
    ///
    /// # Errors
    /// The directory cannot be used.
    pub fn open(root: &Path) -> Result<Self, StoreError> {
        for name in ["sha256", "metadata", "made", "temporary", "partial", "uses", "needs"] {
            let path = root.join(name);
            fs::create_dir_all(&path).map_err(|source| StoreError::Directory { path, source })?;
        }
        let cache = Self {
            root: root.to_owned(),
            verified: Mutex::default(),
            damaged: AtomicU64::new(0),
            uses: Some(Mutex::default()),
        };
        cache.sweep()?;
        Ok(cache)
    }

    /// The same cache for a process that keeps nothing from being removed by using it: what it serves has names
    /// elsewhere, as long as it is to be served.
    #[must_use]
    pub fn without_uses(self) -> Self {
        Self { uses: None, ..self }
    }

    /// Where the cache is.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// How many files were found damaged, and removed, since the cache was opened.
    #[must_use]
    pub fn damaged(&self) -> u64 {
        self.damaged.load(Ordering::Relaxed)
    }

    pub(super) fn path(&self, digest: Digest) -> PathBuf {
        let name = digest.to_string();
        self.root.join("sha256").join(&name[..2]).join(name)
    }

    /// Removes temporary files that no living writer holds.
    fn sweep(&self) -> Result<(), StoreError> {
        let lock = self.birth_lock()?;
        if flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
            // Somebody is just starting to write; whoever opens the cache next will sweep.
            return Ok(());
        }
        let directory = self.root.join("temporary");
        let failed = |source| StoreError::Directory { path: directory.clone(), source };
        for entry in fs::read_dir(&directory).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let abandoned = File::open(&path)
                .is_ok_and(|file| flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok());
            if abandoned {
                // Another sweeper may have been faster.
                let _ = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            }
        }
        self.sweep_parts(SystemTime::now())?;
        self.merge_uses(SystemTime::now()).map(drop)
    }

    /// Opens the content with `digest`, checked, and of `size` bytes where that is known. `None` when it is
    /// absent or was found damaged.
    ///
    /// # Errors
    /// It is there and cannot be read.
    pub fn get(&self, digest: Digest, size: impl Into<Option<u64>>) -> Result<Option<File>, StoreError> {
        let size = size.into();
        let path = self.path(digest);
        let failed = |source| StoreError::Read { path: path.clone(), source };
        // Until it is open, nobody evicts it. A full disk is no reason not to read: what is open stays readable.
        let noted = match self.note_use(digest) {
            Err(error) if error.is_full() => None,
            noted => noted?,
        };
        let mut file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(failed(source)),
        };
        drop(noted);
        let identity = Identity::of(&file).map_err(failed)?;
        // A caller that is wrong about the size is no reason to remove anything.
        let fits = size.is_none_or(|size| identity.size == size);
        if self.verified.lock().is_ok_and(|map| map.get(&digest) == Some(&identity)) {
            return Ok(fits.then_some(file));
        }
        // An unreadable sector is damage too.
        if hash(&mut file).is_ok_and(|found| found == digest) {
            file.rewind().map_err(failed)?;
            self.remember_verified(digest, identity);
            return Ok(fits.then_some(file));
        }
        self.damaged.fetch_add(1, Ordering::Relaxed);
        // One that stays is replaced when the content comes again.
        if let Err(error) = self.remove_damaged(digest, identity) {
            tracing::warn!(%error, %digest, "a damaged file stays in the cache");
        }
        Ok(None)
    }

    /// Removes the very file that was found damaged, and not what has taken its place since. Was it still there?
    pub(super) fn remove_damaged(&self, digest: Digest, damaged: Identity) -> Result<bool, StoreError> {
        let path = self.path(digest);
        // What is published is published under the shared one.
        let _lock = self.alone()?;
        let is_same = fs::symlink_metadata(&path)
            .is_ok_and(|found| (found.dev(), found.ino()) == (damaged.device, damaged.inode));
        if !is_same {
            return Ok(false);
        }
        fs::remove_file(&path).map_err(|source| StoreError::Write { path, source })?;
        Ok(true)
    }

    /// Is there anything with this digest? What it is is not looked at.
    pub(super) fn has(&self, digest: Digest) -> bool {
        // What cannot be told is found out by opening it.
        !fs::symlink_metadata(self.path(digest)).is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
    }

    /// The same for what this process has checked already and nobody has changed since. It does not wait for
    /// the disk.
    pub(super) fn get_known(&self, digest: Digest, size: Option<u64>) -> Option<File> {
        let identity = *self.verified.lock().ok()?.get(&digest)?;
        if size.is_some_and(|size| identity.size != size) {
            return None;
        }
        // Its use was noted when it was checked.
        let file = File::open(self.path(digest)).ok()?;
        (Identity::of(&file).ok()? == identity).then_some(file)
    }

    pub(super) fn remember_verified(&self, digest: Digest, identity: Identity) {
        if let Ok(mut map) = self.verified.lock() {
            map.insert(digest, identity);
        }
    }

    /// Begins to write content.
    ///
    /// # Errors
    /// The temporary file cannot be made.
    pub fn writer(&self) -> Result<Writer<'_>, StoreError> {
        let file = self.born(|builder, directory| {
            let file = builder.suffix(".part").tempfile_in(directory)?;
            flock(file.as_file(), FlockOperation::LockExclusive)?;
            Ok(file)
        })?;
        Ok(Writer::new(self, file))
    }

    /// A directory for short-lived files of the caller. It goes when it is dropped, or when the cache
    /// is next opened after its owner was killed.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn scratch(&self) -> Result<Scratch, StoreError> {
        self.born(|builder, directory| {
            let directory = builder.tempdir_in(directory)?;
            let lock = File::open(directory.path())?;
            flock(&lock, FlockOperation::LockExclusive)?;
            Ok(Scratch::new(directory, lock))
        })
    }

    /// Makes and locks something temporary while nobody sweeps.
    fn born<T>(
        &self,
        make: impl FnOnce(&mut tempfile::Builder<'_, '_>, &Path) -> io::Result<T>,
    ) -> Result<T, StoreError> {
        let directory = self.root.join("temporary");
        self.while_nobody_sweeps(|| make(tempfile::Builder::new().prefix("").rand_bytes(16), &directory))
            .map_err(|source| StoreError::Write { path: directory.clone(), source })
    }

    pub(super) fn while_nobody_sweeps<T>(&self, make: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        let _lock = self.shared().map_err(io::Error::other)?;
        make()
    }

    /// Stores `bytes` under their own digest.
    ///
    /// # Errors
    /// They cannot be written.
    pub fn put(&self, bytes: &[u8]) -> Result<Digest, StoreError> {
        let digest = Digest::of(bytes);
        let mut writer = self.writer()?;
        writer.write(bytes)?;
        writer.commit(digest, bytes.len() as u64)?;
        Ok(digest)
    }
}

pub(super) fn hash(file: &mut File) -> io::Result<Digest> {
    let mut hasher = Hasher::default();
    let mut buffer = vec![0; 1 << 18];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(hasher.finish());
        }
        hasher.update(&buffer[..count]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache() -> (tempfile::TempDir, Cache) {
        let directory = tempfile::tempdir().expect("temporary directory");
        let cache = Cache::open(directory.path()).expect("usable");
        (directory, cache)
    }

    fn read(cache: &Cache, digest: Digest, size: u64) -> Option<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut file = cache.get(digest, size).expect("readable")?;
        file.read_to_end(&mut bytes).expect("readable");
        Some(bytes)
    }

    #[test]
    fn what_is_put_is_found() {
        let (_directory, cache) = cache();
        let digest = cache.put(b"hello").expect("written");
        assert_eq!(read(&cache, digest, 5).as_deref(), Some(&b"hello"[..]));
        assert_eq!(read(&cache, Digest::of(b"x"), 1), None);
    }

    #[test]
    fn wrong_content_is_not_kept() {
        let (directory, cache) = cache();
        let mut writer = cache.writer().expect("writer");
        writer.write(b"hellp").expect("written");
        let error = writer.commit(Digest::of(b"hello"), 5).expect_err("wrong");
        assert!(matches!(error, StoreError::Mismatch { .. }));
        assert_eq!(read(&cache, Digest::of(b"hello"), 5), None);
        assert_eq!(read(&cache, Digest::of(b"hellp"), 5), None);
        let left = fs::read_dir(directory.path().join("temporary")).expect("listed").count();
        assert_eq!(left, 0);
    }

    #[test]
    fn a_byte_flipped_on_disk_is_found_even_after_a_first_good_read() {
        let (_directory, cache) = cache();
        let digest = cache.put(b"hello").expect("written");
        assert!(read(&cache, digest, 5).is_some());
        // Kernels before 6.13 count change times in ticks of up to 10 ms.
        std::thread::sleep(Duration::from_millis(30));
        fs::write(cache.path(digest), b"hellp").expect("flipped");
        assert_eq!(read(&cache, digest, 5), None);
        assert_eq!(cache.damaged(), 1);
        assert!(!cache.path(digest).exists());
        cache.put(b"hello").expect("written again");
        assert!(read(&cache, digest, 5).is_some());
    }

    #[test]
    fn who_is_wrong_about_a_size_gets_nothing_and_harms_nothing() {
        let (directory, cache) = cache();
        let digest = cache.put(b"hello").expect("written");
        for cache in [cache, Cache::open(directory.path()).expect("usable")] {
            assert_eq!(read(&cache, digest, 4), None);
            assert_eq!(read(&cache, digest, 5).as_deref(), Some(&b"hello"[..]));
            assert_eq!(read(&cache, digest, 4), None);
            assert_eq!(cache.damaged(), 0);
        }
    }

    #[test]
    fn what_took_the_place_of_a_damaged_file_stays() {
        let (_directory, cache) = cache();
        let digest = cache.put(b"hello").expect("written");
        fs::write(cache.path(digest), b"hellp").expect("flipped");
        let damaged = Identity::of(&File::open(cache.path(digest)).expect("there")).expect("known");
        // Another process finds it as well, and fetches it again.
        cache.put(b"hello").expect("written again");
        assert!(!cache.remove_damaged(digest, damaged).expect("removable"));
        assert!(read(&cache, digest, 5).is_some());
    }

    #[test]
    fn abandoned_temporary_files_are_swept_and_living_ones_are_not() {
        let (directory, cache) = cache();
        let abandoned = directory.path().join("temporary/dead.part");
        fs::write(&abandoned, b"half").expect("written");
        let abandoned_directory = directory.path().join("temporary/dead");
        fs::create_dir_all(abandoned_directory.join("inner")).expect("made");
        let living = cache.scratch().expect("made");
        let mut writer = cache.writer().expect("writer");
        writer.write(b"liv").expect("written");
        let other = Cache::open(directory.path()).expect("usable");
        assert!(!abandoned.exists());
        assert!(!abandoned_directory.exists());
        assert!(living.path().exists());
        writer.write(b"ing").expect("written");
        writer.commit(Digest::of(b"living"), 6).expect("still there");
        assert!(read(&other, Digest::of(b"living"), 6).is_some());
    }

    #[test]
    fn many_writers_readers_and_sweepers_share_one_cache() {
        let directory = tempfile::tempdir().expect("temporary directory");
        std::thread::scope(|scope| {
            for seed in 0..4_u32 {
                let root = directory.path();
                scope.spawn(move || {
                    for round in 0..25_u32 {
                        // Opening sweeps; half of the contents are written by all threads at once.
                        let cache = Cache::open(root).expect("usable");
                        let text = format!("{} {}", round, if round % 2 == 0 { 0 } else { seed });
                        let digest = cache.put(text.as_bytes()).expect("written");
                        assert_eq!(read(&cache, digest, text.len() as u64), Some(text.into_bytes()));
                    }
                });
            }
        });
        let left = fs::read_dir(directory.path().join("temporary")).expect("listed").count();
        assert_eq!(left, 0);
    }
}
