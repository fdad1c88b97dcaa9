//! What goes when the cache is too large: what was not used for longest, and nothing that is needed.
//!
//! [`choose`] decides, purely; [`Cache::shrink`] looks and acts, while no other process begins to use
//! anything.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::time::SystemTime;

use super::digest::Digest;
use super::store::{Cache, StoreError};
use super::uses::seconds;

/// A content, and what is known of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Content {
    /// Its digest.
    pub digest: Digest,
    /// Bytes.
    pub size: u64,
    /// When it was used last, in seconds since 1970.
    pub used: u64,
    /// Does a running process use it?
    pub in_use: bool,
    /// Does a build's lock need it?
    pub needed: bool,
}

/// What is to go so that at most `limit` bytes stay, and nothing that was used since `older_than` (seconds
/// since 1970).
#[must_use]
pub fn choose(contents: &[Content], limit: u64, older_than: Option<u64>) -> Vec<Content> {
    let mut left: u64 = contents.iter().map(|content| content.size).sum();
    let mut candidates: Vec<&Content> =
        contents.iter().filter(|content| !content.in_use && !content.needed).collect();
    candidates.sort_by_key(|content| (content.used, content.digest));
    let mut chosen = Vec::new();
    for content in candidates {
        let old = older_than.is_some_and(|time| content.used < time);
        if left <= limit && !old {
            break;
        }
        left -= content.size;
        chosen.push(*content);
    }
    chosen
}

/// What a shrinking came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Shrunk {
    /// Files removed.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Bytes that stay.
    pub left: u64,
    /// Bytes of these that running processes and locks need.
    pub needed: u64,
}

impl Cache {
    /// Everything there is.
    ///
    /// # Errors
    /// The cache cannot be read.
    pub fn contents(&self) -> Result<Vec<Content>, StoreError> {
        let _lock = self.alone()?;
        let (contents, unread) = self.listed()?;
        if let Some(error) = unread {
            tracing::warn!(%error, "all of the cache counts as in use");
        }
        Ok(contents)
    }

    /// Removes what was not used for longest until at most `limit` bytes are left, and what was not used
    /// since `older_than`; but nothing that a running process or a lock needs.
    ///
    /// # Errors
    /// The cache cannot be read or written, or what is in use cannot be told: then nothing goes.
    pub fn shrink(&self, limit: u64, older_than: Option<SystemTime>) -> Result<Shrunk, StoreError> {
        let _lock = self.alone()?;
        let contents = self.sure()?;
        let mut shrunk = Shrunk::default();
        let parts = self.sweep_parts(SystemTime::now())?;
        let all: u64 = contents.iter().map(|content| content.size).sum();
        if all.saturating_add(parts.bytes) > limit {
            self.drop_parts()?;
            shrunk.files += parts.files;
            shrunk.bytes += parts.bytes;
        }
        let of_parts = shrunk.bytes;
        for content in choose(&contents, limit, older_than.map(seconds)) {
            let path = self.path(content.digest);
            match fs::remove_file(&path) {
                Ok(()) => {
                    shrunk.files += 1;
                    shrunk.bytes += content.size;
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(StoreError::Write { path, source }),
            }
        }
        let sum = |contents: &mut dyn Iterator<Item = &Content>| contents.map(|one| one.size).sum::<u64>();
        shrunk.left = all.saturating_sub(shrunk.bytes - of_parts);
        shrunk.needed = sum(&mut contents.iter().filter(|content| content.in_use || content.needed));
        Ok(shrunk)
    }

    /// Gives a content another name: a hard link at `place`, which is not to be there yet. It is not
    /// checked: whoever serves it does that.
    ///
    /// # Errors
    /// The content is not there, or the link cannot be made.
    pub fn link(&self, digest: Digest, place: &Path) -> Result<(), StoreError> {
        let noted = self.note_use(digest)?;
        // Contents are their owner's alone until they are in a tree, which is for whoever serves it.
        let path = self.path(digest);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644))
            .map_err(|source| StoreError::Write { path, source })?;
        fs::hard_link(self.path(digest), place)
            .map_err(|source| StoreError::Write { path: place.to_owned(), source })?;
        drop(noted);
        Ok(())
    }

    /// Device and inode of the content; `None` when it is not there.
    #[must_use]
    pub fn inode(&self, digest: Digest) -> Option<(u64, u64)> {
        fs::metadata(self.path(digest)).ok().map(|data| (data.dev(), data.ino()))
    }

    /// Is the content there, with another name, and of the right size? It is not read.
    #[must_use]
    pub fn is_linked(&self, digest: Digest, size: Option<u64>) -> bool {
        fs::metadata(self.path(digest))
            .is_ok_and(|metadata| metadata.nlink() > 1 && size.is_none_or(|size| metadata.len() == size))
    }

    /// Removes contents that have no other name and are none of `named`, but for those in use. How many.
    ///
    /// # Errors
    /// The cache cannot be read or written, or what is in use cannot be told: then nothing goes.
    pub fn remove_unlinked(&self, named: &HashSet<Digest>) -> Result<u64, StoreError> {
        let _lock = self.alone()?;
        let mut removed = 0;
        for content in self.sure()? {
            let path = self.path(content.digest);
            let names = fs::metadata(&path).map_or(0, |metadata| metadata.nlink());
            if names == 1 && !content.in_use && !content.needed && !named.contains(&content.digest) {
                fs::remove_file(&path).map_err(|source| StoreError::Write { path, source })?;
                removed += 1;
            }
        }
        Ok(removed)
    }

    /// Everything there is, with what is known for sure of its use.
    fn sure(&self) -> Result<Vec<Content>, StoreError> {
        match self.listed()? {
            (contents, None) => Ok(contents),
            (_, Some(unread)) => Err(unread),
        }
    }

    /// Everything there is. All of it is in use where it cannot be told what is, and why is said.
    fn listed(&self) -> Result<(Vec<Content>, Option<StoreError>), StoreError> {
        let known = self.merge_uses(SystemTime::now())?;
        let mut contents = Vec::new();
        let root = self.root().join("sha256");
        let failed = |source: io::Error| StoreError::Directory { path: root.clone(), source };
        for folder in fs::read_dir(&root).map_err(failed)? {
            for file in fs::read_dir(folder.map_err(failed)?.path()).map_err(failed)? {
                let file = file.map_err(failed)?;
                let Some(digest) = file.file_name().to_str().and_then(|name| name.parse().ok()) else {
                    continue;
                };
                let metadata = file.metadata().map_err(failed)?;
                let written = metadata.modified().map_or(0, seconds);
                contents.push(Content {
                    digest,
                    size: metadata.len(),
                    used: known.last.get(&digest).map_or(written, |used| written.max(*used)),
                    in_use: known.unread.is_some() || known.in_use.contains(&digest),
                    needed: known.needed.contains(&digest),
                });
            }
        }
        Ok((contents, known.unread))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn content(name: u8, size: u64, used: u64) -> Content {
        Content { digest: Digest::of(&[name]), size, used, in_use: false, needed: false }
    }

    #[test]
    fn what_was_not_used_for_longest_goes_first_and_only_as_much_as_must() {
        let contents = [content(1, 10, 300), content(2, 10, 100), content(3, 10, 200)];
        assert_eq!(choose(&contents, 30, None), []);
        assert_eq!(choose(&contents, 29, None), [contents[1]]);
        assert_eq!(choose(&contents, 10, None), [contents[1], contents[2]]);
        assert_eq!(choose(&contents, 99, Some(200)), [contents[1]]);
    }

    proptest::proptest! {
        #[test]
        fn nothing_that_is_needed_goes(
            parts in proptest::collection::vec((0..50_u64, 0..9_u64, 0..4_u8), 0..40),
            limit in 0..600_u64,
        ) {
            let contents: Vec<Content> = parts
                .iter()
                .zip(0..)
                .map(|((size, used, why), name)| Content {
                    in_use: *why == 1,
                    needed: *why == 2,
                    ..content(name, *size, *used)
                })
                .collect();
            let chosen = choose(&contents, limit, None);
            proptest::prop_assert!(chosen.iter().all(|content| !content.in_use && !content.needed));
            let sum = |contents: &[Content]| contents.iter().map(|content| content.size).sum::<u64>();
            let stays: Vec<Content> =
                contents.iter().filter(|content| !chosen.contains(content)).copied().collect();
            let could_go = stays.iter().any(|content| !content.in_use && !content.needed && content.size > 0);
            proptest::prop_assert!(sum(&stays) <= limit || !could_go);
        }
    }

    #[test]
    fn what_others_use_and_locks_need_stays() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let open = || Cache::open(directory.path()).expect("usable");
        let old = open();
        let [used, needed, idle] = [b"used", b"need", b"idle"].map(|text| old.put(text).expect("written"));
        drop(old);
        let running = open();
        assert!(running.get(used, 4).expect("readable").is_some());
        running.need(Digest::of(b"lock"), &[needed]).expect("written");
        let other = open();
        let shrunk = other.shrink(0, None).expect("writable");
        assert_eq!(shrunk, Shrunk { files: 1, bytes: 4, left: 8, needed: 8 });
        assert!(other.get(idle, 4).expect("readable").is_none());
        assert!(other.get(used, 4).expect("readable").is_some());
        assert!(other.get(needed, 4).expect("readable").is_some());
        drop((running, other));
        // Nobody runs any more; the lock is still there.
        assert_eq!(open().shrink(0, None).expect("writable").left, 4);
    }

    #[test]
    fn where_what_is_in_use_cannot_be_told_nothing_goes() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let open = || Cache::open(directory.path()).expect("usable");
        open().put(b"idle").expect("written");
        for place in ["uses/unreadable", "needs/unreadable", "used"] {
            let path = directory.path().join(place);
            let _ = fs::remove_file(&path);
            // What root cannot read either.
            fs::create_dir(&path).expect("made");
            let cache = open();
            let error = cache.shrink(0, None).expect_err("it cannot be told");
            assert!(matches!(error, StoreError::Unread { .. }), "{error}");
            assert!(error.to_string().contains(place), "{error}");
            assert!(cache.remove_unlinked(&HashSet::new()).is_err());
            assert!(cache.contents().expect("readable").iter().all(|content| content.in_use), "{place}");
            fs::remove_dir(&path).expect("still there");
        }
        assert_eq!(open().shrink(0, None).expect("writable").files, 1);
    }

    #[test]
    fn what_was_used_last_is_known_after_its_users_are_gone() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let open = || Cache::open(directory.path()).expect("usable");
        let cache = open();
        let [first, second] = [b"1", b"2"].map(|text| cache.put(text).expect("written"));
        drop(cache);
        std::thread::sleep(std::time::Duration::from_millis(1100));
        assert!(open().get(first, 1).expect("readable").is_some());
        assert_eq!(open().shrink(1, None).expect("writable").files, 1);
        let last = open();
        assert!(last.get(first, 1).expect("readable").is_some());
        assert!(last.get(second, 1).expect("readable").is_none());
        // What processes noted does not pile up.
        assert_eq!(fs::read_dir(directory.path().join("uses")).expect("listed").count(), 1);
    }
}
