//! What must survive the daemon: an append-only file of checked lines.
//!
//! A line is `1 CRC JSON`: the format's version, the CRC-32 of the rest, one [`Entry`]. It is
//! durable before what it tells is acted on, as long as the disk takes it: one that is full must not keep
//! what filled it from being taken back, so then what is in memory goes on, loudly, and is written as soon as
//! there is room. A lease is written whole each time it changes, so reading back is taking the last of each.
//! A torn or altered line is dropped and the file is kept aside; everything before and after it counts.
//!
//! The end of the file is empty lines, which are there before they are written over: to make durable what
//! only overwrites, the disk writes that and nothing else. A file that grows has to wait for the file
//! system's own journal, and with it for what everybody else on the host has just written. (On one that never
//! overwrites, such as btrfs, it is as if there were none.)
//!
//! Writing happens on a thread of its own: a slow disk delays those who wait for it, and nobody
//! else.

mod entry;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use hostler_protocol::lease::LeaseId;
use rustix::fs::{Mode, OFlags, openat, renameat};
use tokio::sync::oneshot;

use crate::causes::chain;
use crate::model::{BootId, Lease};
use entry::write_line;
pub use entry::{Entry, Recovered, recover};

/// Above this size the file is written anew with only what counts; or above twice what that took, when it is
/// more.
const COMPACT_ABOVE: u64 = 4 * 1024 * 1024;

/// How much of empty lines is put at the end of the file, and how little of it is left when there is more
/// put there.
const AHEAD: u64 = 1024 * 1024;
const AHEAD_LEAST: u64 = 256 * 1024;

/// Why the journal cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The directory or a file in it.
    #[error("{operation} {} failed; check [state] directory", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// Another daemon uses it.
    #[error("{} is in use by another hostlerd; stop it first, or give this one a [state] directory of its own", path.display())]
    InUse {
        /// The directory's lock file.
        path: PathBuf,
    },
    /// What was written together with others' entries is not durable.
    #[error(transparent)]
    NotDurable(Arc<JournalError>),
    /// The writing thread is gone.
    #[error("the journal's thread ended; restart hostlerd")]
    ThreadEnded,
}

impl JournalError {
    fn is_full(&self) -> bool {
        match self {
            Self::File { source, .. } => {
                matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
            }
            Self::InUse { .. } | Self::NotDurable(_) | Self::ThreadEnded => false,
        }
    }
}

struct Job {
    entries: Vec<Entry>,
    /// Absent when nobody waits for it: it becomes durable together with what somebody waits for.
    done: Option<oneshot::Sender<Result<(), JournalError>>>,
}

/// The open journal.
#[derive(Clone, Debug)]
pub struct Journal {
    jobs: mpsc::Sender<Job>,
}

impl Journal {
    /// Opens the journal in `directory`, making it when it is not there, and tells what it holds.
    /// A damaged file is copied to `journal.damaged` first. On a full disk it goes on with what it has read.
    ///
    /// # Errors
    /// When the directory cannot be used, or another daemon uses it.
    pub fn open(directory: &Path, boot: &BootId) -> Result<(Self, Recovered), JournalError> {
        let failed = |operation, path: &Path| {
            let path = path.to_owned();
            move |source| JournalError::File { operation, path, source }
        };
        fs::create_dir_all(directory).map_err(failed("making", directory))?;
        let lock_path = directory.join("lock");
        let lock = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(&lock_path)
            .map_err(failed("opening", &lock_path))?;
        if let Err(error) = lock_patiently(&lock) {
            return Err(match error {
                fs::TryLockError::WouldBlock => JournalError::InUse { path: lock_path },
                fs::TryLockError::Error(source) => {
                    JournalError::File { operation: "locking", path: lock_path, source }
                }
            });
        }
        let path = directory.join("journal");
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(source) => return Err(JournalError::File { operation: "reading", path, source }),
        };
        let recovered = recover(&bytes);
        let folder = File::open(directory).map_err(failed("opening", directory))?;
        let mut writer = Writer {
            folder,
            path,
            file: None,
            size: 0,
            filled: 0,
            fills_ahead: true,
            compact_above: COMPACT_ABOVE,
            aside: (!recovered.damaged.is_empty()).then_some(bytes),
            boot: boot.clone(),
            next_lease: recovered.next_lease,
            leases: recovered.leases.clone(),
            unopened: recovered.unopened.clone(),
            _lock: lock,
        };
        match writer.rewrite() {
            Ok(()) => {}
            Err(error) if error.is_full() => tracing::error!(
                "what the journal has is taken up, and a restart forgets what happens before there is room: {}",
                chain(&error)
            ),
            Err(error) => return Err(error),
        }
        let (jobs, queue) = mpsc::channel::<Job>();
        let thread = std::thread::Builder::new().name("journal".to_owned()).spawn(move || {
            while let Some(first) = writer.next(&queue) {
                // All that waits meanwhile is made durable together: with many leases ending at once the
                // disk, not the host, would be what they wait for.
                let jobs: Vec<Job> = std::iter::once(first).chain(queue.try_iter()).collect();
                let is_awaited = jobs.iter().any(|job| job.done.is_some());
                let result = writer.append(jobs.iter().flat_map(|job| &job.entries), is_awaited);
                let failure = result.err().map(Arc::new);
                for done in jobs.into_iter().filter_map(|job| job.done) {
                    let result = failure.clone().map_or(Ok(()), |cause| Err(JournalError::NotDurable(cause)));
                    // Whoever asked may have given up; the entries are written all the same.
                    let _ = done.send(result);
                }
            }
        });
        thread.map_err(failed("starting a thread for", directory))?;
        Ok((Self { jobs }, recovered))
    }

    /// Writes entries. They are on their way when this returns, after all that were before them, and
    /// durable when what it returns is awaited.
    ///
    /// # Errors
    /// When they are not: the disk is full or read-only, for example.
    pub fn append(
        &self,
        entries: Vec<Entry>,
    ) -> impl Future<Output = Result<(), JournalError>> + Send + use<> {
        let (done, result) = oneshot::channel();
        let sent = self.jobs.send(Job { entries, done: Some(done) }).map_err(|_| JournalError::ThreadEnded);
        async move {
            sent?;
            result.await.map_err(|_| JournalError::ThreadEnded)?
        }
    }

    /// Writes what nobody waits for. It is in the file soon, and durable together with the next entries
    /// that somebody waits for, who also hears of it when it could not be written: after a failure the file
    /// is written anew.
    pub fn tell(&self, entry: Entry) {
        // Without the thread, the next that is waited for tells so.
        let _ = self.jobs.send(Job { entries: vec![entry], done: None });
    }
}

/// A worker that a killed daemon was just starting has the lock for the moment until it is another
/// program.
fn lock_patiently(lock: &File) -> Result<(), fs::TryLockError> {
    const PATIENCE: Duration = Duration::from_secs(2);
    const INTERVAL: Duration = Duration::from_millis(20);
    let deadline = Instant::now() + PATIENCE;
    loop {
        match lock.try_lock() {
            Err(fs::TryLockError::WouldBlock) if Instant::now() < deadline => std::thread::sleep(INTERVAL),
            result => return result,
        }
    }
}

struct Writer {
    /// The directory, held: whatever is mounted over it or put in its place, the journal stays where it is.
    folder: File,
    /// Where the journal is; for people.
    path: PathBuf,
    file: Option<File>,
    /// Where the next line goes.
    size: u64,
    /// Where the empty lines end.
    filled: u64,
    /// Whether more of them are put there when these run out.
    fills_ahead: bool,
    /// From which size on it is written anew.
    compact_above: u64,
    /// A damaged file's bytes, until they are in a file of their own.
    aside: Option<Vec<u8>>,
    boot: BootId,
    next_lease: u64,
    leases: BTreeMap<LeaseId, Lease>,
    unopened: BTreeMap<LeaseId, PathBuf>,
    /// Held for as long as the daemon lives.
    _lock: File,
}

impl Writer {
    /// The next job. While the file cannot be written it is tried again meanwhile, so that what is only in
    /// memory is durable as soon as the disk takes it.
    fn next(&mut self, queue: &mpsc::Receiver<Job>) -> Option<Job> {
        const INTERVAL: Duration = Duration::from_secs(2);
        while self.file.is_none() {
            match queue.recv_timeout(INTERVAL) {
                Ok(job) => return Some(job),
                Err(mpsc::RecvTimeoutError::Disconnected) => return None,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    if self.rewrite().is_ok() {
                        tracing::info!("the journal can be written again, and nothing is missing in it");
                    }
                }
            }
        }
        match queue.try_recv() {
            Ok(job) => return Some(job),
            Err(mpsc::TryRecvError::Disconnected) => return None,
            // Nobody waits.
            Err(mpsc::TryRecvError::Empty) => self.fill_ahead(),
        }
        queue.recv().ok()
    }

    /// Makes sure that there is enough to write over. Without it, a write takes longer, and that is all.
    fn fill_ahead(&mut self) {
        let is_due = self.fills_ahead && self.filled < self.size + AHEAD_LEAST;
        let Some(file) = self.file.as_ref().filter(|_| is_due) else { return };
        let end = self.size + AHEAD;
        if let Err(error) = fill(file, self.filled, end) {
            tracing::debug!("no room is made ahead in the journal until it is written anew: {error}");
            self.fills_ahead = false;
            // On a full disk the room is worth more elsewhere. What stays of it does no harm.
            let _ = file.set_len(self.filled);
            return;
        }
        // The kernel tells once of what could not be written, and that may be lines that nobody waited for.
        match file.sync_data() {
            Ok(()) => self.filled = end,
            Err(error) => {
                tracing::warn!("the journal is written anew: making room ahead in it failed: {error}");
                self.file = None;
            }
        }
    }

    fn append<'a>(
        &mut self,
        entries: impl IntoIterator<Item = &'a Entry>,
        is_awaited: bool,
    ) -> Result<(), JournalError> {
        let mut bytes = Vec::new();
        for entry in entries {
            self.remember(entry);
            write_line(entry, &mut bytes).map_err(|source| self.failed("encoding for", source))?;
        }
        // After a failed write the end of the file is unknown: it is written anew from memory, so
        // that nothing is lost once the disk can take it again.
        let Some(file) = self.file.as_ref().filter(|_| self.size < self.compact_above) else {
            return self.rewrite();
        };
        let sync = |file: &File| if is_awaited { file.sync_data() } else { Ok(()) };
        match file.write_all_at(&bytes, self.size).and_then(|()| sync(file)) {
            Ok(()) => {
                self.size += bytes.len() as u64;
                self.filled = self.filled.max(self.size);
                Ok(())
            }
            Err(source) => {
                self.file = None;
                Err(self.failed("writing", source))
            }
        }
    }

    fn failed(&self, operation: &'static str, source: io::Error) -> JournalError {
        JournalError::File { operation, path: self.path.clone(), source }
    }

    fn remember(&mut self, entry: &Entry) {
        match entry {
            Entry::Opening { lease, cgroup } => {
                self.next_lease = self.next_lease.max(lease.0 + 1);
                self.unopened.insert(*lease, cgroup.clone());
            }
            Entry::Lease { lease } => {
                self.next_lease = self.next_lease.max(lease.id.0 + 1);
                self.unopened.remove(&lease.id);
                self.leases.insert(lease.id, (**lease).clone());
            }
            Entry::Ended { lease } => {
                self.unopened.remove(lease);
                self.leases.remove(lease);
            }
            Entry::Started { .. } | Entry::Planned { .. } | Entry::Stepped { .. } | Entry::Looked { .. } => {}
        }
    }

    /// Writes a new file with only what counts, and puts it in the old one's place.
    fn rewrite(&mut self) -> Result<(), JournalError> {
        self.file = None;
        let mut bytes = Vec::new();
        let started = Entry::Started { boot: self.boot.clone(), next_lease: self.next_lease };
        let unopened = self.unopened.iter();
        let unopened =
            unopened.map(|(lease, cgroup)| Entry::Opening { lease: *lease, cgroup: cgroup.clone() });
        let leases = self.leases.values().map(|lease| Entry::Lease { lease: Box::new(lease.clone()) });
        for entry in std::iter::once(started).chain(unopened).chain(leases) {
            write_line(&entry, &mut bytes).map_err(|source| self.failed("encoding for", source))?;
        }
        if let Some(damaged) = &self.aside {
            let kept = replace(&self.folder, "journal.damaged", damaged);
            kept.map_err(|source| self.failed("keeping the damaged lines of", source))?;
            self.aside = None;
        }
        let written =
            replace(&self.folder, "journal", &bytes).map_err(|source| self.failed("writing", source))?;
        self.file = Some(written);
        self.size = bytes.len() as u64;
        self.filled = self.size;
        self.fills_ahead = true;
        self.compact_above = COMPACT_ABOVE.max(2 * self.size);
        Ok(())
    }
}

/// Writes empty lines from `begin` to `end`.
fn fill(file: &File, begin: u64, end: u64) -> io::Result<()> {
    static EMPTY: [u8; 64 * 1024] = [b'\n'; 64 * 1024];
    let mut at = begin;
    while at < end {
        let part = usize::try_from(end - at).unwrap_or(usize::MAX).min(EMPTY.len());
        file.write_all_at(&EMPTY[..part], at)?;
        at += part as u64;
    }
    Ok(())
}

fn replace(folder: &File, name: &str, bytes: &[u8]) -> io::Result<File> {
    const FRESH: &str = "journal.new";
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let mut file = File::from(openat(folder, FRESH, flags, Mode::RUSR | Mode::WUSR)?);
    file.write_all(bytes)?;
    file.sync_all()?;
    renameat(folder, FRESH, folder, name)?;
    folder.sync_all()?;
    Ok(file)
}

#[cfg(test)]
#[path = "journal_tests.rs"]
mod tests;
