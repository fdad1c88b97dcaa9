//! Which packages are installed in an image.
//!
//! Read from dpkg's own database, or from what `rpm` says. Both were written in a guest, by packages and by
//! whoever wrote the recipe: what is no package is left out, and nothing here is a path or a command.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::debian::control;

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
    #[must_use]
    pub fn of_dpkg(status: &str, os_release: &str) -> Self {
        let mut packages: Vec<Installed> = control::stanzas(status)
            .filter(|stanza| stanza.get("Status").is_some_and(|status| status.ends_with(" installed")))
            .filter_map(|stanza| {
                let field = |name: &str| stanza.get(name).map(one_line);
                Some(Installed {
                    name: field("Package")?,
                    version: field("Version")?,
                    architecture: field("Architecture")?,
                    source: field("Source"),
                    maintainer: field("Maintainer"),
                    license: None,
                })
            })
            .collect();
        packages.sort();
        Self::new(System::Dpkg, packages, os_release)
    }

    /// Reads the lines that `guest/report.sh` has rpm write.
    #[must_use]
    pub fn of_rpm(lines: &str, os_release: &str) -> Self {
        let mut packages: Vec<Installed> = lines
            .lines()
            .filter_map(|line| {
                let mut fields = line.split('\t').map(one_line);
                let name = fields.next().filter(|name| !name.is_empty() && name != "gpg-pubkey")?;
                let epoch = fields.next()?;
                let (version, release) = (fields.next()?, fields.next()?);
                let version = match epoch.as_str() {
                    "" | "0" | "(none)" => format!("{version}-{release}"),
                    epoch => format!("{epoch}:{version}-{release}"),
                };
                let architecture = fields.next()?;
                Some(Installed {
                    name,
                    version,
                    architecture,
                    source: None,
                    maintainer: None,
                    license: fields.next().filter(|license| !license.is_empty()),
                })
            })
            .collect();
        packages.sort();
        Self::new(System::Rpm, packages, os_release)
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
        let status = "Package: b\nStatus: install ok installed\nArchitecture: all\nVersion: 1:2+b~1\nSource: src (2)\nMaintainer: M <m@x.test>\n\nPackage: gone\nStatus: deinstall ok config-files\nArchitecture: all\nVersion: 1\n\nPackage: a\nStatus: hold ok installed\nArchitecture: amd64\nVersion: 3\n";
        let manifest = Manifest::of_dpkg(status, DEBIAN);
        let names: Vec<&str> = manifest.packages.iter().map(|package| package.name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(
            manifest.address(&manifest.packages[1]),
            "pkg:deb/debian/b@1%3A2%2Bb~1?arch=all&distro=debian-12"
        );
    }

    #[test]
    fn rpm_has_epochs_and_licences() {
        let lines = "bash\t0\t5.2\t1.fc40\tx86_64\tGPL-3.0-or-later\nvim\t2\t9.1\t1.fc40\tx86_64\t\ngpg-pubkey\t0\t1\t2\t(none)\t\nbroken\t1\n";
        let manifest = Manifest::of_rpm(lines, "ID=fedora\nVERSION_ID=40\n");
        assert_eq!(manifest.packages.len(), 2);
        assert_eq!(manifest.packages[0].license.as_deref(), Some("GPL-3.0-or-later"));
        assert_eq!(manifest.packages[1].version, "2:9.1-1.fc40");
        assert_eq!(
            manifest.address(&manifest.packages[1]),
            "pkg:rpm/fedora/vim@9.1-1.fc40?arch=x86_64&distro=fedora-40&epoch=2"
        );
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics_and_no_control_character_comes_through(text in ".{0,300}") {
            for manifest in [Manifest::of_dpkg(&text, &text), Manifest::of_rpm(&text, &text)] {
                for package in &manifest.packages {
                    proptest::prop_assert!(!manifest.address(package).chars().any(char::is_control));
                }
            }
        }
    }
}
