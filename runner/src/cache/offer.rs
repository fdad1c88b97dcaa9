//! Which addresses the mirror has, and what is behind them. Pure.
//!
//! ```text
//! /<repository>/dists/<suite>/InRelease                       the verified file, as upstream signed it
//! /<repository>/dists/<suite>/<index>                         whatever that file names
//! /<repository>/dists/<suite>/<folder>/by-hash/SHA256/<hex>   the same
//! /<repository>/pool/…                                        whatever the package indices name
//! ```

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use crate::beside::Beside;
use crate::debian::catalogue::PackageId;
use crate::debian::{Repository, Selection};

use super::digest::Digest;
use super::fetch::Wanted;

/// A file that lies on this host.
#[derive(Clone, Debug)]
pub struct Local {
    /// The folder that it is found below.
    pub folder: Beside,
    /// Its path there.
    pub path: PathBuf,
}

/// What is behind an address.
#[derive(Clone, Debug)]
pub struct Offered {
    /// The file.
    pub wanted: Wanted,
    /// Where it lies, if nobody has to be asked for it.
    pub local: Option<Local>,
    /// When what is behind the address last changed, in seconds since 1970, where that is known.
    pub modified: Option<u64>,
}

/// The addresses of a mirror.
pub trait Offer: Send + Sync {
    /// What is behind the decoded `path` of an address, which begins with a slash.
    fn find(&self, path: &str) -> Option<Offered>;
}

impl<O: Offer + ?Sized> Offer for Box<O> {
    fn find(&self, path: &str) -> Option<Offered> {
        (**self).find(path)
    }
}

/// The addresses of a selection: everything that its verified indices name.
pub struct Archives {
    selection: Arc<Selection>,
    packages: HashMap<(usize, Box<str>), PackageId>,
}

impl Archives {
    /// Everything that the verified indices of `selection` name.
    #[must_use]
    pub fn new(selection: Arc<Selection>) -> Self {
        let catalogue = &selection.catalogue;
        let packages = catalogue
            .packages()
            .filter_map(|package| {
                let (repository, path) = catalogue.path(package)?;
                let path = path.strip_prefix("./").unwrap_or(path);
                Some(((repository, path.into()), package))
            })
            .collect();
        Self { selection, packages }
    }
}

impl Offer for Archives {
    fn find(&self, path: &str) -> Option<Offered> {
        let (name, path) = path.strip_prefix('/')?.split_once('/')?;
        let (number, repository) =
            self.selection.repositories.iter().enumerate().find(|(_, repository)| repository.name == name)?;
        if let Some(rest) = path.strip_prefix("dists/") {
            return find_metadata(repository, rest);
        }
        let package = self.packages.get(&(number, path.into()))?;
        let file = self.selection.catalogue.file(*package).ok()?;
        Some(Offered { wanted: self.selection.wanted(&file), local: None, modified: None })
    }
}

/// Files in a folder of their own, beside what another offers.
pub struct WithFiles<O> {
    folder: &'static str,
    files: HashMap<String, Wanted>,
    other: O,
}

impl<O: Offer> WithFiles<O> {
    /// These files under these names in `folder`, which has nothing else, and all of `other`.
    #[must_use]
    pub fn new(folder: &'static str, files: &[(String, Wanted)], other: O) -> Self {
        Self { folder, files: files.iter().cloned().collect(), other }
    }
}

impl<O: Offer> Offer for WithFiles<O> {
    fn find(&self, path: &str) -> Option<Offered> {
        let name = path.strip_prefix('/').and_then(|path| path.strip_prefix(self.folder)?.strip_prefix('/'));
        match name.filter(|_| !self.files.is_empty()) {
            Some(name) => {
                Some(Offered { wanted: self.files.get(name)?.clone(), local: None, modified: None })
            }
            None => self.other.find(path),
        }
    }
}

fn find_metadata(repository: &Repository, path: &str) -> Option<Offered> {
    // A suite's name may have a slash: in "bookworm/updates/InRelease" it is not "bookworm".
    let suites = repository.suites.iter().filter_map(|suite| {
        let path = path.strip_prefix(suite.name.as_str())?.strip_prefix('/')?;
        Some((suite, path))
    });
    let (suite, path) = suites.max_by_key(|(suite, _)| suite.name.len())?;
    let offered = |wanted| Some(Offered { wanted, local: None, modified: Some(suite.release.date) });
    if path == "InRelease" {
        return offered(suite.signed(&repository.uris));
    }
    let indices = &suite.release.indices;
    if let Some((folder, written)) = path.rsplit_once("/by-hash/SHA256/") {
        let digest: Digest = written.parse().ok()?;
        // By one spelling only: what was handed out is remembered by its path, and a guest has time to spell.
        if digest.to_string() != written {
            return None;
        }
        let (index, entry) = indices.iter().find(|(index, entry)| {
            entry.1 == digest && index.rsplit_once('/').is_some_and(|(parent, _)| parent == folder)
        })?;
        return offered(suite.index(&repository.uris, index, *entry));
    }
    let entry = indices.get(path)?;
    offered(suite.index(&repository.uris, path, *entry))
}

/// Decodes `%xx` in the path of an address; `None` when the result is not text or the code is cut.
#[must_use]
pub fn decode(path: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(path.len());
    let mut rest = path.bytes();
    while let Some(byte) = rest.next() {
        if byte == b'%' {
            let mut digit = || char::from(rest.next()?).to_digit(16);
            bytes.push(u8::try_from(digit()? * 16 + digit()?).ok()?);
        } else {
            bytes.push(byte);
        }
    }
    String::from_utf8(bytes).ok()
}

/// The most parts that are given in one answer; clients of zchunk files ask for up to 256.
const MOST_PARTS: usize = 256;

/// The parts of a file of `size` bytes that a `Range` header asks for: first byte and length of each. None
/// means the whole, which also answers what is not understood, or asks for more than there is (RFC 9110, 14.2).
///
/// # Errors
/// All of it lies beyond the end.
pub fn ranges(header: Option<&str>, size: u64) -> Result<Vec<(u64, u64)>, BeyondEnd> {
    let Some(list) = header.and_then(|value| value.trim().strip_prefix("bytes=")) else {
        return Ok(Vec::new());
    };
    let mut parts = Vec::new();
    let mut total = 0_u64;
    for range in list.split(',') {
        match one_range(range, size) {
            Some(Ok((start, length))) => {
                total = total.saturating_add(length);
                parts.push((start, length));
            }
            Some(Err(BeyondEnd)) => {}
            None => return Ok(Vec::new()),
        }
    }
    if parts.is_empty() {
        return Err(BeyondEnd);
    }
    // Parts that overlap would be a way to have much sent for little.
    if parts.len() > 1 && (parts.len() > MOST_PARTS || total > size) {
        return Ok(Vec::new());
    }
    Ok(parts)
}

fn one_range(range: &str, size: u64) -> Option<Result<(u64, u64), BeyondEnd>> {
    let (first, last) = range.split_once('-')?;
    let (start, end) = match (first.trim(), last.trim()) {
        ("", count) => (size.saturating_sub(count.parse().ok()?), size),
        (start, "") => (start.parse().ok()?, size),
        (start, end) => {
            let (start, end): (u64, u64) = (start.parse().ok()?, end.parse().ok()?);
            if start > end {
                return None;
            }
            (start, end.saturating_add(1).min(size))
        }
    };
    Some(if start >= end { Err(BeyondEnd) } else { Ok((start, end - start)) })
}

/// The range lies beyond the end of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BeyondEnd;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::debian::Suite;
    use crate::debian::catalogue::Catalogue;
    use crate::debian::release::Release;

    fn offer() -> Archives {
        let digest = Digest::of(b"x");
        let release = Release::parse(&format!(
            "Codename: s\nDate: Sat, 21 Nov 2026 00:53:02 UTC\nAcquire-By-Hash: yes\nArchitectures: amd64\nSHA256:\n {digest} 1 main/binary-amd64/Packages.xz\n"
        ))
        .expect("valid");
        let mut catalogue = Catalogue::default();
        let text = format!(
            "Package: a\nVersion: 1\nArchitecture: all\nFilename: pool/a+b.deb\nSize: 1\nSHA256: {digest}\n\nPackage: e\nVersion: 1\nArchitecture: all\nFilename: ../etc/passwd\nSize: 1\nSHA256: {digest}\n"
        );
        catalogue.add(0, text.into_bytes(), "amd64").expect("valid");
        Archives::new(Arc::new(Selection {
            architecture: "amd64".to_owned(),
            repositories: vec![Repository {
                name: "debian".to_owned(),
                uris: vec!["http://one.test/d".to_owned(), "http://two.test/d".to_owned()],
                own: Vec::new(),
                keyring: "/k".into(),
                suites: vec![Suite {
                    name: "s".to_owned(),
                    components: vec!["main".to_owned()],
                    in_release: (Digest::of(b"signed"), 6),
                    release,
                }],
            }],
            catalogue,
            packages: Vec::new(),
            own_keyring: false,
        }))
    }

    #[test]
    fn what_is_named_is_offered_and_nothing_else() {
        let offer = offer();
        let urls = |path: &str| match offer.find(path) {
            Some(offered) => offered.wanted.urls,
            None => Vec::new(),
        };
        assert_eq!(
            urls("/debian/pool/a+b.deb"),
            ["http://one.test/d/pool/a+b.deb", "http://two.test/d/pool/a+b.deb"]
        );
        let hash = Digest::of(b"x");
        let by_hash = format!("/debian/dists/s/main/binary-amd64/by-hash/SHA256/{hash}");
        let spelled = by_hash.replace(&hash.to_string(), &hash.to_string().to_uppercase());
        assert!(spelled != by_hash && offer.find(&spelled).is_none());
        assert_eq!(urls(&by_hash).len(), 4);
        assert_eq!(urls("/debian/dists/s/main/binary-amd64/Packages.xz"), urls(&by_hash));
        let signed = offer.find("/debian/dists/s/InRelease").expect("offered");
        assert_eq!((signed.wanted.digest, signed.wanted.size), (Digest::of(b"signed"), Some(6)));
        assert_eq!(signed.modified, Some(1_795_222_382));
        for path in [
            "/debian/pool/b.deb",
            "/debian/../etc/passwd",
            "/other/pool/a+b.deb",
            "/debian/dists/t/InRelease",
            "/debian/dists/s/Release",
            "/debian/dists/s/contrib/by-hash/SHA256/e3",
            "/",
            "",
        ] {
            assert!(offer.find(path).is_none(), "{path}");
        }
    }

    #[test]
    fn files_are_offered_beside_the_archives() {
        let wanted =
            Wanted { name: "a".to_owned(), urls: Vec::new(), size: Some(1), digest: Digest::of(b"a") };
        let with = WithFiles::new("downloads", &[("a".to_owned(), wanted.clone())], offer());
        assert_eq!(with.find("/downloads/a").map(|offered| offered.wanted), Some(wanted));
        assert!(with.find("/downloads/b").is_none());
        assert!(with.find("/debian/dists/s/InRelease").is_some());
    }

    #[test]
    fn ranges_are_parts_of_the_file() {
        let of = |text: &str| ranges(Some(text), 10);
        assert_eq!(ranges(None, 10), Ok(vec![]));
        assert_eq!(of("bytes=2-4"), Ok(vec![(2, 3)]));
        assert_eq!(of("bytes=2-"), Ok(vec![(2, 8)]));
        assert_eq!(of("bytes=-3"), Ok(vec![(7, 3)]));
        assert_eq!(of("bytes=8-99"), Ok(vec![(8, 2)]));
        assert_eq!(of("bytes=10-"), Err(BeyondEnd));
        assert_eq!(of("bytes=-0"), Err(BeyondEnd));
        assert_eq!(of("bytes=4-2"), Ok(vec![]));
        assert_eq!(of("bytes=x-2"), Ok(vec![]));
        assert_eq!(of("lines=1-2"), Ok(vec![]));
        assert_eq!(of("bytes=1-2,4-5, 9-"), Ok(vec![(1, 2), (4, 2), (9, 1)]));
        // One that lies beyond is left out; those that overlap are the whole file.
        assert_eq!(of("bytes=1-2,40-"), Ok(vec![(1, 2)]));
        assert_eq!(of("bytes=40-,50-"), Err(BeyondEnd));
        assert_eq!(of("bytes=0-9,0-9"), Ok(vec![]));
        let many = format!("bytes={}", vec!["1-1"; MOST_PARTS + 1].join(","));
        assert_eq!(ranges(Some(&many), 1 << 20), Ok(vec![]));
    }

    #[test]
    fn codes_in_paths_are_decoded() {
        assert_eq!(decode("/a%2bb%7E").as_deref(), Some("/a+b~"));
        assert_eq!(decode("/a%2"), None);
        assert_eq!(decode("/a%ff"), None);
    }

    proptest::proptest! {
        #[test]
        fn a_range_is_always_inside(text in "(bytes=)?[0-9]{0,3}-?[0-9]{0,20}(,[0-9]{0,3}-[0-9]{0,3})?", size in 0..2000_u64) {
            for (start, length) in ranges(Some(&text), size).unwrap_or_default() {
                proptest::prop_assert!(length > 0 && start + length <= size);
            }
        }

        #[test]
        fn no_address_panics(path in "(/|debian|dists|s|%|%2f|by-hash/SHA256|InRelease|é){0,12}") {
            if let Some(path) = decode(&path) {
                let _ = offer().find(&path);
            }
        }
    }
}
