//! What debian-installer asks of an archive beside packages: its own packages (udebs), and the Release file
//! with a signature of its own.
//!
//! Everything is vouched for by the signed InRelease file: the udebs' indices are named in it, and a Release
//! file is only handed on when its text is the very same.

use std::collections::HashMap;
use std::sync::Arc;

use crate::cache::offer::{Archives, Offer, Offered};
use crate::cache::{Fetcher, Wanted};
use crate::event::{Event, Sink};

use super::index::decompress;
use super::select::SelectError;
use super::selection::{Repository, Selection, Suite};
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
    let plain_size =
        suite.release.indices.get(&format!("{folder}/Packages")).map_or(1 << 26, |entry| entry.0);
    let compressed = fetcher.fetch(&suite.index(&repository.uris, &index, entry))?;
    let text = decompress(&format!("dists/{}/{index}", suite.name), &compressed, plain_size)?;
    let text = String::from_utf8_lossy(&text);
    for stanza in control::stanzas(&text) {
        let file = || {
            let path = stanza.get("Filename")?;
            let path = path.strip_prefix("./").unwrap_or(path);
            let inside = path.split('/').all(|part| !part.is_empty() && part != "." && part != "..");
            let (size, digest) = (stanza.get("Size")?.parse().ok()?, stanza.get("SHA256")?.parse().ok()?);
            let urls = repository.uris.iter().map(|uri| format!("{uri}/{path}")).collect();
            let wanted = Wanted { name: path.to_owned(), urls, size: Some(size), digest };
            inside.then(|| (format!("/{}/{path}", repository.name), Offered { wanted, modified: None }))
        };
        more.extend(file());
    }
    Ok(())
}

/// `Release` and `Release.gpg`, where the archive has them and they say what InRelease says.
fn add_release(
    repository: &Repository,
    suite: &Suite,
    fetcher: &Fetcher,
    sink: &dyn Sink,
    more: &mut HashMap<String, Offered>,
) -> Result<(), SelectError> {
    let signed = fetcher.fetch(&suite.signed(&repository.uris))?;
    let scratch = fetcher.cache().scratch()?;
    let name = format!("dists/{}/InRelease", suite.name);
    let text = signature::verify(&signed, &repository.keyring, scratch.path(), fetcher.stop())
        .map_err(|source| SelectError::Signature { name, source })?;
    let get = |file: &str| {
        let name = format!("dists/{}/{file}", suite.name);
        let urls: Vec<String> = repository.uris.iter().map(|uri| format!("{uri}/{name}")).collect();
        fetcher.metadata(&name, &urls).map(|answer| (name, urls, answer.bytes))
    };
    for file in ["Release", "Release.gpg"] {
        let (name, urls, bytes) = match get(file) {
            Ok(got) => got,
            Err(error) => {
                sink.event(Event::Warning(format!("debian-installer may miss {file}: {error}")));
                return Ok(());
            }
        };
        if file == "Release" && String::from_utf8_lossy(&bytes).trim_end() != text.trim_end() {
            sink.event(Event::Warning(format!(
                "{name} differs from what InRelease signs, and is not handed on; is the mirror being updated?"
            )));
            return Ok(());
        }
        let size = Some(bytes.len() as u64);
        let digest = fetcher.cache().put(&bytes)?;
        let wanted = Wanted { name: name.clone(), urls, size, digest };
        let offered = Offered { wanted, modified: Some(suite.release.date) };
        more.insert(format!("/{}/{name}", repository.name), offered);
    }
    Ok(())
}
