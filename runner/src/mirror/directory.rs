//! A mirror's directory: the store, its snapshots, and which is current.
//!
//! ```text
//! <root>/store/                    a cache
//! <root>/snapshots/<time>/manifest what it has
//! <root>/snapshots/<time>/tree/…   hard links into the store
//! <root>/snapshots/.new-…          one that is being made; a dead one goes with the next
//! <root>/current                   a link to the newest snapshot's tree
//! <root>/lock                      held by who makes snapshots
//! ```

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::fs::{FlockOperation, flock};

use crate::cache::{AuditError, Cache, Digest, FetchError, Fetcher, StoreError, Wanted};
use crate::causes::in_one_line;
use crate::event::{Event, Sink, Stage};

use super::Plan;
use super::manifest::{Entry, Manifest, is_inside};
use super::snapshot_name::{name_of, time_of};

/// Why a mirror cannot be used or made.
#[derive(Debug, thiserror::Error)]
pub enum DirectoryError {
    /// Something in its directory cannot be read or written.
    #[error("cannot use {} of the mirror: check its space and permissions", path.display())]
    Io {
        /// What.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Another process makes a snapshot.
    #[error("another process is syncing the mirror {}: wait for it", .0.display())]
    Busy(PathBuf),
    /// The store fails.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// Not everything could be looked at.
    #[error(transparent)]
    Audit(#[from] AuditError),
    /// A file cannot be had.
    #[error(
        "the mirror stays as it was: not everything could be fetched (what was is kept for the next try)"
    )]
    Fetch(#[from] FetchError),
    /// A sync would take a suite away.
    #[error(
        "the mirror has suite {suite} in its folder {folder}, and this sync would replace it: sync into another directory, or let it go with --replace"
    )]
    Drops {
        /// The folder.
        folder: String,
        /// The suite.
        suite: String,
    },
    /// Upstream names a path that no tree may have.
    #[error("upstream names the path {0:?}, which would leave the mirror's tree")]
    Path(String),
    /// There is no snapshot.
    #[error("the mirror {} has nothing yet: run `hostler mirror sync` first", .0.display())]
    Empty(PathBuf),
    /// A manifest is damaged.
    #[error("the manifest {} is damaged: sync the mirror again", path.display())]
    Manifest {
        /// The manifest.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
}

/// A mirror's directory.
#[derive(Debug)]
pub struct Directory {
    root: PathBuf,
}

/// What a sync came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Published {
    /// The snapshot's name; the one there was, if nothing changed.
    pub snapshot: String,
    /// Did anything change?
    pub changed: bool,
    /// Files in it.
    pub files: usize,
    /// Their bytes, each content once.
    pub bytes: u64,
    /// Snapshots that were removed because there were too many.
    pub removed: Vec<String>,
}

/// What a check came to.
#[derive(Debug, Default)]
pub struct Verified {
    /// Files of the store that are what they should be.
    pub intact: u64,
    /// Their bytes.
    pub bytes: u64,
    /// What was not, and is again, in all snapshots.
    pub repaired: Vec<Digest>,
    /// What cannot be had again, by its path in the newest snapshot that has it.
    pub lost: Vec<(String, FetchError)>,
}

impl Directory {
    /// The mirror at `root`; made where it is missing.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn create(root: &Path) -> Result<Self, DirectoryError> {
        let snapshots = root.join("snapshots");
        fs::create_dir_all(&snapshots).map_err(at(&snapshots))?;
        Ok(Self { root: root.to_owned() })
    }

    /// The mirror at `root`, which has to have a snapshot.
    ///
    /// # Errors
    /// It has none.
    pub fn open(root: &Path) -> Result<Self, DirectoryError> {
        let directory = Self { root: root.to_owned() };
        match directory.current()? {
            Some(_) => Ok(directory),
            None => Err(DirectoryError::Empty(root.to_owned())),
        }
    }

    /// Its store.
    ///
    /// # Errors
    /// It cannot be used.
    pub fn store(&self) -> Result<Cache, StoreError> {
        Cache::open(&self.root.join("store"))
    }

    /// Its store for who only serves it: what snapshots have stays, and what none has any more may go.
    ///
    /// # Errors
    /// It cannot be used.
    pub fn served_store(&self) -> Result<Cache, StoreError> {
        Ok(self.store()?.without_uses())
    }

    /// The name of the current snapshot.
    ///
    /// # Errors
    /// It cannot be told.
    pub fn current(&self) -> Result<Option<String>, DirectoryError> {
        let path = self.root.join("current");
        match fs::read_link(&path) {
            Ok(target) => {
                let name = target.parent().and_then(Path::file_name).and_then(|name| name.to_str());
                Ok(name.map(str::to_owned))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(DirectoryError::Io { path, source }),
        }
    }

    /// The names of all snapshots, the oldest first.
    ///
    /// # Errors
    /// They cannot be listed.
    pub fn snapshots(&self) -> Result<Vec<String>, DirectoryError> {
        let path = self.root.join("snapshots");
        let mut names = Vec::new();
        for entry in fs::read_dir(&path).map_err(at(&path))? {
            let name = entry.map_err(at(&path))?.file_name();
            // Beside them there may be what is no snapshot: a lost+found, somebody's copy.
            names.extend(name.to_str().filter(|name| time_of(name).is_some()).map(str::to_owned));
        }
        names.sort();
        Ok(names)
    }

    /// What a snapshot has.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn manifest(&self, snapshot: &str) -> Result<Manifest, DirectoryError> {
        let path = self.root.join("snapshots").join(snapshot).join("manifest");
        let text = fs::read(&path).map_err(at(&path))?;
        serde_json::from_slice(&text).map_err(|source| DirectoryError::Manifest { path, source })
    }

    /// Fetches what the plan has and makes it the current snapshot, together with the folders of the one
    /// before that the plan is not about. Of the older ones, `keep` stay, at least the one before.
    ///
    /// # Errors
    /// Something cannot be had or written; the mirror then is as it was.
    pub fn publish(
        &self,
        plan: Plan,
        keep: usize,
        fetcher: &Fetcher,
        sink: &dyn Sink,
    ) -> Result<Published, DirectoryError> {
        let _lock = self.lock()?;
        for (path, _) in &plan.files {
            if !is_inside(path) {
                return Err(DirectoryError::Path(path.clone()));
            }
        }
        let previous = self.current()?.map(|name| self.manifest(&name).map(|one| (name, one))).transpose()?;
        if let (false, Some((_, previous))) = (plan.replace, &previous)
            && let Some((folder, suite)) = dropped(previous, &plan)
        {
            return Err(DirectoryError::Drops { folder: folder.to_owned(), suite: suite.to_owned() });
        }
        let store = fetcher.cache();
        let mut seen = HashSet::new();
        // What a snapshot has already was checked when it came, and is checked when it is served.
        let wanted: Vec<_> = plan
            .files
            .iter()
            .filter(|(_, wanted)| seen.insert(wanted.digest) && !store.is_linked(wanted.digest, wanted.size))
            .map(|(_, wanted)| wanted.clone())
            .collect();
        fetcher.fetch_all(wanted, Stage::Fetch, sink)?;

        let mut manifest = Manifest::default();
        if let Some((_, previous)) = &previous {
            let is_new =
                |path: &str| plan.folders.iter().any(|(name, _)| path.split('/').next() == Some(name));
            let kept = previous.files.iter().filter(|(path, _)| !is_new(path));
            manifest.files.extend(kept.map(|(path, entry)| (path.clone(), *entry)));
            let kept = previous.folders.iter().filter(|(name, _)| !is_new(name));
            manifest.folders.extend(kept.map(|(name, folder)| (name.clone(), folder.clone())));
        }
        manifest.folders.extend(plan.folders);
        for (path, wanted) in plan.files {
            let size = match wanted.size {
                Some(size) => size,
                None => store
                    .get(wanted.digest, None)?
                    .map_or(Ok(0), |file| file.metadata().map(|data| data.len()))
                    .map_err(at(&self.root))?,
            };
            manifest.files.insert(path, Entry { sha256: wanted.digest, size });
        }
        if let Some((name, previous)) = previous
            && previous.files == manifest.files
            && previous.folders == manifest.folders
        {
            return Ok(Published {
                snapshot: name,
                changed: false,
                files: manifest.files.len(),
                bytes: manifest.size(),
                removed: Vec::new(),
            });
        }
        let snapshot = self.write(&mut manifest, store)?;
        let removed = self.remove_old(keep, &snapshot)?;
        // The snapshot is there, whatever becomes of what others had.
        if let Err(error) = self.remove_unnamed(store) {
            sink.event(Event::Warning(format!(
                "what no snapshot has any more stays in the store: {}",
                in_one_line(&error)
            )));
        }
        let (files, bytes) = (manifest.files.len(), manifest.size());
        Ok(Published { snapshot, changed: true, files, bytes, removed })
    }

    /// Checks every byte of the store. What is damaged is fetched again, and takes its place in all snapshots;
    /// so does what was fetched again earlier, by a server or by a check that did not come to its end.
    ///
    /// # Errors
    /// The store cannot be used, or it is time to give up. What cannot be had again is no error, but told.
    pub fn verify(&self, fetcher: &Fetcher, sink: &dyn Sink) -> Result<Verified, DirectoryError> {
        let _lock = self.lock()?;
        let store = fetcher.cache();
        let progress = |bytes| {
            sink.event(Event::Progress {
                stage: Stage::Verify,
                doing: "checking".to_owned(),
                bytes,
                total: None,
            });
        };
        let audit = store.audit(fetcher.stop(), &progress)?;
        let mut verified = Verified { intact: audit.intact, bytes: audit.bytes, ..Verified::default() };
        // Each content once, from wherever one of the snapshots had it; the newest knows best.
        let mut missing: BTreeMap<Digest, Wanted> = BTreeMap::new();
        let mut astray = Vec::new();
        for name in self.snapshots()?.into_iter().rev() {
            let manifest = self.manifest(&name)?;
            let tree = self.root.join("snapshots").join(&name).join("tree");
            for (path, entry) in &manifest.files {
                let kept = store.inode(entry.sha256);
                let place = tree.join(path);
                let linked = fs::symlink_metadata(&place).ok().map(|data| (data.dev(), data.ino()));
                if kept.is_some() && kept == linked {
                    continue;
                }
                astray.push((entry.sha256, place));
                if let (None, Some(wanted)) = (kept, manifest.wanted(path)) {
                    let known = missing.entry(wanted.digest).or_insert_with(|| wanted.clone());
                    known.urls.extend(wanted.urls);
                    let mut seen = HashSet::new();
                    known.urls.retain(|url| seen.insert(url.clone()));
                }
            }
        }
        for wanted in missing.into_values() {
            let name = wanted.name.clone();
            match fetcher.fetch_all(vec![wanted], Stage::Fetch, sink) {
                Ok(()) => {}
                Err(error @ (FetchError::Stopped { .. } | FetchError::Store { .. })) => {
                    return Err(error.into());
                }
                Err(error) => verified.lost.push((name, error)),
            }
        }
        let beside = self.root.join(".repaired");
        for (digest, place) in astray {
            if store.inode(digest).is_none() {
                continue;
            }
            remove(&beside)?;
            store.link(digest, &beside)?;
            fs::rename(&beside, &place).map_err(at(&place))?;
            verified.repaired.push(digest);
        }
        verified.repaired.sort_unstable();
        verified.repaired.dedup();
        Ok(verified)
    }

    /// Removes the contents that no snapshot has.
    fn remove_unnamed(&self, store: &Cache) -> Result<(), DirectoryError> {
        let mut named = HashSet::new();
        for name in self.snapshots()? {
            named.extend(self.manifest(&name)?.files.values().map(|entry| entry.sha256));
        }
        store.remove_unlinked(&named)?;
        Ok(())
    }

    /// One process at a time makes snapshots.
    fn lock(&self) -> Result<File, DirectoryError> {
        let path = self.root.join("lock");
        let lock = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(&path);
        let lock = lock.map_err(at(&path))?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| DirectoryError::Busy(self.root.clone()))?;
        // What one that was killed has begun. With the lock, nobody else's.
        let snapshots = self.root.join("snapshots");
        for entry in fs::read_dir(&snapshots).map_err(at(&snapshots))? {
            let entry = entry.map_err(at(&snapshots))?;
            if entry.file_name().as_encoded_bytes().starts_with(b".new-") {
                fs::remove_dir_all(entry.path()).map_err(at(&entry.path()))?;
            }
        }
        Ok(lock)
    }

    /// Writes a snapshot, and makes it current when it is complete.
    fn write(&self, manifest: &mut Manifest, store: &Cache) -> Result<String, DirectoryError> {
        let snapshots = self.root.join("snapshots");
        let (name, time) = self.free_name()?;
        manifest.time = time;
        let new = snapshots.join(format!(".new-{name}"));
        let tree = new.join("tree");
        fs::create_dir_all(&tree).map_err(at(&tree))?;
        let mut made = HashSet::new();
        for (path, entry) in &manifest.files {
            let place = tree.join(path);
            if let Some(parent) = place.parent()
                && made.insert(parent.to_owned())
            {
                fs::create_dir_all(parent).map_err(at(parent))?;
            }
            store.link(entry.sha256, &place)?;
        }
        let path = new.join("manifest");
        let text = serde_json::to_vec(manifest)
            .map_err(|source| DirectoryError::Manifest { path: path.clone(), source })?;
        fs::write(&path, text).map_err(at(&path))?;
        // Its links and the manifest are to be on the disk before anything leads to them.
        let whole = File::open(&new).map_err(at(&new))?;
        rustix::fs::syncfs(&whole).map_err(|error| at(&new)(error.into()))?;
        let place = snapshots.join(&name);
        fs::rename(&new, &place).map_err(at(&place))?;
        let link = self.root.join(".current");
        remove(&link)?;
        let current = self.root.join("current");
        symlink(Path::new("snapshots").join(&name).join("tree"), &link).map_err(at(&link))?;
        fs::rename(&link, &current).map_err(at(&current))?;
        let whole = File::open(&self.root).map_err(at(&self.root))?;
        rustix::fs::syncfs(&whole).map_err(|error| at(&self.root)(error.into()))?;
        Ok(name)
    }

    /// The name of a snapshot of now, and its time: later than all there are, also where it is the second one
    /// within a second, or the clock went back.
    fn free_name(&self) -> Result<(String, u64), DirectoryError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let last = self.snapshots()?.last().and_then(|name| time_of(name));
        let time = last.map_or(now, |last| now.max(last + 1));
        Ok((name_of(time), time))
    }

    /// Removes the oldest snapshots; never the one that was current until now, whose users may be in the
    /// middle of something.
    fn remove_old(&self, keep: usize, current: &str) -> Result<Vec<String>, DirectoryError> {
        let mut old = self.snapshots()?;
        old.retain(|name| name != current);
        let gone: Vec<String> = old.iter().take(old.len().saturating_sub(keep.max(1))).cloned().collect();
        for name in &gone {
            let path = self.root.join("snapshots").join(name);
            // Half of one is never taken for a whole.
            let hidden = self.root.join("snapshots").join(format!(".new-{name}"));
            fs::rename(&path, &hidden).map_err(at(&path))?;
            fs::remove_dir_all(&hidden).map_err(at(&hidden))?;
        }
        Ok(gone)
    }
}

/// A folder and suite of the snapshot before that the plan makes anew without it.
fn dropped<'a>(previous: &'a Manifest, plan: &Plan) -> Option<(&'a str, &'a str)> {
    let planned: HashSet<&str> = plan.files.iter().map(|(path, _)| path.as_str()).collect();
    let gone = previous.files.keys().filter(|path| !planned.contains(path.as_str()));
    gone.filter_map(|path| {
        let (folder, rest) = path.split_once("/dists/")?;
        Some((folder, rest.strip_suffix("/InRelease")?))
    })
    .find(|(folder, _)| plan.folders.iter().any(|(name, _)| name == folder))
}

/// Removes a file that may be there.
fn remove(path: &Path) -> Result<(), DirectoryError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(at(path)(error)),
        _ => Ok(()),
    }
}

fn at(path: &Path) -> impl Fn(io::Error) -> DirectoryError + use<> {
    let path = path.to_owned();
    move |source| DirectoryError::Io { path: path.clone(), source }
}
