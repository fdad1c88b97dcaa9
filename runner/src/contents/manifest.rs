//! Which packages are installed in an image.
//!
//! Read from dpkg's own database, or from what `rpm` says. Both were written in a guest, by packages and by
//! whoever wrote the recipe: what is no package is left out, and nothing here is a path or a command.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::debian::control;

/// The most packages that a system is believed to have; distributions have fewer in their whole archives.
const MOST_PACKAGES: usize = 100_000;

/// Why there is no list of packages that would have all of them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// Something in the database is no package.
    #[error("number {number} in the image's own list of packages has no {lacks}: is its database damaged?")]
    Damaged {
        /// Which one, 1 being the first.
        number: usize,
        /// What it lacks.
        lacks: &'static str,
    },
    /// There are too many.
    #[error("the image's own list of packages has more than {MOST_PACKAGES}: no system has so many")]
    TooMany,
    /// It is too long to be read.
    #[error("the image's own list of packages has more than {limit} bytes: no system's is that long")]
    TooLong {
        /// How many bytes are read.
        limit: u64,
    },
}

/// Who manages the packages of a system.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum System {
    /// dpkg.
    Dpkg,
    /// rpm.
    Rpm,
}

/// An installed package.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Installed {
    /// Its name.
    pub name: String,
    /// Its version, for rpm with the release and, where it is not 0, the epoch.
    pub version: String,
    /// Its architecture.
    pub architecture: String,
    /// The source package, where it has another name or version.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Who looks after it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub maintainer: Option<String>,
    /// Its licence as rpm has it; dpkg has none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub license: Option<String>,
}

/// What an image has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Manifest {
    /// `ID` of os-release(5), such as `debian`.
    pub distribution: String,
    /// `VERSION_ID` of os-release(5), such as `12`.
    pub release: String,
    /// Who manages the packages.
    pub system: System,
    /// The packages, by name.
    pub packages: Vec<Installed>,
}

impl Manifest {
    /// Reads dpkg's `status`, and os-release(5).
    ///
    /// # Errors
    /// The list would not have all packages.
    pub fn of_dpkg(status: &str, os_release: &str) -> Result<Self, ManifestError> {
        let mut packages = Vec::new();
        for (number, stanza) in (1..).zip(control::stanzas(status)) {
            let field = |name: &'static str| {
                stanza.get(name).map(one_line).ok_or(ManifestError::Damaged { number, lacks: name })
            };
            let status = field("Status")?;
            // What is only half there has files all the same.
            if matches!(status.rsplit(' ').next(), Some("not-installed" | "config-files")) {
                continue;
            }
            packages.push(Installed {
                name: field("Package")?,
                version: field("Version")?,
                architecture: field("Architecture")?,
                source: field("Source").ok(),
                maintainer: field("Maintainer").ok(),
                license: None,
            });
            if packages.len() > MOST_PACKAGES {
                return Err(ManifestError::TooMany);
            }
        }
        packages.sort();
        Ok(Self::new(System::Dpkg, packages, os_release))
    }

    /// Reads what `guest/report.sh` has rpm write: a package ends with ASCII's record separator, its fields with
    /// the unit separator.
    ///
    /// # Errors
    /// The list would not have all packages.
    pub fn of_rpm(records: &str, os_release: &str) -> Result<Self, ManifestError> {
        let mut packages = Vec::new();
        for (number, record) in (1..).zip(records.split_terminator('\x1e')) {
            let mut fields = record.split('\x1f').map(|field| one_line(&field.replace(['\n', '\t'], " ")));
            let mut field = |lacks| {
                let field = fields.next().filter(|field| !field.is_empty());
                field.ok_or(ManifestError::Damaged { number, lacks })
            };
            let name = field("name")?;
            // A key, and no package.
            if name == "gpg-pubkey" {
                continue;
            }
            let (epoch, version, release) = (field("epoch")?, field("version")?, field("release")?);
            let version = match epoch.as_str() {
                "0" | "(none)" => format!("{version}-{release}"),
                epoch => format!("{epoch}:{version}-{release}"),
            };
            let (architecture, license) = (field("architecture")?, field("license").ok());
            packages.push(Installed { name, version, architecture, source: None, maintainer: None, license });
            if packages.len() > MOST_PACKAGES {
                return Err(ManifestError::TooMany);
            }
        }
        packages.sort();
        Ok(Self::new(System::Rpm, packages, os_release))
    }

    /// A Debian system's, with no packages and of no release.
    pub(crate) fn debian() -> Self {
        Self::new(System::Dpkg, Vec::new(), "ID=debian\n")
    }

    fn new(system: System, packages: Vec<Installed>, os_release: &str) -> Self {
        let fields: BTreeMap<&str, &str> =
            os_release.lines().filter_map(|line| line.split_once('=')).collect();
        let field = |name: &str| {
            let value = fields.get(name).map_or("", |value| value.trim().trim_matches(['"', '\'']));
            one_line(value)
        };
        Self { distribution: field("ID"), release: field("VERSION_ID"), system, packages }
    }

    /// The package's address in the language of packages, a purl.
    #[must_use]
    pub fn address(&self, package: &Installed) -> String {
        let kind = match self.system {
            System::Dpkg => "deb",
            System::Rpm => "rpm",
        };
        let mut version = package.version.as_str();
        let mut qualifiers = vec![format!("arch={}", encoded(&package.architecture))];
        // rpm's purl has the epoch apart.
        if self.system == System::Rpm
            && let Some((epoch, rest)) = version.split_once(':')
        {
            qualifiers.push(format!("epoch={}", encoded(epoch)));
            version = rest;
        }
        if !self.release.is_empty() {
            qualifiers.push(format!("distro={}-{}", encoded(&self.distribution), encoded(&self.release)));
        }
        qualifiers.sort();
        let namespace = if self.distribution.is_empty() { "unknown" } else { &self.distribution };
        format!(
            "pkg:{kind}/{}/{}@{}?{}",
            encoded(namespace),
            encoded(&package.name),
            encoded(version),
            qualifiers.join("&")
        )
    }
}

/// Text on one line, without what acts on a terminal.
fn one_line(text: &str) -> String {
    text.chars().filter(|character| !character.is_control()).take(1000).collect()
}

/// Percent-encoded, as a purl wants it.
fn encoded(text: &str) -> String {
    let mut encoded = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            encoded.push_str(&format!("%{byte:02X}"));
        }
    }
    encoded
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEBIAN: &str = "PRETTY_NAME=\"Debian\"\nID=debian\nVERSION_ID=\"12\"\n";

    #[test]
    fn what_is_installed_is_told_and_what_was_removed_is_not() {
        let status = "Package: b\nStatus: install ok installed\nArchitecture: all\nVersion: 1:2+b~1\nSource: src (2)\nMaintainer: M <m@x.test>\n\nPackage: gone\nStatus: deinstall ok config-files\nArchitecture: all\nVersion: 1\n\nPackage: a\nStatus: hold ok installed\nArchitecture: amd64\nVersion: 3\n\nPackage: c\nStatus: install ok triggers-pending\nArchitecture: amd64\nVersion: 4\n";
        let manifest = Manifest::of_dpkg(status, DEBIAN).unwrap();
        let names: Vec<&str> = manifest.packages.iter().map(|package| package.name.as_str()).collect();
        assert_eq!(names, ["a", "b", "c"]);
        assert_eq!(
            manifest.address(&manifest.packages[1]),
            "pkg:deb/debian/b@1%3A2%2Bb~1?arch=all&distro=debian-12"
        );
    }

    #[test]
    fn rpm_has_epochs_and_licences() {
        let records = [
            "bash\x1f0\x1f5.2\x1f1.fc40\x1fx86_64\x1fGPL-3.0-or-later\nand\tMIT\x1e",
            "vim\x1f2\x1f9.1\x1f1.fc40\x1fx86_64\x1f\x1e",
            "gpg-pubkey\x1f0\x1f1\x1f2\x1f(none)\x1f\x1e",
        ];
        let manifest = Manifest::of_rpm(&records.concat(), "ID=fedora\nVERSION_ID=40\n").unwrap();
        assert_eq!(manifest.packages.len(), 2);
        assert_eq!(manifest.packages[0].license.as_deref(), Some("GPL-3.0-or-later and MIT"));
        assert_eq!(manifest.packages[1].version, "2:9.1-1.fc40");
        assert_eq!(
            manifest.address(&manifest.packages[1]),
            "pkg:rpm/fedora/vim@9.1-1.fc40?arch=x86_64&distro=fedora-40&epoch=2"
        );
    }

    #[test]
    fn a_list_that_would_lack_packages_is_none() {
        let error = |text: &str| Manifest::of_dpkg(text, DEBIAN).unwrap_err();
        let whole = "Package: a\nStatus: install ok installed\nArchitecture: all\nVersion: 1\n\n";
        let cut = "Package: b\nStatus: install ok installed\n";
        assert_eq!(error(&format!("{whole}{cut}")), ManifestError::Damaged { number: 2, lacks: "Version" });
        assert_eq!(error("Package: b\n"), ManifestError::Damaged { number: 1, lacks: "Status" });
        assert_eq!(error(&whole.repeat(MOST_PACKAGES + 1)), ManifestError::TooMany);
        let error = |text: &str| Manifest::of_rpm(text, DEBIAN).unwrap_err();
        assert_eq!(error("a\x1f0\x1f1\x1e"), ManifestError::Damaged { number: 1, lacks: "release" });
        assert_eq!(
            error(&"a\x1f0\x1f1\x1f1\x1fnoarch\x1f\x1e".repeat(MOST_PACKAGES + 1)),
            ManifestError::TooMany
        );
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics_and_no_control_character_comes_through(text in ".{0,300}") {
            for manifest in [Manifest::of_dpkg(&text, &text), Manifest::of_rpm(&text, &text)].into_iter().flatten() {
                for package in &manifest.packages {
                    proptest::prop_assert!(!manifest.address(package).chars().any(char::is_control));
                }
            }
        }
    }
}
