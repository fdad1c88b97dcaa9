//! A build's private directory: owned while its lock is held, removed on every way out.
//!
//! It lies in the output directory, so that the finished image moves into place by a rename. A
//! directory whose lock is free has a dead owner, whatever its age: [`sweep`] takes those away when
//! the next build starts. Deliberately absent: process ids, time stamps, and any other guess at
//! whether an owner lives.
//!
//! With a watchdog nothing may be left until then either. The watchdog knows of it a moment after it was
//! made; whoever is killed in that moment has a [`Guard`] that takes the directory away, empty as it is. In a
//! build that root started all of its processes end at once, the guard too: there the next build does it.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread;
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use rustix::io::Errno;

use crate::vm::nonce::nonce;

/// What the names of all scratch directories start with.
const PREFIX: &str = ".hostler-build.";

/// Why there is no scratch directory.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ScratchError {
    /// It could not be made.
    #[error("could not make a scratch directory in {parent}; may this user write there?")]
    Create {
        /// Where.
        parent: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It could not be removed.
    #[error("could not remove the scratch directory {path}; remove it by hand")]
    Remove {
        /// It.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The directory. Dropping it removes it and all that is in it.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    lock: OwnedFd,
    removed: bool,
    guard: Option<Guard>,
}

/// A process that removes an empty directory when its maker dies.
#[derive(Debug)]
struct Guard {
    process: Child,
    /// It reads from this, until a line comes or nobody can write one any more.
    line: Option<ChildStdin>,
}

impl Guard {
    /// Of the directory of that name in `parent`, which need not be there yet. Without a shell there is none,
    /// and the next build's sweep is what is left.
    fn of(parent: &Path, name: &str) -> Option<Self> {
        // Neither what ends a process group nor what looks for a job's environment ends it, nor the watchdog
        // before it has had time.
        let process = Command::new("/bin/sh")
            .args(["-c", "trap '' TERM HUP INT; read -r _ || exec rmdir \"$0\"", name])
            .current_dir(parent)
            .env_clear()
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let mut process = process.ok()?;
        let line = process.stdin.take();
        Some(Self { process, line })
    }

    /// Somebody else removes the directory from now on.
    fn dismiss(mut self) {
        // When it cannot be told, it finds a directory that is not empty, or removes one that is.
        let _ = self.line.as_mut().map(|line| line.write_all(b"\n"));
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        drop(self.line.take());
        let _ = self.process.wait();
    }
}

impl Scratch {
    /// Makes one in `parent`, readable by nobody else.
    ///
    /// # Errors
    /// When `parent` cannot be written to.
    pub fn create(parent: &Path) -> Result<Self, ScratchError> {
        let failed = |source| ScratchError::Create { parent: parent.to_owned(), source };
        for _ in 0..16 {
            let name = nonce().map_err(failed)?;
            let name = format!("{PREFIX}{}", &name[..12]);
            let path = parent.join(&name);
            let guard = Guard::of(parent, &name);
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
                Err(error) => return Err(failed(error)),
            }
            // Another build's sweep may have come between: then this one is gone or going.
            if let Some(lock) = lock(&path).map_err(failed)? {
                return Ok(Self { path, lock, removed: false, guard });
            }
        }
        Err(failed(io::Error::other("every try was swept away by another build")))
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Somebody removes it when this process dies: the watchdog, or the next build.
    pub fn is_known(&mut self) {
        if let Some(guard) = self.guard.take() {
            guard.dismiss();
        }
    }

    /// Removes it, and says when that fails.
    ///
    /// # Errors
    /// When something in it cannot be removed.
    pub fn remove(mut self) -> Result<(), ScratchError> {
        self.removed = true;
        remove_tree(&self.path).map_err(|source| ScratchError::Remove { path: self.path.clone(), source })
    }
}

impl AsFd for Scratch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.lock.as_fd()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.removed {
            // The next build's sweep tries again.
            let _ = remove_tree(&self.path);
        }
    }
}

/// Removes the scratch directories in `parent` whose owners are dead. Their paths.
///
/// # Errors
/// When `parent` cannot be listed, or what is left cannot be removed.
pub fn sweep(parent: &Path) -> Result<Vec<PathBuf>, ScratchError> {
    let unlisted = |source| ScratchError::Create { parent: parent.to_owned(), source };
    let mut swept = Vec::new();
    for entry in fs::read_dir(parent).map_err(unlisted)? {
        let entry = entry.map_err(unlisted)?;
        let path = entry.path();
        let is_ours = entry.file_name().to_str().is_some_and(|name| name.starts_with(PREFIX))
            && entry
                .metadata()
                .is_ok_and(|data| data.is_dir() && data.uid() == rustix::process::geteuid().as_raw());
        if !is_ours {
            continue;
        }
        // Held until it is removed, so that two sweeps do not fight.
        let Ok(Some(_lock)) = lock(&path) else {
            continue;
        };
        remove_tree(&path).map_err(|source| ScratchError::Remove { path: path.clone(), source })?;
        swept.push(path);
    }
    Ok(swept)
}

/// The lock of the directory at `path`, if nobody holds it and it is still the one at that path.
fn lock(path: &Path) -> io::Result<Option<OwnedFd>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let directory = match open(path, flags, Mode::empty()) {
        Ok(directory) => directory,
        Err(Errno::NOENT) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Ok(None),
        Err(error) => return Err(error.into()),
    }
    let directory = File::from(directory);
    let locked = directory.metadata()?;
    let same = fs::symlink_metadata(path)
        .is_ok_and(|named| named.dev() == locked.dev() && named.ino() == locked.ino());
    Ok(same.then(|| directory.into()))
}

/// Removes a tree, without following links. An image's tree has folders that even their owner may
/// not write to.
fn remove_tree(path: &Path) -> io::Result<()> {
    let mut tries = 0;
    loop {
        match remove_once(path) {
            // A thread of a build that was given up may still be writing; without the folders it
            // fails soon.
            Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty && tries < 20 => {
                tries += 1;
                thread::sleep(Duration::from_millis(50));
            }
            result => return result,
        }
    }
}

fn remove_once(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            unseal(path)?;
            fs::remove_dir_all(path)
        }
        Err(error) => Err(error),
    }
}

fn unseal(folder: &Path) -> io::Result<()> {
    fs::set_permissions(folder, fs::Permissions::from_mode(0o700))?;
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            unseal(&entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entries(folder: &Path) -> usize {
        fs::read_dir(folder).unwrap().count()
    }

    #[test]
    fn it_is_private_and_goes_with_its_owner() {
        let parent = tempfile::tempdir().unwrap();
        let scratch = Scratch::create(parent.path()).unwrap();
        let mode = fs::metadata(scratch.path()).unwrap().mode();
        assert_eq!(mode & 0o777, 0o700);
        fs::create_dir(scratch.path().join("tree")).unwrap();
        fs::write(scratch.path().join("tree/file"), "x").unwrap();
        drop(scratch);
        assert_eq!(entries(parent.path()), 0);
    }

    #[test]
    fn a_dead_owners_directory_is_swept_and_a_living_owners_is_not() {
        let parent = tempfile::tempdir().unwrap();
        let living = Scratch::create(parent.path()).unwrap();
        let dead = parent.path().join(format!("{PREFIX}dead"));
        fs::create_dir_all(dead.join("sealed/inner")).unwrap();
        fs::set_permissions(dead.join("sealed"), fs::Permissions::from_mode(0o500)).unwrap();
        fs::create_dir(parent.path().join("someone-elses")).unwrap();
        assert_eq!(sweep(parent.path()).unwrap(), [dead]);
        assert!(living.path().exists());
        assert_eq!(entries(parent.path()), 2);
    }

    #[test]
    fn whoever_dies_before_it_is_known_leaves_no_empty_directory() {
        let parent = tempfile::tempdir().unwrap();
        let guarded = |name: &str| {
            let guard = Guard::of(parent.path(), name).expect("a shell");
            fs::create_dir(parent.path().join(name)).unwrap();
            guard
        };
        // All that a dead process can do: its ends of pipes are closed.
        drop(guarded("empty"));
        let used = guarded("used");
        fs::write(parent.path().join("used/file"), "x").unwrap();
        drop(used);
        guarded("known").dismiss();
        assert!(!parent.path().join("empty").exists());
        assert!(parent.path().join("used/file").exists());
        assert!(parent.path().join("known").exists());
    }

    #[test]
    fn a_link_with_such_a_name_is_left_alone() {
        let parent = tempfile::tempdir().unwrap();
        let precious = tempfile::tempdir().unwrap();
        let link = parent.path().join(format!("{PREFIX}link"));
        std::os::unix::fs::symlink(precious.path(), &link).unwrap();
        assert!(sweep(parent.path()).unwrap().is_empty());
        assert!(precious.path().exists());
    }
}
