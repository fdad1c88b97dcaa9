//! Package indices: which of them a suite has, and their text.

use std::io::Read as _;

use crate::cache::{Digest, Wanted};
use crate::xz;

use super::select::SelectError;
use super::selection::Suite;

/// For an index whose uncompressed size the Release file does not tell.
const LIMIT: u64 = 1 << 30;

/// A package index as the Release file describes it.
pub(super) struct IndexFile {
    pub(super) path: String,
    pub(super) size: u64,
    digest: Digest,
    /// Bytes of its text, where they are told.
    pub(super) plain_size: Option<u64>,
}

impl IndexFile {
    pub(super) fn wanted(&self, uris: &[String], suite: &Suite) -> Wanted {
        suite.index(uris, &self.path, (self.size, self.digest))
    }
}

/// The indices of a suite's components.
pub(super) fn index_files(suite: &Suite, architecture: &str) -> Result<Vec<IndexFile>, SelectError> {
    let mut files = Vec::new();
    for component in &suite.components {
        let describe = |architecture: &str| {
            let (path, size, digest) = suite.release.package_index(component, architecture)?;
            let plain = format!("{component}/binary-{architecture}/Packages");
            let plain_size = suite.release.indices.get(&plain).map(|entry| entry.0);
            Some(IndexFile { path, size, digest, plain_size })
        };
        files.push(describe(architecture).ok_or_else(|| SelectError::NoIndex {
            suite: suite.name.clone(),
            component: component.clone(),
        })?);
        if suite.release.separate_all {
            files.extend(describe("all"));
        }
    }
    Ok(files)
}

/// The text of the index called `name`. Its Release file may say that it has `plain_size` bytes: then it has
/// neither more nor less.
pub(crate) fn decompress(
    name: &str,
    compressed: &[u8],
    plain_size: Option<u64>,
) -> Result<Vec<u8>, SelectError> {
    let failed = |source| SelectError::Decompress { name: name.to_owned(), source };
    let most = plain_size.unwrap_or(LIMIT).min(LIMIT);
    let mut text = Vec::with_capacity(usize::try_from(plain_size.map_or(0, |_| most)).unwrap_or(0));
    // A file may be several compressed ones in a row, as parallel compressors write them. One byte more than
    // promised is enough to tell that there is more.
    let limit = most + 1;
    let read = match name.rsplit_once('.').map(|(_, suffix)| suffix) {
        Some("xz") => xz::decoder(compressed).map_err(failed)?.take(limit).read_to_end(&mut text),
        Some("gz") => flate2::read::MultiGzDecoder::new(compressed).take(limit).read_to_end(&mut text),
        _ => compressed.take(limit).read_to_end(&mut text),
    };
    let came = read.map_err(failed)? as u64;
    if came == limit {
        let why = match plain_size {
            Some(size) if size <= LIMIT => "it is larger than its Release file says".to_owned(),
            _ => format!("it is larger than {}, the most that is read", bytesize::ByteSize(LIMIT)),
        };
        return Err(failed(std::io::Error::other(why)));
    }
    if plain_size.is_some_and(|size| came < size) {
        return Err(failed(std::io::Error::other("it is shorter than its Release file says")));
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_index_larger_than_promised_is_refused() {
        for size in [None, Some(3)] {
            assert_eq!(decompress("Packages", b"abc", size).expect("fits"), b"abc");
        }
        assert!(decompress("Packages", b"abcd", Some(3)).is_err());
        assert!(decompress("Packages.xz", b"abcd", Some(3)).is_err());
    }

    #[test]
    fn an_index_shorter_than_promised_is_refused() {
        let error = decompress("Packages", b"abc", Some(4)).expect_err("torn");
        assert!(crate::causes::in_one_line(&error).contains("shorter"), "{error}");
    }

    #[test]
    fn an_index_of_several_streams_is_read_to_its_end() {
        use std::io::Write as _;
        let gz = |text: &[u8]| {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(text).expect("memory");
            encoder.finish().expect("memory")
        };
        let xz = |text: &[u8]| {
            let mut encoder = liblzma::write::XzEncoder::new(Vec::new(), 0);
            encoder.write_all(text).expect("memory");
            encoder.finish().expect("memory")
        };
        let both = |one: Vec<u8>, other: Vec<u8>| [one, other].concat();
        assert_eq!(decompress("P.gz", &both(gz(b"ab"), gz(b"cd")), Some(4)).expect("fits"), b"abcd");
        assert_eq!(decompress("P.xz", &both(xz(b"ab"), xz(b"cd")), Some(4)).expect("fits"), b"abcd");
        assert!(decompress("P.xz", &both(xz(b"ab"), xz(b"cd")), Some(3)).is_err());
    }
}
