//! Who used which content, and when.
//!
//! ```text
//! <root>/uses/<name>   the digests that one process used, a line each; locked while it lives
//! <root>/used          the same of processes that are gone: digest and second, a line each
//! <root>/needs/<name>  the digests that a build's lock needs; its time is when the lock was last used
//! ```
//!
//! A time in the content's own metadata would not do: changing it makes the content look changed.
//! Processes note a use before they open the content, under the shared lock under which nobody evicts.

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, flock};

use super::digest::Digest;
use super::store::{Cache, StoreError};

/// How long a lock that nobody uses keeps what it needs.
const KEPT: Duration = Duration::from_secs(90 * 86_400);

/// What this process used.
#[derive(Debug, Default)]
pub(super) struct Uses {
    log: Option<File>,
    noted: HashSet<Digest>,
}

/// What is known of all content's use.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// When it was used last, in seconds since 1970.
    pub(super) last: HashMap<Digest, u64>,
    /// What living processes use.
    pub(super) in_use: HashSet<Digest>,
    /// What locks need.
    pub(super) needed: HashSet<Digest>,
    /// Why that may not be all.
    pub(super) unread: Option<StoreError>,
}

impl Known {
    /// What was read; where it was not, all that is known is doubtful.
    fn sure<T>(&mut self, path: &Path, read: io::Result<T>) -> Option<T> {
        read.map_err(|source| self.unread = Some(StoreError::Unread { path: path.to_owned(), source })).ok()
    }
}

impl Cache {
    /// Notes that this process uses the content. Returns a lock to hold until the content is open, where
    /// there is need.
    pub(super) fn note_use(&self, digest: Digest) -> Result<Option<File>, StoreError> {
        let Some(uses) = &self.uses else { return Ok(None) };
        let mut uses = uses.lock().unwrap_or_else(PoisonError::into_inner);
        if uses.noted.contains(&digest) {
            return Ok(None);
        }
        let directory = self.root().join("uses");
        let failed = |source| StoreError::Write { path: directory.clone(), source };
        let lock = self.shared()?;
        if uses.log.is_none() {
            let file = tempfile::Builder::new().prefix("").rand_bytes(16).tempfile_in(&directory);
            let (file, path) = file.map_err(failed)?.into_parts();
            flock(&file, FlockOperation::LockExclusive).map_err(|error| failed(error.into()))?;
            // It stays when this process is gone, until another reads it.
            path.keep().map_err(|error| failed(error.error))?;
            uses.log = Some(file);
        }
        if let Some(log) = &mut uses.log {
            // A part of a line, which a full disk may have left before, ends here and is no digest.
            log.write_all(format!("\n{digest}\n").as_bytes()).map_err(failed)?;
        }
        uses.noted.insert(digest);
        Ok(Some(lock))
    }

    /// Keeps what a build's lock needs, as long as the lock, which is known by `name`, is used.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn need(&self, name: Digest, digests: &[Digest]) -> Result<(), StoreError> {
        let path = self.root().join("needs").join(name.to_string());
        let mut writer = self.writer()?;
        for digest in digests {
            writer.write(format!("{digest}\n").as_bytes())?;
        }
        writer.publish(&path)
    }

    /// Everything that is known of uses; merges what processes that are gone have noted. The caller holds
    /// the exclusive lock.
    pub(super) fn merge_uses(&self, now: SystemTime) -> Result<Known, StoreError> {
        let mut known = Known::default();
        let used = self.root().join("used");
        known.last = known.sure(&used, read_used(&used)).unwrap_or_default();
        // What cannot be read is not written anew without what it had.
        let is_mergeable = known.unread.is_none();
        let mut gone = Vec::new();
        for path in list(&self.root().join("uses"))? {
            // Whoever merged it before is faster than this only without the lock: then nothing is lost.
            let Some(file) = known.sure(&path, opened(&path)).flatten() else { continue };
            let alive = flock(&file, FlockOperation::NonBlockingLockShared).is_err();
            let time = seconds(if alive { now } else { modified(&file, now) });
            let Some(digests) = known.sure(&path, read_digests(&path)) else { continue };
            for digest in digests {
                let last = known.last.entry(digest).or_default();
                *last = time.max(*last);
                if alive {
                    known.in_use.insert(digest);
                }
            }
            if !alive {
                gone.push(path);
            }
        }
        for path in list(&self.root().join("needs"))? {
            let Some(file) = known.sure(&path, opened(&path)).flatten() else { continue };
            if now.duration_since(modified(&file, now)).is_ok_and(|age| age > KEPT) {
                // Another may have been faster.
                let _ = fs::remove_file(&path);
            } else if let Some(digests) = known.sure(&path, read_digests(&path)) {
                known.needed.extend(digests);
            }
        }
        if !gone.is_empty() && is_mergeable {
            // What is gone is of no interest; what was never used has its own time.
            known.last.retain(|digest, _| self.path(*digest).exists());
            // A full disk is no reason not to read, and above all not to prune: it is merged another time.
            match self.write_used(&known.last) {
                Ok(()) => gone.iter().for_each(|path| drop(fs::remove_file(path))),
                Err(error) => tracing::warn!(%error, "what was used could not be merged"),
            }
        }
        Ok(known)
    }

    fn write_used(&self, last: &HashMap<Digest, u64>) -> Result<(), StoreError> {
        let path = self.root().join("used");
        let failed = |source| StoreError::Write { path: path.clone(), source };
        let mut file = tempfile::Builder::new()
            .prefix("")
            .rand_bytes(16)
            .tempfile_in(self.root().join("temporary"))
            .map_err(failed)?;
        let text: String = last.iter().map(|(digest, time)| format!("{digest} {time}\n")).collect();
        file.write_all(text.as_bytes()).map_err(failed)?;
        file.persist(&path).map_err(|error| failed(error.error))?;
        Ok(())
    }
}

fn modified(file: &File, otherwise: SystemTime) -> SystemTime {
    file.metadata().and_then(|metadata| metadata.modified()).unwrap_or(otherwise)
}

pub(super) fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

fn list(directory: &Path) -> Result<Vec<PathBuf>, StoreError> {
    let failed = |source: io::Error| StoreError::Directory { path: directory.to_owned(), source };
    fs::read_dir(directory)
        .map_err(failed)?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(failed)
}

/// `None` when it is gone.
fn opened(path: &Path) -> io::Result<Option<File>> {
    match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        opened => opened.map(Some),
    }
}

/// A line that was cut by a crash is no digest.
fn read_digests(path: &Path) -> io::Result<Vec<Digest>> {
    let text = fs::read_to_string(path)?;
    Ok(text.lines().filter_map(|line| line.parse().ok()).collect())
}

fn read_used(path: &Path) -> io::Result<HashMap<Digest, u64>> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        text => text?,
    };
    let parse = |line: &str| {
        let (digest, time) = line.split_once(' ')?;
        Some((digest.parse().ok()?, time.parse().ok()?))
    };
    Ok(text.lines().filter_map(parse).collect())
}
