//! Where a finished file goes: out of the scratch directory, to whoever asked for it.
//!
//! [`Folder`] is the output directory. Deliberately absent: what a build that root started does
//! instead, which the program's edge knows.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

/// Why a file could not be delivered.
#[derive(Debug, thiserror::Error)]
#[error("could not deliver {}", file.display())]
pub struct DeliveryError {
    /// The file.
    pub file: PathBuf,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// Takes finished files.
pub trait Delivery: Send + Sync {
    /// Takes a finished file out of the scratch directory, into the output directory or the folder of this
    /// name in it. Where people find it from then on.
    ///
    /// # Errors
    /// When it cannot be taken.
    fn deliver(&self, file: &Path, folder: Option<&str>) -> Result<PathBuf, DeliveryError>;
}

/// A directory on the same file system as the scratch directory.
#[derive(Clone, Debug)]
pub struct Folder(pub PathBuf);

impl Delivery for Folder {
    /// Moves it by a rename, after it is on the disk for good.
    fn deliver(&self, file: &Path, folder: Option<&str>) -> Result<PathBuf, DeliveryError> {
        let moved = || -> io::Result<PathBuf> {
            File::open(file)?.sync_all()?;
            let directory = match folder {
                Some(folder) => self.0.join(folder),
                None => self.0.clone(),
            };
            fs::create_dir_all(&directory)?;
            let target = directory.join(file.file_name().unwrap_or_default());
            fs::rename(file, &target)?;
            // The name has to last as well.
            File::open(&directory)?.sync_all()?;
            Ok(target)
        };
        moved().map_err(|source| DeliveryError { file: file.to_owned(), source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_move_under_their_own_names() {
        let from = tempfile::tempdir().unwrap();
        let to = tempfile::tempdir_in(from.path()).unwrap();
        let file = from.path().join("a");
        fs::write(&file, "x").unwrap();
        let output = Folder(to.path().to_owned());
        let moved = output.deliver(&file, None).unwrap();
        assert_eq!(moved, to.path().join("a"));
        assert!(!file.exists());
        assert_eq!(output.deliver(&moved, Some("x.artifacts")).unwrap(), to.path().join("x.artifacts/a"));
    }
}
