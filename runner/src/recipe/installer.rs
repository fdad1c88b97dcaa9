//! The table `[installer]`: which installer is booted, and what answers its questions.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::Spanned;

use super::refusal::Refusal;
use super::written::{BESIDE_RULE, checked, is_beside, is_package_name};

/// An installer's family: how it takes its answers, logs, and proves that it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Family {
    /// Debian's; answers are a preseed file.
    DebianInstaller,
    /// Red Hat's and Fedora's; answers are a kickstart file.
    Anaconda,
    /// Ubuntu's server installer; answers are an autoinstall file.
    Subiquity,
    /// No installer but a disk image with cloud-init; answers are its user-data.
    CloudImage,
}

/// Where an installer, or a cloud image, comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Medium {
    /// A Debian package that has it, out of the recipe's archive.
    Package(String),
    /// An ISO 9660 image.
    Iso(PathBuf),
    /// A folder with `.treeinfo`.
    Tree(PathBuf),
    /// Kernel and initial file system.
    Kernel {
        /// The kernel.
        kernel: PathBuf,
        /// The initial file system.
        initrd: PathBuf,
    },
    /// A disk, raw or qcow2.
    Disk(PathBuf),
}

/// What to install with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Installer {
    /// The installer's family.
    pub family: Family,
    /// Where it comes from.
    pub medium: Medium,
    /// The file with its answers, beside the recipe.
    pub answers: PathBuf,
    /// More for the kernel's command line.
    pub arguments: Vec<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WrittenInstaller {
    family: Spanned<Family>,
    answers: Spanned<String>,
    package: Option<Spanned<String>>,
    iso: Option<Spanned<String>>,
    tree: Option<Spanned<String>>,
    kernel: Option<Spanned<String>>,
    initrd: Option<Spanned<String>>,
    disk: Option<Spanned<String>>,
    #[serde(default)]
    arguments: Vec<Spanned<String>>,
}

impl WrittenInstaller {
    pub(super) fn check(self) -> Result<Installer, Refusal> {
        let family = *self.family.get_ref();
        let answers = checked(&self.answers, is_beside, BESIDE_RULE)?.into();
        let medium = match (self.package, self.iso, self.tree, self.kernel, self.initrd, self.disk) {
            (Some(package), None, None, None, None, None) => {
                let rule = "is not a package name: write e.g. \"debian-installer-12-netboot-amd64\"";
                let name = checked(&package, is_package_name, rule)?;
                if family != Family::DebianInstaller {
                    let message =
                        "only debian-installer comes as a package: name an iso, a tree, or kernel and initrd";
                    return Err(Refusal::at(&package, message.to_owned()));
                }
                Medium::Package(name)
            }
            (None, Some(iso), None, None, None, None) => Medium::Iso(medium(&iso)?),
            (None, None, Some(tree), None, None, None) => Medium::Tree(medium(&tree)?),
            (None, None, None, Some(kernel), Some(initrd), None) => {
                Medium::Kernel { kernel: medium(&kernel)?, initrd: medium(&initrd)? }
            }
            (None, None, None, None, None, Some(disk)) => Medium::Disk(medium(&disk)?),
            _ => {
                let message =
                    "name exactly one of installer.package, iso, tree, kernel with initrd, and disk";
                return Err(Refusal::at(&self.family, message.to_owned()));
            }
        };
        if matches!(medium, Medium::Disk(_)) != (family == Family::CloudImage) {
            let message =
                "family \"cloud-image\" needs installer.disk, and all others need something to boot";
            return Err(Refusal::at(&self.family, message.to_owned()));
        }
        // They read the most of themselves, and the packages, from what they came on.
        let lacks = match (family, &medium) {
            (Family::Anaconda, Medium::Kernel { .. }) => Some(
                "kernel and initrd alone have neither the rest of anaconda nor packages: name the iso or the tree that they are of",
            ),
            (Family::Subiquity, Medium::Kernel { .. } | Medium::Tree(_)) => {
                Some("subiquity installs from its image: name that as installer.iso")
            }
            _ => None,
        };
        if let Some(message) = lacks {
            return Err(Refusal::at(&self.family, message.to_owned()));
        }
        let is_argument =
            |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'"');
        let arguments = self.arguments.iter().map(|argument| {
            checked(argument, is_argument, "is not a kernel argument: write one word without quotes for each")
        });
        Ok(Installer { family, medium, answers, arguments: arguments.collect::<Result<_, _>>()? })
    }
}

/// A medium's path: beside the recipe, or anywhere if it is written in full.
fn medium(path: &Spanned<String>) -> Result<PathBuf, Refusal> {
    let rule = "leaves the recipe's folder: name a file in it by a relative path without \"..\", or write the full path";
    let allowed = |text: &str| is_beside(text) || (Path::new(text).is_absolute() && !text.contains('\0'));
    checked(path, allowed, rule).map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::Recipe;

    #[test]
    fn what_an_installer_cannot_install_from_is_refused_with_what_it_can() {
        let parse = |family: &str, medium: &str| {
            let text = format!(
                "kind = \"installer\"\n[image]\nname = \"x\"\nsize = \"1GiB\"\n[installer]\nfamily = \"{family}\"\nanswers = \"a\"\n{medium}\n"
            );
            Recipe::parse(&text, Path::new("r.toml")).map_err(|error| error.to_string())
        };
        let kernel = "kernel = \"k\"\ninitrd = \"i\"";
        let error = parse("anaconda", kernel).unwrap_err();
        assert!(error.contains("name the iso or the tree that they are of"), "{error}");
        for medium in [kernel, "tree = \"t\""] {
            let error = parse("subiquity", medium).unwrap_err();
            assert!(error.contains("name that as installer.iso"), "{error}");
        }
        for (family, medium) in
            [("anaconda", "tree = \"t\""), ("anaconda", "iso = \"i\""), ("subiquity", "iso = \"i\"")]
        {
            assert!(parse(family, medium).is_ok(), "{family} {medium}");
        }
    }
}
