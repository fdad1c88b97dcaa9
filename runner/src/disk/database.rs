//! dpkg's database for packages that are unpacked and not yet configured.
//!
//! Pure: texts in dpkg's formats (deb-src: `lib/dpkg/dump.c`, `lib/dpkg/parse.c`, `deb-triggers(5)`).
//! `dpkg --configure -a` finishes such packages. Conffiles are written in place with their own digest,
//! which dpkg takes as already settled: it only asks where a `.dpkg-new` waits beside one. File
//! triggers need no activation, as every interested package is itself still to be configured.

use std::collections::BTreeMap;

use crate::debian::control::Stanza;

/// A package's record of one file that an administrator may change.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Conffile {
    /// Absolute path.
    pub path: String,
    /// MD5 digest in hexadecimal, as dpkg keeps it.
    pub md5: String,
}

/// A package as its own control file describes it.
#[derive(Clone, Copy, Debug)]
pub struct Described<'a> {
    stanza: Stanza<'a>,
}

impl<'a> Described<'a> {
    /// Takes the text of a control file; `None` when it has no name, version or architecture.
    #[must_use]
    pub fn new(fields: &'a str) -> Option<Self> {
        let stanza = Stanza::new(fields.trim_start_matches('\n'));
        let complete = ["Package", "Version", "Architecture"].iter().all(|name| stanza.get(name).is_some());
        complete.then_some(Self { stanza })
    }

    fn field(&self, name: &str) -> &'a str {
        self.stanza.get(name).unwrap_or("")
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &'a str {
        self.field("Package")
    }

    /// Its version.
    #[must_use]
    pub fn version(&self) -> &'a str {
        self.field("Version")
    }

    /// Its architecture.
    #[must_use]
    pub fn architecture(&self) -> &'a str {
        self.field("Architecture")
    }

    /// Its name in file names and in trigger files: with the architecture where several may be
    /// installed side by side.
    #[must_use]
    pub fn instance(&self) -> String {
        if self.field("Multi-Arch") == "same" {
            format!("{}:{}", self.name(), self.architecture())
        } else {
            self.name().to_owned()
        }
    }

    /// Its stanza of `status`.
    #[must_use]
    pub fn status(&self, conffiles: &[Conffile]) -> String {
        let mut text = format!("Package: {}\nStatus: install ok unpacked\n", self.name());
        for (name, value) in self.stanza.fields() {
            // Only dpkg itself writes these; a package that has them would corrupt its own record.
            let own =
                ["Package", "Status", "Conffiles", "Config-Version", "Triggers-Pending", "Triggers-Awaited"];
            if !own.iter().any(|own| name.eq_ignore_ascii_case(own)) {
                text.push_str(&format!("{name}: {value}\n"));
            }
        }
        if !conffiles.is_empty() {
            text.push_str("Conffiles:\n");
            for conffile in conffiles {
                text.push_str(&format!(" {} {}\n", conffile.path, conffile.md5));
            }
        }
        text.push('\n');
        text
    }
}

/// The conffiles that a control archive's `conffiles` names. Those that are to be removed on upgrade
/// are not in the package.
#[must_use]
pub fn conffile_paths(text: &str) -> Vec<String> {
    text.lines().map(str::trim).filter(|line| line.starts_with('/')).map(str::to_owned).collect()
}

/// A package's `.list`: the root first, then each path as the package has it.
#[must_use]
pub fn file_list(paths: &[&str]) -> String {
    let mut text = String::from("/.\n");
    for path in paths {
        let path = path.trim_start_matches("./").trim_matches('/');
        if !path.is_empty() && path != "." {
            text.push_str(&format!("/{path}\n"));
        }
    }
    text
}

/// The files of `/var/lib/dpkg/triggers`, by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Triggers {
    files: BTreeMap<String, String>,
}

impl Triggers {
    /// Takes what `instance` is interested in, by its control archive's `triggers`.
    pub fn add(&mut self, instance: &str, text: &str) {
        for line in text.lines().map(|line| line.split('#').next().unwrap_or("")) {
            let mut words = line.split_whitespace();
            let (Some(directive), Some(name)) = (words.next(), words.next()) else {
                continue;
            };
            let awaiting = match directive {
                "interest" | "interest-await" => "",
                "interest-noawait" => "/noawait",
                _ => continue,
            };
            if name.starts_with('/') {
                let file = self.files.entry("File".to_owned()).or_default();
                file.push_str(&format!("{name} {instance}{awaiting}\n"));
            } else if is_trigger_name(name) {
                let file = self.files.entry(name.to_owned()).or_default();
                file.push_str(&format!("{instance}{awaiting}\n"));
            }
        }
    }

    /// File names and contents.
    pub fn files(&self) -> impl Iterator<Item = (&str, &str)> {
        self.files.iter().map(|(name, text)| (name.as_str(), text.as_str()))
    }
}

/// A trigger's name becomes a file name; dpkg keeps `File`, `Lock` and `Unincorp` for itself.
fn is_trigger_name(name: &str) -> bool {
    !name.starts_with('.') && !name.contains('/') && !matches!(name, "File" | "Lock" | "Unincorp")
}

/// apt's note of packages that came only as dependencies, so that `apt autoremove` can tell.
#[must_use]
pub fn extended_states<'a>(automatic: impl Iterator<Item = (&'a str, &'a str)>) -> String {
    automatic
        .map(|(name, architecture)| {
            format!("Package: {name}\nArchitecture: {architecture}\nAuto-Installed: 1\n\n")
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_stanza_keeps_the_packages_fields() {
        let described =
            Described::new("Package: libc6\nVersion: 2.36-9\nArchitecture: amd64\nMulti-Arch: same\nStatus: x\nDescription: a\n b\n .\n c\n")
                .expect("complete");
        let conffile =
            Conffile { path: "/etc/a".to_owned(), md5: "d41d8cd98f00b204e9800998ecf8427e".to_owned() };
        assert_eq!(
            described.status(&[conffile]),
            "Package: libc6\nStatus: install ok unpacked\nVersion: 2.36-9\nArchitecture: amd64\nMulti-Arch: same\nDescription: a\n b\n .\n c\nConffiles:\n /etc/a d41d8cd98f00b204e9800998ecf8427e\n\n"
        );
        assert_eq!(described.instance(), "libc6:amd64");
        assert!(Described::new("Package: a\n").is_none());
    }

    #[test]
    fn lists_have_the_root_and_no_trailing_slashes() {
        let paths = ["./", "./etc/", "./etc/a", "lib/x"];
        assert_eq!(file_list(&paths), "/.\n/etc\n/etc/a\n/lib/x\n");
    }

    #[test]
    fn conffiles_to_be_removed_are_not_in_the_package() {
        assert_eq!(conffile_paths("/etc/a\nremove-on-upgrade /etc/b\n"), ["/etc/a"]);
    }

    #[test]
    fn triggers_are_sorted_into_files() {
        let mut triggers = Triggers::default();
        triggers.add("a", "# why\ninterest /usr/x\ninterest-noawait ldconfig\nactivate y\n");
        triggers.add("b:amd64", "interest-noawait /usr/x\ninterest ../z\ninterest File\n");
        let files: Vec<_> = triggers.files().collect();
        assert_eq!(files, [("File", "/usr/x a\n/usr/x b:amd64/noawait\n"), ("ldconfig", "a/noawait\n")]);
    }

    #[test]
    fn automatic_packages_are_noted() {
        assert_eq!(
            extended_states([("a", "amd64")].into_iter()),
            "Package: a\nArchitecture: amd64\nAuto-Installed: 1\n\n"
        );
    }
}
