//! A FUSE file system that this process serves, and that does not answer, or no more.
//!
//! Only what the kernel asks for to walk in it and to open a directory is answered: the protocol of
//! `linux/fuse.h`, of which the sizes and numbers below are.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::failure::OrFail;

/// `struct fuse_in_header`.
const IN_HEADER: usize = 40;
/// `FUSE_FORGET`, `FUSE_BATCH_FORGET`, `FUSE_INTERRUPT`: nobody waits for an answer to these. And
/// `FUSE_FLUSH`: whoever closes a file does.
const UNANSWERED: [u32; 4] = [2, 42, 36, 25];
/// The node of the only file.
const FILE: u64 = 3;

/// The file system. It goes, and whoever waits for it with it, when this is dropped.
#[derive(Debug)]
pub struct Fuse {
    point: PathBuf,
    server: File,
    is_silent: Arc<AtomicBool>,
}

impl Fuse {
    /// Mounts one that never answers anything.
    ///
    /// # Panics
    /// When it cannot be mounted.
    #[must_use]
    pub fn silent(point: &Path) -> Self {
        Self::mounted(point, 0, "test")
    }

    /// Mounts one for a user, as the set-user-ID program does that users have for it.
    ///
    /// # Panics
    /// When it cannot be mounted.
    #[must_use]
    pub fn of_user(point: &Path, user: u32) -> Self {
        Self::mounted(point, user, "test")
    }

    /// The same, and calls itself what it likes.
    ///
    /// # Panics
    /// When it cannot be mounted.
    #[must_use]
    pub fn named(point: &Path, user: u32, source: &str) -> Self {
        Self::mounted(point, user, source)
    }

    fn mounted(point: &Path, user: u32, source: &str) -> Self {
        let server = File::options().read(true).write(true).open("/dev/fuse").or_fail("opening /dev/fuse");
        let options = format!("fd={},rootmode=40000,user_id={user},group_id={user}", server.as_raw_fd());
        mount(Some(source), point, Some("fuse"), MsFlags::empty(), Some(options.as_str()))
            .or_fail("mounting a FUSE file system");
        Self { point: point.to_owned(), server, is_silent: Arc::new(AtomicBool::new(true)) }
    }

    /// Mounts one in which every name is a directory, but for `file`, which is one that can be opened, and
    /// whose closing hangs.
    ///
    /// # Panics
    /// When it cannot be mounted.
    #[must_use]
    pub fn answering(point: &Path) -> Self {
        let fuse = Self::silent(point);
        fuse.is_silent.store(false, Ordering::SeqCst);
        let mut server = fuse.server.try_clone().or_fail("another handle of /dev/fuse");
        let is_silent = Arc::clone(&fuse.is_silent);
        std::thread::spawn(move || {
            let mut buffer = vec![0u8; 256 * 1024];
            // It ends with the mount, or with the first request that it leaves unanswered.
            while let Ok(length) = server.read(&mut buffer) {
                if is_silent.load(Ordering::SeqCst) {
                    return;
                }
                if let Some(answer) = answer(&buffer[..length]) {
                    // The asker may have gone.
                    let _ = server.write_all(&answer);
                }
            }
        });
        fuse
    }

    /// Ends it for all who wait for it.
    pub fn abort(&self) {
        // Gone already is as good.
        let _ = umount2(&self.point, MntFlags::MNT_FORCE | MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    }

    /// From now on it answers no more.
    pub fn fall_silent(&self) {
        self.is_silent.store(true, Ordering::SeqCst);
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        // Gone already is as good. Lazily, since somebody may wait in it; the connection ends with the
        // last of its mounts and handles.
        let _ = umount2(&self.point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    }
}

/// `struct fuse_attr` of a directory of root's, or of the file.
fn attributes(node: u64) -> Vec<u8> {
    let mode: u32 = if node == FILE { 0o100_644 } else { 0o40_755 };
    let mut attributes = vec![0u8; 88];
    attributes[..8].copy_from_slice(&node.to_ne_bytes());
    attributes[60..64].copy_from_slice(&mode.to_ne_bytes());
    attributes[64..68].copy_from_slice(&2u32.to_ne_bytes());
    attributes
}

fn answer(request: &[u8]) -> Option<Vec<u8>> {
    let word = |at: usize| u32::from_ne_bytes(request[at..at + 4].try_into().unwrap_or_default());
    let operation = word(4);
    if request.len() < IN_HEADER || UNANSWERED.contains(&operation) {
        return None;
    }
    let body = match operation {
        // FUSE_INIT: the version, and the rest of `struct fuse_init_out` as small as can be.
        26 => {
            let mut body = vec![0u8; 64];
            body[..4].copy_from_slice(&7u32.to_ne_bytes());
            body[4..8].copy_from_slice(&31u32.to_ne_bytes());
            body[20..24].copy_from_slice(&4096u32.to_ne_bytes());
            Some(body)
        }
        // FUSE_GETATTR: `struct fuse_attr_out`. It is valid for no time, so it is asked for each time.
        3 => Some([vec![0u8; 16], attributes(u64::from(word(16)))].concat()),
        // FUSE_LOOKUP: `struct fuse_entry_out`. Every other name is that of one and the same directory.
        1 => {
            let node = if request.get(IN_HEADER..) == Some(b"file\0") { FILE } else { 2 };
            Some([node.to_ne_bytes().to_vec(), vec![0u8; 32], attributes(node)].concat())
        }
        // FUSE_OPEN, FUSE_OPENDIR, FUSE_RELEASE, FUSE_RELEASEDIR, FUSE_STATFS.
        14 | 27 => Some(vec![0u8; 16]),
        18 | 29 => Some(Vec::new()),
        17 => Some(vec![0u8; 80]),
        _ => None,
    };
    let error = if body.is_some() { 0i32 } else { -nix::libc::ENOSYS };
    let body = body.unwrap_or_default();
    let length = u32::try_from(16 + body.len()).unwrap_or(u32::MAX);
    let mut reply = Vec::with_capacity(16 + body.len());
    reply.extend(length.to_ne_bytes());
    reply.extend(error.to_ne_bytes());
    // The request's own number.
    reply.extend(&request[8..16]);
    reply.extend(body);
    Some(reply)
}
