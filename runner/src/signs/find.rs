//! Finds rules in text.

use std::fmt;
use std::sync::OnceLock;

use aho_corasick::AhoCorasick;
use serde::{Deserialize, Serialize};

use crate::class::Class;

use super::pack::{Pack, PackError, Place, Rule, Weight};

/// The packs that come with this program.
const BUILTIN: [&str; 7] = [
    include_str!("../../rules/firmware.toml"),
    include_str!("../../rules/linux.toml"),
    include_str!("../../rules/userspace.toml"),
    include_str!("../../rules/packages.toml"),
    include_str!("../../rules/debian-installer.toml"),
    include_str!("../../rules/anaconda.toml"),
    include_str!("../../rules/subiquity.toml"),
];

/// The longest line that is kept in a finding, in characters.
const LONGEST_SHOWN: usize = 240;

/// A rule that matched, and what it matched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// The pack.
    pub pack: String,
    /// The pack's version.
    pub version: u32,
    /// The rule.
    pub rule: String,
    /// The class of the failure.
    pub class: Class,
    /// What it means for the run.
    pub weight: Weight,
    /// Where it was found.
    pub place: Place,
    /// Who said it.
    pub speaker: String,
    /// What it means, as a sentence about the speaker without an end.
    pub meaning: String,
    /// The text around it, without control characters.
    pub line: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}: {}", self.meaning, self.line)
    }
}

/// Rule packs, ready to be searched for.
#[derive(Debug)]
pub struct Rules {
    packs: Vec<Pack>,
    searcher: AhoCorasick,
    /// For each text that is searched for, its pack and rule.
    owners: Vec<(usize, usize)>,
}

impl Rules {
    /// Those of this program.
    ///
    /// # Panics
    /// Never: a test reads the packs.
    #[must_use]
    pub fn builtin() -> &'static Self {
        static RULES: OnceLock<Rules> = OnceLock::new();
        RULES.get_or_init(|| {
            let packs: Result<Vec<Pack>, PackError> = BUILTIN.iter().map(|text| Pack::parse(text)).collect();
            packs.and_then(Self::new).expect("the packs of this program were tested")
        })
    }

    /// Those of these packs.
    ///
    /// # Errors
    /// When they are too many to be searched for.
    pub fn new(packs: Vec<Pack>) -> Result<Self, PackError> {
        let mut texts = Vec::new();
        let mut owners = Vec::new();
        for (pack, rules) in packs.iter().enumerate() {
            for (rule, text) in rules.rules.iter().enumerate() {
                texts.push(text.longest_part().to_owned());
                owners.push((pack, rule));
            }
        }
        let searcher = AhoCorasick::new(&texts).map_err(|error| PackError::Search(error.to_string()))?;
        Ok(Self { packs, searcher, owners })
    }

    /// The packs.
    #[must_use]
    pub fn packs(&self) -> &[Pack] {
        &self.packs
    }

    /// The weightiest rule that matches a line or a screen; of several, the one that the packs name first.
    #[must_use]
    pub fn find(&self, place: Place, text: &str) -> Option<Finding> {
        let mut best: Option<(Weight, usize, usize)> = None;
        for found in self.searcher.find_overlapping_iter(text) {
            let Some(&(pack, rule)) = self.owners.get(found.pattern().as_usize()) else { continue };
            let candidate = &self.packs[pack].rules[rule];
            let better = best.is_none_or(|(weight, ..)| candidate.weight > weight)
                || best.is_some_and(|(weight, p, r)| candidate.weight == weight && (pack, rule) < (p, r));
            if better && candidate.places.contains(&place) && candidate.matches(text) {
                best = Some((candidate.weight, pack, rule));
            }
        }
        best.map(|(_, pack, rule)| finding(&self.packs[pack], rule, place, text))
    }
}

fn finding(pack: &Pack, rule: usize, place: Place, text: &str) -> Finding {
    let rule = &pack.rules[rule];
    Finding {
        pack: pack.name.clone(),
        version: pack.version,
        rule: rule.id.clone(),
        class: rule.class,
        weight: rule.weight,
        place,
        speaker: pack.speaker.clone(),
        meaning: format!("{} {}", pack.speaker, rule.says),
        line: excerpt(pack, rule, place, text),
    }
}

/// What is shown of the text: a screen from its start, where a dialog has its title and question; a line,
/// when it is long, from the match on.
fn excerpt(pack: &Pack, rule: &Rule, place: Place, text: &str) -> String {
    let first = rule.parts().next().unwrap_or("");
    let start = match (place, &pack.dialog) {
        (Place::Screen, Some(dialog)) => text.find(dialog.as_str()),
        (Place::Line | Place::Log, _) if text.len() > LONGEST_SHOWN => text.find(first),
        _ => None,
    };
    let start = start.unwrap_or(0);
    let rest = text.get(start..).unwrap_or(text);
    rest.trim().chars().filter(|character| !character.is_control()).take(LONGEST_SHOWN).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(place: Place, text: &str) -> Option<String> {
        Rules::builtin().find(place, text).map(|finding| format!("{}/{}", finding.pack, finding.rule))
    }

    #[test]
    fn the_packs_of_this_program_are_packs_and_no_rule_has_two_meanings() {
        let mut names = Vec::new();
        for pack in Rules::builtin().packs() {
            assert!(pack.version >= 1 && !pack.rules.is_empty());
            names.extend(pack.rules.iter().map(|rule| format!("{}/{}", pack.name, rule.id)));
        }
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn every_rule_finds_a_text_made_of_its_own_parts() {
        for pack in Rules::builtin().packs() {
            for rule in &pack.rules {
                let parts: Vec<&str> = rule.parts().collect();
                let text =
                    format!("{}{}", if rule.by.is_some() { "[    1.000000] " } else { "" }, parts.join("x"));
                for &place in &rule.places {
                    assert!(rule.matches(&text), "{}/{}: {text}", pack.name, rule.id);
                    assert!(found(place, &text).is_some(), "{}/{}: {text}", pack.name, rule.id);
                }
            }
        }
    }

    #[test]
    fn a_place_finds_only_its_own_rules() {
        assert_eq!(
            found(Place::Screen, "Downloading a file failed:"),
            Some("debian-installer/download-dialog".into())
        );
        assert_eq!(found(Place::Line, "Downloading a file failed:"), None);
        assert_eq!(
            found(Place::Line, "cp: write error: No space left on device"),
            Some("userspace/no-space".into())
        );
    }

    #[test]
    fn an_end_goes_before_a_question_and_that_before_an_explanation() {
        let screen = "[!!] Download installer components Downloading a file failed: <Go Back> <Continue>";
        assert_eq!(found(Place::Screen, screen), Some("debian-installer/download-dialog".into()));
        assert_eq!(
            found(Place::Screen, "Hostname: <Go Back> <Continue>"),
            Some("debian-installer/go-back".into())
        );
    }

    #[test]
    fn a_finding_has_no_control_characters_and_is_short() {
        let text = format!("a\u{1b}[2J{} No space left on device", "x".repeat(1000));
        let finding = Rules::builtin().find(Place::Line, &text).unwrap();
        assert_eq!(finding.line, "No space left on device");
        let text = "a\u{1b}[2J: No space left on device";
        assert_eq!(Rules::builtin().find(Place::Line, text).unwrap().line, "a[2J: No space left on device");
    }
}
