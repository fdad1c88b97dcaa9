//! The last stages of a build: what was made becomes the files that were asked for, is proven, and is handed
//! over.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::time::{Duration, SystemTime};

use crate::cache::Digest;
use crate::contents::provenance::Artifact;
use crate::event::{Event, Stage};
use crate::lock::{Lock, LockedRecipe, LockedTool};
use crate::vm::argv::DiskFormat;

use super::error::BuildError;
use super::image;
use super::outputs::{self, Sources};
use super::preflight::Host;
use super::product::Product;
use super::request::{Built, BuiltFile, seconds};
use super::session::{Packages, Session};

/// How long the shared store may take to be given what it lacked, after a build.
const SETTLE_LIMIT: Duration = Duration::from_secs(30);

impl Session<'_> {
    /// Makes the files that were asked for, proves the image, and hands all over.
    pub(super) fn deliver(&mut self, host: &Host, mut product: Product) -> Result<Built, BuildError> {
        let recipe = &self.request.recipe;
        let mut files = Vec::new();
        if let Some(disk) = product.disk.clone() {
            // Where the builder guest has put the unit that proves a boot into the image itself, that is what
            // boots; else a copy which got it.
            let mut copy = None;
            if product.contents.is_none() {
                let (contents, inspected) = self.stage(Stage::Inspect, |session| {
                    session.inspect(host, &product.packages, &disk, product.accelerator)
                })?;
                product.contents = Some(contents);
                copy = Some(inspected);
            }
            let made = self.stage(Stage::Convert, |session| session.convert(host, &disk, &product))?;
            let image = match (copy, made.iter().find(|file| is_qcow2(file))) {
                (Some(copy), _) => (copy, DiskFormat::Qcow2),
                (None, Some(made)) => (made.path.clone(), DiskFormat::Qcow2),
                (None, None) => (disk, DiskFormat::Raw),
            };
            files.extend(made);
            if recipe.verify.boot {
                let log = self.stage(Stage::Verify, |session| {
                    session.verify(host, (&image.0, image.1), product.accelerator)
                })?;
                product.logs.push(log);
            }
        }
        let name = &recipe.image.name;
        let folder = format!("{name}.artifacts");
        for artifact in &product.artifacts {
            files.push(self.finished(artifact, Some(&folder))?);
        }
        let logs: Vec<Artifact> = product
            .logs
            .iter()
            .map(|log| Ok(self.finished(log, None)?.artifact()))
            .collect::<Result<_, BuildError>>()?;
        for document in self.documents(host, &product, &files, &logs)? {
            files.push(self.finished(&document, None)?);
        }
        let sums = self.scratch.path().join(format!("{name}.sha256"));
        let text: String = files.iter().map(|file| format!("{}  {}\n", file.sha256, file.name())).collect();
        fs::write(&sums, text).map_err(|source| BuildError::Write { path: sums.clone(), source })?;
        let delivery = &self.environment.delivery;
        // The sums last: whoever finds them finds what they are of.
        let lock = self.lock(host, &product.packages)?;
        let mut built = Vec::new();
        for file in &files {
            let path = delivery.deliver(&file.path, file.folder.as_deref())?;
            built.push(BuiltFile { path, bytes: file.bytes, sha256: file.sha256.clone() });
        }
        let lock = lock.map(|lock| delivery.deliver(&lock, None)).transpose()?;
        let logs = product.logs.iter().map(|log| delivery.deliver(log, None)).collect::<Result<_, _>>()?;
        delivery.deliver(&sums, None)?;
        let ungiven = product.packages.fetcher.settle(SETTLE_LIMIT);
        if ungiven > 0 {
            self.environment.sink.event(Event::Warning(format!(
                "the shared store was not given {ungiven} of the files that were downloaded: it is slow, or away"
            )));
        }
        Ok(Built {
            files: built,
            lock,
            logs,
            accelerator: product.accelerator,
            stages: self.stages.clone(),
            steps: product.steps,
            counted: product.packages.fetcher.counted(),
            packages: product.packages.selection.packages.len(),
            took: self.started.elapsed(),
        })
    }

    /// Writes down what went in, if that is wanted; and tells how it differs from what a lock has.
    fn lock(&self, host: &Host, packages: &Packages) -> Result<Option<PathBuf>, BuildError> {
        let Packages { selection, fetcher, .. } = packages;
        let recipe = &self.request.recipe;
        let lock = Lock {
            recipe: LockedRecipe { name: recipe.image.name.clone(), sha256: Some(recipe.digest()) },
            tools: vec![LockedTool { name: "qemu".to_owned(), version: host.qemu_version.clone() }],
            machines: self.machines.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            inputs: self.inputs.lock().unwrap_or_else(PoisonError::into_inner).clone(),
            suites: selection.locked_suites(),
            files: fetcher.brought(),
            ..Lock::new()
        };
        if let Some(kept) = fetcher.lock() {
            for difference in kept.differences(&lock) {
                self.environment.sink.event(Event::Warning(difference));
            }
        }
        let needed = fetcher.lock().or(self.request.locks.then_some(&lock));
        if let Some(needed) = needed {
            let name = Digest::of(needed.text()?.as_bytes());
            fetcher.cache().need(name, &needed.digests())?;
        }
        if !self.request.locks {
            return Ok(None);
        }
        let path = self.scratch.path().join(format!("{}.lock", recipe.image.name));
        fs::write(&path, lock.text()?).map_err(|source| BuildError::Write { path: path.clone(), source })?;
        Ok(Some(path))
    }

    /// Makes every format that the recipe asks for.
    fn convert(&self, host: &Host, disk: &Path, product: &Product) -> Result<Vec<Finished>, BuildError> {
        let recipe = &self.request.recipe;
        let contents = product.contents.as_ref();
        let kernel = contents.and_then(|contents| contents.kernel.as_ref());
        let sources = Sources {
            disk,
            root: contents.and_then(|contents| contents.root.as_deref()),
            kernel: kernel.map(|(kernel, initrd)| (kernel.as_path(), initrd.as_path())),
            distribution: contents.map_or("", |contents| &contents.manifest.distribution),
            machine: (recipe.guest.memory / (1024 * 1024), recipe.guest.cpus),
            time: self.request.epoch().unwrap_or_else(|| seconds(SystemTime::now())),
        };
        let folder = self.scratch.path().join("out");
        fs::create_dir(&folder).map_err(|source| BuildError::Write { path: folder.clone(), source })?;
        let mut files = Vec::new();
        for format in &recipe.output.formats {
            // Apart from the build's own files, which may be called as the image is.
            let place = (folder.as_path(), recipe.image.name.as_str());
            for path in outputs::make(*format, sources, place, &host.qemu_img, &self.stop)? {
                files.push(self.finished(&path, None)?);
            }
        }
        Ok(files)
    }

    fn finished(&self, path: &Path, folder: Option<&str>) -> Result<Finished, BuildError> {
        let sha256 = image::digest(path, &self.stop)?;
        let data =
            fs::metadata(path).map_err(|source| BuildError::Write { path: path.to_owned(), source })?;
        Ok(Finished { path: path.to_owned(), folder: folder.map(str::to_owned), bytes: data.len(), sha256 })
    }
}

/// A file that is ready to be delivered.
pub(super) struct Finished {
    path: PathBuf,
    /// The folder that it goes to, where it is not the output directory itself.
    folder: Option<String>,
    bytes: u64,
    pub(super) sha256: String,
}

impl Finished {
    /// How the list of digests names it.
    pub(super) fn name(&self) -> String {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        match &self.folder {
            Some(folder) => format!("{folder}/{name}"),
            None => name.into_owned(),
        }
    }

    fn artifact(&self) -> Artifact {
        Artifact { name: self.name(), sha256: self.sha256.clone() }
    }
}

fn is_qcow2(file: &Finished) -> bool {
    file.path.extension().is_some_and(|extension| extension == "qcow2")
}
