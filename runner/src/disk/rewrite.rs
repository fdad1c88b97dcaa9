//! Writes the disk of a finished image anew, out of an archive of its root file system.
//!
//! What a guest does to a file system depends on when it does it, and what it deletes leaves its traces. A file
//! system that is written here depends on nothing but its files and one time. What lies before the partition, the
//! boot loader, is copied; it finds its files by the file system's UUID, which stays.
//!
//! The archive is a guest's word: paths are admitted by a [`super::Layout`], like those of packages.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::Path;

use crate::stop::Stop;

use super::compose::ComposedDisk;
use super::filesystem::{self, FilesystemError, Sources};
use super::layout::Admitted;
use super::tree::{Tree, TreeError};
use super::unpack::{UnpackError, describe};

/// What tar calls an extended attribute in its headers.
const ATTRIBUTE: &str = "SCHILY.xattr.";
/// The longest value of one; ext4 has no more room in an inode's own block.
const LONGEST_VALUE: usize = 4096;

/// Why a disk cannot be written anew.
#[derive(Debug, thiserror::Error)]
pub enum RewriteError {
    /// The archive cannot be read.
    #[error("cannot read the archive of the root file system, which the guest wrote")]
    Archive(#[source] io::Error),
    /// An entry of the archive cannot be part of such a disk.
    #[error("cannot write the image's disk anew, as SOURCE_DATE_EPOCH asks for: build it without")]
    Entry(#[from] UnpackError),
    /// A file of the tree cannot be written.
    #[error("cannot write the file tree")]
    Tree(#[from] TreeError),
    /// There is no file system.
    #[error(transparent)]
    Filesystem(#[from] FilesystemError),
    /// The disk cannot be written.
    #[error("cannot write the disk; is its own disk full?")]
    Write(#[source] io::Error),
}

/// Puts a new disk in the place of `disk`'s, with what is in the tar archive `root`, as if all had happened at
/// `time`, in seconds since 1970. Files for that are left in `scratch`.
///
/// # Errors
/// See [`RewriteError`].
pub fn rewrite(
    disk: &ComposedDisk,
    root: &Path,
    time: u64,
    scratch: &Path,
    stop: &Stop,
) -> Result<(), RewriteError> {
    let tree = Tree::plain(scratch.join("rewritten"))?;
    let mut attributes = Vec::new();
    let mut archive = tar::Archive::new(stop.reading(File::open(root).map_err(RewriteError::Archive)?));
    for entry in archive.entries().map_err(RewriteError::Archive)? {
        stop.check().map_err(UnpackError::Stopped)?;
        let mut entry = entry.map_err(RewriteError::Archive)?;
        let described = describe(&entry)?;
        let mut named = Vec::new();
        for field in entry.pax_extensions().map_err(RewriteError::Archive)?.into_iter().flatten() {
            let field = field.map_err(RewriteError::Archive)?;
            let name = field.key().ok().and_then(|key| key.strip_prefix(ATTRIBUTE));
            named.extend(name.map(|name| (name.to_owned(), field.value_bytes().to_owned())));
        }
        let add =
            tree.add(&described.path, &described.kind, described.attributes, 1, |_, _| false, &mut entry);
        let added = add.map_err(|source| UnpackError::Tree { path: described.path.clone(), source })?;
        let Admitted::Make(place) = added else { continue };
        for (name, value) in named {
            let is_sound = name.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"');
            if !is_sound || value.len() > LONGEST_VALUE {
                return Err(UnpackError::Special { path: described.path }.into());
            }
            attributes.push((place.clone(), name, value));
        }
    }
    tree.settle()?;
    let partition = disk.partition;
    let old = File::open(&disk.image).map_err(RewriteError::Write)?;
    let size = old.metadata().map_err(RewriteError::Write)?.len();
    let image = scratch.join("rewritten.raw");
    let start = || -> io::Result<()> {
        let mut new = File::create_new(&image)?;
        new.set_len(size)?;
        io::copy(&mut old.take(partition.offset), &mut new)?;
        new.flush()
    };
    start().map_err(RewriteError::Write)?;
    let layout = tree.layout();
    let sources = Sources { tree: tree.root(), layout: &layout, attributes: &attributes, time: Some(time) };
    filesystem::make((&image, partition), &disk.root_uuid, sources, scratch, stop)?;
    fs::rename(&image, &disk.image).map_err(RewriteError::Write)?;
    // Hundreds of MB that later stages need the room of.
    fs::remove_dir_all(tree.root()).map_err(RewriteError::Write)
}
