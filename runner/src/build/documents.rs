//! The documents beside an image: its packages, its bill of materials, and where it came from.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use serde_json::Value;

use crate::contents::provenance::{Artifact, Build, statement};
use crate::contents::{Installed, Manifest, System, sbom};
use crate::debian::Selection;
use crate::recipe::Kind;

use super::error::BuildError;
use super::preflight::Host;
use super::product::Product;
use super::results::Finished;
use super::session::Session;

impl Session<'_> {
    /// Writes the documents about what was made; their paths.
    pub(super) fn documents(
        &self,
        host: &Host,
        product: &Product,
        files: &[Finished],
        logs: &[Artifact],
    ) -> Result<Vec<PathBuf>, BuildError> {
        let recipe = &self.request.recipe;
        let name = &recipe.image.name;
        let selection = &product.packages.selection;
        let now = timestamp(self.request.time.unwrap_or_else(SystemTime::now));
        let began = timestamp(SystemTime::now() - self.started.elapsed());
        let mut documents = Vec::new();
        let mut materials = went_in(&recipe.kind, &product.materials, selection);
        let given = Given::new(&materials, selection);
        let manifest = product.contents.as_ref().map(|contents| &contents.manifest);
        // A list with nothing in it would say that there is nothing.
        if let Some(manifest) = manifest.filter(|manifest| !manifest.packages.is_empty()) {
            let sha256 = files.first().map(|file| file.sha256.as_str());
            let subject = sbom::Subject { name, sha256, created: &now };
            let bill = sbom::document(subject, manifest, |package| given.digest(manifest, package));
            documents.push(("packages.json", serde_json::to_value(manifest).unwrap_or_default()));
            documents.push(("spdx.json", bill));
        }
        materials.extend(manifest.map(|manifest| given.installed(manifest)).unwrap_or_default());
        let outputs: Vec<Artifact> =
            files.iter().map(|file| Artifact { name: file.name(), sha256: file.sha256.clone() }).collect();
        let statement = statement(&Build {
            outputs: &outputs,
            recipe: &recipe.text,
            materials: &materials,
            means: BTreeMap::from([
                ("accelerator", product.accelerator.name().to_owned()),
                ("qemu", host.qemu_version.clone()),
                ("hostler", env!("CARGO_PKG_VERSION").to_owned()),
            ]),
            byproducts: logs,
            times: self.request.time.is_none().then_some((began.as_str(), now.as_str())),
        });
        documents.push(("provenance.json", statement));
        documents
            .into_iter()
            .map(|(suffix, document)| {
                let path = self.scratch.path().join(format!("{name}.{suffix}"));
                let written = fs::write(&path, pretty(&document));
                written.map(|()| path.clone()).map_err(|source| BuildError::Write { path, source })
            })
            .collect()
    }
}

fn pretty(document: &Value) -> String {
    // A value always has a text.
    serde_json::to_string_pretty(document).unwrap_or_default() + "\n"
}

fn timestamp(time: SystemTime) -> String {
    let seconds = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
    humantime::format_rfc3339_seconds(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)).to_string()
}

/// Everything that went into a build, as far as it was handed out: `materials` beside the packages that were
/// chosen.
fn went_in(kind: &Kind, materials: &[Artifact], selection: &Selection) -> Vec<Artifact> {
    let mut all = materials.to_vec();
    // An installer chooses itself, and what it got is among the materials.
    if let Kind::Installer(_) = kind {
        return all;
    }
    for repository in &selection.repositories {
        for suite in &repository.suites {
            let name = format!("{}/dists/{}/InRelease", repository.name, suite.name);
            all.push(Artifact { name, sha256: suite.in_release.0.to_string() });
        }
    }
    for package in &selection.packages {
        let architecture = selection.catalogue.stanza(package.id).get("Architecture").unwrap_or("all");
        all.push(Artifact {
            name: address(&package.name, &package.version, architecture),
            sha256: package.file.digest.to_string(),
        });
    }
    all
}

/// Which of an image's packages are files that this build was given.
struct Given<'a> {
    digests: HashSet<String>,
    selection: &'a Selection,
}

impl<'a> Given<'a> {
    fn new(materials: &[Artifact], selection: &'a Selection) -> Self {
        Self { digests: materials.iter().map(|one| one.sha256.clone()).collect(), selection }
    }

    /// The digest of an installed package. One of the same name and version that came in another way may be
    /// another, so that the archive has it says nothing.
    fn digest(&self, manifest: &Manifest, package: &Installed) -> Option<String> {
        if manifest.system != System::Dpkg || manifest.distribution != "debian" {
            return None;
        }
        let catalogue = &self.selection.catalogue;
        let id = catalogue.find(&package.name, &package.version, &package.architecture)?;
        let digest = catalogue.file(id).ok()?.digest.to_string();
        Some(digest).filter(|digest| self.digests.contains(digest))
    }

    /// Those packages, by the names that people's tools know them by.
    fn installed(&self, manifest: &Manifest) -> Vec<Artifact> {
        let known = |package: &Installed| {
            let name = address(&package.name, &package.version, &package.architecture);
            self.digest(manifest, package).map(|sha256| Artifact { name, sha256 })
        };
        manifest.packages.iter().filter_map(known).collect()
    }
}

/// A Debian package's purl.
pub(super) fn address(name: &str, version: &str, architecture: &str) -> String {
    let package = Installed {
        name: name.to_owned(),
        version: version.to_owned(),
        architecture: architecture.to_owned(),
        source: None,
        maintainer: None,
        license: None,
    };
    Manifest::debian().address(&package)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::{Family, Installer, Medium};

    #[test]
    fn a_package_has_one_address_wherever_it_is_named() {
        assert_eq!(
            address("libc6", "2.36-9+deb12u1", "amd64"),
            "pkg:deb/debian/libc6@2.36-9%2Bdeb12u1?arch=amd64"
        );
    }

    /// An archive with packages `a` and `b`, of which `a` was chosen.
    fn selection() -> Selection {
        let mut catalogue = crate::debian::catalogue::Catalogue::default();
        let stanza = |name: &str| {
            let digest = crate::cache::Digest::of(name.as_bytes());
            format!(
                "Package: {name}\nVersion: 1\nArchitecture: all\nFilename: pool/{name}.deb\nSize: 1\nSHA256: {digest}\n\n"
            )
        };
        catalogue.add(0, (stanza("a") + &stanza("b")).into_bytes(), "amd64").unwrap();
        let chosen = crate::debian::describe(&catalogue, catalogue.candidate("a").unwrap(), true).unwrap();
        Selection {
            architecture: "amd64".to_owned(),
            repositories: Vec::new(),
            catalogue,
            packages: vec![chosen],
            own_keyring: false,
        }
    }

    #[test]
    fn only_what_was_handed_out_went_in() {
        let selection = selection();
        let status = ["a", "b"].map(|name| {
            format!("Package: {name}\nStatus: install ok installed\nVersion: 1\nArchitecture: all\n\n")
        });
        let manifest = Manifest::of_dpkg(&status.concat(), "ID=debian\n").unwrap();
        let file = |name: &str| Artifact {
            name: name.to_owned(),
            sha256: crate::cache::Digest::of(name.as_bytes()).to_string(),
        };
        let names = |list: Vec<Artifact>| -> Vec<String> { list.into_iter().map(|one| one.name).collect() };
        let a = "pkg:deb/debian/a@1?arch=all";
        let b = "pkg:deb/debian/b@1?arch=all";

        // The archive's packages were only looked at.
        let installer = Kind::Installer(Installer {
            family: Family::Anaconda,
            medium: Medium::Iso("x.iso".into()),
            answers: "ks.cfg".into(),
            arguments: Vec::new(),
        });
        let materials = went_in(&installer, &[file("x.iso")], &selection);
        assert_eq!(materials, [file("x.iso")]);
        assert!(Given::new(&materials, &selection).installed(&manifest).is_empty());
        // One of them went to the guest.
        let materials = went_in(&installer, &[file("b")], &selection);
        assert_eq!(names(Given::new(&materials, &selection).installed(&manifest)), [b]);

        let materials = went_in(&Kind::Debian, &[], &selection);
        assert_eq!(names(materials.clone()), [a]);
        let given = Given::new(&materials, &selection);
        assert_eq!(names(given.installed(&manifest)), [a]);
        // Another distribution's package of the same name and version is another.
        let ubuntu = Manifest::of_dpkg(&status.concat(), "ID=ubuntu\n").unwrap();
        assert!(given.installed(&ubuntu).is_empty());
        assert_eq!(given.digest(&ubuntu, &ubuntu.packages[0]), None);
    }

    #[test]
    fn times_have_whole_seconds() {
        let time = SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_900);
        assert_eq!(timestamp(time), "2023-11-14T22:13:20Z");
    }
}
