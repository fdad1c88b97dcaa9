//! The documents beside an image: its packages, its bill of materials, and where it came from.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use serde_json::Value;

use crate::contents::provenance::{Artifact, Build, statement};
use crate::contents::{Installed, Manifest, sbom};
use crate::debian::Selection;

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
        if let Some(contents) = &product.contents {
            let manifest = &contents.manifest;
            let sha256 = files.first().map(|file| file.sha256.as_str());
            let subject = sbom::Subject { name, sha256, created: &now };
            let bill = sbom::document(subject, manifest, |package| digest(selection, package));
            documents.push(("packages.json", serde_json::to_value(manifest).unwrap_or_default()));
            documents.push(("spdx.json", bill));
        }
        let outputs: Vec<Artifact> =
            files.iter().map(|file| Artifact { name: file.name(), sha256: file.sha256.clone() }).collect();
        let statement = statement(&Build {
            outputs: &outputs,
            recipe: &recipe.text,
            materials: &materials(product),
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

/// Everything that went into a build.
fn materials(product: &Product) -> Vec<Artifact> {
    let selection = &product.packages.selection;
    let mut materials = product.materials.clone();
    for repository in &selection.repositories {
        for suite in &repository.suites {
            let name = format!("{}/dists/{}/InRelease", repository.name, suite.name);
            materials.push(Artifact { name, sha256: suite.in_release.0.to_string() });
        }
    }
    for package in &selection.packages {
        let architecture = selection.catalogue.stanza(package.id).get("Architecture").unwrap_or("all");
        materials.push(Artifact {
            name: address(&package.name, &package.version, architecture),
            sha256: package.file.digest.to_string(),
        });
    }
    if let Some(contents) = &product.contents {
        materials.extend(installed(&contents.manifest, selection));
    }
    materials
}

/// What the image has beyond the packages that were chosen, as far as the archive knows it.
fn installed(manifest: &Manifest, selection: &Selection) -> Vec<Artifact> {
    let known = |package: &Installed| {
        let name = address(&package.name, &package.version, &package.architecture);
        digest(selection, package).map(|sha256| Artifact { name, sha256 })
    };
    manifest.packages.iter().filter_map(known).collect()
}

/// The digest of an installed package, where the archive's signed index has that version.
fn digest(selection: &Selection, package: &Installed) -> Option<String> {
    let catalogue = &selection.catalogue;
    let id = catalogue.find(&package.name, &package.version, &package.architecture)?;
    Some(catalogue.file(id).ok()?.digest.to_string())
}

/// A Debian package's purl.
pub(super) fn address(name: &str, version: &str, architecture: &str) -> String {
    let text = format!(
        "Package: {name}\nStatus: install ok installed\nVersion: {version}\nArchitecture: {architecture}\n"
    );
    let manifest = Manifest::of_dpkg(&text, "ID=debian\n");
    manifest.packages.first().map(|package| manifest.address(package)).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_package_has_one_address_wherever_it_is_named() {
        assert_eq!(
            address("libc6", "2.36-9+deb12u1", "amd64"),
            "pkg:deb/debian/libc6@2.36-9%2Bdeb12u1?arch=amd64"
        );
    }

    #[test]
    fn times_have_whole_seconds() {
        let time = SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_900);
        assert_eq!(timestamp(time), "2023-11-14T22:13:20Z");
    }
}
