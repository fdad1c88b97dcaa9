//! The kind `builder`: a command in a throwaway machine.
//!
//! The machine is made of packages once and kept as a [`checkpoint`]; each build works on an overlay of it,
//! which nobody ever reads. The workspace goes in and the artifacts come out as archives on disks of their
//! own ([`workspace`], [`artifacts`]). Loop devices, mounts and whatever else a command leaves behind die with the machine.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::cache::Fetcher;
use crate::contents::provenance::Artifact;
use crate::debian::Package;
use crate::disk;
use crate::event::{Event, Stage};
use crate::recipe::Builder;
use crate::vm::argv::{Accelerator, Disk, DiskFormat};

use super::checkpoint;
use super::documents::address;
use super::error::BuildError;
use super::finish::Task;
use super::image;
use super::machines::{Guest, Worked, preinst_lines};
use super::preflight::Host;
use super::product::Product;
use super::session::{Packages, Session};
use super::{artifacts, workspace};

impl Session<'_> {
    /// Runs the recipe's commands in a throwaway machine.
    pub(super) fn make_in_throwaway(
        &mut self,
        host: &Host,
        builder: &Builder,
    ) -> Result<Product, BuildError> {
        let chosen = self.select()?;
        let image = &self.request.recipe.image;
        let kernel = disk::kernel_package(&chosen.selection)?;
        let key = checkpoint::key(&chosen.selection, &kernel, image.size, &image.hostname);
        let found = self.found(&chosen.fetcher, Stage::Select, &key)?;
        let packages = self.fetch(chosen, found.is_none())?;
        if found.is_some() {
            // They went into the machine, though they were not fetched for it now.
            packages.note_all();
        }
        let accelerator = self.stage(Stage::Canary, |session| session.canary(host, &packages))?;
        let base = self.scratch.path().join("machine.qcow2");
        let checkpoint = match found {
            Some(file) => {
                let told = "the throwaway machine was prepared by an earlier build, and comes from the cache";
                self.environment.sink.event(Event::Note(told.to_owned()));
                file
            }
            None => self.prepare(host, &packages, accelerator, &base, &key, &kernel)?,
        };
        let mut materials = Vec::new();
        let (worked, results) = self.stage(Stage::Guest, |session| {
            checkpoint::place(&checkpoint, &base, &session.stop)
                .map_err(|source| BuildError::Write { path: base.clone(), source })?;
            session.command(host, &packages, (&base, accelerator), builder, &mut materials)
        })?;
        materials.extend(worked.fetched);
        materials.push(Artifact {
            name: address(&kernel.name, &kernel.version, &packages.selection.architecture),
            sha256: kernel.file.digest.to_string(),
        });
        let wanted = wanted(builder);
        let folder = self.scratch.path().join("artifacts");
        let mut files = self.stage(Stage::Collect, |session| {
            fs::create_dir(&folder).map_err(|source| BuildError::Write { path: folder.clone(), source })?;
            let files = artifacts::take(&results, &wanted, &folder, &session.stop)?;
            fs::remove_file(&results).map_err(|source| BuildError::Write { path: results, source })?;
            Ok(files)
        })?;
        let disk = builder.disk.as_ref().and_then(|_| files.pop()).map(|file| {
            // Out of the folder in which names are the recipe's.
            let disk = self.scratch.path().join("disk.raw");
            fs::rename(&file, &disk).map(|()| disk).map_err(|source| BuildError::Write { path: file, source })
        });
        Ok(Product {
            disk: disk.transpose()?,
            contents: None,
            artifacts: files,
            logs: vec![worked.log],
            accelerator,
            steps: worked.report.stages,
            packages,
            materials,
        })
    }

    fn found(&self, fetcher: &Arc<Fetcher>, stage: Stage, key: &str) -> Result<Option<File>, BuildError> {
        let fetcher = Arc::clone(fetcher);
        let key = key.to_owned();
        self.interruptible(stage, move || Ok(checkpoint::find(fetcher.cache(), &key)?))
    }

    /// Makes the machine's disk, and keeps it in the cache; what the cache has then.
    fn prepare(
        &mut self,
        host: &Host,
        packages: &Packages,
        accelerator: Accelerator,
        target: &Path,
        key: &str,
        kernel: &Package,
    ) -> Result<File, BuildError> {
        let modules = packages.tools.modules.clone();
        let disk = self.stage(Stage::Compose, |session| session.compose(packages, Some(modules)))?;
        self.environment.sink.event(Event::Note(format!(
            "the throwaway machine has {} packages and the kernel of {} {}",
            disk.packages.len(),
            kernel.name,
            kernel.version
        )));
        self.stage(Stage::Prepare, |session| {
            let preinst = preinst_lines(&disk);
            let guest = Guest {
                task: Task::Prepare { preinst: &preinst },
                root: (disk.partition.number, &disk.root_uuid),
                disks: vec![Disk::new(disk.image.clone(), DiskFormat::Raw)],
                is_networked: false,
                stage: Stage::Prepare,
                log: "prepare.log",
            };
            session.work_in_guest(host, packages, accelerator, &guest)?;
            image::convert(&host.qemu_img, &disk.image, target, image::Packing::Plain, &session.stop)?;
            fs::remove_file(&disk.image)
                .map_err(|source| BuildError::Write { path: disk.image.clone(), source })?;
            checkpoint::keep(packages.fetcher.cache(), key, target, &session.stop)?;
            fs::remove_file(target)
                .map_err(|source| BuildError::Write { path: target.to_owned(), source })?;
            let kept = session.found(&packages.fetcher, Stage::Prepare, key)?;
            kept.ok_or_else(|| BuildError::Cache(lost(target)))
        })
    }

    /// Runs the commands on an overlay of `base`; the disk with what they left.
    fn command(
        &self,
        host: &Host,
        packages: &Packages,
        (base, accelerator): (&Path, Accelerator),
        builder: &Builder,
        materials: &mut Vec<Artifact>,
    ) -> Result<(Worked, PathBuf), BuildError> {
        let recipe = &self.request.recipe;
        let overlay = self.scratch.path().join("overlay.qcow2");
        image::overlay(&host.qemu_img, base, DiskFormat::Qcow2, &overlay, &self.stop)?;
        let mut disks = vec![Disk::new(overlay.clone(), DiskFormat::Qcow2)];
        if let Some(path) = &builder.workspace {
            let folder = self.request.beside.folder(path)?;
            let target = self.scratch.path().join("workspace.tar");
            workspace::pack(&folder.path(), &self.request.beside.shown(path), &target, &self.stop)?;
            let name = format!("workspace:{}", path.display());
            let sha256 = image::digest(&target, &self.stop)?;
            self.note_input(&name, &sha256)?;
            materials.push(Artifact { name, sha256 });
            pad(&target).map_err(|source| BuildError::Write { path: target.clone(), source })?;
            disks.push(Disk::new(target, DiskFormat::Raw));
        }
        let results = self.scratch.path().join("results.tar");
        // As large as all that fits on the machine's disk, and what an archive has beside it.
        File::create_new(&results)
            .and_then(|file| file.set_len(recipe.image.size + (64 << 20)))
            .map_err(|source| BuildError::Write { path: results.clone(), source })?;
        disks.push(Disk::new(results.clone(), DiskFormat::Raw));
        let wanted = wanted(builder);
        let guest = Guest {
            task: Task::Use {
                run: &recipe.guest.run,
                workspace: builder.workspace.is_some(),
                artifacts: &wanted,
                results: if builder.workspace.is_some() { "/dev/vdc" } else { "/dev/vdb" },
            },
            root: (1, ""),
            disks,
            is_networked: true,
            stage: Stage::Guest,
            log: "console.log",
        };
        let worked = self.work_in_guest(host, packages, accelerator, &guest)?;
        fs::remove_file(&overlay).map_err(|source| BuildError::Write { path: overlay, source })?;
        Ok((worked, results))
    }
}

/// The files to hand over; the disk's comes last.
fn wanted(builder: &Builder) -> Vec<String> {
    builder.artifacts.iter().chain(&builder.disk).cloned().collect()
}

fn lost(path: &Path) -> crate::cache::StoreError {
    let source = std::io::Error::other("what was just written is gone or damaged");
    crate::cache::StoreError::Read { path: path.to_owned(), source }
}

/// A disk has whole sectors.
fn pad(archive: &Path) -> std::io::Result<()> {
    let file = File::options().write(true).open(archive)?;
    let size = file.metadata()?.len();
    file.set_len(size.next_multiple_of(4096).max(4096))
}
