//! The cache's content as a tar archive, to carry to a host without a network.
//!
//! The archive has the cache's own layout: `sha256/ab/<digest>` and `metadata/<name>`. Nothing in it is
//! believed: each content has to be what its name says, and what addresses answered is only a hint.

use std::collections::HashSet;
use std::io::{self, Read, Write};
use std::path::Path;

use super::digest::Digest;
use super::remembered::Remembered;
use super::store::{Cache, StoreError};

/// Bytes that are copied at a time.
const PIECE: usize = 1 << 18;
/// The largest description of an answer.
const LARGEST_ANSWER: u64 = 64 << 10;

/// Why an archive cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The cache fails.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The archive cannot be written.
    #[error("cannot write the archive: check its space")]
    Write(#[source] io::Error),
    /// The archive cannot be read.
    #[error("cannot read the archive: was it cut off?")]
    Read(#[source] io::Error),
    /// Something that a lock needs is not there.
    #[error("the cache does not have {0}, which the lock needs: build with that lock first")]
    Missing(Digest),
    /// A content is not what its name says.
    #[error("{name} in the archive is not what its name says: it was damaged or altered on its way")]
    Altered {
        /// The entry.
        name: String,
        /// What it is instead.
        #[source]
        source: StoreError,
    },
    /// Not an archive of a cache.
    #[error("the archive has {0:?}, which no cache has: is it an archive of `hostler cache export`?")]
    Stranger(String),
}

/// What was carried.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Carried {
    /// Contents.
    pub files: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Contents that were there already.
    pub known: u64,
}

impl Cache {
    /// Writes `only` these contents, or all, checked, to an archive.
    ///
    /// # Errors
    /// The cache or the archive fails, or something is not there.
    pub fn export(&self, only: Option<&[Digest]>, to: impl Write) -> Result<Carried, ArchiveError> {
        let mut builder = tar::Builder::new(to);
        let mut carried = Carried::default();
        let digests: Vec<Digest> = match only {
            Some(digests) => digests.to_vec(),
            None => self.contents()?.into_iter().map(|content| content.digest).collect(),
        };
        let mut done = HashSet::new();
        for digest in digests {
            if !done.insert(digest) {
                continue;
            }
            let file = match self.get(digest, None)? {
                Some(file) => file,
                None if only.is_some() => return Err(ArchiveError::Missing(digest)),
                None => continue,
            };
            let size = file.metadata().map_err(ArchiveError::Write)?.len();
            let name = digest.to_string();
            append(&mut builder, &format!("sha256/{}/{name}", &name[..2]), size, file.take(size))?;
            carried.files += 1;
            carried.bytes += size;
        }
        for (name, answer) in self.answers()? {
            if answer.digest.parse().is_ok_and(|digest| done.contains(&digest)) {
                let text = serde_json::to_vec(&answer).map_err(|error| ArchiveError::Write(error.into()))?;
                append(&mut builder, &format!("metadata/{name}"), text.len() as u64, text.as_slice())?;
            }
        }
        builder.into_inner().and_then(|mut to| to.flush()).map_err(ArchiveError::Write)?;
        Ok(carried)
    }

    /// Takes the contents of an archive, each checked.
    ///
    /// # Errors
    /// The archive is none, or something in it is not what its name says; what came before that stays.
    pub fn import(&self, from: impl Read) -> Result<Carried, ArchiveError> {
        let mut archive = tar::Archive::new(from);
        let mut carried = Carried::default();
        let mut buffer = vec![0; PIECE];
        // Raw: else the library reads names of any length into memory, and none here is long.
        for entry in archive.entries().map_err(ArchiveError::Read)?.raw(true) {
            let mut entry = entry.map_err(ArchiveError::Read)?;
            let name = String::from_utf8_lossy(&entry.path_bytes()).into_owned();
            let stranger = || ArchiveError::Stranger(name.clone());
            if !entry.header().entry_type().is_file() {
                return Err(stranger());
            }
            let parts: Vec<&str> = name.split('/').collect();
            match parts.as_slice() {
                ["sha256", _, digest] => {
                    let digest: Digest = digest.parse().map_err(|_| stranger())?;
                    if self.get(digest, None)?.is_some() {
                        carried.known += 1;
                        continue;
                    }
                    let mut writer = self.writer()?;
                    loop {
                        let count = entry.read(&mut buffer).map_err(ArchiveError::Read)?;
                        if count == 0 {
                            break;
                        }
                        writer.write(&buffer[..count])?;
                    }
                    let size = writer.size();
                    writer.commit(digest, size).map_err(|error| match error {
                        source @ StoreError::Mismatch { .. } => {
                            ArchiveError::Altered { name: name.clone(), source }
                        }
                        other => other.into(),
                    })?;
                    carried.files += 1;
                    carried.bytes += size;
                }
                ["metadata", address] => {
                    let address: Digest = address.parse().map_err(|_| stranger())?;
                    let mut text = Vec::new();
                    entry.take(LARGEST_ANSWER).read_to_end(&mut text).map_err(ArchiveError::Read)?;
                    let answer: Remembered = serde_json::from_slice(&text).map_err(|_| stranger())?;
                    // Whether it is still as upstream has it, only upstream is to say.
                    let answer = Remembered { etag: None, last_modified: None, ..answer };
                    // What this host has seen itself counts for more.
                    self.remember_first(address, &answer)?;
                }
                _ => return Err(stranger()),
            }
        }
        Ok(carried)
    }
}

fn append<W: Write>(
    builder: &mut tar::Builder<W>,
    name: &str,
    size: u64,
    content: impl Read,
) -> Result<(), ArchiveError> {
    let mut header = tar::Header::new_ustar();
    header.set_size(size);
    header.set_mode(0o644);
    // Nothing but the contents: the same cache gives the same archive.
    header.set_mtime(0);
    builder.append_data(&mut header, Path::new(name), content).map_err(ArchiveError::Write)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache() -> (tempfile::TempDir, Cache) {
        let directory = tempfile::tempdir().expect("temporary directory");
        let cache = Cache::open(directory.path()).expect("usable");
        (directory, cache)
    }

    fn filled() -> (tempfile::TempDir, Cache, Digest) {
        let (directory, cache) = cache();
        let digest = cache.put(b"hello").expect("written");
        cache.put(b"other").expect("written");
        let answer = Remembered {
            digest: digest.to_string(),
            size: 5,
            etag: Some("\"x\"".to_owned()),
            last_modified: Some("then".to_owned()),
            policy: None,
        };
        cache.remember("http://mirror.test/a", &answer).expect("written");
        (directory, cache, digest)
    }

    #[test]
    fn what_is_exported_is_imported() {
        let (_directory, from, digest) = filled();
        let mut bytes = Vec::new();
        assert_eq!(from.export(None, &mut bytes).expect("written").files, 2);
        let (_directory, to) = cache();
        let carried = to.import(bytes.as_slice()).expect("read");
        assert_eq!(carried, Carried { files: 2, bytes: 10, known: 0 });
        assert!(to.get(digest, 5).expect("readable").is_some());
        let answer = to.remembered("http://mirror.test/a").expect("there");
        assert_eq!((answer.size, answer.etag, answer.last_modified), (5, None, None));
        assert_eq!(to.import(bytes.as_slice()).expect("read").known, 2);
    }

    #[test]
    fn only_what_a_lock_needs_is_exported_and_all_of_it() {
        let (_directory, from, digest) = filled();
        let mut bytes = Vec::new();
        assert_eq!(from.export(Some(&[digest, digest]), &mut bytes).expect("written").files, 1);
        let missing = Digest::of(b"missing");
        let error = from.export(Some(&[missing]), Vec::new()).expect_err("missing");
        assert!(error.to_string().contains(&missing.to_string()), "{error}");
    }

    #[test]
    fn what_was_altered_on_its_way_is_refused() {
        let (_directory, from, digest) = filled();
        let mut bytes = Vec::new();
        from.export(Some(&[digest]), &mut bytes).expect("written");
        let place = bytes.windows(5).position(|window| window == b"hello").expect("there");
        bytes[place] = b'j';
        let (_directory, to) = cache();
        assert!(matches!(to.import(bytes.as_slice()), Err(ArchiveError::Altered { .. })));
        assert!(to.get(digest, 5).expect("readable").is_none());
        assert!(to.get(Digest::of(b"jello"), 5).expect("readable").is_none());
    }

    #[test]
    fn another_archive_is_refused_and_a_cut_one_as_well() {
        let mut builder = tar::Builder::new(Vec::new());
        append(&mut builder, "etc/passwd", 1, &b"x"[..]).expect("written");
        let bytes = builder.into_inner().expect("written");
        let (_directory, to) = cache();
        assert!(
            matches!(to.import(bytes.as_slice()), Err(ArchiveError::Stranger(name)) if name == "etc/passwd")
        );
        let (_directory, from, _) = filled();
        let mut bytes = Vec::new();
        from.export(None, &mut bytes).expect("written");
        assert!(to.import(&bytes[..514]).is_err());
    }

    #[test]
    fn a_name_without_end_is_refused_before_it_is_read() {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::GNULongName);
        header.set_size(1 << 40);
        header.set_path("x").expect("short");
        header.set_cksum();
        let mut rest = io::repeat(b'a').take(1 << 40);
        let (_directory, to) = cache();
        let error = to.import(header.as_bytes().chain(&mut rest)).expect_err("no cache has that");
        assert!(matches!(error, ArchiveError::Stranger(_)), "{error}");
        assert!(rest.limit() > (1 << 40) - (1 << 20), "it was read");
    }
}
