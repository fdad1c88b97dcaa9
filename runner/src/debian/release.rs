//! The Release file: what a suite is, until when it holds, and the digests of its indices.
//!
//! Parses text that a signature already vouches for (see `signature`); it never sees the raw file.
//! `now` is a parameter.

use std::collections::HashMap;

use crate::cache::Digest;

use super::control;

/// Clocks differ; apt tolerates less, mirrors' clocks and ours need some.
const CLOCK_TOLERANCE: u64 = 24 * 3600;

/// What a Release file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Release {
    /// `Origin`, such as `Debian`.
    pub origin: String,
    /// `Suite`, such as `oldstable-security`.
    pub suite: String,
    /// `Codename`, such as `bookworm-security`.
    pub codename: String,
    /// `Date`, in seconds since 1970.
    pub date: u64,
    /// `Valid-Until`, in seconds since 1970.
    pub valid_until: Option<u64>,
    /// Are indices also offered under the name of their digest?
    pub by_hash: bool,
    /// `Architectures`.
    pub architectures: Vec<String>,
    /// Are packages for all architectures only in an index of their own?
    pub separate_all: bool,
    /// Size in bytes and digest of each index, by its path under the suite.
    pub indices: HashMap<String, (u64, Digest)>,
}

/// Why a Release file is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReleaseError {
    /// A field that it must have is absent.
    #[error("its field {0} is missing: this is not an archive's Release file")]
    Missing(&'static str),
    /// A field cannot be read.
    #[error("its field {field} reads {value:?}, which cannot be understood")]
    Malformed {
        /// The field.
        field: &'static str,
        /// Its value, or the wrong line.
        value: String,
    },
    /// It has run out.
    #[error(
        "it was valid until {0} and is now too old: the mirror is stale or replayed, or this host's clock is wrong"
    )]
    Expired(String),
    /// It comes from the future.
    #[error("it is dated {0}, in the future: check this host's clock")]
    NotYetValid(String),
    /// It is another suite's.
    #[error("it is for {found}, not for {wanted}: the mirror answers with another suite")]
    OtherSuite {
        /// Suite or code name that was asked for.
        wanted: String,
        /// What it says it is.
        found: String,
    },
    /// The archive does not carry the architecture.
    #[error("it has no packages for {wanted}: it has {offered}")]
    OtherArchitecture {
        /// The architecture.
        wanted: String,
        /// Those there are.
        offered: String,
    },
}

impl Release {
    /// Parses the signed text.
    ///
    /// # Errors
    /// A field is missing or cannot be understood.
    pub fn parse(text: &str) -> Result<Self, ReleaseError> {
        let stanza = control::stanzas(text).next().ok_or(ReleaseError::Missing("Codename"))?;
        let text_of = |name| stanza.get(name).unwrap_or("").to_owned();
        let (suite, codename) = (text_of("Suite"), text_of("Codename"));
        if suite.is_empty() && codename.is_empty() {
            return Err(ReleaseError::Missing("Codename"));
        }
        let mut indices = HashMap::new();
        let list = stanza.get("SHA256").ok_or(ReleaseError::Missing("SHA256"))?;
        for line in list.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let (path, entry) = parse_index(line)
                .ok_or_else(|| ReleaseError::Malformed { field: "SHA256", value: line.to_owned() })?;
            indices.insert(path, entry);
        }
        let architectures: Vec<String> = words(stanza.get("Architectures"));
        let separate_all = architectures.iter().any(|word| word == "all")
            && !words(stanza.get("No-Support-for-Architecture-all")).iter().any(|word| word == "Packages");
        Ok(Self {
            origin: text_of("Origin"),
            suite,
            codename,
            date: date(stanza.get("Date").ok_or(ReleaseError::Missing("Date"))?, "Date")?,
            valid_until: stanza.get("Valid-Until").map(|value| date(value, "Valid-Until")).transpose()?,
            by_hash: stanza.get("Acquire-By-Hash").is_some_and(|value| value.eq_ignore_ascii_case("yes")),
            architectures,
            separate_all,
            indices,
        })
    }

    /// Is it what was asked for, and does it hold at `now` (seconds since 1970)?
    ///
    /// # Errors
    /// The first thing that is wrong.
    pub fn check(&self, wanted: &str, architecture: &str, now: u64) -> Result<(), ReleaseError> {
        // Old security suites are called "bookworm/updates" in paths and "bookworm" inside.
        let plain = wanted.split('/').next().unwrap_or(wanted);
        if ![&self.codename, &self.suite].into_iter().any(|name| name == wanted || name == plain) {
            let found = if self.codename.is_empty() { &self.suite } else { &self.codename };
            return Err(ReleaseError::OtherSuite { wanted: wanted.to_owned(), found: found.clone() });
        }
        if let Some(until) = self.valid_until.filter(|until| *until < now) {
            return Err(ReleaseError::Expired(show(until)));
        }
        if self.date > now + CLOCK_TOLERANCE {
            return Err(ReleaseError::NotYetValid(show(self.date)));
        }
        if !self.architectures.iter().any(|word| word == architecture) {
            return Err(ReleaseError::OtherArchitecture {
                wanted: architecture.to_owned(),
                offered: self.architectures.join(", "),
            });
        }
        Ok(())
    }

    /// The best form of the package index of `component` for `architecture`: its path, size, digest.
    #[must_use]
    pub fn package_index(&self, component: &str, architecture: &str) -> Option<(String, u64, Digest)> {
        [".xz", ".gz", ""].iter().find_map(|suffix| {
            let path = format!("{component}/binary-{architecture}/Packages{suffix}");
            let (size, digest) = *self.indices.get(&path)?;
            Some((path, size, digest))
        })
    }
}

fn words(value: Option<&str>) -> Vec<String> {
    value.unwrap_or("").split_whitespace().map(str::to_owned).collect()
}

fn parse_index(line: &str) -> Option<(String, (u64, Digest))> {
    let mut words = line.split_whitespace();
    let digest = words.next()?.parse().ok()?;
    let size = words.next()?.parse().ok()?;
    let path = words.next()?.to_owned();
    words.next().is_none().then_some((path, (size, digest)))
}

fn show(seconds: u64) -> String {
    let time = std::time::UNIX_EPOCH.checked_add(std::time::Duration::from_secs(seconds));
    time.map_or_else(
        || format!("second {seconds}"),
        |time| humantime::format_rfc3339_seconds(time).to_string(),
    )
}

/// Parses `Sat, 28 Nov 2026 00:53:02 UTC`, as RFC 2822 without its other zones: archives write UTC.
fn date(value: &str, field: &'static str) -> Result<u64, ReleaseError> {
    parse_date(value).ok_or_else(|| ReleaseError::Malformed { field, value: value.to_owned() })
}

fn parse_date(value: &str) -> Option<u64> {
    const MONTHS: [&str; 12] =
        ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
    let rest = value.split_once(',').map_or(value, |(_, rest)| rest);
    let mut words = rest.split_whitespace();
    let day: u32 = words.next()?.parse().ok()?;
    let name = words.next()?;
    let month = MONTHS.iter().position(|month| *month == name)? + 1;
    let year: u32 = words.next()?.parse().ok()?;
    let clock = words.next()?;
    if !matches!(words.next(), Some("UTC" | "GMT" | "+0000")) {
        return None;
    }
    let day = (1..=31).contains(&day).then_some(day)?;
    let year = (1970..=9999).contains(&year).then_some(year)?;
    // Release files are also written with single-digit hours.
    let mut parts = clock.split(':');
    let mut part = || parts.next()?.parse::<u32>().ok().filter(|part| *part < 61);
    let (hour, minute, second) = (part()?, part()?, part()?);
    let text = format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z");
    let time = humantime::parse_rfc3339(&text).ok()?;
    Some(time.duration_since(std::time::UNIX_EPOCH).ok()?.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "Origin: Debian\nSuite: oldstable-security\nCodename: bookworm-security\nDate: Sat, 21 Nov 2026 00:53:02 UTC\nValid-Until: Sat, 28 Nov 2026 00:53:02 UTC\nAcquire-By-Hash: yes\nArchitectures: amd64 arm64\nSHA256:\n e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855        0 main/binary-amd64/Packages\n f61f27bd17de546264aa58f40f3aafaac7021e0ef69c17f6b1b4cd7664a037ec       20 main/binary-amd64/Packages.xz\n";
    const DATE: u64 = 1_795_222_382;

    #[test]
    fn fields_are_read() {
        let release = Release::parse(TEXT).expect("valid");
        assert_eq!(release.codename, "bookworm-security");
        assert_eq!(release.date, DATE);
        assert_eq!(release.valid_until, Some(DATE + 7 * 86_400));
        assert!(release.by_hash);
        let (path, size, digest) = release.package_index("main", "amd64").expect("there");
        assert_eq!((path.as_str(), size), ("main/binary-amd64/Packages.xz", 20));
        assert!(digest.to_string().starts_with("f61f27bd"));
        assert_eq!(release.package_index("contrib", "amd64"), None);
    }

    #[test]
    fn time_suite_and_architecture_are_checked() {
        let release = Release::parse(TEXT).expect("valid");
        let check = |wanted, architecture, now| release.check(wanted, architecture, now);
        assert_eq!(check("bookworm-security", "amd64", DATE), Ok(()));
        assert_eq!(check("oldstable-security", "amd64", DATE + 7 * 86_400), Ok(()));
        assert_eq!(
            check("bookworm-security", "amd64", DATE + 7 * 86_400 + 1),
            Err(ReleaseError::Expired("2026-11-28T00:53:02Z".to_owned()))
        );
        assert_eq!(
            check("bookworm-security", "amd64", DATE - 86_401),
            Err(ReleaseError::NotYetValid("2026-11-21T00:53:02Z".to_owned()))
        );
        assert!(matches!(check("bookworm", "amd64", DATE), Err(ReleaseError::OtherSuite { .. })));
        assert!(matches!(
            check("bookworm-security", "vax", DATE),
            Err(ReleaseError::OtherArchitecture { .. })
        ));
    }

    #[test]
    fn a_malformed_digest_line_is_refused() {
        let text = TEXT.replace("f61f27bd", "zz1f27bd");
        assert!(matches!(Release::parse(&text), Err(ReleaseError::Malformed { field: "SHA256", .. })));
    }

    #[test]
    fn packages_for_all_may_have_an_index_of_their_own() {
        let with_all = TEXT.replace("amd64 arm64", "all amd64");
        assert!(Release::parse(&with_all).expect("valid").separate_all);
        let joined = with_all.replace("SHA256:", "No-Support-for-Architecture-all: Packages\nSHA256:");
        assert!(!Release::parse(&joined).expect("valid").separate_all);
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(text in "(Date|SHA256|Suite|Codename|: |\n| |[0-9a-f]|Nov|,){0,60}") {
            let _ = Release::parse(&text);
            let _ = parse_date(&text);
        }
    }
}
