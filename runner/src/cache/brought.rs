//! What a build asked for and had: what its lock is made of. Pure.

use std::collections::{HashMap, HashSet};

use crate::lock::LockedFile;

use super::digest::Digest;
use super::fetch::Wanted;
use super::upstream::without_user;

/// What was asked for, in its order, and how large it turned out to be.
#[derive(Default)]
pub(super) struct Brought {
    files: Vec<Wanted>,
    places: HashMap<Digest, usize>,
    sizes: HashMap<Digest, u64>,
    /// What nothing vouches for.
    unverified: HashSet<Digest>,
}

impl Brought {
    /// Notes that a file is asked for.
    pub(super) fn note(&mut self, wanted: &Wanted) {
        let next = self.files.len();
        if *self.places.entry(wanted.digest).or_insert(next) == next {
            self.files.push(wanted.clone());
        }
    }

    /// Notes that it was had.
    pub(super) fn note_size(&mut self, digest: Digest, size: u64) {
        self.sizes.insert(digest, size);
    }

    pub(super) fn note_unverified(&mut self, digest: Digest) {
        self.unverified.insert(digest);
    }

    /// All of it, for those who read it elsewhere: without this site's `mirrors`.
    pub(super) fn files(&self, mirrors: &[String]) -> Vec<LockedFile> {
        let describe = |wanted: &Wanted| {
            Some(LockedFile {
                name: wanted.name.clone(),
                sha256: wanted.digest,
                // What was asked for and never had did not go into anything.
                size: *self.sizes.get(&wanted.digest)?,
                urls: told_to_others(&wanted.urls, mirrors),
                verified: !self.unverified.contains(&wanted.digest),
            })
        };
        self.files.iter().filter_map(describe).collect()
    }
}

/// Addresses without this site's mirrors, and without passwords.
fn told_to_others(urls: &[String], mirrors: &[String]) -> Vec<String> {
    let is_ours = |url: &&String| {
        let mut roots = mirrors.iter().map(|root| root.trim_end_matches('/'));
        roots.any(|root| url.strip_prefix(root).is_some_and(|rest| rest.starts_with('/')))
    };
    urls.iter().filter(|url| !is_ours(url)).map(|url| without_user(url)).collect()
}
