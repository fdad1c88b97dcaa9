//! Turns of processes at fetching one file.
//!
//! One file of the cache has a byte for each digest, as far as locks are concerned: whoever locks it
//! fetches. The kernel lets go of it when its owner dies, and nothing is left to be swept. One that is stopped
//! keeps it, and is told by what it does not do: whoever has a turn changes a byte of that file twice a second.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use tokio::task::JoinHandle;

use super::digest::Digest;
use super::store::Cache;

/// How often a process that has a turn shows that it lives.
const BEAT: Duration = Duration::from_millis(500);
/// How many bytes there are for that. Two files that share one are told from nobody for a little longer.
const PULSES: u64 = 4096;

/// The turn at fetching one file; ends when it is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    _lock: File,
}

/// A turn whose owner shows that it lives.
#[derive(Debug)]
pub(super) struct Held {
    _turn: Turn,
    beating: Option<JoinHandle<()>>,
}

impl Held {
    /// Shows it from now on, in the runtime that this is called in. Where that cannot be done, others fetch
    /// the file as well after a while.
    pub(super) fn new(turn: Turn, pulse: io::Result<Pulse>) -> Self {
        let beating = pulse.ok().map(|pulse| {
            tokio::spawn(async move {
                while pulse.beat().is_ok() {
                    tokio::time::sleep(BEAT).await;
                }
            })
        });
        Self { _turn: turn, beating }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(beating) = &self.beating {
            beating.abort();
        }
    }
}

/// The byte that changes while a file's turn is had by a process that lives.
#[derive(Debug)]
pub(super) struct Pulse {
    file: File,
    place: u64,
}

impl Pulse {
    /// As it is now; `None` where nobody ever had a turn.
    pub(super) fn read(&self) -> Option<u8> {
        let mut byte = [0];
        self.file.read_exact_at(&mut byte, self.place).ok().map(|()| byte[0])
    }

    fn beat(&self) -> io::Result<()> {
        self.file.write_all_at(&[self.read().unwrap_or_default().wrapping_add(1)], self.place)
    }
}

impl Cache {
    /// What tells whether the process that has the turn at a file lives.
    pub(super) fn pulse(&self, digest: Digest) -> io::Result<Pulse> {
        let path = self.root().join("flights");
        let file =
            OpenOptions::new().create(true).truncate(false).read(true).write(true).mode(0o600).open(path)?;
        Ok(Pulse { file, place: digest.number().unsigned_abs() % PULSES })
    }

    /// The turn at fetching the file with `digest`, unless another process has it.
    pub(super) fn turn(&self, digest: Digest) -> io::Result<Option<Turn>> {
        // A lock belongs to the open file: each turn needs one of its own.
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(self.root().join("flights"))?;
        let range = nix::libc::flock {
            l_type: nix::libc::F_WRLCK as i16,
            l_whence: nix::libc::SEEK_SET as i16,
            l_start: digest.number(),
            l_len: 1,
            l_pid: 0,
        };
        match fcntl(&file, FcntlArg::F_OFD_SETLK(&range)) {
            Ok(_) => Ok(Some(Turn { _lock: file })),
            Err(Errno::EAGAIN | Errno::EACCES) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_at_a_time_has_the_turn_at_a_file() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let [one, other] = [(); 2].map(|()| Cache::open(directory.path()).expect("usable"));
        let turn = one.turn(Digest::of(b"a")).expect("lockable").expect("free");
        assert!(other.turn(Digest::of(b"a")).expect("lockable").is_none());
        assert!(one.turn(Digest::of(b"a")).expect("lockable").is_none());
        assert!(other.turn(Digest::of(b"b")).expect("lockable").is_some());
        drop(turn);
        assert!(other.turn(Digest::of(b"a")).expect("lockable").is_some());
    }
}
