//! The file tree of an image as it lies on the host, waiting to become a file system.
//!
//! A private directory of the building user. Files here belong to that user and have no setuid bits;
//! who they belong to in the image is in the [`Layout`]. Several threads add entries.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, CWD, Timespec, Timestamps, utimensat};

use super::layout::{Admitted, Attributes, Kind, Layout, MERGED, Node, Refusal};

/// Owner number of entries that no package owns; packages count from 1.
pub const BUILDER: usize = 0;

/// Why the tree cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// An entry is refused.
    #[error("the entry is refused")]
    Refused(#[from] Refusal),
    /// A file cannot be written.
    #[error("cannot write {}: check the space and inodes of its disk", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The source of a file's contents fails.
    #[error("cannot read the contents of {path}")]
    Contents {
        /// The path in the image.
        path: String,
        /// What the reader said.
        #[source]
        source: io::Error,
    },
}

/// The tree.
pub struct Tree {
    root: PathBuf,
    layout: Mutex<Layout>,
}

impl Tree {
    /// Makes an empty tree at `root`, which must not exist, with the links of a merged `/usr`.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn create(root: PathBuf, modified: u64) -> Result<Self, TreeError> {
        let failed = |path: &Path, source| TreeError::Write { path: path.to_owned(), source };
        fs::create_dir(&root).map_err(|source| failed(&root, source))?;
        // Numeric on purpose: it also clears a setgid bit that the parent may have handed down.
        fs::set_permissions(&root, fs::Permissions::from_mode(0o700))
            .map_err(|source| failed(&root, source))?;
        let tree = Self { root, layout: Mutex::default() };
        let directory = Attributes { uid: 0, gid: 0, mode: 0o755, modified };
        tree.directory("", directory)?;
        tree.directory("usr", directory)?;
        for name in MERGED {
            tree.directory(&format!("usr/{name}"), directory)?;
            tree.link(name, &format!("usr/{name}"), directory)?;
        }
        Ok(tree)
    }

    /// Makes an empty tree at `root`, which must not exist, for a system that has its own links.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn plain(root: PathBuf) -> Result<Self, TreeError> {
        let failed = |source| TreeError::Write { path: root.clone(), source };
        fs::create_dir(&root).map_err(failed)?;
        fs::set_permissions(&root, fs::Permissions::from_mode(0o700)).map_err(failed)?;
        Ok(Self { root, layout: Mutex::new(Layout::plain()) })
    }

    /// Where it lies.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The layout so far.
    pub fn layout(&self) -> MutexGuard<'_, Layout> {
        match self.layout.lock() {
            Ok(layout) => layout,
            // A thread that panics between two entries leaves a layout that is whole.
            Err(poisoned) => poisoned.into_inner(),
        }
    }

    /// Adds an entry of package number `owner`; contents are read from `contents`.
    ///
    /// # Errors
    /// It is refused, or cannot be written.
    pub fn add(
        &self,
        path: &str,
        kind: &Kind,
        attributes: Attributes,
        owner: usize,
        replaces: impl Fn(usize, usize) -> bool,
        contents: &mut dyn Read,
    ) -> Result<Admitted, TreeError> {
        let mut layout = self.layout();
        let admitted = layout.admit(path, kind.clone(), attributes, owner, replaces)?;
        let Admitted::Make(place) = &admitted else {
            return Ok(admitted);
        };
        // A directory must be there before another thread is told that it is.
        if let Kind::File = kind {
            drop(layout);
        }
        self.make(place, kind, attributes, contents)?;
        Ok(admitted)
    }

    /// Makes an entry that was to be made later, unless another package's counts. For the time after all threads
    /// are done.
    ///
    /// # Errors
    /// It is refused, or cannot be written.
    pub fn take_over(
        &self,
        path: &str,
        node: Node,
        replaces: impl Fn(usize, usize) -> bool,
        contents: &mut dyn Read,
    ) -> Result<bool, TreeError> {
        let attributes = node.attributes;
        let mut layout = self.layout();
        let Some(place) = layout.take_over(path, node, replaces)? else { return Ok(false) };
        let kind = layout.get(&place).map_or(Kind::File, |node| node.kind.clone());
        drop(layout);
        self.make_instead(&place, &kind, attributes, contents)?;
        Ok(true)
    }

    fn make_instead(
        &self,
        place: &str,
        kind: &Kind,
        attributes: Attributes,
        contents: &mut dyn Read,
    ) -> Result<(), TreeError> {
        let full = self.root.join(place);
        match fs::remove_file(&full) {
            Err(source) if source.kind() != io::ErrorKind::NotFound => {
                return Err(TreeError::Write { path: full, source });
            }
            _ => {}
        }
        self.make(place, kind, attributes, contents)
    }

    /// Adds a directory of the builder's own; one that is there stays.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn directory(&self, path: &str, attributes: Attributes) -> Result<(), TreeError> {
        let mut nothing = io::empty();
        self.add(path, &Kind::Directory, attributes, BUILDER, |_, _| false, &mut nothing).map(|_| ())
    }

    /// Adds directories of the builder's own down to `path`; those that are there stay.
    ///
    /// # Errors
    /// One cannot be written.
    pub fn directories(&self, path: &str, attributes: Attributes) -> Result<(), TreeError> {
        for (index, _) in path.match_indices('/') {
            self.directory(&path[..index], attributes)?;
        }
        self.directory(path, attributes)
    }

    fn link(&self, path: &str, target: &str, attributes: Attributes) -> Result<(), TreeError> {
        // The way of `admit` would lead the link's own path into /usr.
        let kind = Kind::Symlink(target.to_owned());
        let node =
            Node { kind: kind.clone(), attributes: Attributes { mode: 0o777, ..attributes }, owner: BUILDER };
        self.layout().insert_merged(path, node);
        self.make(path, &kind, attributes, &mut io::empty())
    }

    /// Adds a file of the builder's own, in the place of any that is there.
    ///
    /// # Errors
    /// It is refused, or cannot be written.
    pub fn file(&self, path: &str, bytes: &[u8], attributes: Attributes) -> Result<(), TreeError> {
        let node = Node { kind: Kind::File, attributes, owner: BUILDER };
        let place = self.layout().replace(path, node)?;
        self.make_instead(&place, &Kind::File, attributes, &mut &*bytes)
    }

    fn make(
        &self,
        place: &str,
        kind: &Kind,
        attributes: Attributes,
        contents: &mut dyn Read,
    ) -> Result<(), TreeError> {
        let full = self.root.join(place);
        let failed = |source| TreeError::Write { path: full.clone(), source };
        match kind {
            Kind::Directory if place.is_empty() => {}
            Kind::Directory => fs::create_dir(&full).map_err(failed)?,
            Kind::Symlink(target) => {
                symlink(target, &full).map_err(failed)?;
                set_link_time(&full, attributes.modified).map_err(failed)?;
            }
            Kind::HardLink(target) => fs::hard_link(self.root.join(target), &full).map_err(failed)?,
            Kind::File => {
                let mut file = OpenOptions::new()
                    .write(true)
                    .create_new(true)
                    .mode(0o600)
                    .open(&full)
                    .map_err(failed)?;
                copy(contents, &mut file, place, &full)?;
                // The owner must be able to read it, or no file system can be made of it.
                let mode = mode_on_disk(attributes.mode);
                file.set_permissions(fs::Permissions::from_mode(mode)).map_err(failed)?;
                file.set_modified(time(attributes.modified)).map_err(failed)?;
            }
        }
        Ok(())
    }

    /// Gives directories the times they must have, once nothing is added any more.
    ///
    /// # Errors
    /// A time cannot be set.
    pub fn settle(&self) -> Result<(), TreeError> {
        for (place, node) in self.layout().nodes() {
            if node.kind != Kind::Directory {
                continue;
            }
            let full = self.root.join(place);
            let failed = |source| TreeError::Write { path: full.clone(), source };
            let mode = if place.is_empty() { 0o700 } else { 0o755 };
            fs::set_permissions(&full, fs::Permissions::from_mode(mode)).map_err(failed)?;
            let directory = File::open(&full).map_err(failed)?;
            directory.set_modified(time(node.attributes.modified)).map_err(failed)?;
        }
        Ok(())
    }
}

/// The mode that a file of the image has while it lies on the host.
pub(super) fn mode_on_disk(mode: u32) -> u32 {
    (mode & 0o777) | 0o600
}

fn time(seconds: u64) -> SystemTime {
    // Beyond what the clock can say, any time is as good.
    SystemTime::UNIX_EPOCH
        .checked_add(Duration::from_secs(seconds.min(0xffff_ffff)))
        .unwrap_or(SystemTime::UNIX_EPOCH)
}

fn set_link_time(path: &Path, seconds: u64) -> io::Result<()> {
    let moment = Timespec { tv_sec: i64::try_from(seconds.min(0xffff_ffff)).unwrap_or(0), tv_nsec: 0 };
    let times = Timestamps { last_access: moment, last_modification: moment };
    Ok(utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

fn copy(contents: &mut dyn Read, file: &mut File, place: &str, full: &Path) -> Result<(), TreeError> {
    let mut buffer = [0; 1 << 16];
    loop {
        let count = match contents.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(source) => {
                return Err(TreeError::Contents { path: place.to_owned(), source });
            }
        };
        file.write_all(&buffer[..count])
            .map_err(|source| TreeError::Write { path: full.to_owned(), source })?;
    }
}
