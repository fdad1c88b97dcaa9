//! What a build knows of its archives: plain data, and what follows from it.
//!
//! Deliberately absent: how it is found out (see `select`).

use std::path::PathBuf;

use crate::cache::{Digest, Wanted};
use crate::lock::LockedSuite;

use super::catalogue::{Catalogue, PackageFile, PackageId};
use super::release::Release;

/// One archive.
#[derive(Clone, Debug)]
pub struct Repository {
    /// Its name in the guest's addresses: a single safe path component.
    pub name: String,
    /// Roots of its mirrors, without a slash at the end, in the order in which they are asked.
    pub uris: Vec<String>,
    /// Its own roots as others are told of them, in images and locks: without this site's mirrors and without
    /// passwords.
    pub own: Vec<String>,
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

impl Suite {
    /// Its signed Release file, at archives with these roots.
    #[must_use]
    pub fn signed(&self, uris: &[String]) -> Wanted {
        let name = format!("dists/{}/InRelease", self.name);
        let (digest, size) = self.in_release;
        let urls = uris.iter().map(|uri| format!("{uri}/{name}")).collect();
        Wanted { name, urls, size: Some(size), digest }
    }

    /// An index that its Release file describes, at archives with these roots.
    #[must_use]
    pub fn index(&self, uris: &[String], index: &str, (size, digest): (u64, Digest)) -> Wanted {
        let paths = self.index_paths(index, digest);
        Wanted {
            name: format!("dists/{}/{index}", self.name),
            urls: uris.iter().flat_map(|uri| paths.iter().map(move |path| format!("{uri}/{path}"))).collect(),
            size: Some(size),
            digest,
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
            size: Some(file.size),
            digest: file.digest,
        }
    }

    /// The suites as a lock has them.
    #[must_use]
    pub fn locked_suites(&self) -> Vec<LockedSuite> {
        let of = |repository: &Repository, suite: &Suite| LockedSuite {
            name: suite.name.clone(),
            mirrors: repository.own.clone(),
            components: suite.components.clone(),
            keyring: (!self.own_keyring).then(|| repository.keyring.clone()),
            sha256: suite.in_release.0,
            size: suite.in_release.1,
        };
        self.repositories
            .iter()
            .flat_map(|repository| repository.suites.iter().map(move |suite| of(repository, suite)))
            .collect()
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
    fn sources_list(&self, root: impl Fn(&Repository) -> String) -> String {
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

    /// The `sources.list` of an image: the archives themselves, wherever this build took them from.
    #[must_use]
    pub fn image_sources(&self) -> String {
        self.sources_list(|repository| repository.own.first().cloned().unwrap_or_default())
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
