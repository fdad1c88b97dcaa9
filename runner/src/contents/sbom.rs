//! A bill of materials: SPDX 2.3, as JSON.
//!
//! Licences are declared where the package manager knows them, and not asserted elsewhere: dpkg knows none,
//! and guessing them from copyright files would be a claim without evidence.

use serde_json::{Value, json};

use super::manifest::Manifest;

/// What the document is about.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// The image's name.
    pub name: &'a str,
    /// SHA-256 of its first file, in hexadecimal, where it has one.
    pub sha256: Option<&'a str>,
    /// When it was made, as RFC 3339 has it.
    pub created: &'a str,
}

/// The document. `digest` gives a package's SHA-256 where the archive's signed index tells it.
#[must_use]
pub fn document(
    subject: Subject<'_>,
    manifest: &Manifest,
    digest: impl Fn(&super::Installed) -> Option<String>,
) -> Value {
    let mut packages = vec![json!({
        "SPDXID": "SPDXRef-image",
        "name": subject.name,
        "versionInfo": manifest.release,
        "downloadLocation": "NOASSERTION",
        "filesAnalyzed": false,
        "licenseConcluded": "NOASSERTION",
        "licenseDeclared": "NOASSERTION",
        "copyrightText": "NOASSERTION",
        "primaryPackagePurpose": "OPERATING-SYSTEM",
    })];
    if let Some(sha256) = subject.sha256 {
        packages[0]["checksums"] = json!([{"algorithm": "SHA256", "checksumValue": sha256}]);
    }
    let mut relationships = vec![json!({
        "spdxElementId": "SPDXRef-DOCUMENT",
        "relationshipType": "DESCRIBES",
        "relatedSpdxElement": "SPDXRef-image",
    })];
    for (number, package) in manifest.packages.iter().enumerate() {
        let id = format!("SPDXRef-package-{number}-{}", identifier(&package.name));
        let mut entry = json!({
            "SPDXID": id,
            "name": package.name,
            "versionInfo": package.version,
            "downloadLocation": "NOASSERTION",
            "filesAnalyzed": false,
            "licenseConcluded": "NOASSERTION",
            "licenseDeclared": "NOASSERTION",
            "copyrightText": "NOASSERTION",
            "externalRefs": [{
                "referenceCategory": "PACKAGE-MANAGER",
                "referenceType": "purl",
                "referenceLocator": manifest.address(package),
            }],
        });
        if let Some(maintainer) = &package.maintainer {
            entry["supplier"] = json!(supplier(maintainer));
        }
        if let Some(source) = &package.source {
            entry["sourceInfo"] = json!(format!("built from source package {source}"));
        }
        // Not as licenseDeclared: rpm's words for licences are not always SPDX's.
        if let Some(license) = &package.license {
            entry["licenseComments"] = json!(format!("rpm says: {license}"));
        }
        if let Some(sha256) = digest(package) {
            entry["checksums"] = json!([{"algorithm": "SHA256", "checksumValue": sha256}]);
        }
        packages.push(entry);
        relationships.push(json!({
            "spdxElementId": "SPDXRef-image",
            "relationshipType": "CONTAINS",
            "relatedSpdxElement": id,
        }));
    }
    json!({
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": subject.name,
        // Has to be another for each document, and need not lead anywhere.
        "documentNamespace": format!(
            "urn:hostler:sbom:{}:{}",
            subject.name,
            subject.sha256.unwrap_or(subject.created)
        ),
        "creationInfo": {
            "created": subject.created,
            "creators": [concat!("Tool: hostler-", env!("CARGO_PKG_VERSION"))],
        },
        "packages": packages,
        "relationships": relationships,
    })
}

/// The letters that an identifier may have.
fn identifier(name: &str) -> String {
    let fits = |sign: char| sign.is_ascii_alphanumeric() || sign == '.' || sign == '-';
    name.chars().map(|sign| if fits(sign) { sign } else { '-' }).collect()
}

/// `Name <address>` as SPDX writes it.
fn supplier(maintainer: &str) -> String {
    match maintainer.split_once(" <") {
        Some((name, address)) => {
            format!("Organization: {} ({})", name.trim_matches('"'), address.trim_end_matches('>'))
        }
        None => format!("Organization: {maintainer}"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_package_is_described_once_and_contained_in_the_image() {
        let status = "Package: libc6\nStatus: install ok installed\nArchitecture: amd64\nVersion: 1\nMaintainer: GNU Libc <g@x.test>\n\nPackage: lib+c\nStatus: install ok installed\nArchitecture: all\nVersion: 2\n";
        let manifest = Manifest::of_dpkg(status, "ID=debian\nVERSION_ID=12\n").unwrap();
        let subject = Subject { name: "x", sha256: Some("ab"), created: "2026-01-01T00:00:00Z" };
        let document =
            document(subject, &manifest, |package| (package.name == "libc6").then(|| "cd".to_owned()));
        let packages = document["packages"].as_array().unwrap();
        let ids: BTreeSet<&str> =
            packages.iter().map(|package| package["SPDXID"].as_str().unwrap()).collect();
        assert_eq!(
            ids,
            BTreeSet::from(["SPDXRef-image", "SPDXRef-package-0-lib-c", "SPDXRef-package-1-libc6"])
        );
        assert_eq!(packages[2]["supplier"], "Organization: GNU Libc (g@x.test)");
        assert_eq!(packages[2]["checksums"][0]["checksumValue"], "cd");
        let relationships = document["relationships"].as_array().unwrap();
        assert_eq!(relationships.len(), 3);
        for relationship in relationships {
            assert!(ids.contains(relationship["relatedSpdxElement"].as_str().unwrap()), "{relationship}");
        }
    }
}
