//! From the packages of a build to a disk that a guest can finish.
//!
//! ```text
//! cache ─► unpack ─► tree + layout ─► dpkg's database, host name, … ─► mke2fs, debugfs, e2fsck ─► disk
//! ```
//!
//! Runs as an ordinary user and mounts nothing. Deliberately absent: maintainer scripts, boot loader,
//! and whatever else has to run inside the system: the guest does that.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use sha2::{Digest as _, Sha256};

use crate::cache::Cache;
use crate::debian::Selection;
use crate::debian::signature::{self, SignatureError};
use crate::event::{Event, Sink, Stage};
use crate::recipe::Recipe;
use crate::stop::Stop;

use super::database::{self, Described, Triggers};
use super::filesystem::{self, FilesystemError, Sources};
use super::layout::Attributes;
use super::partition::Partition;
use super::tree::{Tree, TreeError};
use super::unpack::{self, UnpackError, Unpacked};

const DATABASE: &str = "var/lib/dpkg";

/// Why there is no disk.
#[derive(Debug, thiserror::Error)]
pub enum ComposeError {
    /// The recipe's size is too small.
    #[error("the packages need about {needed} bytes and the disk has {size}: raise image.size in the recipe")]
    TooSmall {
        /// Bytes that they say they need.
        needed: u64,
        /// Bytes of the disk.
        size: u64,
    },
    /// A package cannot be unpacked.
    #[error("cannot unpack package {package}")]
    Unpack {
        /// The package.
        package: String,
        /// Why.
        #[source]
        source: UnpackError,
    },
    /// A package does not say who it is.
    #[error(
        "package {package} has an incomplete control file, or is not the one its index names: the archive is damaged"
    )]
    Control {
        /// The package.
        package: String,
    },
    /// A file of the tree cannot be written.
    #[error("cannot write the file tree")]
    Tree(#[from] TreeError),
    /// A folder of the builder's own cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The folder.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The disk cannot be written.
    #[error("cannot write {}: check the space of its disk and its permissions", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A keyring cannot be read.
    #[error(transparent)]
    Keyring(#[from] SignatureError),
    /// No random numbers.
    #[error("the kernel gives no random numbers for the disk's identity")]
    Random {
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// There is no file system.
    #[error(transparent)]
    Filesystem(#[from] FilesystemError),
}

/// A preinst script that the guest has to run, as `preinst install`, before anything is configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Preinst {
    /// Package, for `DPKG_MAINTSCRIPT_PACKAGE`.
    pub package: String,
    /// Architecture, for `DPKG_MAINTSCRIPT_ARCH`.
    pub architecture: String,
    /// Version.
    pub version: String,
    /// The script's absolute path in the image.
    pub script: String,
}

/// A disk with unpacked packages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ComposedDisk {
    /// The raw, sparse image.
    pub image: PathBuf,
    /// Where its root file system lies.
    pub partition: Partition,
    /// UUID of the root file system.
    pub root_uuid: String,
    /// Preinst scripts in the order in which to run them.
    pub preinst: Vec<Preinst>,
    /// Names and versions of the packages.
    pub packages: Vec<(String, String)>,
    /// Paths in the image.
    pub paths: usize,
}

/// Makes the disk `disk.raw` in `scratch`, an empty directory of the caller's that may be removed as
/// a whole afterwards. All packages must be in `cache`. The directory `modules`, whose last component is a
/// kernel's release, goes to where that kernel looks for its modules. With a `time`, in seconds since 1970, the
/// disk's identity follows from that and the recipe; else it is another each time.
///
/// # Errors
/// See [`ComposeError`].
pub fn compose(
    (recipe, selection, modules): (&Recipe, &Selection, Option<&Path>),
    time: Option<u64>,
    cache: &Cache,
    scratch: &Path,
    stop: &Stop,
    sink: &dyn Sink,
) -> Result<ComposedDisk, ComposeError> {
    let needed = selection.installed_size();
    if needed > recipe.image.size - recipe.image.size / 10 {
        let size = recipe.image.size;
        return Err(ComposeError::TooSmall { needed, size });
    }
    // Times out of signed metadata: the same packages make the same tree.
    let modified = selection
        .repositories
        .iter()
        .flat_map(|repository| &repository.suites)
        .map(|suite| suite.release.date)
        .max()
        .unwrap_or(0);
    let tree = Tree::create(scratch.join("tree"), modified)?;
    let unpacked = unpack::unpack(selection, &selection.packages, cache, &tree, &|_| true, (stop, sink))
        .map_err(|failed| ComposeError::Unpack { package: failed.package, source: failed.error })?;
    let progress = |doing: &str| {
        sink.event(Event::Progress {
            stage: Stage::Compose,
            doing: doing.to_owned(),
            bytes: selection.download_size(),
            total: Some(selection.download_size()),
        });
    };
    progress("writing dpkg's database");
    let preinst = write_database(selection, &unpacked, &tree, modified)?;
    let identity = match time {
        Some(time) => Identity::fixed(recipe, time),
        None => Identity::random().map_err(|source| ComposeError::Random { source })?,
    };
    write_configuration(recipe, selection, &tree, &identity.uuid, modified)?;
    if let Some(modules) = modules {
        let release = modules.file_name().unwrap_or_default().to_string_lossy();
        add_folder(modules, &format!("usr/lib/modules/{release}"), &tree, modified)?;
    }
    tree.settle()?;

    progress("making the file system");
    let image = scratch.join("disk.raw");
    let partition = Partition::whole(recipe.image.size, identity.signature);
    create_disk(&image, recipe.image.size, partition)
        .map_err(|source| ComposeError::Write { path: image.clone(), source })?;
    let layout = tree.layout();
    let sources = Sources { tree: tree.root(), layout: &layout, attributes: &[], time: None };
    filesystem::make((&image, partition), &identity.uuid, sources, scratch, stop)?;
    let paths = layout.nodes().count();
    drop(layout);
    // Hundreds of MB that the guest needs the room of.
    std::fs::remove_dir_all(tree.root())
        .map_err(|source| ComposeError::Write { path: tree.root().to_owned(), source })?;
    Ok(ComposedDisk {
        image,
        partition,
        root_uuid: identity.uuid,
        preinst,
        packages: selection
            .packages
            .iter()
            .map(|package| (package.name.clone(), package.version.clone()))
            .collect(),
        paths,
    })
}

/// What tells this disk from all others.
struct Identity {
    uuid: String,
    signature: u32,
}

impl Identity {
    fn random() -> io::Result<Self> {
        let mut bytes = [0_u8; 20];
        let count = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty())?;
        if count < bytes.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(Self::of(bytes))
    }

    /// The same for each build of one recipe for one time.
    fn fixed(recipe: &Recipe, time: u64) -> Self {
        let digest =
            Sha256::new().chain_update(recipe.text.as_bytes()).chain_update(time.to_le_bytes()).finalize();
        let mut bytes = [0_u8; 20];
        bytes.copy_from_slice(&digest[..20]);
        Self::of(bytes)
    }

    fn of(mut bytes: [u8; 20]) -> Self {
        // Version 4, variant 1 (RFC 9562).
        bytes[6] = (bytes[6] & 0x0f) | 0x40;
        bytes[8] = (bytes[8] & 0x3f) | 0x80;
        let digits: String = bytes[..16].iter().map(|byte| format!("{byte:02x}")).collect();
        Self {
            uuid: format!(
                "{}-{}-{}-{}-{}",
                &digits[..8],
                &digits[8..12],
                &digits[12..16],
                &digits[16..20],
                &digits[20..]
            ),
            signature: u32::from_le_bytes([bytes[16], bytes[17], bytes[18], bytes[19]]),
        }
    }
}

fn create_disk(image: &Path, size: u64, partition: Partition) -> io::Result<()> {
    let mut disk: File = OpenOptions::new().write(true).create_new(true).mode(0o600).open(image)?;
    disk.set_len(size)?;
    disk.write_all(&partition.boot_record())
}

const fn attributes(mode: u32, modified: u64) -> Attributes {
    Attributes { uid: 0, gid: 0, mode, modified }
}

fn write_database(
    selection: &Selection,
    unpacked: &[Unpacked],
    tree: &Tree,
    modified: u64,
) -> Result<Vec<Preinst>, ComposeError> {
    for name in ["alternatives", "info", "parts", "triggers", "updates"] {
        tree.directories(&format!("{DATABASE}/{name}"), attributes(0o755, modified))?;
    }
    let mut status = String::new();
    let mut triggers = Triggers::default();
    let mut preinst = Vec::new();
    let write = |name: &str, bytes: &[u8], mode| {
        tree.file(&format!("{DATABASE}/{name}"), bytes, attributes(mode, modified))
    };
    for (index, (package, unpacked)) in selection.packages.iter().zip(unpacked).enumerate() {
        let described = Described::new(&unpacked.control.fields)
            .filter(|described| described.name() == package.name && described.version() == package.version)
            .ok_or_else(|| ComposeError::Control { package: package.name.clone() })?;
        let instance = described.instance();
        // What another package took over is no longer this one's, as dpkg has it.
        let (paths, conffiles) = {
            let layout = tree.layout();
            let is_own = |path: &&str| !layout.is_taken_over(path, index + 1);
            let paths: Vec<&str> = unpacked.paths.iter().map(String::as_str).filter(is_own).collect();
            let conffiles = unpacked.conffiles.iter().filter(|one| is_own(&one.path.trim_start_matches('/')));
            (database::file_list(&paths), conffiles.cloned().collect::<Vec<_>>())
        };
        status.push_str(&described.status(&conffiles));
        triggers.add(&instance, &unpacked.control.text("triggers"));
        write(&format!("info/{instance}.list"), paths.as_bytes(), 0o644)?;
        for member in &unpacked.control.members {
            write(&format!("info/{instance}.{}", member.name), &member.bytes, member.mode)?;
            if member.name == "preinst" {
                preinst.push(Preinst {
                    package: package.name.clone(),
                    architecture: described.architecture().to_owned(),
                    version: package.version.clone(),
                    script: format!("/{DATABASE}/info/{instance}.preinst"),
                });
            }
        }
    }
    write("status", status.as_bytes(), 0o644)?;
    write("info/format", b"1\n", 0o644)?;
    for (name, text) in triggers.files() {
        write(&format!("triggers/{name}"), text.as_bytes(), 0o644)?;
    }
    for empty in ["available", "diversions", "statoverride", "triggers/Unincorp"] {
        write(empty, b"", 0o644)?;
    }
    let automatic = selection.packages.iter().filter(|package| package.automatic);
    let states = database::extended_states(automatic.map(|package| {
        let architecture = selection.catalogue.stanza(package.id).get("Architecture");
        // apt files packages for all architectures under the native one.
        let architecture = architecture.filter(|name| *name != "all");
        (package.name.as_str(), architecture.unwrap_or(&selection.architecture))
    }));
    tree.directories("var/lib/apt", attributes(0o755, modified))?;
    tree.file("var/lib/apt/extended_states", states.as_bytes(), attributes(0o644, modified))?;
    Ok(preinst)
}

/// Adds what is in a folder of the builder's own; links are left out.
fn add_folder(folder: &Path, path: &str, tree: &Tree, modified: u64) -> Result<(), ComposeError> {
    let failed = |source| ComposeError::Read { path: folder.to_owned(), source };
    tree.directories(path, attributes(0o755, modified))?;
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let inside = format!("{path}/{}", entry.file_name().to_string_lossy());
        let kind = entry.file_type().map_err(failed)?;
        if kind.is_dir() {
            add_folder(&entry.path(), &inside, tree, modified)?;
        } else if kind.is_file() {
            let bytes = std::fs::read(entry.path()).map_err(failed)?;
            tree.file(&inside, &bytes, attributes(0o644, modified))?;
        }
    }
    Ok(())
}

fn write_configuration(
    recipe: &Recipe,
    selection: &Selection,
    tree: &Tree,
    uuid: &str,
    modified: u64,
) -> Result<(), ComposeError> {
    let hostname = &recipe.image.hostname;
    let short = hostname.split('.').next().unwrap_or(hostname);
    let names = if short == hostname { hostname.clone() } else { format!("{hostname} {short}") };
    let sources = selection.image_sources();
    tree.directories("etc/apt", attributes(0o755, modified))?;
    for (path, text) in [
        ("etc/fstab", format!("UUID={uuid} / ext4 errors=remount-ro 0 1\n")),
        ("etc/hostname", format!("{hostname}\n")),
        (
            "etc/hosts",
            format!("127.0.0.1 localhost\n127.0.1.1 {names}\n::1 localhost ip6-localhost ip6-loopback\n"),
        ),
        ("etc/apt/sources.list", sources),
    ] {
        tree.file(path, text.as_bytes(), attributes(0o644, modified))?;
    }
    for repository in &selection.repositories {
        let Some(path) = selection.keyring_in_image(repository) else {
            continue;
        };
        let bytes = signature::read_keyring(&repository.keyring)?;
        tree.directories("etc/apt/keyrings", attributes(0o755, modified))?;
        tree.file(&path, &bytes, attributes(0o644, modified))?;
    }
    Ok(())
}
