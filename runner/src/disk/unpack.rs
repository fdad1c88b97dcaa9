//! Unpacks packages into a tree, several at a time.
//!
//! Reads files out of the cache, which checks them first. Files that two packages have and one
//! replaces are settled after all threads are done, so that their order does not matter. Deliberately
//! absent: running anything. Maintainer scripts are for the guest.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use md5::{Digest as _, Md5};

use crate::cache::{Cache, StoreError};
use crate::debian::deb::{self, Control, DebError};
use crate::debian::{Package, Selection, relation};
use crate::event::{Event, Sink, Stage};
use crate::stop::{Stop, Stopped};

use super::database::{self, Conffile};
use super::later::{Later, Makes};
use super::layout::{Admitted, Attributes, Kind};
use super::tools::ToolsError;
use super::tree::{Tree, TreeError};

/// Why a package cannot be unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The package is damaged.
    #[error(transparent)]
    Deb(#[from] DebError),
    /// Its file is not in the cache.
    #[error("its file is missing from the cache: run the build again to fetch it")]
    NotCached,
    /// The cache fails.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// An entry has no place in the tree.
    #[error("cannot unpack {path:?}")]
    Tree {
        /// The entry.
        path: String,
        /// Why.
        #[source]
        source: TreeError,
    },
    /// An entry is neither file, directory nor link.
    #[error("its entry {path:?} is a device or something else that packages must not have")]
    Special {
        /// The entry.
        path: String,
    },
    /// An entry's name or target cannot be represented.
    #[error("its entry {path:?} has a name or target that is not UTF-8 text, or none")]
    Name {
        /// The entry, as well as it can be shown.
        path: String,
    },
    /// Nobody wants it any more.
    #[error("unpacking was given up")]
    Stopped(#[source] Stopped),
    /// Another package failed first.
    #[error("broken off because another package failed")]
    BrokenOff,
}

/// What else than its files a package brought.
#[derive(Clone, Debug, Default)]
pub struct Unpacked {
    /// Its control archive.
    pub control: Control,
    /// Its paths in order, as the package has them.
    pub paths: Vec<String>,
    /// Its conffiles with their digests.
    pub conffiles: Vec<Conffile>,
}

/// A package that failed, and why.
#[derive(Debug)]
pub struct Failed {
    /// Its name.
    pub package: String,
    /// Why.
    pub error: UnpackError,
}

/// Unpacks what `filter` admits of one package.
///
/// # Errors
/// It fails.
pub fn unpack_some(
    selection: &Selection,
    package: &Package,
    cache: &Cache,
    tree: &Tree,
    filter: Filter<'_>,
    (stop, sink): (&Stop, &dyn Sink),
) -> Result<(), ToolsError> {
    let packages = std::slice::from_ref(package);
    unpack(selection, packages, cache, tree, filter, (stop, sink))
        .map(drop)
        .map_err(|failed| ToolsError::Unpack { package: failed.package, source: failed.error })
}

/// Which paths of a package are unpacked; all but for the builder's own tools.
pub type Filter<'a> = &'a (dyn Fn(&str) -> bool + Sync);

/// Unpacks `packages` into `tree`. The result has one element for each, in their order.
///
/// # Errors
/// The first package that fails.
pub fn unpack(
    selection: &Selection,
    packages: &[Package],
    cache: &Cache,
    tree: &Tree,
    filter: Filter<'_>,
    (stop, sink): (&Stop, &dyn Sink),
) -> Result<Vec<Unpacked>, Failed> {
    let job = Job { selection, packages, cache, tree, filter, later: Mutex::default() };
    let total: u64 = packages.iter().map(|package| package.file.size).sum();
    // The largest first, so that no thread is left alone with a kernel at the end.
    let mut order: Vec<usize> = (0..packages.len()).collect();
    order.sort_by_key(|index| std::cmp::Reverse(packages[*index].file.size));
    let next = AtomicUsize::new(0);
    let done = AtomicU64::new(0);
    let broken = AtomicBool::new(false);
    let results: Mutex<BTreeMap<usize, Result<Unpacked, UnpackError>>> = Mutex::default();
    let threads = std::thread::available_parallelism().map_or(2, |count| count.get().clamp(1, 4));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some(index) = order.get(next.fetch_add(1, Ordering::Relaxed)) {
                    if broken.load(Ordering::Relaxed) {
                        return;
                    }
                    let package = &packages[*index];
                    let result = match stop.check() {
                        Ok(()) => job.package(*index),
                        Err(stopped) => Err(UnpackError::Stopped(stopped)),
                    };
                    if result.is_err() {
                        broken.store(true, Ordering::Relaxed);
                    }
                    let bytes = done.fetch_add(package.file.size, Ordering::Relaxed) + package.file.size;
                    sink.event(Event::Progress {
                        stage: Stage::Compose,
                        doing: format!("unpacking {}", package.name),
                        bytes,
                        total: Some(total),
                    });
                    results.lock().unwrap_or_else(PoisonError::into_inner).insert(*index, result);
                }
            });
        }
    });
    let failed = |index: usize, error| Failed {
        package: packages.get(index).map_or_else(String::new, |package| package.name.clone()),
        error,
    };
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    if let Some(index) = results.iter().find(|(_, result)| result.is_err()).map(|(index, _)| *index)
        && let Some(Err(error)) = results.remove(&index)
    {
        return Err(failed(index, error));
    }
    let unpacked = (0..packages.len())
        .map(|index| match results.remove(&index) {
            Some(Ok(unpacked)) => Ok(unpacked),
            _ => Err(failed(index, UnpackError::BrokenOff)),
        })
        .collect::<Result<_, _>>()?;
    job.settle().map_err(|(index, error)| failed(index, error))?;
    Ok(unpacked)
}

struct Job<'a> {
    selection: &'a Selection,
    packages: &'a [Package],
    cache: &'a Cache,
    tree: &'a Tree,
    filter: Filter<'a>,
    /// What is to be made once all are unpacked, by the package's place.
    later: Mutex<BTreeMap<usize, Later>>,
}

impl Job<'_> {
    fn open(&self, index: usize) -> Result<File, UnpackError> {
        let file = &self.packages[index].file;
        self.cache.get(file.digest, file.size)?.ok_or(UnpackError::NotCached)
    }

    fn package(&self, index: usize) -> Result<Unpacked, UnpackError> {
        deb::read(self.open(index)?, |control, data| {
            let conffile_paths = database::conffile_paths(&control.text("conffiles"));
            let mut unpacked = Unpacked { control, ..Unpacked::default() };
            for entry in data.entries().map_err(damaged)? {
                let mut entry = entry.map_err(damaged)?;
                let described = describe(&entry)?;
                let absolute = absolute(&described.path);
                if !(self.filter)(&absolute) {
                    continue;
                }
                let is_conffile = described.kind == Kind::File && conffile_paths.contains(&absolute);
                let mut contents = Hashed { inner: &mut entry, hasher: is_conffile.then(Md5::new) };
                let admitted = self
                    .tree
                    .add(
                        &described.path,
                        &described.kind,
                        described.attributes,
                        index + 1,
                        |left, right| self.replaces(left, right),
                        &mut contents,
                    )
                    .map_err(|source| UnpackError::Tree { path: described.path.clone(), source })?;
                if admitted == Admitted::Later || matches!(described.kind, Kind::HardLink(_)) {
                    let mut later = self.later.lock().unwrap_or_else(PoisonError::into_inner);
                    later.entry(index).or_default().note(&described, &admitted);
                }
                if is_conffile {
                    // What another package's file stands for has to be read all the same.
                    io::copy(&mut contents, &mut io::sink()).map_err(damaged)?;
                }
                if let Some(hasher) = contents.hasher {
                    let md5 = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
                    unpacked.conffiles.push(Conffile { path: absolute, md5 });
                }
                unpacked.paths.push(described.path);
            }
            Ok(unpacked)
        })
    }

    /// Does the package with the owner number `left` say that it replaces files of `right`?
    fn replaces(&self, left: usize, right: usize) -> bool {
        let package = |number: usize| self.packages.get(number.checked_sub(1)?);
        let (Some(left), Some(right)) = (package(left), package(right)) else {
            return false;
        };
        let field = self.selection.catalogue.stanza(left.id).get("Replaces").unwrap_or("");
        let groups = relation::parse(field).unwrap_or_default();
        groups
            .iter()
            .flatten()
            .any(|relation| relation.name == right.name && relation.accepts(&right.version))
    }

    /// Makes what was to be made later; in the build's order.
    fn settle(self) -> Result<(), (usize, UnpackError)> {
        let later = std::mem::take(&mut *self.later.lock().unwrap_or_else(PoisonError::into_inner));
        for (index, later) in later.into_iter().filter(|(_, later)| !later.is_empty()) {
            let take_over = || {
                let mut makes = Makes::new(self.tree, index + 1, &later);
                deb::read(self.open(index)?, |_, data| {
                    for entry in data.entries().map_err(damaged)? {
                        let mut entry = entry.map_err(damaged)?;
                        let described = describe(&entry)?;
                        if !(self.filter)(&absolute(&described.path)) {
                            continue;
                        }
                        makes
                            .entry(&described, |left, right| self.replaces(left, right), &mut entry)
                            .map_err(|source| UnpackError::Tree { path: described.path.clone(), source })?;
                    }
                    Ok(())
                })
            };
            take_over().map_err(|error: UnpackError| (index, error))?;
        }
        Ok(())
    }
}

/// An entry's path as a filter takes it.
fn absolute(path: &str) -> String {
    format!("/{}", path.trim_start_matches("./").trim_matches('/'))
}

fn damaged(source: io::Error) -> UnpackError {
    UnpackError::Deb(DebError::Archive { source })
}

/// An archive's entry.
pub(super) struct Described {
    pub(super) path: String,
    pub(super) kind: Kind,
    pub(super) attributes: Attributes,
}

pub(super) fn describe<R: Read>(entry: &tar::Entry<'_, R>) -> Result<Described, UnpackError> {
    let raw = entry.path_bytes();
    let shown = String::from_utf8_lossy(&raw).into_owned();
    let name = || UnpackError::Name { path: shown.clone() };
    let path = std::str::from_utf8(&raw).map_err(|_| name())?.to_owned();
    let target = || -> Result<String, UnpackError> {
        let bytes = entry.link_name_bytes().ok_or_else(name)?;
        let target = String::from_utf8(bytes.into_owned()).map_err(|_| name())?;
        if target.is_empty() || target.contains('\0') {
            return Err(name());
        }
        Ok(target)
    };
    let header = entry.header();
    let kind = match header.entry_type() {
        tar::EntryType::Directory => Kind::Directory,
        tar::EntryType::Regular | tar::EntryType::Continuous => Kind::File,
        tar::EntryType::Symlink => Kind::Symlink(target()?),
        tar::EntryType::Link => Kind::HardLink(target()?),
        _ => return Err(UnpackError::Special { path }),
    };
    let number = |value: io::Result<u64>| {
        let value = value.map_err(damaged)?;
        u32::try_from(value).map_err(|error| damaged(io::Error::new(io::ErrorKind::InvalidData, error)))
    };
    let attributes = Attributes {
        uid: number(header.uid())?,
        gid: number(header.gid())?,
        mode: header.mode().map_err(damaged)? & 0o7777,
        modified: header.mtime().map_err(damaged)?,
    };
    Ok(Described { path, kind, attributes })
}

/// Hashes what passes, where somebody wants to know.
struct Hashed<R> {
    inner: R,
    hasher: Option<Md5>,
}

impl<R: Read> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        if let Some(hasher) = &mut self.hasher {
            hasher.update(&buffer[..count]);
        }
        Ok(count)
    }
}
