//! Turns of processes at fetching one file.
//!
//! One file of the cache has a byte for each digest, as far as locks are concerned: whoever locks it
//! fetches. The kernel lets go of it when its owner dies, and nothing is left to be swept.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};

use super::digest::Digest;
use super::store::Cache;

/// The turn at fetching one file; ends when it is dropped.
#[derive(Debug)]
pub(super) struct Turn {
    _lock: File,
}

impl Cache {
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
