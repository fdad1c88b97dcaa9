//! The host's apt sources: which mirrors this machine already uses (sources.list(5)).
//!
//! [`parse_stanzas`] and [`parse_lines`] are pure; [`read`] is thin and takes the root directory, so
//! that a test feeds a tree of its own. [`choose`] decides which sources serve a suite. Deliberately
//! absent: `cdrom:`, `file:` and other transports, which a cache of HTTP downloads cannot stand for,
//! and whether a source really is Debian's, which only its signature tells.

use std::path::{Path, PathBuf};

use crate::cache::without_user;

use super::control;

/// Why the host's sources cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SourcesError {
    /// A file or directory cannot be read.
    #[error("cannot read {}: check its permissions, or give the recipe an archive's address as debian.source", path.display())]
    Read {
        /// What.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// No source serves the suite.
    #[error(
        "this host's apt sources name no Debian archive with suite {suite} ({named}): add one, or give the recipe its address as debian.source"
    )]
    NoneForSuite {
        /// The suite.
        suite: String,
        /// What they do name.
        named: String,
    },
}

/// One source: archives with the same suites.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Source {
    /// Roots of mirrors, equal to each other, without a slash at the end.
    pub uris: Vec<String>,
    /// Suites.
    pub suites: Vec<String>,
    /// Components.
    pub components: Vec<String>,
    /// Architectures it is limited to; empty means no limit.
    pub architectures: Vec<String>,
    /// Keyring, where it is a file.
    pub keyring: Option<PathBuf>,
    /// Are the keys written into the source itself?
    pub inline_key: bool,
}

/// Reads every source of the system below `root`.
///
/// # Errors
/// A file exists and cannot be read.
pub fn read(root: &Path) -> Result<Vec<Source>, SourcesError> {
    let mut sources = Vec::new();
    let main = root.join("etc/apt/sources.list");
    if let Some(text) = read_optional(&main)? {
        sources.extend(parse_lines(&text));
    }
    let directory = root.join("etc/apt/sources.list.d");
    for path in list_optional(&directory)? {
        let parse: fn(&str) -> Vec<Source> = match path.extension().and_then(|extension| extension.to_str()) {
            Some("list") => parse_lines,
            Some("sources") => parse_stanzas,
            _ => continue,
        };
        if let Some(text) = read_optional(&path)? {
            sources.extend(parse(&text));
        }
    }
    for source in &mut sources {
        source.uris = expand_mirror_lists(root, std::mem::take(&mut source.uris))?;
    }
    Ok(sources)
}

/// `mirror+file:` names a file with one mirror per line; Debian's cloud images use it.
fn expand_mirror_lists(root: &Path, uris: Vec<String>) -> Result<Vec<String>, SourcesError> {
    let mut expanded = Vec::new();
    for uri in uris {
        let Some(list) = uri.strip_prefix("mirror+file:") else {
            expanded.push(uri);
            continue;
        };
        let path = root.join(list.trim_start_matches('/'));
        let text = read_optional(&path)?.unwrap_or_default();
        let mirrors = text.lines().filter_map(|line| line.split_whitespace().next());
        expanded.extend(mirrors.map(|mirror| mirror.trim_end_matches('/').to_owned()));
    }
    expanded.retain(|uri| is_http(uri));
    Ok(expanded)
}

fn read_optional(path: &Path) -> Result<Option<String>, SourcesError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(SourcesError::Read { path: path.to_owned(), source }),
    }
}

fn list_optional(directory: &Path) -> Result<Vec<PathBuf>, SourcesError> {
    let failed = |source| SourcesError::Read { path: directory.to_owned(), source };
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(failed(source)),
    };
    let mut paths = entries
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(failed)?;
    paths.sort();
    Ok(paths)
}

/// Parses a `.sources` file.
#[must_use]
pub fn parse_stanzas(text: &str) -> Vec<Source> {
    // Comments may stand between the lines of a field and would end it.
    let text: String = text
        .lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| format!("{}\n", line.trim_end()))
        .collect();
    control::stanzas(&text)
        .filter_map(|stanza| {
            let words = |name: &str| -> Vec<String> {
                let value = stanza.get(name).unwrap_or("");
                value.split_whitespace().map(str::to_owned).collect()
            };
            let disabled = stanza
                .get("Enabled")
                .is_some_and(|value| ["no", "false", "0", "off", "without", "disable"].contains(&value));
            if disabled || !words("Types").iter().any(|kind| kind == "deb") {
                return None;
            }
            let signed_by = stanza.get("Signed-By").unwrap_or("");
            let inline_key = signed_by.contains("-----BEGIN");
            let source = Source {
                uris: words("URIs").iter().map(|uri| uri.trim_end_matches('/').to_owned()).collect(),
                suites: words("Suites").iter().map(|suite| suite.trim_end_matches('/').to_owned()).collect(),
                components: words("Components"),
                architectures: words("Architectures"),
                keyring: (!inline_key).then(|| keyring(signed_by)).flatten(),
                inline_key,
            };
            Some(source)
        })
        .collect()
}

/// Parses a `.list` file.
#[must_use]
pub fn parse_lines(text: &str) -> Vec<Source> {
    text.lines().filter_map(parse_line).collect()
}

fn parse_line(line: &str) -> Option<Source> {
    let line = line.split('#').next()?.trim();
    let mut rest = line.strip_prefix("deb")?;
    if !rest.starts_with([' ', '\t']) {
        return None;
    }
    rest = rest.trim_start();
    let mut source = Source::default();
    if let Some(options) = rest.strip_prefix('[') {
        let (options, after) = options.split_once(']')?;
        for option in options.split_whitespace() {
            match option.split_once('=') {
                Some(("signed-by", value)) => source.keyring = keyring(value),
                Some(("arch", value)) => {
                    source.architectures = value.split(',').map(str::to_owned).collect();
                }
                _ => {}
            }
        }
        rest = after;
    }
    let mut words = rest.split_whitespace().map(|word| word.trim_end_matches('/').to_owned());
    source.uris = vec![words.next()?];
    source.suites = vec![words.next()?];
    source.components = words.collect();
    Some(source)
}

/// `Signed-By` may list several files, or name fingerprints, which are no files.
fn keyring(value: &str) -> Option<PathBuf> {
    value.split([',', ' ', '\n']).map(Path::new).find(|path| path.is_absolute()).map(Path::to_owned)
}

fn is_http(uri: &str) -> bool {
    uri.starts_with("http://") || uri.starts_with("https://")
}

/// One suite of one archive that a build uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chosen {
    /// Roots of mirrors, equal to each other, in the order in which they are asked.
    pub uris: Vec<String>,
    /// The archive's own roots as others are told of them: without this site's mirrors and without passwords.
    pub own: Vec<String>,
    /// The suite.
    pub suite: String,
    /// Components, out of those that were asked for.
    pub components: Vec<String>,
    /// The source's own keyring.
    pub keyring: Option<PathBuf>,
}

impl Chosen {
    /// The address of its first mirror, for messages: without the password that it may have.
    #[must_use]
    pub fn shown_uri(&self) -> String {
        self.uris.first().map_or(String::new(), |uri| without_user(uri))
    }
}

/// Picks the sources of `suite`, its updates and its security updates. `any_signer` admits sources
/// that other keys than Debian's sign.
///
/// # Errors
/// None serves the suite itself.
pub fn choose(
    sources: &[Source],
    suite: &str,
    architecture: &str,
    components: &[String],
    any_signer: bool,
) -> Result<Vec<Chosen>, SourcesError> {
    let wanted = [
        suite.to_owned(),
        format!("{suite}-updates"),
        format!("{suite}-security"),
        format!("{suite}/updates"),
    ];
    let mut chosen: Vec<Chosen> = Vec::new();
    for source in sources.iter().filter(|source| any_signer || is_of_debian(source)) {
        let fits =
            source.architectures.is_empty() || source.architectures.iter().any(|word| word == architecture);
        let uris: Vec<String> = source.uris.iter().filter(|uri| is_http(uri)).cloned().collect();
        let common: Vec<String> =
            components.iter().filter(|component| source.components.contains(component)).cloned().collect();
        if !fits || uris.is_empty() || common.is_empty() {
            continue;
        }
        for suite in wanted.iter().filter(|suite| source.suites.contains(suite)) {
            match chosen.iter_mut().find(|one| one.uris == uris && one.suite == *suite) {
                Some(same) => {
                    let missing: Vec<String> = common
                        .iter()
                        .filter(|component| !same.components.contains(component))
                        .cloned()
                        .collect();
                    same.components.extend(missing);
                }
                None => chosen.push(Chosen {
                    uris: uris.clone(),
                    own: uris.iter().map(|uri| without_user(uri)).collect(),
                    suite: suite.clone(),
                    components: common.clone(),
                    keyring: source.keyring.clone(),
                }),
            }
        }
    }
    if chosen.iter().any(|one| one.suite == suite) {
        return Ok(chosen);
    }
    let mut named: Vec<&str> = sources.iter().flat_map(|source| &source.suites).map(String::as_str).collect();
    named.sort_unstable();
    named.dedup();
    Err(SourcesError::NoneForSuite {
        suite: suite.to_owned(),
        named: if named.is_empty() {
            "they are empty".to_owned()
        } else {
            format!("they name {}", named.join(", "))
        },
    })
}

/// A third party's source may have a suite and component called as Debian's; its keyring tells.
fn is_of_debian(source: &Source) -> bool {
    !source.inline_key && source.keyring.as_deref().is_none_or(has_debians_name)
}

fn has_debians_name(keyring: &Path) -> bool {
    let name = keyring.file_name().and_then(|name| name.to_str());
    name.is_some_and(|name| name.starts_with("debian-archive-"))
}

/// Is that a keyring of Debian's, in a folder where only root puts keyrings? For one that this host's sources
/// do not name.
pub(super) fn is_debians(keyring: &Path) -> bool {
    const FOLDERS: [&str; 3] = ["/usr/share/keyrings", "/etc/apt/keyrings", "/etc/apt/trusted.gpg.d"];
    has_debians_name(keyring)
        && keyring.parent().is_some_and(|folder| FOLDERS.into_iter().any(|one| folder == Path::new(one)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STANZAS: &str = "Types: deb deb-src\n# a comment\nURIs: http://mirror.test/debian/\nSuites: bookworm bookworm-updates\nComponents: main\n# within\n contrib\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n\nTypes: deb\nURIs: http://mirror.test/debian-security\nSuites: bookworm-security\nComponents: main\n\nEnabled: no\nTypes: deb\nURIs: http://off.test/\nSuites: bookworm\nComponents: main\n\nTypes: deb-src\nURIs: http://source.test/\nSuites: bookworm\nComponents: main\n";

    fn main_only() -> Vec<String> {
        vec!["main".to_owned()]
    }

    #[test]
    fn stanzas_and_lines_are_read_alike() {
        let stanzas = parse_stanzas(STANZAS);
        assert_eq!(stanzas.len(), 2);
        assert_eq!(stanzas[0].components, ["main", "contrib"]);
        let lines = parse_lines(
            "# deb http://x.test y main\ndeb [arch=amd64 signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://mirror.test/debian bookworm main contrib # why\ndeb-src http://mirror.test/debian bookworm main\ndeb\n",
        );
        assert_eq!(lines.len(), 1);
        assert_eq!(lines[0].uris, stanzas[0].uris);
        assert_eq!(lines[0].keyring, stanzas[0].keyring);
        assert_eq!(lines[0].architectures, ["amd64"]);
    }

    #[test]
    fn a_suite_brings_its_updates() {
        let chosen =
            choose(&parse_stanzas(STANZAS), "bookworm", "amd64", &main_only(), false).expect("there");
        let found: Vec<(&str, &str)> =
            chosen.iter().map(|one| (one.uris[0].as_str(), one.suite.as_str())).collect();
        assert_eq!(
            found,
            [
                ("http://mirror.test/debian", "bookworm"),
                ("http://mirror.test/debian", "bookworm-updates"),
                ("http://mirror.test/debian-security", "bookworm-security"),
            ]
        );
    }

    #[test]
    fn a_password_in_an_address_is_not_shown() {
        for (uri, shown) in [
            ("https://user:secret@mirror.test/debian", "https://mirror.test/debian"),
            ("http://mirror.test", "http://mirror.test"),
        ] {
            let chosen = Chosen {
                uris: vec![uri.to_owned()],
                own: Vec::new(),
                suite: "s".to_owned(),
                components: main_only(),
                keyring: None,
            };
            assert_eq!(chosen.shown_uri(), shown);
        }
    }

    #[test]
    fn strangers_are_left_alone() {
        let text = "deb [signed-by=/etc/apt/keyrings/docker.asc] https://d.test/linux/debian bookworm main\ndeb cdrom:[x]/ bookworm main\ndeb https://p.test/apt vendor main\n";
        let error = choose(&parse_lines(text), "bookworm", "amd64", &main_only(), false).expect_err("none");
        assert!(error.to_string().contains("they name bookworm, vendor"), "{error}");
    }

    #[test]
    fn a_mirror_list_is_expanded_below_the_root() {
        let root = tempfile::tempdir().expect("temporary directory");
        let apt = root.path().join("etc/apt/sources.list.d");
        std::fs::create_dir_all(&apt).expect("directory");
        std::fs::write(
            apt.join("debian.sources"),
            "Types: deb\nURIs: mirror+file:///etc/apt/mirrors.list\nSuites: bookworm\nComponents: main\n",
        )
        .expect("write");
        std::fs::write(apt.join("ignored.save"), "deb http://no.test bookworm main").expect("write");
        std::fs::write(
            root.path().join("etc/apt/mirrors.list"),
            "http://one.test/debian/ priority:1\nftp://two.test/\nhttps://three.test/debian\n",
        )
        .expect("write");
        let sources = read(root.path()).expect("readable");
        assert_eq!(sources.len(), 1);
        assert_eq!(sources[0].uris, ["http://one.test/debian", "https://three.test/debian"]);
    }

    #[test]
    fn a_host_without_apt_has_no_sources() {
        let root = tempfile::tempdir().expect("temporary directory");
        assert_eq!(read(root.path()).expect("readable"), []);
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(text in "(deb|\\[|\\]|=|,|Types: deb|URIs:|Signed-By: | |\n|x){0,40}") {
            let _ = parse_lines(&text);
            let _ = parse_stanzas(&text);
        }
    }
}
