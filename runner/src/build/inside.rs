//! What is in an image: asked for by a guest, read here.
//!
//! The guest writes archives to disks of their own, so that no file system of an image is read on the host.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use crate::contents::{Manifest, ManifestError};
use crate::event::{Event, Stage};
use crate::recipe::Format;
use crate::vm::argv::{Accelerator, Disk, DiskFormat};

use super::artifacts;
use super::error::BuildError;
use super::finish::{Task, Tell};
use super::image;
use super::machines::Guest;
use super::preflight::Host;
use super::session::{Packages, Session};

/// The longest list of packages that is read, in bytes.
const LONGEST_LIST: u64 = 64 << 20;
/// The disk for the list of packages, kernel and initramfs; it has holes.
const RESULTS_SIZE: u64 = 1 << 30;

/// What is in an image.
pub(super) struct Contents {
    /// Its packages.
    pub(super) manifest: Manifest,
    /// Its kernel and initramfs, if they were asked for.
    pub(super) kernel: Option<(PathBuf, PathBuf)>,
    /// Its root file system as a tar archive, if that was asked for.
    pub(super) root: Option<PathBuf>,
}

/// The disks on which a guest tells of an image: after the image's own, `/dev/vdb` and up.
pub(super) struct Telling {
    results: PathBuf,
    root: Option<PathBuf>,
    kernel: bool,
}

impl Telling {
    /// What the guest is told about them.
    pub(super) fn tell(&self) -> Tell<'static> {
        let root = self.root.as_ref().map(|_| "/dev/vdc");
        Tell { results: "/dev/vdb", root, kernel: self.kernel }
    }

    pub(super) fn disks(&self) -> Vec<Disk> {
        let disk = |path: &PathBuf| Disk::new(path.clone(), DiskFormat::Raw);
        std::iter::once(&self.results).chain(&self.root).map(disk).collect()
    }
}

impl Session<'_> {
    /// Makes the disks; one for the root file system where an output or the build itself needs that.
    pub(super) fn telling(&self, disk_size: u64, wants_root: bool) -> Result<Telling, BuildError> {
        let output = &self.request.recipe.output;
        let make = |name: &str, size: u64| {
            let path = self.scratch.path().join(name);
            let made = File::create_new(&path).and_then(|file| file.set_len(size));
            made.map(|()| path.clone()).map_err(|source| BuildError::Write { path, source })
        };
        let needs_root = wants_root || output.formats.iter().any(|format| format.needs_root());
        Ok(Telling {
            results: make("told.tar", RESULTS_SIZE)?,
            // Beside the files, an archive has headers.
            root: needs_root.then(|| make("root.tar", disk_size + disk_size / 4)).transpose()?,
            kernel: output.has(Format::Kernel),
        })
    }

    /// Reads what was told.
    pub(super) fn told(&self, telling: Telling) -> Result<Contents, BuildError> {
        let folder = self.scratch.path().join("told");
        let written = |path: &Path| {
            let path = path.to_owned();
            move |source| BuildError::Write { path, source }
        };
        fs::create_dir(&folder).map_err(written(&folder))?;
        let mut wanted = vec!["os-release", "dpkg-status", "rpm-packages"];
        if telling.kernel {
            wanted.extend(["kernel", "initrd"]);
        }
        let wanted: Vec<String> = wanted.into_iter().map(str::to_owned).collect();
        let files = artifacts::take(&telling.results, &wanted, &folder, &self.stop)?;
        fs::remove_file(&telling.results).map_err(written(&telling.results))?;
        let text = |path: &Path| -> Result<String, BuildError> {
            let mut bytes = Vec::new();
            File::open(path)
                .and_then(|file| file.take(LONGEST_LIST + 1).read_to_end(&mut bytes))
                .map_err(written(path))?;
            if bytes.len() as u64 > LONGEST_LIST {
                return Err(ManifestError::TooLong { limit: LONGEST_LIST }.into());
            }
            Ok(String::from_utf8_lossy(&bytes).into_owned())
        };
        let (os_release, dpkg, rpm) = (text(&files[0])?, text(&files[1])?, text(&files[2])?);
        let manifest = if rpm.is_empty() {
            Manifest::of_dpkg(&dpkg, &os_release)?
        } else {
            Manifest::of_rpm(&rpm, &os_release)?
        };
        if manifest.packages.is_empty() {
            let told = "the image has no package manager that is known here (dpkg, rpm): there will be no list of its packages, and no bill of materials";
            self.environment.sink.event(Event::Warning(told.to_owned()));
        }
        let name = &self.request.recipe.image.name;
        let named = |from: &Path, suffix: &str| -> Result<PathBuf, BuildError> {
            let to = self.scratch.path().join(format!("{name}.{suffix}"));
            fs::rename(from, &to).map_err(written(from))?;
            Ok(to)
        };
        let kernel = match &files[3..] {
            [kernel, initrd] => Some((named(kernel, "vmlinuz")?, named(initrd, "initrd")?)),
            _ => None,
        };
        let root = match telling.root {
            Some(root) => {
                artifacts::cut(&root, &self.stop)?;
                Some(named(&root, "tar")?)
            }
            None => None,
        };
        Ok(Contents { manifest, kernel, root })
    }

    /// Looks into a raw disk that was made elsewhere; a throwaway copy of it that proves its boot, if the
    /// recipe wants that proven.
    pub(super) fn inspect(
        &self,
        host: &Host,
        packages: &Packages,
        disk: &Path,
        accelerator: Accelerator,
    ) -> Result<(Contents, PathBuf), BuildError> {
        let copy = self.scratch.path().join("inspected.qcow2");
        image::overlay(&host.qemu_img, disk, DiskFormat::Raw, &copy, &self.stop)?;
        let size =
            fs::metadata(disk).map_err(|source| BuildError::Write { path: disk.to_owned(), source })?.len();
        let telling = self.telling(size, false)?;
        let mut disks = vec![Disk::new(copy.clone(), DiskFormat::Qcow2)];
        disks.extend(telling.disks());
        let guest = Guest {
            task: Task::Inspect { tell: telling.tell(), verify: self.request.recipe.verify.boot },
            root: (0, ""),
            disks,
            is_networked: false,
            stage: Stage::Inspect,
            log: "inspect.log",
        };
        // Its log tells nothing when all went well.
        self.work_in_guest(host, packages, accelerator, &guest)?;
        Ok((self.told(telling)?, copy))
    }
}
