//! What debian-installer asks of an archive beside packages: its own packages (udebs), and the Release file
//! with a signature of its own.
//!
//! Everything is vouched for by the signed InRelease file: the udebs' indices are named in it, and a Release
//! file is only handed on when its text is the very same.

use std::collections::HashMap;
use std::sync::Arc;

use crate::cache::offer::{Archives, Offer, Offered};
use crate::cache::{Digest, FetchError, Fetcher, Metadata, StoreError, Wanted, last_part};
use crate::causes::in_one_line;
use crate::event::{Event, Sink};
use crate::lock::LockedFile;

use super::catalogue::is_inside;
use super::index::decompress;
use super::select::SelectError;
use super::selection::{Repository, Selection, Suite};
use super::signature::SignatureError;
use super::{control, signature};

/// The addresses of a selection, with those that debian-installer asks for.
pub struct InstallerArchives {
    archives: Archives,
    more: HashMap<String, Offered>,
}

impl InstallerArchives {
    /// Reads what the archives of `selection` have for debian-installer, which takes its own packages from
    /// the suite called `own`. Blocks for the network.
    ///
    /// # Errors
    /// Something cannot be had or trusted.
    pub fn read(
        selection: &Arc<Selection>,
        own: &str,
        fetcher: &Fetcher,
        sink: &dyn Sink,
    ) -> Result<Self, SelectError> {
        let mut more = HashMap::new();
        for repository in &selection.repositories {
            for suite in &repository.suites {
                add_release(repository, suite, fetcher, sink, &mut more)?;
                for component in suite.components.iter().filter(|_| suite.name == own) {
                    let folder = format!("{component}/debian-installer/binary-{}", selection.architecture);
                    add_udebs(repository, suite, &folder, fetcher, &mut more)?;
                }
            }
        }
        Ok(Self { archives: Archives::new(Arc::clone(selection)), more })
    }
}

impl Offer for InstallerArchives {
    fn find(&self, path: &str) -> Option<Offered> {
        self.more.get(path).cloned().or_else(|| self.archives.find(path))
    }
}

fn add_udebs(
    repository: &Repository,
    suite: &Suite,
    folder: &str,
    fetcher: &Fetcher,
    more: &mut HashMap<String, Offered>,
) -> Result<(), SelectError> {
    let index = ["xz", "gz"].iter().find_map(|suffix| {
        let index = format!("{folder}/Packages.{suffix}");
        let entry = *suite.release.indices.get(&index)?;
        Some((index, entry))
    });
    // Components other than main need not have any.
    let Some((index, entry)) = index else { return Ok(()) };
    let plain_size = suite.release.indices.get(&format!("{folder}/Packages")).map(|entry| entry.0);
    let compressed = fetcher.fetch(&suite.index(&repository.uris, &index, entry))?;
    let text = decompress(&format!("dists/{}/{index}", suite.name), &compressed, plain_size)?;
    let text = String::from_utf8_lossy(&text);
    for stanza in control::stanzas(&text) {
        let file = || {
            let path = stanza.get("Filename")?;
            let path = path.strip_prefix("./").unwrap_or(path);
            let (size, digest) = (stanza.get("Size")?.parse().ok()?, stanza.get("SHA256")?.parse().ok()?);
            let urls = repository.uris.iter().map(|uri| format!("{uri}/{path}")).collect();
            let wanted = Wanted { name: path.to_owned(), urls, size: Some(size), digest };
            is_inside(path).then(|| {
                (format!("/{}/{path}", repository.name), Offered { wanted, local: None, modified: None })
            })
        };
        more.extend(file());
    }
    Ok(())
}

/// `Release` and `Release.gpg`, where the archive has them and they say what InRelease says, with a signature by
/// the same keys. Under a lock it is the lock that has them, if the build that made it handed them on.
fn add_release(
    repository: &Repository,
    suite: &Suite,
    fetcher: &Fetcher,
    sink: &dyn Sink,
    more: &mut HashMap<String, Offered>,
) -> Result<(), SelectError> {
    let mut offer = |wanted: Wanted| {
        let path = format!("/{}/{}", repository.name, wanted.name);
        more.insert(path, Offered { wanted, local: None, modified: Some(suite.release.date) });
    };
    let wanted = |file: &str, digest: Digest, size: u64| {
        let name = format!("dists/{}/{file}", suite.name);
        let urls = repository.uris.iter().map(|uri| format!("{uri}/{name}")).collect();
        Wanted { name, urls, size: Some(size), digest }
    };
    if let Some(lock) = fetcher.lock() {
        for file in ["Release", "Release.gpg"] {
            let name = format!("dists/{}/{file}", suite.name);
            let is_it = |one: &&LockedFile| {
                one.name == name
                    && repository.uris.iter().any(|uri| one.urls.contains(&format!("{uri}/{name}")))
            };
            if let Some(one) = lock.files.iter().find(is_it) {
                offer(wanted(file, one.sha256, one.size));
            }
        }
        return Ok(());
    }
    let signed = fetcher.fetch(&suite.signed(&repository.uris))?;
    let name = format!("dists/{}/InRelease", suite.name);
    let scratch = fetcher.cache().scratch()?;
    let text = signature::verify(&signed, &repository.keyring, scratch.path(), fetcher.stop())
        .map_err(|source| SelectError::Signature { name, source })?;
    match apart(repository, suite, &text, fetcher) {
        Ok(files) => {
            for (file, digest, size) in files {
                offer(wanted(file, digest, size));
            }
        }
        Err(error) if error.is_theirs() => sink.event(Event::Warning(format!(
            "debian-installer may miss Release and Release.gpg of {}: {}",
            suite.name,
            in_one_line(&error)
        ))),
        Err(ApartError::Fetch(error)) => return Err(error.into()),
        Err(ApartError::Store(error)) => return Err(error.into()),
        Err(ApartError::Signature(source)) => {
            return Err(SelectError::Signature { name: format!("dists/{}/Release", suite.name), source });
        }
        Err(ApartError::Differs) => {}
    }
    Ok(())
}

/// Why a Release file with its signature apart is not handed on.
#[derive(Debug, thiserror::Error)]
enum ApartError {
    #[error(transparent)]
    Fetch(#[from] FetchError),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("its signature is not trusted")]
    Signature(#[from] SignatureError),
    #[error("Release differs from what InRelease signs: is the mirror being updated?")]
    Differs,
}

impl ApartError {
    /// Whether an upstream is to blame.
    fn is_theirs(&self) -> bool {
        match self {
            Self::Fetch(error) => !matches!(error, FetchError::Stopped { .. } | FetchError::Store { .. }),
            Self::Signature(error) => matches!(error, SignatureError::Distrusted(_)),
            Self::Store(_) => false,
            Self::Differs => true,
        }
    }
}

/// Brings both into the cache, from one mirror. Name, digest and bytes of each.
fn apart(
    repository: &Repository,
    suite: &Suite,
    text: &str,
    fetcher: &Fetcher,
) -> Result<[(&'static str, Digest, u64); 2], ApartError> {
    let folder = format!("dists/{}", suite.name);
    let url = |root: &str, file: &str| format!("{root}/{folder}/{file}");
    let signature_of = |release: &Metadata| -> Result<Metadata, ApartError> {
        if String::from_utf8_lossy(&release.bytes).trim_end() != text.trim_end() {
            return Err(ApartError::Differs);
        }
        let root = repository.uris.iter().find(|uri| url(uri, "Release") == release.url());
        let beside: Vec<String> = root.map(|root| url(root, "Release.gpg")).into_iter().collect();
        let check = |signature: &Metadata| -> Result<(), ApartError> {
            let scratch = fetcher.cache().scratch()?;
            let (keyring, stop) = (&repository.keyring, fetcher.stop());
            signature::verify_detached(&release.bytes, &signature.bytes, keyring, scratch.path(), stop)?;
            Ok(())
        };
        let name = format!("{folder}/Release.gpg");
        Ok(fetcher.usable_metadata(&name, &beside, check, ApartError::is_theirs)?.0)
    };
    let urls: Vec<String> = repository.uris.iter().map(|uri| url(uri, "Release")).collect();
    let name = format!("{folder}/Release");
    let (release, signature) = fetcher.usable_metadata(&name, &urls, signature_of, ApartError::is_theirs)?;
    let keep = |file: &'static str, answer: &Metadata| -> Result<_, ApartError> {
        let archive = repository.uris.first().map_or("", |uri| last_part(uri));
        let digest = fetcher.keep(answer, &format!("{file} {:?} {archive:?}", suite.name))?;
        Ok((file, digest, answer.bytes.len() as u64))
    };
    Ok([keep("Release", &release)?, keep("Release.gpg", &signature)?])
}
