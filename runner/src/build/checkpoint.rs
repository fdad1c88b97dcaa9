//! Prepared machines in the cache: made once, found again by what they were made of.
//!
//! A checkpoint is the disk of a throwaway machine whose packages are configured, as a qcow2 file under its
//! digest, like all that the cache keeps: it is checked when it is met, and a damaged one is made anew. Its
//! key covers everything that went into it, so that one never has to ask whether it is up to date.
//! Deliberately absent: memory of a running machine. It would be bound to one accelerator and one version of
//! qemu, to save the seconds of a boot.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::AsRawFd as _;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, linkat};
use rustix::io::Errno;

use crate::cache::{Cache, Hasher, Remembered, StoreError};
use crate::debian::{Package, Selection};
use crate::stop::Stop;

use super::image::copy_with_holes;

/// The scripts that make a checkpoint; a change of theirs makes other checkpoints.
const MADE_BY: [&str; 6] = [
    include_str!("guest/init.sh"),
    include_str!("guest/preinst.sh"),
    include_str!("guest/configure.sh"),
    include_str!("guest/prepare.sh"),
    include_str!("guest/cleanup.sh"),
    include_str!("guest/dpkg-maintscript-helper"),
];

/// The key of the machine that these packages make, on a disk of `size` bytes.
#[must_use]
pub fn key(selection: &Selection, kernel: &Package, size: u64, hostname: &str) -> String {
    let mut hasher = Hasher::default();
    let mut add = |text: &str| {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    };
    add(concat!("checkpoint 1 ", env!("CARGO_PKG_VERSION")));
    MADE_BY.iter().for_each(|script| add(script));
    add(&size.to_string());
    add(hostname);
    // In the order of their preinst scripts.
    for package in selection.packages.iter().chain([kernel]) {
        add(&package.file.digest.to_string());
        add(if package.automatic { "automatic" } else { "asked for" });
    }
    add(&selection.image_sources());
    hasher.finish().to_string()
}

/// The checkpoint with this key, if the cache has it whole.
///
/// # Errors
/// The cache fails.
pub fn find(cache: &Cache, key: &str) -> Result<Option<File>, StoreError> {
    let Some(Remembered { digest, size, .. }) = cache.made(key) else {
        return Ok(None);
    };
    match digest.parse() {
        Ok(digest) => cache.get(digest, size),
        Err(_) => Ok(None),
    }
}

/// Puts the file at `path` into the cache as the checkpoint with this key.
///
/// # Errors
/// It cannot be read or the cache fails; or the build is to stop.
pub fn keep(cache: &Cache, key: &str, path: &Path, stop: &Stop) -> Result<(), StoreError> {
    let unreadable = |source| StoreError::Read { path: path.to_owned(), source };
    let mut input = File::open(path).map_err(unreadable)?;
    let mut writer = cache.writer()?;
    let mut hasher = Hasher::default();
    let mut buffer = vec![0; 1 << 20];
    loop {
        stop.check().map_err(|stopped| unreadable(io::Error::other(stopped)))?;
        match input.read(&mut buffer).map_err(unreadable)? {
            0 => break,
            length => {
                hasher.update(&buffer[..length]);
                writer.write(&buffer[..length])?;
            }
        }
    }
    let (digest, size) = (hasher.finish(), writer.size());
    writer.commit(digest, size)?;
    let answer =
        Remembered { digest: digest.to_string(), size, etag: None, last_modified: None, policy: None };
    cache.remember_made(key, &answer)
}

/// Gives an open checkpoint the name `target`, in a directory where the machine may read it: by a link where
/// it can be, else as a copy.
///
/// # Errors
/// When neither works, or the build is to stop.
pub fn place(checkpoint: &File, target: &Path, stop: &Stop) -> io::Result<()> {
    let opened = format!("/proc/self/fd/{}", checkpoint.as_raw_fd());
    match linkat(CWD, opened, CWD, target, AtFlags::SYMLINK_FOLLOW) {
        Ok(()) => Ok(()),
        // Another file system; or one without links; or the cache has just thrown it away.
        Err(Errno::XDEV | Errno::PERM | Errno::OPNOTSUPP | Errno::NOENT | Errno::MLINK) => {
            let go_on = || stop.check().map_err(io::Error::other);
            copy_with_holes(checkpoint, &File::create_new(target)?, go_on)
        }
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn neither_keeping_nor_placing_outlasts_the_builds_time() {
        use crate::stop::Stopped;
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(&folder.path().join("cache")).unwrap();
        let disk = folder.path().join("disk.qcow2");
        fs::write(&disk, "a disk").unwrap();
        let late = Stop::default().within(std::time::Duration::ZERO);
        let error = keep(&cache, "k", &disk, &late).unwrap_err();
        assert_eq!(Stopped::cause_of(&error), Some(Stopped::Late), "{error}");
        assert!(find(&cache, "k").unwrap().is_none());
        // No name here can lead there.
        let elsewhere = rustix::fs::memfd_create("disk", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let elsewhere = File::from(elsewhere);
        io::Write::write_all(&mut &elsewhere, b"a disk").unwrap();
        let error = place(&elsewhere, &folder.path().join("x"), &late).unwrap_err();
        assert_eq!(Stopped::cause_of(&error), Some(Stopped::Late), "{error}");
    }

    #[test]
    fn what_was_kept_is_found_and_a_damaged_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(&folder.path().join("cache")).unwrap();
        let disk = folder.path().join("disk.qcow2");
        fs::write(&disk, "a disk").unwrap();
        assert!(find(&cache, "k").unwrap().is_none());
        keep(&cache, "k", &disk, &Stop::default()).unwrap();
        let found = find(&cache, "k").unwrap().unwrap();
        let placed = folder.path().join("base.qcow2");
        place(&found, &placed, &Stop::default()).unwrap();
        assert_eq!(fs::read(&placed).unwrap(), b"a disk");
        assert!(find(&cache, "other").unwrap().is_none());
        // Kernels before 6.13 count change times in ticks of up to 10 ms.
        std::thread::sleep(std::time::Duration::from_millis(30));
        // The link leads to the cache's own file.
        fs::write(&placed, "a desk").unwrap();
        assert!(find(&cache, "k").unwrap().is_none());
    }
}
