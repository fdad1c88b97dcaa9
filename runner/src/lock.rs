//! What went into a build, byte for byte, so that it can be done again with the same.
//!
//! A lock is a text: [`Lock::parse`] and [`Lock::text`] are all there is to it. It names the signed
//! Release files, every file that was used with its digest and where it can be had, in the order in which
//! they were asked for, and what the machines were told. Deliberately absent: the keys. A lock says what
//! was trusted, and whether to trust is still the keyring's matter.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::cache::Digest;

/// The version of the text's form.
const VERSION: u32 = 1;

/// Why a lock cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// The file cannot be read.
    #[error("cannot read the lock {}: make one with --lock", path.display())]
    Read {
        /// The lock.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The text is no lock.
    #[error("{} is no lock that this version understands: make a new one with --lock", path.display())]
    Invalid {
        /// The lock.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: toml::de::Error,
    },
    /// It is of another version.
    #[error("the lock {} has version {found}, and this is for {VERSION}: make a new one with --lock", path.display())]
    Version {
        /// The lock.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// It cannot be written as text.
    #[error("the lock cannot be written as text")]
    Unwritable(#[source] toml::ser::Error),
}

/// A file or folder of the recipe's side is not the lock's.
#[derive(Debug, thiserror::Error)]
pub enum InputError {
    /// It is another one.
    #[error("{name} is not what the lock has: put the old one back, or make a new lock without --locked")]
    Differs {
        /// What.
        name: String,
    },
    /// The lock knows no such thing.
    #[error("the lock does not have {name}: make a new lock without --locked")]
    Unknown {
        /// What.
        name: String,
    },
}

/// What went into a build.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lock {
    /// Of the text's form.
    pub version: u32,
    /// Hostler's own version.
    pub hostler: String,
    /// The recipe.
    pub recipe: LockedRecipe,
    /// Tools of the host, as name and version.
    #[serde(default)]
    pub tools: Vec<LockedTool>,
    /// What the machines were told.
    #[serde(default)]
    pub machines: Vec<LockedMachine>,
    /// Files and folders of the recipe's side.
    #[serde(default)]
    pub inputs: Vec<LockedInput>,
    /// Suites of archives, in their order.
    #[serde(default)]
    pub suites: Vec<LockedSuite>,
    /// Every file, in the order in which they were asked for.
    #[serde(default)]
    pub files: Vec<LockedFile>,
}

/// The recipe of a build.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedRecipe {
    /// The image's name.
    pub name: String,
    /// Digest of its text, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sha256: Option<Digest>,
}

/// A tool of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedTool {
    /// Its name.
    pub name: String,
    /// Its version.
    pub version: String,
}

/// What a machine was told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedMachine {
    /// In which stage.
    pub stage: String,
    /// qemu's arguments, without the names of scratch files and the nonce.
    pub arguments: Vec<String>,
}

/// A file or folder of the recipe's side.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedInput {
    /// What it is, and its name: `workspace:`, `answers:` or `file:`.
    pub name: String,
    /// Digest of the file, or of the archive that a folder is made into.
    pub sha256: Digest,
}

/// A suite of an archive.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedSuite {
    /// Its name.
    pub name: String,
    /// Roots of its mirrors.
    pub mirrors: Vec<String>,
    /// Components.
    pub components: Vec<String>,
    /// The keyring that its source names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keyring: Option<PathBuf>,
    /// Digest of the signed Release file.
    pub sha256: Digest,
    /// Its bytes.
    pub size: u64,
}

/// A file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LockedFile {
    /// What it is called, such as its path under its archive's root.
    pub name: String,
    /// Its digest.
    pub sha256: Digest,
    /// Its bytes.
    pub size: u64,
    /// Where it can be had.
    pub urls: Vec<String>,
    /// Whether signed metadata or the recipe vouches for it.
    #[serde(default = "yes", skip_serializing_if = "is_true")]
    pub verified: bool,
}

fn yes() -> bool {
    true
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde asks for it")]
fn is_true(value: &bool) -> bool {
    *value
}

impl Lock {
    /// A lock of this version, with nothing in it.
    #[must_use]
    pub fn new() -> Self {
        let hostler = env!("CARGO_PKG_VERSION").to_owned();
        Self { version: VERSION, hostler, ..Self::default() }
    }

    /// Reads the lock at `path`.
    ///
    /// # Errors
    /// It cannot be read, or is none.
    pub fn load(path: &Path) -> Result<Self, LockError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| LockError::Read { path: path.to_owned(), source })?;
        Self::parse(&text, path)
    }

    /// Parses a lock; `path` only serves the messages.
    ///
    /// # Errors
    /// It is none.
    pub fn parse(text: &str, path: &Path) -> Result<Self, LockError> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
        }
        let invalid = |source| LockError::Invalid { path: path.to_owned(), source };
        // Another version's may have other fields; its number is what matters then.
        let Versioned { version } = toml::from_str(text).map_err(invalid)?;
        if version != VERSION {
            return Err(LockError::Version { path: path.to_owned(), found: version });
        }
        toml::from_str(text).map_err(invalid)
    }

    /// The text of the lock.
    ///
    /// # Errors
    /// A path in it is not text.
    pub fn text(&self) -> Result<String, LockError> {
        let text = toml::to_string_pretty(self).map_err(LockError::Unwritable)?;
        Ok(format!("# What went into the image, byte for byte; made by `hostler build --lock`.\n{text}"))
    }

    /// The digests of everything in it, once each.
    #[must_use]
    pub fn digests(&self) -> Vec<Digest> {
        let mut seen = HashSet::new();
        let suites = self.suites.iter().map(|suite| suite.sha256);
        let files = self.files.iter().map(|file| file.sha256);
        suites.chain(files).filter(|digest| seen.insert(*digest)).collect()
    }

    /// Is this the input that it has?
    ///
    /// # Errors
    /// It is another one, or there is none of this name.
    pub fn check_input(&self, name: &str, sha256: Digest) -> Result<(), InputError> {
        match self.inputs.iter().find(|input| input.name == name) {
            Some(input) if input.sha256 == sha256 => Ok(()),
            Some(_) => Err(InputError::Differs { name: name.to_owned() }),
            None => Err(InputError::Unknown { name: name.to_owned() }),
        }
    }

    /// What the lock calls the content with this digest.
    #[must_use]
    pub fn name_of(&self, digest: Digest) -> Option<String> {
        let file = self.files.iter().find(|file| file.sha256 == digest).map(|file| file.name.clone());
        let suite = || self.suites.iter().find(|suite| suite.sha256 == digest);
        file.or_else(|| suite().map(|suite| format!("dists/{}/InRelease", suite.name)))
    }

    /// How `other`, a lock of the same build done again, differs in what is not bytes: tools and machines.
    #[must_use]
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let mut differences = Vec::new();
        if self.hostler != other.hostler {
            differences.push(format!("hostler is {} where the lock has {}", other.hostler, self.hostler));
        }
        for tool in &other.tools {
            match self.tools.iter().find(|known| known.name == tool.name) {
                Some(known) if known.version != tool.version => differences
                    .push(format!("{} is {} where the lock has {}", tool.name, tool.version, known.version)),
                _ => {}
            }
        }
        for machine in &other.machines {
            let known = self.machines.iter().find(|known| known.stage == machine.stage);
            if known.is_some_and(|known| known.arguments != machine.arguments) {
                differences.push(format!("the machine of stage {} is told something else", machine.stage));
            }
        }
        differences
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lock() -> Lock {
        Lock {
            recipe: LockedRecipe { name: "x".to_owned(), sha256: Some(Digest::of(b"recipe")) },
            tools: vec![LockedTool { name: "qemu".to_owned(), version: "7.2".to_owned() }],
            machines: vec![LockedMachine { stage: "guest".to_owned(), arguments: vec!["-m".to_owned()] }],
            inputs: vec![LockedInput { name: "workspace:w".to_owned(), sha256: Digest::of(b"w") }],
            suites: vec![LockedSuite {
                name: "bookworm".to_owned(),
                mirrors: vec!["http://mirror.test/debian".to_owned()],
                components: vec!["main".to_owned()],
                keyring: None,
                sha256: Digest::of(b"signed"),
                size: 6,
            }],
            files: vec![LockedFile {
                name: "pool/a.deb".to_owned(),
                sha256: Digest::of(b"a"),
                size: 1,
                urls: vec!["http://mirror.test/debian/pool/a.deb".to_owned()],
                verified: true,
            }],
            ..Lock::new()
        }
    }

    #[test]
    fn a_lock_is_its_text() {
        let text = lock().text().expect("writable");
        assert_eq!(Lock::parse(&text, Path::new("x.lock")).expect("a lock"), lock());
        assert!(text.contains(&Digest::of(b"a").to_string()), "{text}");
        assert_eq!(lock().digests(), [Digest::of(b"signed"), Digest::of(b"a")]);
        assert_eq!(lock().name_of(Digest::of(b"a")).as_deref(), Some("pool/a.deb"));
        assert_eq!(lock().name_of(Digest::of(b"signed")).as_deref(), Some("dists/bookworm/InRelease"));
        assert_eq!(lock().name_of(Digest::of(b"b")), None);
    }

    #[test]
    fn what_is_no_lock_is_refused_with_what_to_do() {
        let refusal = |text: &str| Lock::parse(text, Path::new("x.lock")).expect_err("refused").to_string();
        let text = lock().text().expect("writable");
        assert!(refusal(&text.replace("version = 1\n", "version = 7\nmore = 1\n")).contains("version 7"));
        for wrong in [
            String::new(),
            text.replace("size = 6", "size = -6"),
            text.replace("sha256 = \"", "sha256 = \"z"),
        ] {
            assert!(refusal(&wrong).contains("make a new one with --lock"), "{wrong}");
        }
    }

    #[test]
    fn inputs_are_held_to_the_lock() {
        assert!(lock().check_input("workspace:w", Digest::of(b"w")).is_ok());
        let told = |name: &str| lock().check_input(name, Digest::of(b"x")).expect_err("refused").to_string();
        assert!(told("workspace:w").starts_with("workspace:w is not what the lock has"));
        assert!(told("answers:a").starts_with("the lock does not have answers:a"));
    }

    #[test]
    fn tools_that_changed_are_told() {
        let mut again = lock();
        assert_eq!(lock().differences(&again), Vec::<String>::new());
        again.tools[0].version = "9.0".to_owned();
        again.machines[0].arguments.push("1G".to_owned());
        assert_eq!(
            lock().differences(&again),
            ["qemu is 9.0 where the lock has 7.2", "the machine of stage guest is told something else"]
        );
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(text in ".{0,200}") {
            let _ = Lock::parse(&text, Path::new("x.lock"));
            let _ = Lock::parse(&format!("version = 1\n{text}"), Path::new("x.lock"));
        }
    }
}
