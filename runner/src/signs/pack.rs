//! A rule pack as it is written.

use serde::{Deserialize, Serialize};

use crate::class::Class;

/// Where a text is looked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Place {
    /// In each line that the console prints.
    Line,
    /// In the console's whole screen, as one line of text.
    Screen,
    /// In each line of the installer's own log.
    Log,
}

/// What a match means for the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Weight {
    /// It may be survived, and explains a failure that follows.
    Explains,
    /// The run has failed when this stays on the screen and nothing moves.
    Stays,
    /// The run has failed.
    Ends,
}

/// Who has to have said it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Voice {
    /// The kernel itself, whose lines start with the time.
    Kernel,
}

/// Where a rule's text was taken from.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "String")]
pub enum Origin {
    /// A Debian package.
    Deb(String),
    /// A package of Debian's installer.
    Udeb(String),
    /// The initial file systems that a Debian package contains.
    Initrd(String),
    /// Debian's kernel.
    Kernel,
    /// A file of an upstream project that no registry has as a package.
    Source(String),
}

impl TryFrom<String> for Origin {
    type Error = String;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        Ok(match text.split_once(':') {
            None if text == "kernel" => Self::Kernel,
            Some(("deb", package)) => Self::Deb(package.to_owned()),
            Some(("udeb", package)) => Self::Udeb(package.to_owned()),
            Some(("initrd", package)) => Self::Initrd(package.to_owned()),
            Some(("source", file)) => Self::Source(file.to_owned()),
            _ => return Err(format!("{text:?} is no origin: deb:, udeb:, initrd:, source: or kernel")),
        })
    }
}

/// One way to fail.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// Its name within the pack.
    pub id: String,
    /// The class of the failure.
    pub class: Class,
    /// Where its text is looked for.
    #[serde(rename = "where")]
    pub places: Vec<Place>,
    /// The text, as `rules/README.md` explains it.
    pub text: String,
    /// What a match means.
    pub weight: Weight,
    /// Who has to have said it.
    pub(super) by: Option<Voice>,
    /// What it means, as the predicate of a sentence about the pack's speaker.
    pub says: String,
    /// Where the text was taken from.
    pub from: Origin,
    /// How it is written there, where that differs.
    pub shipped: Option<String>,
}

/// A set of rules for what one speaker says.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pack {
    /// Its name.
    #[serde(rename = "pack")]
    pub name: String,
    /// Raised with every change.
    pub version: u32,
    /// Who speaks, as the subject of a sentence.
    pub speaker: String,
    /// What a dialog of its begins with: what is before that on a screen is no part of it.
    pub dialog: Option<String>,
    /// The rules.
    #[serde(rename = "rule")]
    pub rules: Vec<Rule>,
}

/// Why a pack is refused.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PackError {
    /// It is no TOML, or not of a pack's form.
    #[error("this is no rule pack")]
    Form(#[from] toml::de::Error),
    /// A rule would match everything.
    #[error("rule {rule} of pack {pack} has no text of at least 4 letters to look for")]
    Empty {
        /// The pack.
        pack: String,
        /// The rule.
        rule: String,
    },
    /// Only a screen can stay.
    #[error("rule {rule} of pack {pack} can only stay on a screen: where = [\"screen\"]")]
    NoScreen {
        /// The pack.
        pack: String,
        /// The rule.
        rule: String,
    },
    /// The texts cannot be searched for.
    #[error("the texts of the rules cannot be searched for: {0}")]
    Search(String),
}

impl Pack {
    /// Reads a pack.
    ///
    /// # Errors
    /// See [`PackError`].
    pub fn parse(text: &str) -> Result<Self, PackError> {
        let pack: Self = toml::from_str(text)?;
        for rule in &pack.rules {
            let name = || (pack.name.clone(), rule.id.clone());
            if rule.longest_part().len() < 4 {
                let (pack, rule) = name();
                return Err(PackError::Empty { pack, rule });
            }
            if rule.weight == Weight::Stays && rule.places != [Place::Screen] {
                let (pack, rule) = name();
                return Err(PackError::NoScreen { pack, rule });
            }
        }
        Ok(pack)
    }
}

impl Rule {
    /// The text as it must be found in what `from` names.
    #[must_use]
    pub fn shipped_text(&self) -> &str {
        self.shipped.as_deref().unwrap_or_else(|| self.longest_part())
    }

    /// The parts between the asterisks.
    pub(super) fn parts(&self) -> impl Iterator<Item = &str> {
        let text = self.text.strip_prefix('^').unwrap_or(&self.text);
        text.strip_suffix('$').unwrap_or(text).split('*').filter(|part| !part.is_empty())
    }

    pub(super) fn longest_part(&self) -> &str {
        self.parts().max_by_key(|part| part.len()).unwrap_or("")
    }

    /// Whether the text is there.
    pub(super) fn matches(&self, text: &str) -> bool {
        let text = text.trim_end_matches(['\r', '\n']);
        let text = match self.by {
            None => text,
            Some(Voice::Kernel) => match kernels(text) {
                Some(message) => message,
                None => return false,
            },
        };
        let mut rest = text;
        for (number, part) in self.parts().enumerate() {
            let Some(at) = rest.find(part) else {
                return false;
            };
            if number == 0 && self.text.starts_with('^') && at != 0 {
                return false;
            }
            rest = rest.get(at + part.len()..).unwrap_or("");
        }
        !self.text.ends_with('$')
            || self.parts().last().is_some_and(|part| text.trim_end().ends_with(part.trim_end()))
    }
}

/// What the kernel itself said in a line: its lines start with the time, `[   12.345678] `.
fn kernels(line: &str) -> Option<&str> {
    let (time, message) = line.trim_start().strip_prefix('[')?.split_once("] ")?;
    time.trim().parse::<f64>().ok().map(|_| message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(text: &str, more: &str) -> Result<Rule, PackError> {
        let pack = format!(
            "pack = \"p\"\nversion = 1\nspeaker = \"s\"\n[[rule]]\nid = \"r\"\nclass = \"stalled\"\nwhere = [\"line\"]\nweight = \"ends\"\nsays = \"x\"\nfrom = \"kernel\"\ntext = {text:?}\n{more}"
        );
        Pack::parse(&pack).map(|pack| pack.rules[0].clone())
    }

    #[test]
    fn parts_are_found_in_their_order() {
        let rule = rule("Menu item '*' failed.", "").unwrap();
        assert!(rule.matches("main-menu[22]: Menu item 'netcfg' failed."));
        assert!(!rule.matches("failed. Menu item '"));
    }

    #[test]
    fn ends_of_a_text_tie_it_to_the_ends_of_the_line() {
        let start = rule("^No bootable device.", "").unwrap();
        assert!(start.matches("No bootable device.\r"));
        assert!(!start.matches("it says: No bootable device."));
        let end = rule("grub rescue>$", "").unwrap();
        assert!(end.matches("error: x. grub rescue> "));
        assert!(!end.matches("grub rescue> ls"));
    }

    #[test]
    fn only_the_kernels_own_line_is_the_kernels() {
        let rule = rule("^Kernel panic - not syncing", "by = \"kernel\"").unwrap();
        assert!(rule.matches("[    4.25] Kernel panic - not syncing: VFS"));
        for line in [
            "Kernel panic - not syncing",
            "[x] Kernel panic - not syncing",
            "[ 1.0] echo: Kernel panic - not syncing",
        ] {
            assert!(!rule.matches(line), "{line}");
        }
    }

    #[test]
    fn what_would_match_everything_or_is_no_rule_is_refused() {
        assert!(matches!(rule("*", ""), Err(PackError::Empty { .. })));
        assert!(matches!(rule("abc", ""), Err(PackError::Empty { .. })));
        assert!(matches!(rule("abcd", "frm = 1"), Err(PackError::Form(_))));
        let stays = "pack = \"p\"\nversion = 1\nspeaker = \"s\"\n[[rule]]\nid = \"r\"\nclass = \"stalled\"\nwhere = [\"line\"]\nweight = \"stays\"\nsays = \"x\"\nfrom = \"kernel\"\ntext = \"abcd\"\n";
        assert!(matches!(Pack::parse(stays), Err(PackError::NoScreen { .. })));
    }
}
