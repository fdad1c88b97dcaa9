//! Relations between packages: `Depends: a (>= 1) | b, c:any` (Debian Policy 7.1).

use std::cmp::Ordering;
use std::fmt;

use super::version;

/// How a version must stand to the one that is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operator {
    /// `<<`
    Earlier,
    /// `<=`
    EarlierOrEqual,
    /// `=`
    Equal,
    /// `>=`
    LaterOrEqual,
    /// `>>`
    Later,
}

impl Operator {
    fn sign(self) -> &'static str {
        match self {
            Self::Earlier => "<<",
            Self::EarlierOrEqual => "<=",
            Self::Equal => "=",
            Self::LaterOrEqual => ">=",
            Self::Later => ">>",
        }
    }

    fn accepts(self, order: Ordering) -> bool {
        match self {
            Self::Earlier => order == Ordering::Less,
            Self::EarlierOrEqual => order != Ordering::Greater,
            Self::Equal => order == Ordering::Equal,
            Self::LaterOrEqual => order != Ordering::Less,
            Self::Later => order == Ordering::Greater,
        }
    }
}

/// One package that is named, perhaps with conditions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relation<'a> {
    /// Package, or virtual package.
    pub name: &'a str,
    /// The word after the colon: `any`, `native` or an architecture.
    pub qualifier: Option<&'a str>,
    /// Condition on the version.
    pub version: Option<(Operator, &'a str)>,
}

impl Relation<'_> {
    /// Does `candidate` fulfil the condition on the version?
    #[must_use]
    pub fn accepts(&self, candidate: &str) -> bool {
        self.version.is_none_or(|(operator, wanted)| operator.accepts(version::compare(candidate, wanted)))
    }

    /// Does a virtual package fulfil this? One that states no version fulfils no condition on it
    /// (Policy 7.5).
    #[must_use]
    pub fn accepts_provided(&self, provided: Option<&str>) -> bool {
        match (self.version, provided) {
            (None, _) => true,
            (Some(_), None) => false,
            (Some(_), Some(version)) => self.accepts(version),
        }
    }

    /// Can a package of `architecture` be meant?
    #[must_use]
    pub fn fits(&self, architecture: &str) -> bool {
        match self.qualifier {
            None | Some("any" | "native") => true,
            Some(word) => word == architecture,
        }
    }
}

impl fmt::Display for Relation<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name)?;
        if let Some(qualifier) = self.qualifier {
            write!(formatter, ":{qualifier}")?;
        }
        if let Some((operator, version)) = self.version {
            write!(formatter, " ({} {version})", operator.sign())?;
        }
        Ok(())
    }
}

/// Parses a field: groups, all of which must hold, of alternatives, one of which must.
///
/// # Errors
/// The part of the text that is no relation.
pub fn parse(field: &str) -> Result<Vec<Vec<Relation<'_>>>, &str> {
    field
        .split(',')
        .map(str::trim)
        .filter(|group| !group.is_empty())
        .map(|group| group.split('|').map(|one| parse_one(one.trim())).collect())
        .collect()
}

fn parse_one(text: &str) -> Result<Relation<'_>, &str> {
    let (head, version) = match text.split_once('(') {
        None => (text, None),
        Some((head, rest)) => {
            let condition = rest.trim_end().strip_suffix(')').ok_or(text)?.trim();
            let digits = condition.find(|sign: char| !"<>=".contains(sign)).ok_or(text)?;
            let operator = match &condition[..digits] {
                "<<" => Operator::Earlier,
                // The single signs are old spellings of the inclusive ones (Policy 7.1).
                "<=" | "<" => Operator::EarlierOrEqual,
                "=" => Operator::Equal,
                ">=" | ">" => Operator::LaterOrEqual,
                ">>" => Operator::Later,
                _ => return Err(text),
            };
            (head, Some((operator, condition[digits..].trim())))
        }
    };
    let head = head.trim();
    let (name, qualifier) = match head.split_once(':') {
        Some((name, qualifier)) => (name, Some(qualifier)),
        None => (head, None),
    };
    let sound = |word: &str| !word.is_empty() && !word.contains(char::is_whitespace);
    if sound(name) && qualifier.is_none_or(sound) && version.is_none_or(|(_, version)| sound(version)) {
        Ok(Relation { name, qualifier, version })
    } else {
        Err(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_alternatives_versions_and_qualifiers() {
        let groups = parse("a (>= 1:2-3) | b, python3:any (<<4),\n c").expect("valid");
        let texts: Vec<Vec<String>> =
            groups.iter().map(|group| group.iter().map(ToString::to_string).collect()).collect();
        assert_eq!(texts, [vec!["a (>= 1:2-3)", "b"], vec!["python3:any (<< 4)"], vec!["c"]]);
    }

    #[test]
    fn a_bare_provide_fulfils_no_version() {
        let relation = parse_one("m (>= 1)").expect("valid");
        assert!(!relation.accepts_provided(None));
        assert!(relation.accepts_provided(Some("1")));
        assert!(!relation.accepts_provided(Some("0.9")));
        assert!(parse_one("m").expect("valid").accepts_provided(None));
    }

    #[test]
    fn what_is_no_relation_is_named() {
        for text in ["a (>= 1", "a (1)", "a (>=)", "a (~ 1)", ":any", "a b"] {
            assert_eq!(parse(text), Err(text));
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(text in "[a-c:|,()<>=~1 ]{0,40}") {
            let _ = parse(&text);
        }
    }
}
