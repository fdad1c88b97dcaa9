//! What addresses last answered, for revalidation: `<root>/metadata/<digest of the address>`.

use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::digest::Digest;
use super::store::{Cache, StoreError};

/// The folder of what this host made itself.
const MADE: &str = "made";

/// What an address last answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Remembered {
    /// Digest of the answer.
    pub digest: String,
    /// Its bytes.
    pub size: u64,
    /// Its `ETag`.
    pub etag: Option<String>,
    /// Its `Last-Modified`.
    pub last_modified: Option<String>,
    /// By which rules it may be used again, where nothing vouches for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<serde_json::Value>,
}

impl Cache {
    /// What `address` last answered; an entry that cannot be understood is as good as none.
    #[must_use]
    pub fn remembered(&self, address: &str) -> Option<Remembered> {
        let text = fs::read(self.metadata_path(address)).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// Remembers what `address` answered.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn remember(&self, address: &str, answer: &Remembered) -> Result<(), StoreError> {
        self.write_answer(&self.metadata_path(address), answer)
    }

    /// What this host itself made of what `key` stands for.
    #[must_use]
    pub fn made(&self, key: &str) -> Option<Remembered> {
        let text = fs::read(self.made_path(key)).ok()?;
        serde_json::from_slice(&text).ok()
    }

    /// Remembers what this host made. Apart from the answers of addresses, which an archive from elsewhere may
    /// bring along: nothing but this host's own word says what was made here.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn remember_made(&self, key: &str, made: &Remembered) -> Result<(), StoreError> {
        self.write_answer(&self.made_path(key), made)
    }

    fn made_path(&self, key: &str) -> PathBuf {
        self.root().join(MADE).join(Digest::of(key.as_bytes()).to_string())
    }

    fn write_answer(&self, path: &Path, answer: &Remembered) -> Result<(), StoreError> {
        let failed = |source| StoreError::Write { path: path.to_owned(), source };
        let mut writer = self.writer()?;
        let text = serde_json::to_vec(answer).map_err(|error| failed(error.into()))?;
        writer.write(&text)?;
        writer.publish(path)
    }

    /// Remembers an answer of the address with this digest, unless there is one.
    pub(super) fn remember_first(&self, address: Digest, answer: &Remembered) -> Result<(), StoreError> {
        let path = self.root().join("metadata").join(address.to_string());
        if path.exists() { Ok(()) } else { self.write_answer(&path, answer) }
    }

    /// All answers that are remembered, with the digests of their addresses.
    pub(super) fn answers(&self) -> Result<Vec<(String, Remembered)>, StoreError> {
        let path = self.root().join("metadata");
        let failed = |source| StoreError::Directory { path: path.clone(), source };
        let mut answers = Vec::new();
        for entry in fs::read_dir(&path).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            let answer = fs::read(entry.path()).ok().and_then(|text| serde_json::from_slice(&text).ok());
            if let (Some(answer), Some(name)) = (answer, entry.file_name().to_str()) {
                answers.push((name.to_owned(), answer));
            }
        }
        answers.sort_by(|one, other| one.0.cmp(&other.0));
        Ok(answers)
    }

    fn metadata_path(&self, address: &str) -> PathBuf {
        self.root().join("metadata").join(Digest::of(address.as_bytes()).to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_remembered() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let cache = Cache::open(directory.path()).expect("usable");
        let answer = Remembered {
            digest: Digest::of(b"").to_string(),
            size: 0,
            etag: Some("\"x\"".to_owned()),
            last_modified: None,
            policy: None,
        };
        cache.remember("http://mirror.test/a", &answer).expect("written");
        let again = Cache::open(directory.path()).expect("usable");
        assert_eq!(again.remembered("http://mirror.test/a"), Some(answer));
        assert_eq!(again.remembered("http://mirror.test/b"), None);
        // What an address answered is nothing that was made here, whatever it is called.
        assert_eq!(again.made("http://mirror.test/a"), None);
        cache
            .remember_made(
                "machine",
                &Remembered { etag: None, ..again.remembered("http://mirror.test/a").expect("kept") },
            )
            .expect("written");
        assert!(again.made("machine").is_some() && again.remembered("machine").is_none());
        assert_eq!(again.answers().expect("readable").len(), 1);
    }
}
