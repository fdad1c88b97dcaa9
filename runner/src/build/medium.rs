//! An installer's kernel and initial file system, out of whatever medium they come on.

use std::fs::{self, File};
use std::io::{self, Read, Write as _};
use std::path::{Path, PathBuf};

use crate::beside::{Beside, BesideError, plain_file};
use crate::contents::provenance::Artifact;
use crate::debian::{SelectError, describe};
use crate::disk::{Tree, unpack_some};
use crate::event::Stage;
use crate::media::boot::{self, NotBootable};
use crate::media::iso::{Iso, IsoError};
use crate::media::treeinfo::{self, TreeinfoError};
use crate::recipe::{Family, Medium};
use crate::rpm::MetadataError;
use crate::stop::{Stop, Stopped};

use super::error::BuildError;
use super::image;
use super::session::{Packages, Session};

/// The largest initial file system that is taken, in bytes.
const LARGEST: u64 = 2 << 30;

/// Why a medium is of no use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MediumError {
    /// It cannot be opened.
    #[error(transparent)]
    Beside(#[from] BesideError),
    /// It cannot be opened.
    #[error("cannot open {}, which the recipe names", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// An ISO image is none, or has not what is needed.
    #[error("cannot use {}", path.display())]
    Iso {
        /// The image.
        path: PathBuf,
        /// Why.
        #[source]
        source: IsoError,
    },
    /// An image has no installer of the family.
    #[error("{} has no kernel and initial file system where this family has them: {}", path.display(), looked.join(", "))]
    NoInstaller {
        /// The image.
        path: PathBuf,
        /// Where they were looked for.
        looked: Vec<String>,
    },
    /// A tree's `.treeinfo` is of no use.
    #[error("cannot use {}", path.display())]
    Treeinfo {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: TreeinfoError,
    },
    /// A tree's index is of no use.
    #[error("cannot use {}", path.display())]
    Repository {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: MetadataError,
    },
    /// A tree does not have the installer itself.
    #[error("{} names no stage2: it is a tree of packages only; name one that an installer comes with, or an iso", path.display())]
    NoStage2 {
        /// The file.
        path: PathBuf,
    },
    /// It was given up.
    #[error("gave up reading {}", path.display())]
    Stopped {
        /// The file, or folder.
        path: PathBuf,
        /// Why.
        #[source]
        source: Stopped,
    },
    /// A file of a tree is not what `.treeinfo`, or an index, says.
    #[error("{} is not the file that its tree vouches for: download it again", path.display())]
    Digest {
        /// The file.
        path: PathBuf,
    },
    /// A file is not what it is taken for.
    #[error("cannot boot {}", path.display())]
    NotBootable {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: NotBootable,
    },
    /// A package has no installer.
    #[error("package {package} has no linux and initrd.gz of the text installer")]
    NotInPackage {
        /// The package.
        package: String,
    },
    /// A file is larger than what it is taken for ever is.
    #[error("{} has more than {limit} bytes: no such file is that large", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
        /// How many it may have.
        limit: u64,
    },
    /// A file of the scratch directory cannot be written.
    #[error("could not write {}; is the disk full?", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What boots an installer.
#[derive(Debug)]
pub(super) struct Bootable {
    pub(super) kernel: PathBuf,
    /// The original; the answers are put behind it.
    pub(super) initrd: PathBuf,
    /// A disc that goes into the drive, and its label.
    pub(super) disc: Option<(PathBuf, String)>,
    /// Where it came from.
    pub(super) materials: Vec<Artifact>,
}

/// Where the families have kernel and initial file system in their images.
fn places(family: Family) -> &'static [(&'static str, &'static str)] {
    match family {
        Family::DebianInstaller => &[
            ("install.amd/vmlinuz", "install.amd/initrd.gz"),
            ("linux", "initrd.gz"),
            ("install/vmlinuz", "install/initrd.gz"),
        ],
        Family::Anaconda => &[
            ("images/pxeboot/vmlinuz", "images/pxeboot/initrd.img"),
            ("isolinux/vmlinuz", "isolinux/initrd.img"),
            ("boot/x86_64/loader/linux", "boot/x86_64/loader/initrd"),
        ],
        Family::Subiquity => &[("casper/vmlinuz", "casper/initrd"), ("casper/vmlinuz", "casper/initrd.gz")],
        Family::CloudImage => &[],
    }
}

/// Opens what the recipe names: beside it, or by its full path.
pub(super) fn open(beside: &Beside, path: &Path) -> Result<File, MediumError> {
    if path.is_absolute() {
        return plain_file(path).map_err(|source| MediumError::Open { path: path.to_owned(), source });
    }
    Ok(beside.file(path)?)
}

impl Session<'_> {
    /// Finds what boots the installer, and looks whether it really is what it is taken for.
    pub(super) fn bootable(
        &self,
        family: Family,
        medium: &Medium,
        packages: &Packages,
    ) -> Result<Bootable, BuildError> {
        let (kernel, initrd) = (self.scratch.path().join("kernel"), self.scratch.path().join("initrd"));
        let mut materials = Vec::new();
        let mut disc = None;
        let beside = &self.request.beside;
        match medium {
            Medium::Kernel { kernel: from_kernel, initrd: from_initrd } => {
                for (from, to) in [(from_kernel, &kernel), (from_initrd, &initrd)] {
                    copy(&mut open(beside, from)?, to, &self.stop)?;
                    materials.push(self.material(from, to)?);
                }
            }
            Medium::Iso(path) => {
                let target = self.scratch.path().join("medium.iso");
                let file = open(beside, path)?;
                place(&file, &target, &self.stop)?;
                let wrong = |source| MediumError::Iso { path: path.clone(), source };
                let mut iso = Iso::open(file).map_err(wrong)?;
                let looked = places(family);
                let mut is_found = false;
                for (from_kernel, from_initrd) in looked {
                    let missing = |error: &IsoError| matches!(error, IsoError::Missing { .. });
                    match iso.file(from_kernel) {
                        Ok((mut input, _)) => copy(&mut input, &kernel, &self.stop)?,
                        Err(error) if missing(&error) => continue,
                        Err(error) => return Err(wrong(error).into()),
                    }
                    match iso.file(from_initrd) {
                        Ok((mut input, _)) => copy(&mut input, &initrd, &self.stop)?,
                        Err(error) if missing(&error) => continue,
                        Err(error) => return Err(wrong(error).into()),
                    }
                    is_found = true;
                    break;
                }
                if !is_found {
                    let looked = looked.iter().map(|(kernel, _)| (*kernel).to_owned()).collect();
                    return Err(MediumError::NoInstaller { path: path.clone(), looked }.into());
                }
                materials.push(self.material(path, &target)?);
                disc = Some((target, iso.label().to_owned()));
            }
            Medium::Tree(path) => self.of_tree(path, (&kernel, &initrd), &mut materials)?,
            Medium::Package(name) => {
                self.of_package(name, packages, (&kernel, &initrd), &mut materials)?;
            }
            // A disk boots by itself; the recipe's check has seen to that.
            Medium::Disk(_) => {}
        }
        let looks = |path: &Path, is: fn(&[u8]) -> Result<(), NotBootable>| {
            is(&start(path)?).map_err(|source| MediumError::NotBootable { path: named(medium, path), source })
        };
        looks(&kernel, boot::kernel)?;
        looks(&initrd, boot::initrd)?;
        Ok(Bootable { kernel, initrd, disc, materials })
    }

    fn material(&self, name: &Path, file: &Path) -> Result<Artifact, BuildError> {
        let name = name.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let (name, sha256) = (format!("file:{name}"), image::digest(file, &self.stop)?);
        self.note_input(&name, &sha256)?;
        Ok(Artifact { name, sha256 })
    }

    fn of_tree(
        &self,
        path: &Path,
        (kernel, initrd): (&Path, &Path),
        materials: &mut Vec<Artifact>,
    ) -> Result<(), BuildError> {
        let beside = &self.request.beside;
        let info = path.join(".treeinfo");
        let mut text = String::new();
        let file = open(beside, &info)?;
        file.take(1 << 20)
            .read_to_string(&mut text)
            .map_err(|source| MediumError::Open { path: info.clone(), source })?;
        let tree = treeinfo::parse(&text).map_err(|source| MediumError::Treeinfo { path: info, source })?;
        for (wanted, to) in [(&tree.kernel, kernel), (&tree.initrd, initrd)] {
            let from = path.join(&wanted.path);
            copy(&mut open(beside, &from)?, to, &self.stop)?;
            let material = self.material(&from, to)?;
            if material.sha256 != wanted.sha256 {
                return Err(MediumError::Digest { path: from }.into());
            }
            materials.push(material);
        }
        Ok(())
    }

    fn of_package(
        &self,
        name: &str,
        packages: &Packages,
        (kernel, initrd): (&Path, &Path),
        materials: &mut Vec<Artifact>,
    ) -> Result<(), BuildError> {
        let Packages { selection, fetcher, .. } = packages;
        let no_package = || SelectError::NoPackage { package: name.to_owned() };
        let id = selection.catalogue.candidate(name).ok_or_else(no_package)?;
        let package = describe(&selection.catalogue, id, true)?;
        let wanted = vec![selection.wanted(&package.file)];
        fetcher.fetch_all(wanted, Stage::Fetch, self.environment.sink.as_ref())?;
        let root = self.scratch.path().join("installer");
        let tree = Tree::create(root.clone(), 0).map_err(crate::disk::ToolsError::Tree)?;
        // The graphical one lies beside it.
        let is_wanted = |path: &str| !path.contains("/gtk");
        let sink = self.environment.sink.as_ref();
        unpack_some(selection, &package, fetcher.cache(), &tree, &is_wanted, (&self.stop, sink))?;
        let find = |name: &str| {
            let layout = tree.layout();
            let found = layout.nodes().map(|(path, _)| path).find(|path| path.ends_with(name));
            found.map(|path| root.join(path))
        };
        let (Some(linux), Some(initrd_gz)) = (find("/linux"), find("/initrd.gz")) else {
            return Err(MediumError::NotInPackage { package: name.to_owned() }.into());
        };
        for (from, to) in [(linux, kernel), (initrd_gz, initrd)] {
            let renamed = fs::rename(&from, to);
            renamed.map_err(|source| MediumError::Write { path: to.to_owned(), source })?;
        }
        materials.push(Artifact {
            name: super::documents::address(&package.name, &package.version, "all"),
            sha256: package.file.digest.to_string(),
        });
        Ok(())
    }
}

/// The name that the recipe's author knows a file by.
fn named(medium: &Medium, path: &Path) -> PathBuf {
    match medium {
        Medium::Kernel { kernel, .. } if path.ends_with("kernel") => kernel.clone(),
        Medium::Kernel { initrd, .. } => initrd.clone(),
        Medium::Iso(file) | Medium::Tree(file) | Medium::Disk(file) => file.clone(),
        Medium::Package(name) => PathBuf::from(name),
    }
}

/// The beginning of a file.
pub(super) fn start(path: &Path) -> Result<Vec<u8>, MediumError> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(boot::LOOKED_AT as u64).read_to_end(&mut bytes))
        .map_err(|source| MediumError::Open { path: path.to_owned(), source })?;
    Ok(bytes)
}

fn copy(input: &mut dyn Read, target: &Path, stop: &Stop) -> Result<(), MediumError> {
    let failed = |source| MediumError::Write { path: target.to_owned(), source };
    let mut output = File::create(target).map_err(failed)?;
    let copied = io::copy(&mut stop.reading(input).take(LARGEST + 1), &mut output);
    let copied = copied.and_then(|copied| output.flush().map(|()| copied)).map_err(failed)?;
    if copied > LARGEST {
        return Err(MediumError::TooLarge { path: target.to_owned(), limit: LARGEST });
    }
    Ok(())
}

/// Gives an open file a name where the machine may read it: by a link where it can be, else as a copy.
pub(super) fn place(file: &File, target: &Path, stop: &Stop) -> Result<(), MediumError> {
    super::checkpoint::place(file, target, stop)
        .map_err(|source| MediumError::Write { path: target.to_owned(), source })
}
