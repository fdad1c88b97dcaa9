//! From a recipe to the exact files of a build.
//!
//! Asks upstream for the signed Release file of each suite, checks it, reads the package indices it
//! names and resolves the recipe's packages. Emits progress, notes and warnings; the caller brackets
//! the stage. Deliberately absent: fetching packages (see [`fetch`], or the mirror on demand).

use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::cache::{Digest, FetchError, Fetcher, StoreError, Wanted};
use crate::event::{Event, Sink, Stage};
use crate::recipe::{PackageSource, Recipe};

use super::catalogue::{Catalogue, CatalogueError, PackageFile, PackageId};
use super::release::{Release, ReleaseError};
use super::resolve::{self, ResolveError};
use super::signature::{self, SignatureError};
use super::sources::{self, Chosen, SourcesError};

/// Where Debian's package of its own keys puts them.
const DEBIAN_KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// For an index whose uncompressed size the Release file does not tell.
const INDEX_LIMIT: u64 = 1 << 30;

/// Why packages cannot be chosen.
#[derive(Debug, thiserror::Error)]
pub enum SelectError {
    /// The host's apt sources do not serve.
    #[error(transparent)]
    Sources(#[from] SourcesError),
    /// A file cannot be had.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The cache fails.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A Release file is not trusted.
    #[error("cannot trust {name}")]
    Signature {
        /// The file.
        name: String,
        /// Why.
        #[source]
        source: SignatureError,
    },
    /// A Release file is not the one wanted, or too old.
    #[error("cannot use {name}")]
    Release {
        /// The file.
        name: String,
        /// Why.
        #[source]
        source: ReleaseError,
    },
    /// A component that the archive does not have.
    #[error("suite {suite} has no package index for component {component}: check debian.components")]
    NoIndex {
        /// The suite.
        suite: String,
        /// The component.
        component: String,
    },
    /// An index cannot be decompressed.
    #[error("cannot decompress {name}: the archive is damaged, tell its maintainers")]
    Decompress {
        /// The file.
        name: String,
        /// What the decoder said.
        #[source]
        source: std::io::Error,
    },
    /// An index cannot be used.
    #[error("cannot use {name}")]
    Catalogue {
        /// The index or package.
        name: String,
        /// Why.
        #[source]
        source: CatalogueError,
    },
    /// The packages cannot be installed together.
    #[error("cannot choose packages")]
    Resolve(#[from] ResolveError),
}

/// One archive.
#[derive(Clone, Debug)]
pub struct Repository {
    /// Its name in the guest's addresses: a single safe path component.
    pub name: String,
    /// Roots of its mirrors, without a slash at the end.
    pub uris: Vec<String>,
    /// The keyring its signatures were checked with.
    pub keyring: PathBuf,
    /// The suites in use.
    pub suites: Vec<Suite>,
}

/// One suite of an archive.
#[derive(Clone, Debug)]
pub struct Suite {
    /// Its name as in the path `dists/<name>`.
    pub name: String,
    /// Components in use.
    pub components: Vec<String>,
    /// Digest and bytes of its InRelease file, which is in the cache.
    pub in_release: (Digest, u64),
    /// What the signed text says.
    pub release: Release,
}

impl Suite {
    /// The paths under an archive's root at which an index can be had, best first: by its digest it is
    /// found even while the mirror is just being updated.
    #[must_use]
    pub fn index_paths(&self, index: &str, digest: Digest) -> Vec<String> {
        let root = format!("dists/{}", self.name);
        let by_name = format!("{root}/{index}");
        match index.rsplit_once('/') {
            Some((folder, _)) if self.release.by_hash => {
                vec![format!("{root}/{folder}/by-hash/SHA256/{digest}"), by_name]
            }
            _ => vec![by_name],
        }
    }
}

/// A package of the build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Package {
    /// Its place in the catalogue.
    pub id: PackageId,
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
    /// Its file.
    pub file: PackageFile,
    /// Did it come only because another needs it?
    pub automatic: bool,
}

/// Everything a build needs to know of its archives.
pub struct Selection {
    /// Debian's name of the architecture.
    pub architecture: String,
    /// The archives.
    pub repositories: Vec<Repository>,
    /// All packages they have.
    pub catalogue: Catalogue,
    /// The build's packages, in an order in which preinst scripts can be run.
    pub packages: Vec<Package>,
    /// Did the recipe name its own keyring?
    pub own_keyring: bool,
}

impl Selection {
    /// What the cache needs to know to fetch a package's file.
    #[must_use]
    pub fn wanted(&self, file: &PackageFile) -> Wanted {
        let uris = self.repositories.get(file.repository).map_or(&[][..], |one| &one.uris);
        Wanted {
            name: file.path.clone(),
            urls: uris.iter().map(|uri| format!("{uri}/{}", file.path)).collect(),
            size: file.size,
            digest: file.digest,
        }
    }

    /// Bytes of all packages of the build.
    #[must_use]
    pub fn download_size(&self) -> u64 {
        self.packages.iter().map(|package| package.file.size).sum()
    }

    /// Bytes that the build's packages say they occupy once installed.
    #[must_use]
    pub fn installed_size(&self) -> u64 {
        let kibibytes = |package: &Package| -> u64 {
            let field = self.catalogue.stanza(package.id).get("Installed-Size");
            field.and_then(|value| value.parse().ok()).unwrap_or(0)
        };
        self.packages.iter().map(kibibytes).sum::<u64>().saturating_mul(1024)
    }

    /// A `sources.list` in which `root` gives the address of each repository's root.
    #[must_use]
    pub fn sources_list(&self, root: impl Fn(&Repository) -> String) -> String {
        let mut text = String::new();
        for repository in &self.repositories {
            let option = match self.keyring_in_image(repository) {
                Some(path) => format!("[signed-by=/{path}] "),
                None => String::new(),
            };
            for suite in &repository.suites {
                text.push_str(&format!(
                    "deb {option}{} {} {}\n",
                    root(repository),
                    suite.name,
                    suite.components.join(" ")
                ));
            }
        }
        text
    }

    /// Where in the image the keyring of `repository` goes; Debian's own comes with a package.
    #[must_use]
    pub fn keyring_in_image(&self, repository: &Repository) -> Option<String> {
        self.own_keyring.then(|| format!("etc/apt/keyrings/{}.gpg", repository.name))
    }

    /// The `sources.list` of the builder guest, for a mirror at `base`, such as
    /// `http://10.0.2.100:8080`.
    #[must_use]
    pub fn guest_sources(&self, base: &str) -> String {
        self.sources_list(|repository| format!("{}/{}", base.trim_end_matches('/'), repository.name))
    }
}

/// Chooses the packages of `recipe`. `host` is the root of the file system whose apt sources count:
/// `/` but for tests. Blocks for the network.
///
/// # Errors
/// Something cannot be had, trusted or resolved.
pub fn select(
    recipe: &Recipe,
    fetcher: &Fetcher,
    host: &Path,
    sink: &dyn Sink,
) -> Result<Selection, SelectError> {
    let wanted = &recipe.debian;
    let architecture = wanted.architecture.as_str();
    let chosen = match &wanted.source {
        PackageSource::HostApt => sources::choose(
            &sources::read(host)?,
            &wanted.suite,
            architecture,
            &wanted.components,
            wanted.keyring.is_some(),
        )?,
        PackageSource::Url(url) => vec![Chosen {
            uris: vec![url.clone()],
            suite: wanted.suite.clone(),
            components: wanted.components.clone(),
            keyring: None,
        }],
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let damaged = fetcher.counted().damaged;
    let mut repositories: Vec<Repository> = Vec::new();
    let mut catalogue = Catalogue::default();
    for one in chosen {
        let keyring = match (&wanted.keyring, &one.keyring) {
            (Some(keyring), _) => keyring.clone(),
            (None, Some(keyring)) => host.join(keyring.strip_prefix("/").unwrap_or(keyring)),
            (None, None) => host.join(DEBIAN_KEYRING.trim_start_matches('/')),
        };
        let suite = read_suite(&one, &keyring, architecture, now, fetcher, sink)?;
        let third_party = wanted.source == PackageSource::HostApt && wanted.keyring.is_none();
        if third_party && suite.release.origin != "Debian" {
            sink.event(Event::Note(format!(
                "suite {} of origin {:?} is not Debian's: left out",
                suite.name, suite.release.origin
            )));
            continue;
        }
        let repository = repositories
            .iter()
            .position(|known| known.uris == one.uris && known.keyring == keyring)
            .unwrap_or_else(|| {
                repositories.push(Repository {
                    name: repository_name(&one.uris, &repositories),
                    uris: one.uris.clone(),
                    keyring,
                    suites: Vec::new(),
                });
                repositories.len() - 1
            });
        for index in index_files(&suite, architecture)? {
            let name = format!("dists/{}/{}", suite.name, index.path);
            sink.event(Event::Progress {
                stage: Stage::Select,
                doing: format!("package index {}/{}", suite.name, index.path),
                bytes: 0,
                total: Some(index.size),
            });
            let compressed = fetcher.fetch(&index.wanted(&one.uris, &suite))?;
            let text = decompress(&name, &compressed, index.plain_size)?;
            catalogue
                .add(repository, text, architecture)
                .map_err(|source| SelectError::Catalogue { name, source })?;
        }
        repositories[repository].suites.push(suite);
    }
    tell_damage(fetcher, damaged, sink);
    let packages = choose_packages(&catalogue, architecture, &wanted.packages)?;
    Ok(Selection {
        architecture: architecture.to_owned(),
        repositories,
        catalogue,
        packages,
        own_keyring: wanted.keyring.is_some(),
    })
}

/// Fetches the files of all packages into the cache. Blocks for the network.
///
/// # Errors
/// One cannot be had.
pub fn fetch(selection: &Selection, fetcher: &Fetcher, sink: &dyn Sink) -> Result<(), FetchError> {
    let wanted = selection.packages.iter().map(|package| selection.wanted(&package.file)).collect();
    let damaged = fetcher.counted().damaged;
    fetcher.fetch_all(wanted, Stage::Fetch, sink)?;
    tell_damage(fetcher, damaged, sink);
    Ok(())
}

/// What was damaged is whole again, but its disk may be about to fail.
fn tell_damage(fetcher: &Fetcher, before: u64, sink: &dyn Sink) {
    let found = fetcher.counted().damaged - before;
    if found > 0 {
        sink.event(Event::Warning(format!(
            "{found} damaged files were found in the cache and fetched again: look after its disk"
        )));
    }
}

fn choose_packages(
    catalogue: &Catalogue,
    architecture: &str,
    asked: &[String],
) -> Result<Vec<Package>, SelectError> {
    let base: Vec<PackageId> = catalogue.base().collect();
    let mut wanted = vec!["apt".to_owned()];
    // Without it, init-system-helpers would pull in usrmerge and with it perl, to convert a tree that
    // is laid out merged from the start.
    if catalogue.candidate("usr-is-merged").is_some() {
        wanted.push("usr-is-merged".to_owned());
    }
    wanted.extend_from_slice(asked);
    let resolution = resolve::resolve(catalogue, architecture, &base, &wanted)?;
    resolution.packages.iter().map(|id| describe(catalogue, *id, resolution.automatic.contains(id))).collect()
}

pub(crate) fn describe(
    catalogue: &Catalogue,
    id: PackageId,
    automatic: bool,
) -> Result<Package, SelectError> {
    let name = catalogue.name(id).to_owned();
    let file = catalogue.file(id).map_err(|source| SelectError::Catalogue { name: name.clone(), source })?;
    Ok(Package { id, name, version: catalogue.version(id).to_owned(), file, automatic })
}

fn read_suite(
    chosen: &Chosen,
    keyring: &Path,
    architecture: &str,
    now: u64,
    fetcher: &Fetcher,
    sink: &dyn Sink,
) -> Result<Suite, SelectError> {
    let name = format!("dists/{}/InRelease", chosen.suite);
    sink.event(Event::Progress {
        stage: Stage::Select,
        doing: format!("signed Release file of {}", chosen.suite),
        bytes: 0,
        total: None,
    });
    let urls: Vec<String> = chosen.uris.iter().map(|uri| format!("{uri}/{name}")).collect();
    let answer = fetcher.metadata(&name, &urls)?;
    if let Some(failure) = &answer.stale {
        sink.event(Event::Warning(format!("{failure}; going on with the {name} that the cache kept")));
    }
    let read = |bytes: &[u8]| -> Result<Release, SelectError> {
        let scratch = fetcher.cache().scratch()?;
        let text = signature::verify(bytes, keyring, scratch.path(), fetcher.stop())
            .map_err(|source| SelectError::Signature { name: name.clone(), source })?;
        let unusable = |source| SelectError::Release { name: name.clone(), source };
        let release = Release::parse(&text).map_err(unusable)?;
        release.check(&chosen.suite, architecture, now).map_err(unusable)?;
        Ok(release)
    };
    let release = read(&answer.bytes)?;
    let suite = |release, digest, bytes: &[u8]| Suite {
        name: chosen.suite.clone(),
        components: chosen.components.clone(),
        in_release: (digest, bytes.len() as u64),
        release,
    };
    // An old file stays well signed: without a look back, a mirror could hide updates by replaying it.
    if let Some(previous) = fetcher.previous(&urls).filter(|previous| *previous != answer.bytes)
        && let Ok(newer) = read(&previous)
        && newer.date > release.date
    {
        sink.event(Event::Warning(format!(
            "upstream's {name} is older than the one seen before, which is used instead: is the mirror behind?"
        )));
        let digest = fetcher.cache().put(&previous)?;
        return Ok(suite(newer, digest, &previous));
    }
    let digest = fetcher.keep(&answer)?;
    Ok(suite(release, digest, &answer.bytes))
}

/// A package index as the Release file describes it.
struct IndexFile {
    path: String,
    size: u64,
    digest: Digest,
    plain_size: u64,
}

impl IndexFile {
    fn wanted(&self, uris: &[String], suite: &Suite) -> Wanted {
        let paths = suite.index_paths(&self.path, self.digest);
        Wanted {
            name: format!("dists/{}/{}", suite.name, self.path),
            urls: uris.iter().flat_map(|uri| paths.iter().map(move |path| format!("{uri}/{path}"))).collect(),
            size: self.size,
            digest: self.digest,
        }
    }
}

fn index_files(suite: &Suite, architecture: &str) -> Result<Vec<IndexFile>, SelectError> {
    let mut files = Vec::new();
    for component in &suite.components {
        let describe = |architecture: &str| {
            let (path, size, digest) = suite.release.package_index(component, architecture)?;
            let plain = format!("{component}/binary-{architecture}/Packages");
            let plain_size = suite.release.indices.get(&plain).map_or(INDEX_LIMIT, |entry| entry.0);
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

fn decompress(name: &str, compressed: &[u8], plain_size: u64) -> Result<Vec<u8>, SelectError> {
    let mut text = Vec::with_capacity(usize::try_from(plain_size.min(INDEX_LIMIT)).unwrap_or(0));
    // One byte more than promised is enough to tell that there is more.
    let limit = plain_size.min(INDEX_LIMIT) + 1;
    let read = match name.rsplit_once('.').map(|(_, suffix)| suffix) {
        Some("xz") => liblzma::read::XzDecoder::new(compressed).take(limit).read_to_end(&mut text),
        Some("gz") => flate2::read::GzDecoder::new(compressed).take(limit).read_to_end(&mut text),
        _ => compressed.take(limit).read_to_end(&mut text),
    };
    let failed = |source| SelectError::Decompress { name: name.to_owned(), source };
    if read.map_err(failed)? as u64 == limit {
        return Err(failed(std::io::Error::other("it is larger than its Release file says")));
    }
    Ok(text)
}

fn repository_name(uris: &[String], taken: &[Repository]) -> String {
    let last = uris
        .first()
        .and_then(|uri| uri.split_once("://"))
        .and_then(|(_, rest)| rest.split_once('/'))
        .and_then(|(_, path)| path.rsplit('/').next())
        .unwrap_or("");
    let clean: String =
        last.chars().filter(|sign| sign.is_ascii_alphanumeric() || matches!(sign, '-' | '_')).collect();
    let stem = if clean.is_empty() { "archive".to_owned() } else { clean };
    let free = |name: &String| taken.iter().all(|repository| repository.name != *name);
    std::iter::once(stem.clone())
        .chain((2..).map(|number| format!("{stem}-{number}")))
        .find(free)
        .unwrap_or(stem)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn repository(name: &str) -> Repository {
        Repository { name: name.to_owned(), uris: Vec::new(), keyring: PathBuf::new(), suites: Vec::new() }
    }

    #[test]
    fn repositories_are_named_by_the_last_part_of_their_address() {
        let name = |uri: &str, taken: &[Repository]| repository_name(&[uri.to_owned()], taken);
        assert_eq!(name("http://mirror.test/a/debian", &[]), "debian");
        assert_eq!(name("http://mirror.test/debian", &[repository("debian")]), "debian-2");
        assert_eq!(name("http://mirror.test", &[]), "archive");
        assert_eq!(name("http://mirror.test/..", &[]), "archive");
    }

    #[test]
    fn an_index_larger_than_promised_is_refused() {
        assert_eq!(decompress("Packages", b"abc", 3).expect("fits"), b"abc");
        assert!(decompress("Packages", b"abcd", 3).is_err());
        assert!(decompress("Packages.xz", b"abcd", 3).is_err());
    }
}
