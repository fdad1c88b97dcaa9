//! A recipe as it is written, and the checks that make it one.

use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use bytesize::ByteSize;
use serde::Deserialize;
use toml::Spanned;

use super::builder::{Builder, WrittenBuilder};
use super::download::WrittenDownload;
use super::installer::WrittenInstaller;
use super::output::WrittenOutput;
use super::refusal::Refusal;
use super::{Debian, Family, Guest, Image, Installer, Kind, Limits, PackageSource, Recipe, Verify};

const MEBIBYTE: u64 = 1 << 20;
const GIBIBYTE: u64 = 1 << 30;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Written {
    kind: Spanned<WrittenKind>,
    image: WrittenImage,
    debian: Option<WrittenDebian>,
    installer: Option<Spanned<WrittenInstaller>>,
    builder: Option<Spanned<WrittenBuilder>>,
    #[serde(default)]
    guest: WrittenGuest,
    #[serde(default)]
    download: Vec<Spanned<WrittenDownload>>,
    output: Option<Spanned<WrittenOutput>>,
    #[serde(default)]
    limits: WrittenLimits,
    #[serde(default)]
    verify: WrittenVerify,
}

#[derive(Clone, Copy, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum WrittenKind {
    Debian,
    Builder,
    Installer,
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
    #[serde(default)]
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
    boot: Option<Spanned<bool>>,
    target: Option<Spanned<String>>,
    #[serde(default)]
    commands: Vec<Spanned<String>>,
}

impl Written {
    /// The recipe that is meant, with what was left out filled in.
    pub(super) fn check(self, text: &str) -> Result<Recipe, Refusal> {
        let guest = self.guest.check()?;
        if let Some(download) = self.download.first().filter(|_| guest.run.is_empty()) {
            let message = "a download is for the commands of guest.run: give it one";
            return Err(Refusal::at(download, message.to_owned()));
        }
        let downloads: Vec<_> = self.download.into_iter().map(Spanned::into_inner).collect();
        let downloads = WrittenDownload::check(&downloads)?;
        let place = self.kind.span();
        let refuse = |message: &str| Refusal { span: Some(place.clone()), message: message.to_owned() };
        let kind = match (self.kind.get_ref(), self.builder, self.installer) {
            (WrittenKind::Debian, None, None) => Kind::Debian,
            (WrittenKind::Builder, Some(builder), None) => {
                if guest.run.is_empty() {
                    return Err(refuse("a builder needs a command: give it guest.run"));
                }
                Kind::Builder(WrittenBuilder::check(builder)?)
            }
            (WrittenKind::Installer, None, Some(installer)) => {
                if !guest.run.is_empty() {
                    return Err(refuse(
                        "an installer runs what its answers say, not guest.run: put it there",
                    ));
                }
                Kind::Installer(installer.into_inner().check()?)
            }
            (WrittenKind::Builder, None, _) => {
                return Err(refuse(
                    "a builder needs a table [builder] that says which files it leaves: disk or artifacts",
                ));
            }
            (WrittenKind::Installer, _, None) => {
                return Err(refuse(
                    "an installer needs a table [installer] that says which one, and its answers",
                ));
            }
            (_, Some(builder), _) => {
                let message = "the table [builder] is for kind = \"builder\"";
                return Err(Refusal::at(&builder, message.to_owned()));
            }
            (_, _, Some(installer)) => {
                let message = "the table [installer] is for kind = \"installer\"";
                return Err(Refusal::at(&installer, message.to_owned()));
            }
        };
        let has_disk = !matches!(&kind, Kind::Builder(Builder { disk: None, .. }));
        let output = match self.output {
            Some(output) if !has_disk => {
                let message = "output is made of a disk: name it as builder.disk";
                return Err(Refusal::at(&output, message.to_owned()));
            }
            Some(output) => output.into_inner().check()?,
            None => WrittenOutput::default().check()?,
        };
        let verify = self.verify.check(has_disk)?;
        let limits = Limits {
            total: duration(self.limits.total, "total", Duration::from_secs(30 * 60))?,
            no_progress: duration(self.limits.no_progress, "no_progress", Duration::from_secs(5 * 60))?,
        };
        let mut debian = match (self.debian, &kind) {
            (Some(debian), _) => debian.check()?,
            // Only the builder's own tools come from there, whatever is installed.
            (None, Kind::Installer(Installer { family, .. })) if *family != Family::DebianInstaller => {
                Debian::tools()
            }
            (None, _) => return Err(refuse("a table [debian] is needed: it says where packages come from")),
        };
        if let Kind::Builder(_) = kind {
            // For modprobe, in a machine whose kernel is not one of its packages.
            debian.packages.push("kmod".to_owned());
        }
        Ok(Recipe {
            kind,
            image: self.image.check()?,
            debian,
            guest,
            downloads,
            output,
            limits,
            verify,
            text: text.to_owned(),
        })
    }
}

impl WrittenImage {
    fn check(self) -> Result<Image, Refusal> {
        let name = checked(&self.name, is_file_name, FILE_NAME_RULE)?;
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

impl WrittenVerify {
    fn check(self, has_disk: bool) -> Result<Verify, Refusal> {
        let boot = match &self.boot {
            Some(boot) if *boot.get_ref() && !has_disk => {
                let message = "verify.boot needs a disk to boot: name it as builder.disk";
                return Err(Refusal::at(boot, message.to_owned()));
            }
            Some(boot) => *boot.get_ref(),
            None => has_disk,
        };
        let unproven = "needs verify.boot: it is looked at in the booted image";
        if let Some(target) = self.target.as_ref().filter(|_| !boot) {
            return Err(Refusal::at(target, format!("verify.target {unproven}")));
        }
        if let Some(command) = self.commands.first().filter(|_| !boot) {
            return Err(Refusal::at(command, format!("verify.commands {unproven}")));
        }
        let rule = "is not a systemd unit: write e.g. \"multi-user.target\" or \"ssh.service\"";
        let target = self.target.map(|target| checked(&target, is_unit, rule)).transpose()?;
        let one_line = |line: &str| !line.trim().is_empty() && !line.contains(['\0', '\n']);
        let rule = "is not a command: write one line for the shell";
        let commands = self.commands.iter().map(|line| checked(line, one_line, rule));
        Ok(Verify { boot, target, commands: commands.collect::<Result<_, _>>()? })
    }
}

pub(super) fn checked(
    value: &Spanned<String>,
    accept: impl Fn(&str) -> bool,
    rule: &str,
) -> Result<String, Refusal> {
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

/// What [`is_file_name`] demands, for messages.
pub(super) const FILE_NAME_RULE: &str =
    "becomes a file name: use up to 100 letters, digits, '.', '_', '-', '+', the first a letter or digit";

/// Whether a name is safe as the name of a file, on a command line and in a URL.
pub(super) fn is_file_name(name: &str) -> bool {
    name.len() <= 100
        && name.starts_with(|first: char| first.is_ascii_alphanumeric())
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-+".contains(&byte))
}

/// What [`is_beside`] demands, for messages.
pub(super) const BESIDE_RULE: &str =
    "leaves the recipe's folder: name a file or folder in it, by a relative path without \"..\"";

/// Whether a path names something in the recipe's own folder. Links are looked at when it is opened.
pub(super) fn is_beside(path: &str) -> bool {
    let mut components = Path::new(path).components();
    !path.is_empty() && !path.contains('\0') && components.all(|one| matches!(one, Component::Normal(_)))
}

/// Whether this is the name of a systemd unit; systemd.unit(5).
fn is_unit(name: &str) -> bool {
    name.len() <= 255
        && !name.starts_with(['.', '-'])
        && name.contains('.')
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b":-_.\\@".contains(&byte))
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
pub(super) fn is_package_name(name: &str) -> bool {
    name.len() >= 2
        && name.starts_with(|first: char| first.is_ascii_lowercase() || first.is_ascii_digit())
        && name
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"+-.".contains(&byte))
}

fn is_archive_url(text: &str) -> bool {
    is_url(text) && !text.bytes().any(|byte| b"[]#?".contains(&byte))
}

/// Whether this is an address that can be asked for.
pub(super) fn is_url(text: &str) -> bool {
    let clean = !text.bytes().any(|byte| byte.is_ascii_whitespace() || byte.is_ascii_control());
    clean
        && reqwest::Url::parse(text)
            .is_ok_and(|url| matches!(url.scheme(), "http" | "https") && url.host_str().is_some())
}
