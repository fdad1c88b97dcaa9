//! What goes into a throwaway machine: a tar archive on a disk of its own.
//!
//! What comes out of it is in `artifacts`, the guest's side in `guest/`.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write as _};
use std::path::{Path, PathBuf};

use crate::stop::{Stop, Stopped};

/// Why files could not be moved in or out.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WorkspaceError {
    /// The workspace could not be read.
    #[error("could not read {} for the guest; may this user read it?", path.display())]
    Read {
        /// What.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Something in the workspace is neither file, folder nor link.
    #[error("{} is a device, socket or pipe: keep it out of the workspace", path.display())]
    Special {
        /// What.
        path: PathBuf,
    },
    /// A file of the scratch directory could not be written.
    #[error("could not write {}; is the disk full?", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// What the guest handed over is no archive, or is cut off.
    #[error(
        "the archive with the guest's files is damaged; is image.size too small for what its commands leave?"
    )]
    Archive(#[source] io::Error),
    /// A file is missing.
    #[error("the guest handed over no file {name}")]
    Missing {
        /// Its name.
        name: String,
    },
    /// A file is too large.
    #[error("the guest's file {name} has more than 1 TiB")]
    TooLarge {
        /// Its name.
        name: String,
    },
    /// Nobody wants it any more.
    #[error("moving the files was given up")]
    Stopped(#[source] Stopped),
}

/// Packs `folder` into the archive `target`. The same files make the same archive: owners, times and the
/// order in which a directory happens to be listed are left out. `shown` is the folder's name for people.
///
/// # Errors
/// See [`WorkspaceError`].
pub fn pack(folder: &Path, shown: &Path, target: &Path, stop: &Stop) -> Result<(), WorkspaceError> {
    let unwritable = |source| WorkspaceError::Write { path: target.to_owned(), source };
    let output = File::create(target).map_err(unwritable)?;
    let mut builder = tar::Builder::new(BufWriter::with_capacity(1 << 20, output));
    builder.mode(tar::HeaderMode::Deterministic);
    builder.follow_symlinks(false);
    builder.sparse(false);
    add_folder(&mut builder, folder, shown, Path::new(""), stop)?;
    builder.into_inner().and_then(|mut output| output.flush()).map_err(unwritable)
}

fn add_folder<W: io::Write>(
    builder: &mut tar::Builder<W>,
    folder: &Path,
    shown: &Path,
    inside: &Path,
    stop: &Stop,
) -> Result<(), WorkspaceError> {
    let failed = |inside: &Path| {
        let path = shown.join(inside);
        move |source| WorkspaceError::Read { path, source }
    };
    let entries = fs::read_dir(folder.join(inside)).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    let mut entries = entries.map_err(failed(inside))?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        stop.check().map_err(WorkspaceError::Stopped)?;
        let inside = inside.join(entry.file_name());
        let kind = entry.file_type().map_err(failed(&inside))?;
        if !(kind.is_file() || kind.is_dir() || kind.is_symlink()) {
            return Err(WorkspaceError::Special { path: shown.join(inside) });
        }
        if kind.is_file() {
            add_file(builder, &entry.path(), &inside, stop).map_err(failed(&inside))?;
        } else {
            builder.append_path_with_name(entry.path(), &inside).map_err(failed(&inside))?;
        }
        if kind.is_dir() {
            add_folder(builder, folder, shown, &inside, stop)?;
        }
    }
    Ok(())
}

fn add_file<W: io::Write>(
    builder: &mut tar::Builder<W>,
    path: &Path,
    inside: &Path,
    stop: &Stop,
) -> io::Result<()> {
    let file = File::open(path)?;
    let data = file.metadata()?;
    let mut header = tar::Header::new_gnu();
    header.set_metadata_in_mode(&data, tar::HeaderMode::Deterministic);
    // Whoever changes it now is not to move what follows it in the archive.
    let mut contents = stop.reading(file).take(data.len());
    builder.append_data(&mut header, inside, &mut contents)?;
    match contents.limit() {
        0 => Ok(()),
        _ => Err(io::Error::other("it became shorter while it was read")),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use super::*;

    #[test]
    fn packing_a_large_file_does_not_outlast_the_builds_time() {
        // Zeros that take seconds, in one file.
        const LARGE: u64 = 6 << 30;
        let folder = tempfile::tempdir().unwrap();
        let work = folder.path().join("work");
        fs::create_dir(&work).unwrap();
        File::create(work.join("large")).unwrap().set_len(LARGE).unwrap();
        let target = folder.path().join("packed");
        let when = std::time::Instant::now() + std::time::Duration::from_millis(50);
        let stop = Stop::default().at(when);
        let error = pack(&work, Path::new("work"), &target, &stop).unwrap_err();
        assert_eq!(Stopped::cause_of(&error), Some(Stopped::Late), "{error}");
        assert!(when.elapsed() < std::time::Duration::from_secs(1), "{:?}", when.elapsed());
    }

    #[test]
    fn a_workspace_makes_the_same_archive_whenever_it_is_packed() {
        let folder = tempfile::tempdir().unwrap();
        let work = folder.path().join("work");
        fs::create_dir_all(work.join("sub")).unwrap();
        fs::write(work.join("sub/run.sh"), "true").unwrap();
        fs::set_permissions(work.join("sub/run.sh"), fs::Permissions::from_mode(0o755)).unwrap();
        symlink("/etc/passwd", work.join("link")).unwrap();
        let (one, two) = (folder.path().join("1"), folder.path().join("2"));
        pack(&work, Path::new("work"), &one, &Stop::default()).unwrap();
        File::open(work.join("sub/run.sh")).unwrap().set_modified(std::time::SystemTime::now()).unwrap();
        pack(&work, Path::new("work"), &two, &Stop::default()).unwrap();
        let bytes = fs::read(&one).unwrap();
        assert_eq!(bytes, fs::read(&two).unwrap());
        let mut archive = tar::Archive::new(bytes.as_slice());
        let entries: Vec<(String, u32)> = archive
            .entries()
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let mode = entry.header().mode().unwrap();
                (entry.path().unwrap().display().to_string(), mode & 0o111)
            })
            .collect();
        assert_eq!(
            entries.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(),
            ["link", "sub", "sub/run.sh"]
        );
        assert_eq!(entries[2].1, 0o111);
        // The link is one in the archive too: nothing outside of the folder goes along.
        assert!(!String::from_utf8_lossy(&bytes).contains("root:x:0:0"));
    }

    #[test]
    fn a_device_in_a_workspace_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let _socket = std::os::unix::net::UnixListener::bind(folder.path().join("socket")).unwrap();
        let target = tempfile::tempdir().unwrap();
        let error =
            pack(folder.path(), Path::new("work"), &target.path().join("x"), &Stop::default()).unwrap_err();
        assert!(error.to_string().starts_with("work/socket is a device"), "{error}");
    }
}
