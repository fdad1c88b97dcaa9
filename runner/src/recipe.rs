//! What a person asks for: the recipe of an image.
//!
//! Text goes in, a checked [`Recipe`] comes out; everything downstream may rely on what is checked
//! here (a name is safe as a file name, a size is in range). Each refusal names file, line and what
//! is allowed instead. Deliberately absent: the host. Whether a package exists or a keyring can be
//! read is found out by the stage that needs it.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytesize::ByteSize;
use serde::Deserialize;
use toml::Spanned;

const MEBIBYTE: u64 = 1 << 20;
const GIBIBYTE: u64 = 1 << 30;

/// Why a recipe is refused.
#[derive(Debug, thiserror::Error)]
pub enum RecipeError {
    /// The file cannot be read.
    #[error("cannot read recipe {}: check the path and its permissions", path.display())]
    Read {
        /// The recipe.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The text is not a recipe.
    #[error("{}:{line}:{column}: {message}\n{snippet}", path.display())]
    Invalid {
        /// The recipe.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column, from 1, in characters.
        column: usize,
        /// What is wrong and what is allowed.
        message: String,
        /// The line with the place marked.
        snippet: String,
    },
}

/// An image to build, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recipe {
    /// The result.
    pub image: Image,
    /// Where its packages come from and which they are.
    pub debian: Debian,
    /// The builder guest.
    pub guest: Guest,
    /// How long it may take.
    pub limits: Limits,
    /// What is checked at the end.
    pub verify: Verify,
}

/// The image itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Its name: safe as the stem of a file name.
    pub name: String,
    /// Size of the disk in bytes, a multiple of 1 MiB, below 2 TiB.
    pub size: u64,
    /// Host name inside the image.
    pub hostname: String,
}

/// Where upstream's addresses come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PackageSource {
    /// The host's own apt sources.
    HostApt,
    /// The root of one archive, without a slash at its end.
    Url(String),
}

/// The Debian part of a recipe.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Debian {
    /// Where upstream's addresses come from.
    pub source: PackageSource,
    /// Code name, such as `bookworm`.
    pub suite: String,
    /// Debian's name of the architecture.
    pub architecture: String,
    /// Archive components.
    pub components: Vec<String>,
    /// Keyring for all signatures, instead of the source's own.
    pub keyring: Option<PathBuf>,
    /// Packages asked for, beside the essential ones and apt.
    pub packages: Vec<String>,
}

/// The guest that finishes the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guest {
    /// Shell commands run in the image, in order.
    pub run: Vec<String>,
    /// Memory in bytes.
    pub memory: u64,
    /// Virtual processors.
    pub cpus: u32,
}

/// Limits of a build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Limits {
    /// For everything.
    pub total: Duration,
    /// Without any sign of progress.
    pub no_progress: Duration,
}

/// What is checked at the end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verify {
    /// Boot the finished image and wait for its proof.
    pub boot: bool,
}

impl Recipe {
    /// Reads and checks the recipe at `path`.
    ///
    /// # Errors
    /// The file cannot be read, or its text is not a recipe.
    pub fn load(path: &Path) -> Result<Self, RecipeError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| RecipeError::Read { path: path.to_owned(), source })?;
        Self::parse(&text, path)
    }

    /// Checks the text of a recipe; `path` only serves the messages.
    ///
    /// # Errors
    /// The text is not a recipe.
    pub fn parse(text: &str, path: &Path) -> Result<Self, RecipeError> {
        let refuse = |refusal: Refusal| locate(text, path, refusal);
        let written: Written = toml::from_str(text)
            .map_err(|error| refuse(Refusal { span: error.span(), message: error.message().to_owned() }))?;
        written.check().map_err(refuse)
    }
}

/// What is wrong, and where in the text.
struct Refusal {
    span: Option<Range<usize>>,
    message: String,
}

impl Refusal {
    fn at<T>(place: &Spanned<T>, message: String) -> Self {
        Self { span: Some(place.span()), message }
    }
}

fn locate(text: &str, path: &Path, refusal: Refusal) -> RecipeError {
    let span = refusal.span.unwrap_or(0..0);
    let start = floor_boundary(text, span.start);
    let end = floor_boundary(text, span.end).max(start);
    let line_start = text[..start].rfind('\n').map_or(0, |index| index + 1);
    let line_end = text[start..].find('\n').map_or(text.len(), |index| start + index);
    let line = text[..start].matches('\n').count() + 1;
    let column = text[line_start..start].chars().count() + 1;
    let marks = text[start..end.min(line_end)].chars().count().max(1);
    let number = line.to_string();
    let margin = " ".repeat(number.len());
    let snippet = format!(
        "{margin} |\n{number} | {}\n{margin} | {}{}",
        &text[line_start..line_end],
        " ".repeat(column - 1),
        "^".repeat(marks)
    );
    RecipeError::Invalid { path: path.to_owned(), line, column, message: refusal.message, snippet }
}

fn floor_boundary(text: &str, index: usize) -> usize {
    let mut index = index.min(text.len());
    while !text.is_char_boundary(index) {
        index -= 1;
    }
    index
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    kind: Kind,
    image: WrittenImage,
    debian: WrittenDebian,
    #[serde(default)]
    guest: WrittenGuest,
    #[serde(default)]
    limits: WrittenLimits,
    #[serde(default)]
    verify: WrittenVerify,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Kind {
    Debian,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenImage {
    name: Spanned<String>,
    size: Spanned<String>,
    hostname: Option<Spanned<String>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenDebian {
    source: Spanned<String>,
    suite: Spanned<String>,
    architecture: Spanned<String>,
    components: Option<Vec<Spanned<String>>>,
    keyring: Option<Spanned<PathBuf>>,
    packages: Vec<Spanned<String>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenGuest {
    #[serde(default)]
    run: Vec<Spanned<String>>,
    memory: Option<Spanned<String>>,
    cpus: Option<Spanned<u32>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenLimits {
    total: Option<Spanned<String>>,
    no_progress: Option<Spanned<String>>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenVerify {
    boot: Option<bool>,
}

impl Written {
    fn check(self) -> Result<Recipe, Refusal> {
        let Kind::Debian = self.kind;
        let limits = Limits {
            total: duration(self.limits.total, "total", Duration::from_secs(30 * 60))?,
            no_progress: duration(self.limits.no_progress, "no_progress", Duration::from_secs(5 * 60))?,
        };
        Ok(Recipe {
            image: self.image.check()?,
            debian: self.debian.check()?,
            guest: self.guest.check()?,
            limits,
            verify: Verify { boot: self.verify.boot.unwrap_or(true) },
        })
    }
}

impl WrittenImage {
    fn check(self) -> Result<Image, Refusal> {
        let name = checked(
            &self.name,
            |name| {
                name.len() <= 100
                    && name.starts_with(|first: char| first.is_ascii_alphanumeric())
                    && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-+".contains(&byte))
            },
            "becomes a file name: use up to 100 letters, digits, '.', '_', '-', '+', the first a letter or digit",
        )?;
        let size = size(&self.size, 256 * MEBIBYTE, 2048 * GIBIBYTE - MEBIBYTE)?.next_multiple_of(MEBIBYTE);
        let hostname = match &self.hostname {
            Some(hostname) => checked(
                hostname,
                is_hostname,
                "is not a host name: use dot-separated labels of up to 63 letters, digits and inner '-', 64 in total",
            )?,
            None => "debian".to_owned(),
        };
        Ok(Image { name, size, hostname })
    }
}

impl WrittenDebian {
    fn check(self) -> Result<Debian, Refusal> {
        let source = match self.source.get_ref().as_str() {
            "host-apt" => PackageSource::HostApt,
            url if is_archive_url(url) => PackageSource::Url(url.trim_end_matches('/').to_owned()),
            other => {
                let message = format!(
                    "debian.source {other:?} is neither \"host-apt\" nor the http:// or https:// address of an archive's root"
                );
                return Err(Refusal::at(&self.source, message));
            }
        };
        let components = match &self.components {
            None => vec!["main".to_owned()],
            Some(components) if components.is_empty() => {
                return Err(Refusal::at(
                    &self.suite,
                    "debian.components is empty: name at least one, such as \"main\", or leave it out"
                        .to_owned(),
                ));
            }
            Some(components) => components
                .iter()
                .map(|component| {
                    checked(component, is_archive_word, "is not a component: write e.g. \"main\"")
                })
                .collect::<Result<_, _>>()?,
        };
        let keyring = match self.keyring {
            Some(keyring) if !keyring.get_ref().is_absolute() => {
                let message =
                    "debian.keyring must be an absolute path to a keyring that gpgv reads".to_owned();
                return Err(Refusal::at(&keyring, message));
            }
            Some(keyring) => Some(keyring.into_inner()),
            None => None,
        };
        Ok(Debian {
            source,
            suite: checked(
                &self.suite,
                is_archive_word,
                "is not a suite: write a code name, such as \"bookworm\"",
            )?,
            architecture: checked(
                &self.architecture,
                |word| word == "amd64",
                "cannot be built yet: the only architecture is \"amd64\"",
            )?,
            components,
            keyring,
            packages: self
                .packages
                .iter()
                .map(|package| {
                    checked(
                        package,
                        is_package_name,
                        "is not a package name: two or more of a-z, 0-9, '+', '-', '.', the first a letter or digit",
                    )
                })
                .collect::<Result<_, _>>()?,
        })
    }
}

impl WrittenGuest {
    fn check(self) -> Result<Guest, Refusal> {
        let cpus = match &self.cpus {
            Some(cpus) if !(1..=64).contains(cpus.get_ref()) => {
                return Err(Refusal::at(cpus, "guest.cpus must be between 1 and 64".to_owned()));
            }
            Some(cpus) => *cpus.get_ref(),
            None => 2,
        };
        Ok(Guest {
            run: self
                .run
                .iter()
                .map(|line| {
                    checked(
                        line,
                        |line| !line.trim().is_empty() && !line.contains('\0'),
                        "is not a command: write a line for the shell",
                    )
                })
                .collect::<Result<_, _>>()?,
            memory: match &self.memory {
                Some(memory) => size(memory, 256 * MEBIBYTE, 1024 * GIBIBYTE)?.next_multiple_of(MEBIBYTE),
                None => GIBIBYTE,
            },
            cpus,
        })
    }
}

fn checked(value: &Spanned<String>, accept: impl Fn(&str) -> bool, rule: &str) -> Result<String, Refusal> {
    let text = value.get_ref();
    if accept(text) { Ok(text.clone()) } else { Err(Refusal::at(value, format!("{text:?} {rule}"))) }
}

fn size(value: &Spanned<String>, least: u64, most: u64) -> Result<u64, Refusal> {
    let bytes = value
        .get_ref()
        .parse::<ByteSize>()
        .map_err(|_| {
            let message = format!("{:?} is not a size: write e.g. \"512MiB\" or \"2GiB\"", value.get_ref());
            Refusal::at(value, message)
        })?
        .as_u64();
    if (least..=most).contains(&bytes) {
        return Ok(bytes);
    }
    let message = format!(
        "{:?} is out of range: allowed are {} to {}",
        value.get_ref(),
        ByteSize(least),
        ByteSize(most)
    );
    Err(Refusal::at(value, message))
}

fn duration(value: Option<Spanned<String>>, name: &str, default: Duration) -> Result<Duration, Refusal> {
    let Some(value) = value else {
        return Ok(default);
    };
    match humantime::parse_duration(value.get_ref()) {
        Ok(duration) if duration >= Duration::from_secs(1) && duration <= Duration::from_secs(7 * 86_400) => {
            Ok(duration)
        }
        Ok(_) => Err(Refusal::at(&value, format!("limits.{name} must be between 1s and 7days"))),
        Err(_) => {
            let message = format!("{:?} is not a duration: write e.g. \"90s\" or \"20min\"", value.get_ref());
            Err(Refusal::at(&value, message))
        }
    }
}

fn is_hostname(name: &str) -> bool {
    name.len() <= 64
        && name.split('.').all(|label| {
            !label.is_empty()
                && label.len() <= 63
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
        })
}

/// Suites and components become parts of paths and of lines in `sources.list`.
fn is_archive_word(word: &str) -> bool {
    word.starts_with(|first: char| first.is_ascii_alphanumeric())
        && word.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-+".contains(&byte))
}

/// Debian Policy 5.6.1.
fn is_package_name(name: &str) -> bool {
    name.len() >= 2
        && name.starts_with(|first: char| first.is_ascii_lowercase() || first.is_ascii_digit())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"+-.".contains(&byte))
}

fn is_archive_url(text: &str) -> bool {
    let clean = !text
        .bytes()
        .any(|byte| byte.is_ascii_whitespace() || byte.is_ascii_control() || b"[]#?".contains(&byte));
    clean
        && reqwest::Url::parse(text)
            .is_ok_and(|url| matches!(url.scheme(), "http" | "https") && url.host_str().is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: &str = "kind = \"debian\"\n[image]\nname = \"debian-12\"\nsize = \"2GiB\"\n[debian]\nsource = \"host-apt\"\nsuite = \"bookworm\"\narchitecture = \"amd64\"\npackages = []\n";

    fn refusal(text: &str) -> String {
        Recipe::parse(text, Path::new("r.toml")).expect_err("must be refused").to_string()
    }

    #[test]
    fn defaults_fill_what_is_left_out() {
        let recipe = Recipe::parse(SMALL, Path::new("r.toml")).expect("valid");
        assert_eq!(recipe.image.size, 2 << 30);
        assert_eq!(recipe.image.hostname, "debian");
        assert_eq!(recipe.debian.components, ["main"]);
        assert_eq!(recipe.guest.cpus, 2);
        assert!(recipe.verify.boot);
        assert_eq!(recipe.limits.no_progress, Duration::from_secs(300));
    }

    #[test]
    fn the_example_is_valid() {
        let text = include_str!("../examples/debian-12.toml");
        let recipe = Recipe::parse(text, Path::new("debian-12.toml")).expect("valid");
        assert_eq!(recipe.image.name, "debian-12");
    }

    #[test]
    fn a_wrong_size_shows_its_line_and_what_is_allowed() {
        assert_eq!(
            refusal(&SMALL.replace("2GiB", "two")),
            "r.toml:4:8: \"two\" is not a size: write e.g. \"512MiB\" or \"2GiB\"\n  |\n4 | size = \"two\"\n  |        ^^^^^"
        );
    }

    #[test]
    fn an_unknown_key_names_the_known_ones() {
        let text = refusal(&SMALL.replace("suite =", "sweet ="));
        assert!(text.starts_with("r.toml:7:1: unknown field `sweet`, expected one of"), "{text}");
        assert!(text.contains("`suite`"), "{text}");
    }

    #[test]
    fn an_image_name_cannot_leave_its_folder() {
        for name in ["../x", ".x", "a/b", "", "-x"] {
            let text = refusal(&SMALL.replace("debian-12", name));
            assert!(text.contains("becomes a file name"), "{text}");
        }
    }

    #[test]
    fn names_that_reach_a_shell_or_a_path_are_checked() {
        for (from, to) in [
            ("packages = []", "packages = [\"a;b\"]"),
            ("\"bookworm\"", "\"../x\""),
            ("\"host-apt\"", "\"ftp://x/debian\""),
            ("\"amd64\"", "\"vax\""),
            ("\"2GiB\"", "\"1KiB\""),
            ("\"2GiB\"", "\"2GiB\"\nhostname = \"-a\""),
        ] {
            refusal(&SMALL.replace(from, to));
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(text in ".{0,200}") {
            let _ = Recipe::parse(&text, Path::new("r.toml"));
            let _ = Recipe::parse(&SMALL.replace("bookworm", &text), Path::new("r.toml"));
        }
    }
}
