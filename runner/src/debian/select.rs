//! From a recipe to the exact files of a build.
//!
//! Asks upstream for the signed Release file of each suite, checks it, reads the package indices it
//! names and resolves the recipe's packages. Emits progress, notes and warnings; the caller brackets
//! the stage. Deliberately absent: fetching packages (see [`fetch`], or the mirror on demand).

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::cache::{FetchError, Fetcher, StoreError, Wanted, last_part, without_user};
use crate::causes::in_one_line;
use crate::event::{Event, Sink, Stage};
use crate::lock::{Lock, LockedSuite};
use crate::recipe::{Debian, PackageSource, Recipe};

use super::catalogue::{Catalogue, CatalogueError, PackageId};
use super::index::{decompress, index_files};
use super::release::{Release, ReleaseError};
use super::resolve::{self, ResolveError};
use super::selection::{Package, Repository, Selection, Suite};
use super::signature::{self, SignatureError};
use super::sources::{self, Chosen, SourcesError};

/// Where Debian's package of its own keys puts them.
const DEBIAN_KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

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
    /// The Release file that a lock names is nowhere.
    #[error(
        "the {name} that the lock has is not in the cache, and its mirrors have another by now: bring it with `hostler cache import`, or make a new lock"
    )]
    Gone {
        /// The file.
        name: String,
        /// Why it cannot be had.
        #[source]
        source: Box<FetchError>,
    },
    /// The packages are not those of the lock.
    #[error("the lock does not have suite {suite}: build without --locked to make a new lock")]
    NotLocked {
        /// The suite.
        suite: String,
    },
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
    /// The host's sources with that suite are all another's.
    #[error(
        "no apt source of this host with suite {suite} is Debian's: name another as debian.source in the recipe, and the keyring of its signer as debian.keyring"
    )]
    NotDebian {
        /// The suite.
        suite: String,
    },
    /// A lock names another's keyring.
    #[error(
        "the lock says that suite {suite} is signed by keys of {}, which is no keyring of Debian's: a lock does not choose whom to trust, so name it as debian.keyring in the recipe", keyring.display()
    )]
    LockedKeyring {
        /// The suite.
        suite: String,
        /// The keyring.
        keyring: PathBuf,
    },
    /// A component that the archive does not have.
    #[error("suite {suite} has no package index for component {component}: check debian.components")]
    NoIndex {
        /// The suite.
        suite: String,
        /// The component.
        component: String,
    },
    /// A package that the archive does not have.
    #[error("the archive has no package {package}: check its name and the suite")]
    NoPackage {
        /// The package.
        package: String,
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

impl SelectError {
    /// Whether a source is to blame, and not this host or the one who waits.
    fn is_of_the_source(&self) -> bool {
        match self {
            Self::Signature { source, .. } => matches!(source, SignatureError::Distrusted(_)),
            Self::Release { .. } => true,
            Self::Fetch(error) => !matches!(error, FetchError::Stopped { .. } | FetchError::Store { .. }),
            Self::Sources(_)
            | Self::Gone { .. }
            | Self::NotLocked { .. }
            | Self::Store(_)
            | Self::NotDebian { .. }
            | Self::LockedKeyring { .. }
            | Self::NoIndex { .. }
            | Self::NoPackage { .. }
            | Self::Decompress { .. }
            | Self::Catalogue { .. }
            | Self::Resolve(_) => false,
        }
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
    let (repositories, catalogue) = archives(wanted, fetcher, host, sink)?;
    let packages = choose_packages(&catalogue, architecture, &wanted.packages)?;
    Ok(Selection {
        architecture: architecture.to_owned(),
        repositories,
        catalogue,
        packages,
        own_keyring: wanted.keyring.is_some(),
    })
}

/// The archives that are meant, with all packages they have for the architecture. Blocks for the network.
///
/// # Errors
/// Something cannot be had or trusted.
pub(crate) fn archives(
    wanted: &Debian,
    fetcher: &Fetcher,
    host: &Path,
    sink: &dyn Sink,
) -> Result<(Vec<Repository>, Catalogue), SelectError> {
    let architecture = wanted.architecture.as_str();
    let chosen = match (fetcher.lock(), &wanted.source) {
        (Some(lock), _) => locked(lock, &wanted.suite)?,
        (None, PackageSource::HostApt) => sources::choose(
            &sources::read(host)?,
            &wanted.suite,
            architecture,
            &wanted.components,
            wanted.keyring.is_some(),
        )?,
        (None, PackageSource::Url(url)) => vec![Chosen {
            uris: vec![url.clone()],
            own: vec![without_user(url)],
            suite: wanted.suite.clone(),
            components: wanted.components.clone(),
            keyring: None,
        }],
    };
    let chosen =
        chosen.into_iter().map(|one| Chosen { uris: fetcher.with_mirrors(one.uris), ..one }).collect();
    let damaged = fetcher.counted().damaged;
    let mut repositories: Vec<Repository> = Vec::new();
    let mut catalogue = Catalogue::default();
    for Admitted { chosen: one, keyring, suite } in admitted(chosen, wanted, fetcher, host, sink)? {
        let repository = repositories
            .iter()
            .position(|known| known.uris == one.uris && known.keyring == keyring)
            .unwrap_or_else(|| {
                repositories.push(Repository {
                    name: repository_name(&one.uris, &repositories),
                    uris: one.uris.clone(),
                    own: one.own.clone(),
                    keyring,
                    suites: Vec::new(),
                });
                repositories.len() - 1
            });
        for index in index_files(&suite, architecture)? {
            let name = format!("dists/{}/{}", suite.name, index.path);
            sink.event(Event::Progress {
                stage: Stage::Select,
                doing: format!(
                    "package index {}/{}, {}",
                    suite.name,
                    index.path,
                    bytesize::ByteSize(index.size)
                ),
                bytes: 0,
                total: None,
            });
            let compressed = fetcher.fetch(&index.wanted(&one.uris, &suite))?;
            let text = decompress(&name, &compressed, index.plain_size)?;
            catalogue
                .add(repository, text, architecture)
                .map_err(|source| SelectError::Catalogue { name, source })?;
        }
        repositories[repository].suites.push(suite);
    }
    fetcher.tell_news(sink);
    tell_damage(fetcher, damaged, sink);
    Ok((repositories, catalogue))
}

/// The sources that a lock has, whatever this host's are by now.
fn locked(lock: &Lock, suite: &str) -> Result<Vec<Chosen>, SelectError> {
    if !lock.suites.iter().any(|locked| locked.name == suite) {
        return Err(SelectError::NotLocked { suite: suite.to_owned() });
    }
    let chosen = |locked: &LockedSuite| Chosen {
        uris: locked.mirrors.clone(),
        own: locked.mirrors.clone(),
        suite: locked.name.clone(),
        components: locked.components.clone(),
        keyring: locked.keyring.clone(),
    };
    Ok(lock.suites.iter().map(chosen).collect())
}

/// A source that is used.
struct Admitted {
    chosen: Chosen,
    keyring: PathBuf,
    suite: Suite,
}

/// Reads the suites of all sources, and leaves out those of this host that are not what the build
/// wants.
///
/// Whose a source without `Signed-By` is, only its signature tells. One that cannot be read or
/// trusted is left out where a trusted one serves the same suite: then nothing is lost by it. Else
/// leaving it out would let anyone between here and a mirror take away the security updates, by
/// answering with nonsense.
fn admitted(
    chosen: Vec<Chosen>,
    wanted: &Debian,
    fetcher: &Fetcher,
    host: &Path,
    sink: &dyn Sink,
) -> Result<Vec<Admitted>, SelectError> {
    let is_debians = wanted.source == PackageSource::HostApt && wanted.keyring.is_none();
    // A lock has what was admitted once, and no more.
    let of_host = wanted.source == PackageSource::HostApt && fetcher.lock().is_none();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs());
    let mut admitted: Vec<Admitted> = Vec::new();
    let mut doubtful = Vec::new();
    for one in chosen {
        if let (Some(_), None, Some(keyring)) = (fetcher.lock(), &wanted.keyring, &one.keyring)
            && !sources::is_debians(keyring)
        {
            return Err(SelectError::LockedKeyring { suite: one.suite, keyring: keyring.clone() });
        }
        let keyring = match (&wanted.keyring, &one.keyring) {
            (Some(keyring), _) => keyring.clone(),
            (None, Some(keyring)) => host.join(keyring.strip_prefix("/").unwrap_or(keyring)),
            (None, None) => host.join(DEBIAN_KEYRING.trim_start_matches('/')),
        };
        let says_whose = wanted.keyring.is_none() && one.keyring.is_some();
        match read_suite(&one, &keyring, &wanted.architecture, now, fetcher, sink) {
            Ok(suite) if is_debians && suite.release.origin != "Debian" => {
                if !of_host {
                    return Err(SelectError::NotDebian { suite: suite.name });
                }
                sink.event(Event::Note(format!(
                    "suite {} of origin {:?} is not Debian's: left out",
                    suite.name, suite.release.origin
                )));
            }
            Ok(suite) => admitted.push(Admitted { chosen: one, keyring, suite }),
            Err(error) if of_host && !says_whose && error.is_of_the_source() => doubtful.push((one, error)),
            Err(error) => return Err(error),
        }
    }
    for (one, error) in doubtful {
        let serves = |other: &Admitted| {
            other.chosen.suite == one.suite
                && one.components.iter().all(|component| other.chosen.components.contains(component))
        };
        if !admitted.iter().any(serves) {
            return Err(error);
        }
        sink.event(Event::Warning(format!(
            "this host's apt source {} with suite {} is left out, another serves it: {}",
            one.shown_uri(),
            one.suite,
            in_one_line(&error)
        )));
    }
    if of_host && !admitted.iter().any(|one| one.chosen.suite == wanted.suite) {
        return Err(SelectError::NotDebian { suite: wanted.suite.clone() });
    }
    Ok(admitted)
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
    let full = format!("{}/{name}", chosen.shown_uri());
    let read = |bytes: &[u8], now: Option<u64>| -> Result<Release, SelectError> {
        let scratch = fetcher.cache().scratch()?;
        let text = signature::verify(bytes, keyring, scratch.path(), fetcher.stop())
            .map_err(|source| SelectError::Signature { name: full.clone(), source })?;
        let unusable = |source| SelectError::Release { name: full.clone(), source };
        let release = Release::parse(&text).map_err(unusable)?;
        // Under a lock it holds for ever: its digest says which it is.
        let now = now.unwrap_or(release.date);
        release.check(&chosen.suite, architecture, now).map_err(unusable)?;
        Ok(release)
    };
    let suite = |release, digest, bytes: &[u8]| {
        let suite = Suite {
            name: chosen.suite.clone(),
            components: chosen.components.clone(),
            in_release: (digest, bytes.len() as u64),
            release,
        };
        fetcher.note_brought(&suite.signed(&chosen.uris));
        suite
    };
    let urls: Vec<String> = chosen.uris.iter().map(|uri| format!("{uri}/{name}")).collect();
    if let Some(lock) = fetcher.lock() {
        let locked = lock.suites.iter().find(|one| one.name == chosen.suite && one.mirrors == chosen.own);
        let locked = locked.ok_or_else(|| SelectError::NotLocked { suite: chosen.suite.clone() })?;
        let wanted = Wanted { name: name.clone(), urls, size: Some(locked.size), digest: locked.sha256 };
        let bytes = fetcher.fetch(&wanted).map_err(|source| match source {
            FetchError::Altered { .. }
            | FetchError::OtherSize { .. }
            | FetchError::Status { .. }
            | FetchError::Everywhere { .. } => SelectError::Gone { name, source: Box::new(source) },
            other => other.into(),
        })?;
        return Ok(suite(read(&bytes, None)?, locked.sha256, &bytes));
    }
    let (answer, release) = fetcher.usable_metadata(
        &name,
        &urls,
        |answer| read(&answer.bytes, Some(now)),
        SelectError::is_of_the_source,
    )?;
    if let Some(failure) = &answer.stale {
        sink.event(Event::Warning(format!("{failure}; going on with the {name} that the cache kept")));
    }
    // An old file stays well signed: without a look back, a mirror could hide updates by replaying it.
    let identity = identity(chosen, &release);
    if let Some(previous) = fetcher.previous(&identity).filter(|previous| *previous != answer.bytes)
        && let Ok(newer) = read(&previous, Some(now))
        && newer.date > release.date
    {
        sink.event(Event::Warning(format!(
            "upstream's {name} is older than the one seen before, which is used instead: is the mirror behind?"
        )));
        let digest = fetcher.cache().put(&previous)?;
        return Ok(suite(newer, digest, &previous));
    }
    let digest = fetcher.keep(&answer, &identity)?;
    Ok(suite(release, digest, &answer.bytes))
}

/// What a suite is, whichever mirror it comes from. The same signer may have several archives, so the
/// folder is part of it; each answer is verified anyway when it is used. The code name is not: a name such
/// as stable moves on to another, and never back.
fn identity(chosen: &Chosen, release: &Release) -> String {
    let folder = chosen.uris.first().map_or("", |uri| last_part(uri));
    format!("release {:?} {:?} {folder:?}", release.origin, chosen.suite)
}

fn repository_name(uris: &[String], taken: &[Repository]) -> String {
    let last = uris.first().map_or("", |uri| last_part(uri));
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
        Repository {
            name: name.to_owned(),
            uris: Vec::new(),
            own: Vec::new(),
            keyring: PathBuf::new(),
            suites: Vec::new(),
        }
    }

    #[test]
    fn repositories_are_named_by_the_last_part_of_their_address() {
        let name = |uri: &str, taken: &[Repository]| repository_name(&[uri.to_owned()], taken);
        assert_eq!(name("http://mirror.test/a/debian", &[]), "debian");
        assert_eq!(name("http://mirror.test/debian", &[repository("debian")]), "debian-2");
        assert_eq!(name("http://mirror.test", &[]), "archive");
        assert_eq!(name("http://mirror.test/..", &[]), "archive");
    }
}
