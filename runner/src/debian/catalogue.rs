//! All packages that the verified indices of a build name.
//!
//! Keeps the indices' text and offsets into it: what a package depends on is parsed when somebody
//! asks. Deliberately absent: which package a build takes (see `resolve`), and whether the text can be
//! trusted (it was checked against the signed Release file before it came here).

use std::cmp::Ordering;
use std::collections::{BTreeSet, HashMap};
use std::ops::Range;

use crate::cache::Digest;

use super::control::{self, Stanza};
use super::{relation, version};

/// One package of a catalogue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PackageId {
    index: u32,
    stanza: u32,
}

/// An index that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CatalogueError {
    /// Something is not text.
    #[error("the package index is not UTF-8: the archive is damaged, tell its maintainers")]
    NotText,
    /// A package without a name or version.
    #[error("the package index has a stanza without {missing}, near {near:?}: the archive is damaged")]
    Incomplete {
        /// The field.
        missing: &'static str,
        /// The start of the stanza.
        near: String,
    },
    /// A file that cannot be named safely.
    #[error("package {package} has an unusable {field}: {value:?}")]
    Unusable {
        /// The package.
        package: String,
        /// The field.
        field: &'static str,
        /// Its value.
        value: String,
    },
}

/// Where a package's file is and what it must be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PackageFile {
    /// Which of the build's repositories.
    pub repository: usize,
    /// Path under the repository's root: relative, without `..`.
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// Digest of the file.
    pub digest: Digest,
}

struct Index {
    repository: usize,
    text: Box<str>,
    stanzas: Vec<Entry>,
}

struct Entry {
    range: Range<usize>,
    name: Range<usize>,
    version: Range<usize>,
}

/// A package that also answers to another name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Provider {
    /// The package.
    pub package: PackageId,
    /// The version of the provided name, where it has one.
    pub version: Option<String>,
}

/// The packages of several indices for one architecture.
#[derive(Default)]
pub struct Catalogue {
    indices: Vec<Index>,
    by_name: HashMap<Box<str>, Vec<PackageId>>,
    providers: HashMap<Box<str>, Vec<Provider>>,
    base: BTreeSet<Box<str>>,
}

impl Catalogue {
    /// Adds the packages of one index, which belongs to `repository`.
    ///
    /// # Errors
    /// The index is damaged.
    pub fn add(
        &mut self,
        repository: usize,
        text: Vec<u8>,
        architecture: &str,
    ) -> Result<(), CatalogueError> {
        let text = String::from_utf8(text).map_err(|_| CatalogueError::NotText)?.into_boxed_str();
        let index = u32::try_from(self.indices.len()).unwrap_or(u32::MAX);
        let place = |part: &str| {
            let start = part.as_ptr().addr() - text.as_ptr().addr();
            start..start + part.len()
        };
        let mut stanzas = Vec::new();
        for stanza in control::stanzas(&text) {
            let found = Found::read(stanza);
            if found.architecture != architecture && found.architecture != "all" {
                continue;
            }
            let incomplete = |missing| CatalogueError::Incomplete {
                missing,
                near: stanza.text().chars().take(60).collect(),
            };
            let name = found.name.ok_or_else(|| incomplete("Package"))?;
            let version = found.version.ok_or_else(|| incomplete("Version"))?;
            let package = PackageId { index, stanza: u32::try_from(stanzas.len()).unwrap_or(u32::MAX) };
            if found.base {
                self.base.insert(name.into());
            }
            self.add_providers(package, name, found.provides)?;
            match self.by_name.get_mut(name) {
                Some(same) => same.push(package),
                None => {
                    self.by_name.insert(name.into(), vec![package]);
                }
            }
            stanzas.push(Entry { range: place(stanza.text()), name: place(name), version: place(version) });
        }
        self.indices.push(Index { repository, text, stanzas });
        Ok(())
    }

    fn add_providers(
        &mut self,
        package: PackageId,
        name: &str,
        field: Option<&str>,
    ) -> Result<(), CatalogueError> {
        let groups = relation::parse(field.unwrap_or("")).map_err(|value| CatalogueError::Unusable {
            package: name.to_owned(),
            field: "Provides",
            value: value.to_owned(),
        })?;
        for provided in groups.iter().flatten() {
            let version = provided.version.map(|(_, version)| version.to_owned());
            let provider = Provider { package, version };
            self.providers.entry(provided.name.into()).or_default().push(provider);
        }
        Ok(())
    }

    fn entry(&self, package: PackageId) -> (&Index, &Entry) {
        let index = &self.indices[package.index as usize];
        (index, &index.stanzas[package.stanza as usize])
    }

    /// The fields of a package.
    #[must_use]
    pub fn stanza(&self, package: PackageId) -> Stanza<'_> {
        let (index, entry) = self.entry(package);
        Stanza::new(&index.text[entry.range.clone()])
    }

    /// The name of a package.
    #[must_use]
    pub fn name(&self, package: PackageId) -> &str {
        let (index, entry) = self.entry(package);
        &index.text[entry.name.clone()]
    }

    /// The version of a package.
    #[must_use]
    pub fn version(&self, package: PackageId) -> &str {
        let (index, entry) = self.entry(package);
        &index.text[entry.version.clone()]
    }

    /// The newest package called `name`; of equal ones, the one from the first index.
    #[must_use]
    pub fn candidate(&self, name: &str) -> Option<PackageId> {
        self.by_name.get(name)?.iter().copied().reduce(|best, other| {
            match version::compare(self.version(other), self.version(best)) {
                Ordering::Greater => other,
                Ordering::Less | Ordering::Equal => best,
            }
        })
    }

    /// Every package called `name`, of all indices.
    #[must_use]
    pub fn named(&self, name: &str) -> &[PackageId] {
        self.by_name.get(name).map_or(&[], Vec::as_slice)
    }

    /// The package with this name, version and architecture.
    #[must_use]
    pub fn find(&self, name: &str, version: &str, architecture: &str) -> Option<PackageId> {
        self.by_name.get(name)?.iter().copied().find(|package| {
            self.version(*package) == version
                && self.stanza(*package).get("Architecture") == Some(architecture)
        })
    }

    /// Who provides `name`, virtual or real, beside packages called so.
    #[must_use]
    pub fn providers(&self, name: &str) -> &[Provider] {
        self.providers.get(name).map_or(&[], Vec::as_slice)
    }

    /// The packages that every system has: essential ones and those of priority `required`.
    pub fn base(&self) -> impl Iterator<Item = PackageId> {
        self.base
            .iter()
            .filter_map(|name| self.candidate(name))
            .filter(|package| Found::read(self.stanza(*package)).base)
    }

    /// Is the package marked `Essential: yes`?
    #[must_use]
    pub fn is_essential(&self, package: PackageId) -> bool {
        self.stanza(package).get("Essential") == Some("yes")
    }

    /// Every package there is.
    pub fn packages(&self) -> impl Iterator<Item = PackageId> {
        self.indices.iter().enumerate().flat_map(|(index, content)| {
            (0..content.stanzas.len()).filter_map(move |stanza| {
                Some(PackageId { index: u32::try_from(index).ok()?, stanza: u32::try_from(stanza).ok()? })
            })
        })
    }

    /// Which repository a package comes from, and the path of its file as the index writes it: not
    /// yet checked.
    #[must_use]
    pub fn path(&self, package: PackageId) -> Option<(usize, &str)> {
        let (index, _) = self.entry(package);
        Some((index.repository, self.stanza(package).get("Filename")?))
    }

    /// Where the file of a package is and what it must be.
    ///
    /// # Errors
    /// The index does not say so, or names a path that leaves the archive.
    pub fn file(&self, package: PackageId) -> Result<PackageFile, CatalogueError> {
        let stanza = self.stanza(package);
        let unusable = |field: &'static str| CatalogueError::Unusable {
            package: self.name(package).to_owned(),
            field,
            value: stanza.get(field).unwrap_or("").to_owned(),
        };
        let parse = |field| stanza.get(field).ok_or_else(|| unusable(field));
        let path = parse("Filename")?;
        let path = path.strip_prefix("./").unwrap_or(path);
        if !is_inside(path) {
            return Err(unusable("Filename"));
        }
        Ok(PackageFile {
            repository: self.entry(package).0.repository,
            path: path.to_owned(),
            size: parse("Size")?.parse().map_err(|_| unusable("Size"))?,
            digest: parse("SHA256")?.parse().map_err(|_| unusable("SHA256"))?,
        })
    }
}

/// A path that stays under its root and needs no escape in a URL's path beyond what clients do.
pub(super) fn is_inside(path: &str) -> bool {
    !path.is_empty()
        && path.split('/').all(|part| !matches!(part, "" | "." | ".."))
        && !path.bytes().any(|byte| byte.is_ascii_control() || b"\\?#% ".contains(&byte))
}

/// What must be known of each package; read in one pass.
struct Found<'a> {
    name: Option<&'a str>,
    version: Option<&'a str>,
    architecture: &'a str,
    provides: Option<&'a str>,
    base: bool,
}

impl<'a> Found<'a> {
    fn read(stanza: Stanza<'a>) -> Self {
        const FIELDS: [&str; 6] = ["Package", "Version", "Architecture", "Provides", "Essential", "Priority"];
        let mut values = [None; FIELDS.len()];
        for (name, value) in stanza.fields() {
            // As `Stanza::get` reads them: whatever the case, and the first of equal ones.
            let field = FIELDS.iter().position(|field| field.eq_ignore_ascii_case(name));
            if let Some(place) = field {
                values[place].get_or_insert(value);
            }
        }
        let [name, version, architecture, provides, essential, priority] = values;
        Self {
            name,
            version,
            architecture: architecture.unwrap_or(""),
            provides,
            base: essential == Some("yes") || priority == Some("required"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn catalogue(texts: &[&str]) -> Catalogue {
        let mut catalogue = Catalogue::default();
        for (repository, text) in texts.iter().enumerate() {
            catalogue.add(repository, text.as_bytes().to_vec(), "amd64").expect("valid");
        }
        catalogue
    }

    #[test]
    fn the_newest_version_of_all_indices_is_the_candidate() {
        let catalogue = catalogue(&[
            "Package: a\nVersion: 1-9\nArchitecture: amd64\n\nPackage: b\nVersion: 2\nArchitecture: all\nProvides: v (= 3), w\n",
            "Package: a\nVersion: 1-10\nArchitecture: amd64\n\nPackage: a\nVersion: 9\nArchitecture: arm64\n",
        ]);
        let newest = catalogue.candidate("a").expect("there");
        assert_eq!(catalogue.version(newest), "1-10");
        assert_eq!(catalogue.providers("v")[0].version.as_deref(), Some("3"));
        assert_eq!(catalogue.providers("w")[0].version, None);
        assert_eq!(catalogue.packages().count(), 3);
    }

    #[test]
    fn fields_are_read_whatever_their_case_and_the_first_of_equal_ones_counts() {
        let catalogue = catalogue(&["PACKAGE: a\nversion: 1\nVersion: 2\nArchitecture: amd64\n"]);
        assert_eq!(catalogue.version(catalogue.candidate("a").expect("there")), "1");
    }

    #[test]
    fn a_path_that_leaves_the_archive_is_refused() {
        let digest = Digest::of(b"");
        for (path, fine) in [
            ("pool/a.deb", true),
            ("./pool/a+b~1.deb", true),
            ("../a", false),
            ("/a", false),
            ("a//b", false),
            ("a/../b", false),
            ("a?b", false),
        ] {
            let text = format!(
                "Package: a\nVersion: 1\nArchitecture: all\nFilename: {path}\nSize: 0\nSHA256: {digest}\n"
            );
            let catalogue = catalogue(&[&text]);
            let package = catalogue.candidate("a").expect("there");
            assert_eq!(catalogue.file(package).is_ok(), fine, "{path}");
        }
    }

    #[test]
    fn essential_and_required_packages_are_the_base() {
        let catalogue = catalogue(&[
            "Package: a\nVersion: 1\nArchitecture: all\nEssential: yes\n\nPackage: b\nVersion: 1\nArchitecture: all\nPriority: required\n\nPackage: c\nVersion: 1\nArchitecture: all\nPriority: important\n",
        ]);
        let names: Vec<_> = catalogue.base().map(|package| catalogue.name(package)).collect();
        assert_eq!(names, ["a", "b"]);
    }
}
