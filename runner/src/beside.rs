//! The folder of a recipe, and what lies in it.
//!
//! What a recipe names in its folder is found below the folder's descriptor, and no link leads out of it.
//! Deliberately absent: paths that a recipe may give openly, such as that of an installation medium.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;

/// Why something beside a recipe cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("cannot open {}, which the recipe names{}", path.display(), advice(source))]
pub struct BesideError {
    /// It.
    pub path: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

fn advice(error: &io::Error) -> String {
    match error.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::XDEV) => ": it is, or lies behind, a link that leaves the recipe's folder".to_owned(),
        Some(Errno::ACCESS) => {
            let user = rustix::process::geteuid().as_raw();
            format!(": user {user}, who builds, may not read it")
        }
        _ => String::new(),
    }
}

/// A recipe's folder, opened.
#[derive(Clone, Debug)]
pub struct Beside {
    directory: Arc<OwnedFd>,
    shown: PathBuf,
}

impl Beside {
    /// Opens the folder that the recipe at `recipe` lies in.
    ///
    /// # Errors
    /// When that cannot be opened.
    pub fn of(recipe: &Path) -> Result<Self, BesideError> {
        let folder = match recipe.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder,
            _ => Path::new("."),
        };
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(folder, flags, Mode::empty());
        let failed = |error: Errno| BesideError { path: folder.to_owned(), source: error.into() };
        Ok(Self::new(directory.map_err(failed)?, folder.to_owned()))
    }

    /// A folder that somebody else has opened; `shown` is its path for people.
    #[must_use]
    pub fn new(directory: OwnedFd, shown: PathBuf) -> Self {
        Self { directory: Arc::new(directory), shown }
    }

    /// The descriptor.
    #[must_use]
    pub fn descriptor(&self) -> &OwnedFd {
        &self.directory
    }

    /// How people find `path`.
    #[must_use]
    pub fn shown(&self, path: &Path) -> PathBuf {
        if self.shown == Path::new(".") { path.to_owned() } else { self.shown.join(path) }
    }

    /// Opens the plain file `path` in it.
    ///
    /// # Errors
    /// When it is not there, no plain file, behind a link that leads out, or not to be read.
    pub fn file(&self, path: &Path) -> Result<File, BesideError> {
        let file = File::from(self.open(path, OFlags::RDONLY | OFlags::NONBLOCK)?);
        match file.metadata() {
            Ok(data) if data.is_file() => Ok(file),
            Ok(_) => Err(self.failed(path, io::Error::other("it is not a plain file"))),
            Err(error) => Err(self.failed(path, error)),
        }
    }

    /// Opens the folder `path` in it.
    ///
    /// # Errors
    /// As for a file.
    pub fn folder(&self, path: &Path) -> Result<Folder, BesideError> {
        Ok(Folder(self.open(path, OFlags::RDONLY | OFlags::DIRECTORY)?))
    }

    /// The folder `path` in it, or anywhere if it is written in full, with what lies in that.
    ///
    /// # Errors
    /// As for a file.
    pub fn below(&self, path: &Path) -> Result<Self, BesideError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        if path.is_absolute() {
            let directory = rustix::fs::open(path, flags, Mode::empty());
            let failed = |error: Errno| BesideError { path: path.to_owned(), source: error.into() };
            return Ok(Self::new(directory.map_err(failed)?, path.to_owned()));
        }
        Ok(Self::new(self.open(path, flags)?, self.shown(path)))
    }

    fn open(&self, path: &Path, flags: OFlags) -> Result<OwnedFd, BesideError> {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
        openat2(self.directory.as_fd(), path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
            .map_err(|error| self.failed(path, error.into()))
    }

    fn failed(&self, path: &Path, source: io::Error) -> BesideError {
        BesideError { path: self.shown(path), source }
    }
}

/// Opens a plain file, wherever it lies: a pipe would be waited for.
///
/// # Errors
/// When it is not there, none, or not to be read.
pub fn plain_file(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("it is not a plain file")),
    }
}

/// An open folder.
#[derive(Debug)]
pub struct Folder(OwnedFd);

impl Folder {
    /// A path that leads to it as long as this lives.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd()))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn what_lies_in_the_folder_is_opened_and_no_link_leads_out() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("secret"), "x").unwrap();
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("work")).unwrap();
        fs::write(folder.path().join("work/file"), "x").unwrap();
        symlink("work/file", folder.path().join("inside")).unwrap();
        symlink(outside.path(), folder.path().join("out")).unwrap();
        let beside = Beside::of(&folder.path().join("recipe.toml")).unwrap();
        assert!(beside.file(Path::new("work/file")).is_ok());
        assert!(beside.file(Path::new("inside")).is_ok());
        assert!(beside.folder(Path::new("work")).unwrap().path().join("file").exists());
        for path in ["out/secret", "work"] {
            assert!(beside.file(Path::new(path)).is_err(), "{path}");
        }
        let error = beside.file(Path::new("out/secret")).unwrap_err().to_string();
        assert!(error.contains("a link that leaves the recipe's folder"), "{error}");
        assert!(beside.folder(Path::new("out")).is_err());
        assert!(beside.folder(Path::new("missing")).is_err());
        let below = beside.below(Path::new("work")).unwrap();
        assert!(below.file(Path::new("file")).is_ok());
        assert!(below.file(Path::new("../inside")).is_err());
        assert!(beside.below(Path::new("out")).is_err());
        assert!(beside.below(outside.path()).unwrap().file(Path::new("secret")).is_ok());
    }
}
