//! What a person asks for: the recipe of an image.
//!
//! Text goes in, a checked [`Recipe`] comes out; everything downstream may rely on what is checked
//! here (a name is safe as a file name, a size is in range): `written` is the text's own form and
//! its checks, `refusal` points at the place in the text. Each refusal names file, line and what is
//! allowed instead. Deliberately absent: the host. Whether a package exists or a keyring can be
//! read is found out by the stage that needs it.

mod builder;
mod download;
mod installer;
mod output;
mod refusal;
mod written;

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::cache::Digest;
pub use builder::Builder;
pub use download::Download;
pub use installer::{Family, Installer, Medium};
pub use output::{Format, Output};
use refusal::{Refusal, locate};
use written::Written;

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
    /// How it comes to its result.
    pub kind: Kind,
    /// The result.
    pub image: Image,
    /// Where packages come from, and which the image or the throwaway machine is made of.
    pub debian: Debian,
    /// The builder guest.
    pub guest: Guest,
    /// Files for its commands.
    pub downloads: Vec<Download>,
    /// What the image's disk is made into.
    pub output: Output,
    /// How long it may take.
    pub limits: Limits,
    /// What is checked at the end.
    pub verify: Verify,
    /// The recipe itself.
    pub text: String,
}

/// How a build comes to its result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The host unpacks Debian packages into the image's disk, and a guest finishes that.
    Debian,
    /// A command runs in a throwaway machine made of Debian packages, and leaves files.
    Builder(Builder),
    /// A distribution's installer runs by itself, or cloud-init does in a cloud image.
    Installer(Installer),
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

impl Debian {
    /// Where the builder's own kernel and tools come from, where a recipe does not say so.
    fn tools() -> Self {
        Self {
            source: PackageSource::HostApt,
            suite: "bookworm".to_owned(),
            architecture: "amd64".to_owned(),
            components: vec!["main".to_owned()],
            keyring: None,
            packages: Vec::new(),
        }
    }
}

/// The guest that finishes the image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Guest {
    /// Shell commands run in the image or in the throwaway machine, in order.
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
    /// The unit that has to be active then, instead of all that the system starts.
    pub target: Option<String>,
    /// Shell commands that have to succeed in it.
    pub commands: Vec<String>,
}

impl Recipe {
    /// The digest of its text.
    #[must_use]
    pub fn digest(&self) -> Digest {
        Digest::of(self.text.as_bytes())
    }

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
        written.check(text).map_err(refuse)
    }
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
    fn every_example_is_valid() {
        let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
        let mut names = Vec::new();
        for entry in std::fs::read_dir(examples).expect("the examples") {
            let path = entry.expect("an entry").path();
            if path.extension().is_some_and(|extension| extension == "toml") {
                names.push(Recipe::load(&path).expect("valid").image.name);
            }
        }
        names.sort();
        assert!(names.iter().any(|name| name == "debian-12"), "{names:?}");
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

    const BUILDER: &str = "kind = \"builder\"\n[image]\nname = \"b\"\nsize = \"1GiB\"\n[debian]\nsource = \"host-apt\"\nsuite = \"bookworm\"\narchitecture = \"amd64\"\npackages = []\n[builder]\nworkspace = \"work\"\nartifacts = [\"a.iso\"]\n[guest]\nrun = [\"make\"]\n";

    #[test]
    fn a_builder_has_a_task_and_modules() {
        let recipe = Recipe::parse(BUILDER, Path::new("r.toml")).expect("valid");
        let Kind::Builder(builder) = &recipe.kind else { panic!("{:?}", recipe.kind) };
        assert_eq!(builder.workspace.as_deref(), Some(Path::new("work")));
        assert_eq!(builder.artifacts, ["a.iso"]);
        assert_eq!(recipe.debian.packages, ["kmod"]);
        assert!(!recipe.verify.boot);
        assert_eq!(recipe.output.formats, [Format::Qcow2]);
    }

    #[test]
    fn a_path_that_leaves_the_recipes_folder_shows_its_line() {
        for path in ["/etc", "../work", "work/../../x", ""] {
            let text = refusal(&BUILDER.replace("\"work\"", &format!("{path:?}")));
            assert!(text.starts_with("r.toml:11:13: "), "{text}");
            assert!(
                text.contains("name a file or folder in it, by a relative path without \"..\""),
                "{text}"
            );
        }
    }

    #[test]
    fn a_builder_that_proves_nothing_is_refused() {
        for (from, to, told) in [
            ("artifacts = [\"a.iso\"]\n", "", "r.toml:10:1: a builder that leaves nothing proves nothing"),
            ("run = [\"make\"]", "", "r.toml:1:8: a builder needs a command"),
            ("[\"a.iso\"]", "[\"a.iso\", \"a.iso\"]", "r.toml:12:23: \"a.iso\" is named twice"),
            ("\"a.iso\"", "\"../a.iso\"", "r.toml:12:14: \"../a.iso\" becomes a file name"),
            ("[builder]", "[output]\nformats = []\n[builder]", "r.toml:10:1: output is made of a disk"),
            ("[guest]", "[verify]\nboot = true\n[guest]", "r.toml:14:8: verify.boot needs a disk"),
            ("[guest]", "[verify]\ntarget = \"a.target\"\n[guest]", "r.toml:14:10: verify.target needs"),
            ("kind = \"builder\"", "kind = \"debian\"", "r.toml:10:1: the table [builder] is for kind"),
        ] {
            let text = refusal(&BUILDER.replace(from, to));
            assert!(text.starts_with(told), "{text}");
        }
    }

    #[test]
    fn formats_and_checks_are_named_one_by_one() {
        let more = "[output]\nformats = [\"ova\", \"squashfs\"]\n[verify]\ntarget = \"multi-user.target\"\ncommands = [\"true\"]\n";
        let recipe = Recipe::parse(&format!("{SMALL}{more}"), Path::new("r.toml")).expect("valid");
        assert_eq!(recipe.output.formats, [Format::Ova, Format::Squashfs]);
        assert_eq!(recipe.verify.target.as_deref(), Some("multi-user.target"));
        for (from, to, told) in [
            ("\"ova\"", "\"iso\"", "r.toml:11:12: unknown variant `iso`, expected one of `qcow2`"),
            ("\"ova\"", "\"squashfs\"", "r.toml:11:24: this format is named twice"),
            ("multi-user.target", "../x", "r.toml:13:10: \"../x\" is not a systemd unit"),
            ("\"true\"", "\"a\\nb\"", "r.toml:14:13: \"a\\nb\" is not a command"),
        ] {
            let text = refusal(&format!("{SMALL}{}", more.replace(from, to)));
            assert!(text.starts_with(told), "{text}");
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
