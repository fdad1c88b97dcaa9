//! What of a Debian archive goes into a mirror.

use std::collections::{BTreeSet, HashSet};
use std::path::Path;

use crate::cache::{Digest, Fetcher, Wanted};
use crate::debian::catalogue::{Catalogue, PackageId};
use crate::debian::{self, Repository, SelectError, Suite, resolve};
use crate::event::{Event, Sink, Stage};
use crate::recipe::Debian;

use super::{Folder, Plan};

/// Which part of the archives.
#[derive(Clone, Debug)]
pub struct Wish {
    /// Archives, suite, components and keyring; its packages are only asked for in [`Extent::Closure`], and
    /// its architecture is one of `architectures`.
    pub archive: Debian,
    /// Architectures.
    pub architectures: Vec<String>,
    /// Which packages.
    pub extent: Extent,
    /// Folders of installer images, such as `netboot`; `all` means all.
    pub installer: Vec<String>,
}

/// Which packages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Extent {
    /// All.
    Whole,
    /// The essential ones, apt, those that are asked for, and what these depend on, in every version.
    Closure,
    /// Those with these digests.
    Digests(HashSet<Digest>),
}

/// Why a mirror cannot be planned.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// The archive cannot be read.
    #[error(transparent)]
    Select(#[from] SelectError),
    /// The lock has no such images.
    #[error("the lock has no installer images of suite {suite}: leave out --installer")]
    NotLocked {
        /// The suite.
        suite: String,
    },
    /// There are no such images.
    #[error("suite {suite} has no installer images for {architecture}: leave out --installer")]
    NoInstaller {
        /// The suite.
        suite: String,
        /// The architecture.
        architecture: String,
    },
}

/// Reads the archives and tells which of their files the mirror is to have. Blocks for the network.
///
/// # Errors
/// Something cannot be had, trusted or resolved.
pub fn plan(wish: &Wish, fetcher: &Fetcher, host: &Path, sink: &dyn Sink) -> Result<Plan, PlanError> {
    let mut plan = Plan::default();
    // What the lock's build did without, it can do without again.
    let locked: Option<HashSet<Digest>> = fetcher.lock().map(|lock| lock.digests().into_iter().collect());
    let has = |digest: &Digest| locked.as_ref().is_none_or(|locked| locked.contains(digest));
    for architecture in &wish.architectures {
        let archive = Debian { architecture: architecture.clone(), ..wish.archive.clone() };
        let (repositories, catalogue) = debian::archives(&archive, fetcher, host, sink)?;
        for package in chosen(&wish.extent, &archive, &catalogue)? {
            let file = catalogue.file(package).map_err(|source| SelectError::Catalogue {
                name: catalogue.name(package).to_owned(),
                source,
            })?;
            let Some(repository) = repositories.get(file.repository) else { continue };
            let urls = repository.uris.iter().map(|uri| format!("{uri}/{}", file.path)).collect();
            let wanted = Wanted { name: file.path.clone(), urls, size: Some(file.size), digest: file.digest };
            plan.files.push((format!("{}/{}", repository.name, file.path), wanted));
        }
        let mut images = 0;
        for repository in &repositories {
            for suite in &repository.suites {
                add_indices(&mut plan, repository, suite, architecture);
                if !wish.installer.is_empty() {
                    images += add_installer(
                        &mut plan,
                        repository,
                        suite,
                        architecture,
                        &wish.installer,
                        fetcher,
                        &has,
                        sink,
                    )?;
                }
            }
        }
        if !wish.installer.is_empty() && images == 0 {
            let suite = wish.archive.suite.clone();
            if locked.is_some() {
                return Err(PlanError::NotLocked { suite });
            }
            return Err(PlanError::NoInstaller { suite, architecture: architecture.clone() });
        }
        for repository in repositories {
            let suites: Vec<&str> = repository.suites.iter().map(|suite| suite.name.as_str()).collect();
            let about = format!("Debian archive, {}", suites.join(", "));
            plan.folders.retain(|(name, _)| *name != repository.name);
            plan.folders.push((repository.name, Folder { upstreams: repository.uris, about }));
        }
    }
    plan.files.retain(|(_, wanted)| has(&wanted.digest));
    Ok(plan)
}

fn chosen(extent: &Extent, archive: &Debian, catalogue: &Catalogue) -> Result<Vec<PackageId>, SelectError> {
    Ok(match extent {
        Extent::Whole => catalogue.packages().collect(),
        Extent::Closure => {
            let base: Vec<PackageId> = catalogue.base().collect();
            let mut wanted = vec!["apt".to_owned()];
            // What debootstrap takes to satisfy init-system-helpers.
            wanted.extend(catalogue.candidate("usr-is-merged").map(|_| "usr-is-merged".to_owned()));
            wanted.extend_from_slice(&archive.packages);
            let closure = resolve::resolve(catalogue, &archive.architecture, &base, &wanted)?.packages;
            // Who knows only one of the suites takes another version than who knows them all.
            let names: BTreeSet<&str> = closure.iter().map(|package| catalogue.name(*package)).collect();
            names.into_iter().flat_map(|name| catalogue.named(name)).copied().collect()
        }
        Extent::Digests(digests) => {
            let is_one = |package: &PackageId| {
                catalogue.file(*package).is_ok_and(|file| digests.contains(&file.digest))
            };
            catalogue.packages().filter(is_one).collect()
        }
    })
}

/// The signed Release file and what apt and debootstrap read of the indices that it names, each under its
/// name and under its digest.
fn add_indices(plan: &mut Plan, repository: &Repository, suite: &Suite, architecture: &str) {
    let root = format!("{}/dists/{}", repository.name, suite.name);
    plan.files.push((format!("{root}/InRelease"), suite.signed(&repository.uris)));
    for index in names(suite, architecture) {
        let Some(entry) = suite.release.indices.get(&index) else { continue };
        let wanted = suite.index(&repository.uris, &index, *entry);
        if let Some((folder, _)) = index.rsplit_once('/') {
            plan.files.push((format!("{root}/{folder}/by-hash/SHA256/{}", wanted.digest), wanted.clone()));
        }
        plan.files.push((format!("{root}/{index}"), wanted));
    }
}

/// The indices that matter, each in its best form: archives keep no others.
fn names(suite: &Suite, architecture: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut best = |plain: String, required: bool| {
        let forms = [".xz", ".gz", ".bz2", ""];
        let there = |form: &&str| suite.release.indices.contains_key(&format!("{plain}{form}"));
        // Only packages' indices are ever kept without compression.
        let form = forms.iter().find(|form| there(form) && (required || !form.is_empty()));
        names.extend(form.map(|form| format!("{plain}{form}")));
    };
    for component in &suite.components {
        best(format!("{component}/binary-{architecture}/Packages"), true);
        // Where nobody reads it, archives do not keep it up to date.
        if suite.release.separate_all {
            best(format!("{component}/binary-all/Packages"), true);
        }
        best(format!("{component}/i18n/Translation-en"), false);
    }
    names
}

/// The images of Debian's installer, by the checksum file that the Release file vouches for, and the
/// packages that the installer itself loads. How many images.
#[expect(clippy::too_many_arguments, reason = "one place calls it, and names them all")]
fn add_installer(
    plan: &mut Plan,
    repository: &Repository,
    suite: &Suite,
    architecture: &str,
    folders: &[String],
    fetcher: &Fetcher,
    has: &dyn Fn(&Digest) -> bool,
    sink: &dyn Sink,
) -> Result<usize, PlanError> {
    let root = format!("{}/dists/{}", repository.name, suite.name);
    let fetch = |wanted: &Wanted| -> Result<Vec<u8>, PlanError> {
        sink.event(Event::Progress {
            stage: Stage::Select,
            doing: wanted.name.clone(),
            bytes: 0,
            total: None,
        });
        Ok(fetcher.fetch(wanted).map_err(SelectError::from)?)
    };
    let mut images = 0;
    for component in &suite.components {
        let folder = format!("{component}/installer-{architecture}/current/images");
        let entry = suite.release.indices.get(&format!("{folder}/SHA256SUMS"));
        if let Some(entry) = entry.filter(|(_, digest)| has(digest)) {
            let sums = suite.index(&repository.uris, &format!("{folder}/SHA256SUMS"), *entry);
            let text = String::from_utf8_lossy(&fetch(&sums)?).into_owned();
            plan.files.push((format!("{root}/{folder}/SHA256SUMS"), sums));
            for (path, digest) in checksums(&text) {
                let top = path.split('/').next().unwrap_or("");
                if !folders.iter().any(|folder| folder == "all" || folder == top) || !has(&digest) {
                    continue;
                }
                let name = format!("dists/{}/{folder}/{path}", suite.name);
                let urls = repository.uris.iter().map(|uri| format!("{uri}/{name}")).collect();
                plan.files
                    .push((format!("{}/{name}", repository.name), Wanted { name, urls, size: None, digest }));
                images += 1;
            }
        }
        let plain = format!("{component}/debian-installer/binary-{architecture}/Packages");
        let forms = [".xz", ".gz", ""].map(|form| format!("{plain}{form}"));
        let found = forms.iter().find_map(|index| Some((index, *suite.release.indices.get(index)?)));
        if let Some((index, entry)) = found.filter(|(_, (_, digest))| has(digest)) {
            let wanted = suite.index(&repository.uris, index, entry);
            let plain_size = suite.release.indices.get(&plain).map(|entry| entry.0);
            let text = debian::decompress(index, &fetch(&wanted)?, plain_size)?;
            let mut udebs = Catalogue::default();
            let damaged = |source| SelectError::Catalogue { name: index.clone(), source };
            udebs.add(0, text, architecture).map_err(damaged)?;
            for package in udebs.packages() {
                let file = udebs.file(package).map_err(damaged)?;
                let urls = repository.uris.iter().map(|uri| format!("{uri}/{}", file.path)).collect();
                let wanted =
                    Wanted { name: file.path.clone(), urls, size: Some(file.size), digest: file.digest };
                plan.files.push((format!("{}/{}", repository.name, file.path), wanted));
            }
            if let Some((folder, _)) = index.rsplit_once('/') {
                plan.files
                    .push((format!("{root}/{folder}/by-hash/SHA256/{}", wanted.digest), wanted.clone()));
            }
            plan.files.push((format!("{root}/{index}"), wanted));
        }
    }
    Ok(images)
}

/// The lines of a checksum file, as `sha256sum` writes it.
fn checksums(text: &str) -> Vec<(String, Digest)> {
    let line = |line: &str| {
        let (digest, path) = line.split_once(char::is_whitespace)?;
        let path = path.trim_start().trim_start_matches('*');
        Some((path.strip_prefix("./").unwrap_or(path).to_owned(), digest.parse().ok()?))
    };
    text.lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::debian::release::Release;

    #[test]
    fn checksum_files_are_read() {
        let digest = Digest::of(b"x");
        let text = format!("{digest}  ./netboot/mini.iso\n{digest} *cdrom/vmlinuz\nnonsense\n");
        assert_eq!(
            checksums(&text),
            [("netboot/mini.iso".to_owned(), digest), ("cdrom/vmlinuz".to_owned(), digest)]
        );
    }

    #[test]
    fn indices_are_taken_in_the_form_that_archives_keep() {
        let digest = Digest::of(b"x");
        let lines: String = [
            "main/binary-amd64/Packages",
            "main/binary-amd64/Packages.gz",
            "main/binary-amd64/Packages.xz",
            "main/binary-arm64/Packages.xz",
            "main/i18n/Translation-en",
            "main/i18n/Translation-en.bz2",
            "contrib/binary-amd64/Packages.xz",
        ]
        .iter()
        .map(|path| format!(" {digest} 1 {path}\n"))
        .collect();
        let release = Release::parse(&format!(
            "Codename: s\nDate: Sat, 21 Nov 2026 00:53:02 UTC\nArchitectures: amd64\nSHA256:\n{lines}"
        ))
        .expect("valid");
        let suite = Suite {
            name: "s".to_owned(),
            components: vec!["main".to_owned()],
            in_release: (digest, 1),
            release,
        };
        assert_eq!(names(&suite, "amd64"), ["main/binary-amd64/Packages.xz", "main/i18n/Translation-en.bz2"]);
    }
}
