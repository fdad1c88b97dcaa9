//! What a snapshot has, as a text beside it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::cache::{Digest, Wanted};

/// What a snapshot has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// When it was made, in seconds since 1970.
    pub time: u64,
    /// Its folders.
    pub folders: BTreeMap<String, Folder>,
    /// Its files by their paths.
    pub files: BTreeMap<String, Entry>,
}

/// A folder: one archive or release tree.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Folder {
    /// Where it comes from: roots of equal mirrors.
    pub upstreams: Vec<String>,
    /// What it has, in a few words for people.
    pub about: String,
}

/// A file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// Its digest.
    pub sha256: Digest,
    /// Its bytes.
    pub size: u64,
}

impl Manifest {
    /// The file at `path`, with where it could be had again.
    #[must_use]
    pub fn wanted(&self, path: &str) -> Option<Wanted> {
        let entry = self.files.get(path)?;
        let (folder, rest) = path.split_once('/')?;
        let upstreams = self.folders.get(folder).map_or(&[][..], |folder| &folder.upstreams);
        Some(Wanted {
            name: path.to_owned(),
            urls: upstreams.iter().map(|root| format!("{root}/{rest}")).collect(),
            size: Some(entry.size),
            digest: entry.sha256,
        })
    }

    /// The bytes of its files, each content once.
    #[must_use]
    pub fn size(&self) -> u64 {
        let contents: BTreeMap<Digest, u64> =
            self.files.values().map(|entry| (entry.sha256, entry.size)).collect();
        contents.values().sum()
    }
}

/// A path that stays in its tree.
#[must_use]
pub(super) fn is_inside(path: &str) -> bool {
    !path.is_empty()
        && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
        && !path.bytes().any(|byte| byte.is_ascii_control() || byte == b'\\')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_can_be_had_again_from_where_it_came() {
        let folder = Folder { upstreams: vec!["http://a.test/d".to_owned()], about: String::new() };
        let entry = Entry { sha256: Digest::of(b"x"), size: 1 };
        let manifest = Manifest {
            time: 0,
            folders: [("debian".to_owned(), folder)].into(),
            files: [("debian/pool/x".to_owned(), entry), ("debian/pool/y".to_owned(), entry)].into(),
        };
        assert_eq!(manifest.wanted("debian/pool/x").expect("there").urls, ["http://a.test/d/pool/x"]);
        assert_eq!(manifest.wanted("debian/pool/z"), None);
        assert_eq!(manifest.size(), 1);
    }

    #[test]
    fn paths_that_leave_the_tree_are_none() {
        assert!(is_inside("debian/pool/a b+c~1.deb"));
        for path in ["", "/x", "a//b", "../x", "a/../b", "a/.", "a\nb", "a\\b"] {
            assert!(!is_inside(path), "{path:?}");
        }
    }
}
