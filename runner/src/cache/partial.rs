//! Downloads that were begun and not finished: whoever wants the same content goes on where they end.
//!
//! `<root>/partial/<digest>` is locked by who writes it. It outlives a writer that was killed, stopped or
//! left by its upstream, if there is enough of it; what is wrong in it shows when the whole is checked.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use rustix::fs::{FlockOperation, flock};
use tempfile::{NamedTempFile, TempPath};

use super::digest::Digest;
use super::store::{Cache, StoreError};
use super::writer::Writer;

/// From so many bytes on a part is worth keeping.
pub(super) const WORTH_KEEPING: u64 = 1 << 20;

/// How long a part is kept that nobody goes on with.
const KEPT: Duration = Duration::from_secs(86_400);

/// Parts that nobody writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    /// How many.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
}

impl Cache {
    fn partial(&self) -> PathBuf {
        self.root().join("partial")
    }

    /// How much there is of a content that somebody writes.
    pub(super) fn part_size(&self, digest: Digest) -> Option<u64> {
        fs::metadata(self.partial().join(digest.to_string())).ok().map(|metadata| metadata.len())
    }

    /// Goes on with the content with this digest, of `size` bytes where that is known, from what there is
    /// of it. Reads and hashes that, which takes a while where it is much.
    pub(super) fn resume(&self, digest: Digest, size: Option<u64>) -> Result<Writer<'_>, StoreError> {
        if size.is_some_and(|size| size < WORTH_KEEPING) {
            return self.writer();
        }
        let path = self.partial().join(digest.to_string());
        let failed = |source| StoreError::Write { path: path.clone(), source };
        let locked = self.while_nobody_sweeps(|| {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(nix::libc::O_NOFOLLOW)
                .open(&path)?;
            let is_free = flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok();
            // Its writer may just have given it its name in the cache, where nobody writes to it.
            let is_same = fs::symlink_metadata(&path).is_ok_and(|named| {
                file.metadata().is_ok_and(|own| (own.dev(), own.ino()) == (named.dev(), named.ino()))
            });
            Ok((is_free && is_same).then_some(file))
        });
        let Some(file) = locked.map_err(failed)? else {
            // Another process writes it, though this one has the turn: where there are no such locks.
            return self.writer();
        };
        let file = NamedTempFile::from_parts(file, TempPath::try_from_path(&path).map_err(failed)?);
        let mut writer = Writer::resumable(self, file);
        writer.take_up(size)?;
        Ok(writer)
    }

    /// Removes the parts that nobody writes and that are not worth keeping, or older than they are kept.
    /// What of them stays. The caller holds the exclusive lock.
    pub(super) fn sweep_parts(&self, now: SystemTime) -> Result<Parts, StoreError> {
        self.remove_parts(|size, age| size < WORTH_KEEPING || age > KEPT, now)
    }

    /// Removes all parts that nobody writes. The caller holds the exclusive lock.
    pub(super) fn drop_parts(&self) -> Result<Parts, StoreError> {
        self.remove_parts(|_, _| true, SystemTime::now())
    }

    fn remove_parts(
        &self,
        goes: impl Fn(u64, Duration) -> bool,
        now: SystemTime,
    ) -> Result<Parts, StoreError> {
        let directory = self.partial();
        let failed = |source: io::Error| StoreError::Directory { path: directory.clone(), source };
        let mut stay = Parts::default();
        for entry in fs::read_dir(&directory).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let Ok(file) = File::open(&path) else { continue };
            if flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
                continue;
            }
            let metadata = file.metadata().map_err(failed)?;
            let age = metadata.modified().ok().and_then(|time| now.duration_since(time).ok());
            if goes(metadata.len(), age.unwrap_or_default()) {
                // Another may have been faster.
                let _ = fs::remove_file(&path);
            } else {
                stay.files += 1;
                stay.bytes += metadata.len();
            }
        }
        Ok(stay)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Store {
        directory: tempfile::TempDir,
        whole: Vec<u8>,
    }

    impl Store {
        fn new() -> Self {
            let whole = (0..1_u32 << 20).flat_map(u32::to_le_bytes).collect();
            Self { directory: tempfile::tempdir().expect("temporary directory"), whole }
        }

        fn open(&self) -> Cache {
            Cache::open(self.directory.path()).expect("usable")
        }

        fn digest(&self) -> Digest {
            Digest::of(&self.whole)
        }

        /// Writes so much of it, and leaves it.
        fn begin(&self, bytes: &[u8]) {
            let cache = self.open();
            let mut writer = cache.resume(self.digest(), None).expect("writable");
            writer.write(bytes).expect("written");
        }

        fn parts(&self) -> usize {
            fs::read_dir(self.directory.path().join("partial")).expect("listed").count()
        }
    }

    #[test]
    fn a_part_is_gone_on_with_and_checked_as_a_whole() {
        let store = Store::new();
        let size = store.whole.len();
        store.begin(&store.whole[..size - 5]);
        let cache = store.open();
        let mut writer = cache.resume(store.digest(), Some(size as u64)).expect("writable");
        assert_eq!(writer.size(), size as u64 - 5);
        assert!(writer.pieces() > 0, "what is wrong may be of another upstream");
        writer.write(&store.whole[size - 5..]).expect("written");
        writer.commit(store.digest(), size as u64).expect("right");
        assert!(cache.get(store.digest(), size as u64).expect("readable").is_some());
        assert_eq!(store.parts(), 0);
    }

    #[test]
    fn a_part_with_a_wrong_byte_is_refused_and_gone() {
        let store = Store::new();
        let size = store.whole.len();
        let mut wrong = store.whole.clone();
        wrong[9] ^= 1;
        store.begin(&wrong);
        let cache = store.open();
        let writer = cache.resume(store.digest(), Some(size as u64)).expect("writable");
        assert!(matches!(writer.commit(store.digest(), size as u64), Err(StoreError::Mismatch { .. })));
        assert_eq!(store.parts(), 0);
        // One that is too long is nothing to go on with.
        store.begin(&[store.whole.as_slice(), b"more"].concat());
        assert_eq!(cache.resume(store.digest(), Some(size as u64)).expect("writable").size(), 0);
        assert_eq!(store.parts(), 0);
    }

    #[test]
    fn what_two_write_at_once_is_written_apart() {
        let store = Store::new();
        let (one, other) = (store.open(), store.open());
        let mut first = one.resume(store.digest(), None).expect("writable");
        let mut second = other.resume(store.digest(), None).expect("writable");
        for half in store.whole.chunks(store.whole.len() / 2) {
            first.write(half).expect("written");
            second.write(half).expect("written");
        }
        let size = store.whole.len() as u64;
        first.commit(store.digest(), size).expect("right");
        second.commit(store.digest(), size).expect("right");
    }

    #[test]
    fn little_old_and_unwanted_parts_go() {
        let store = Store::new();
        store.begin(&store.whole[..1000]);
        assert_eq!(store.parts(), 0);
        store.begin(&store.whole[..WORTH_KEEPING as usize]);
        let cache = store.open();
        assert_eq!(store.parts(), 1);
        let later = SystemTime::now() + KEPT * 2;
        assert_eq!(cache.sweep_parts(later).expect("swept"), Parts::default());
        assert_eq!(store.parts(), 0);
        store.begin(&store.whole[..WORTH_KEEPING as usize]);
        // They are the first to go when there is too much.
        let kept = cache.put(b"kept").expect("written");
        assert_eq!(cache.shrink(WORTH_KEEPING, None).expect("shrunk").left, 4);
        assert_eq!(store.parts(), 0);
        assert!(cache.get(kept, 4).expect("readable").is_some());
    }
}
