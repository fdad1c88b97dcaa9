//! The kind `installer`: a distribution's own installer, or cloud-init in a cloud image, without a person.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::cache::Digest;
use crate::cache::offer::Offer;
use crate::contents::provenance::Artifact;
use crate::debian::InstallerArchives;
use crate::event::{Event, Stage};
use crate::installer::{Rejected, cloud, kickstart, preseed};
use crate::media::boot::{self, Layout};
use crate::media::seed;
use crate::recipe::{Family, Installer, Medium};
use crate::vm::NO_TIMER_CHECK;
use crate::vm::argv::{Accelerator, Boot, CONTROL_PORT, Disk, DiskFormat, Network, VmSpec};
use crate::vm::initramfs::Initramfs;
use crate::vm::nonce::nonce;

use super::error::BuildError;
use super::guest_mirror::GuestMirror;
use super::image;
use super::machines::{Logs, Worked, accept};
use super::medium::{MediumError, open, place, start};
use super::preflight::Host;
use super::product::Product;
use super::release_tree::{self, ReleaseTree};
use super::session::{Packages, Session};

/// The largest answers file, in bytes.
const LARGEST_ANSWERS: u64 = 1 << 20;

/// What is booted to install.
struct Installation {
    boot: Boot,
    disks: Vec<Disk>,
    log_port: Option<&'static str>,
    materials: Vec<Artifact>,
}

impl Session<'_> {
    /// Lets an installer install.
    pub(super) fn make_by_installer(
        &mut self,
        host: &Host,
        installer: &Installer,
    ) -> Result<Product, BuildError> {
        // Before anything else: it takes no time, and a wrong answer is found now or after half an hour.
        let answers = self.answers(installer)?;
        let chosen = self.select()?;
        let packages = self.fetch(chosen, false)?;
        let offer: Option<Box<dyn Offer>> = match (installer.family, &installer.medium) {
            (Family::DebianInstaller, _) => {
                let sink = Arc::clone(&self.environment.sink);
                let (selection, fetcher) = (Arc::clone(&packages.selection), Arc::clone(&packages.fetcher));
                let suite = self.request.recipe.debian.suite.clone();
                let read = move || Ok(InstallerArchives::read(&selection, &suite, &fetcher, sink.as_ref())?);
                let archives =
                    self.stage(Stage::Fetch, |session| session.interruptible(Stage::Fetch, read))?;
                Some(Box::new(archives))
            }
            (Family::Anaconda, Medium::Tree(path)) => {
                Some(Box::new(self.stage(Stage::Fetch, |session| session.release_tree(path))?))
            }
            _ => None,
        };
        let accelerator = self.stage(Stage::Canary, |session| session.canary(host, &packages))?;
        let disk = self.scratch.path().join("disk.raw");
        let nonce = nonce().map_err(BuildError::Nonce)?;
        let installation = self.stage(Stage::Compose, |session| {
            session.installation(host, installer, &packages, (&answers, &nonce), &disk)
        })?;
        let mut materials = installation.materials.clone();
        materials.push(Artifact {
            name: format!("answers:{}", installer.answers.display()),
            sha256: Digest::of(answers.as_bytes()).to_string(),
        });
        let (worked, log) = self.stage(Stage::Guest, |session| {
            session.install(host, &packages, accelerator, (installation, offer), &nonce)
        })?;
        let mut logs = vec![worked.log];
        logs.extend(log);
        Ok(Product {
            disk: Some(disk),
            contents: None,
            artifacts: Vec::new(),
            logs,
            accelerator,
            steps: worked.report.stages,
            packages,
            materials: materials.into_iter().chain(worked.fetched).collect(),
        })
    }

    /// The tree that anaconda installs from, as it says itself.
    fn release_tree(&self, path: &Path) -> Result<ReleaseTree, BuildError> {
        let folder = self.request.beside.below(path)?;
        let stop = self.stop.clone();
        let tree = self.interruptible(Stage::Fetch, move || Ok(ReleaseTree::read(folder, &stop)?))?;
        for head in &tree.heads {
            self.note_input(&head.name, &head.sha256)?;
        }
        for repository in &tree.elsewhere {
            self.environment.sink.event(Event::Warning(format!(
                "{} names the repository {repository:?}, which does not lie in it: the installer cannot have that",
                path.join(".treeinfo").display()
            )));
        }
        Ok(tree)
    }

    /// The answers, checked as far as that can be done without the installer.
    fn answers(&self, installer: &Installer) -> Result<String, BuildError> {
        let path = &installer.answers;
        let mut text = String::new();
        let file = self.request.beside.file(path)?;
        file.take(LARGEST_ANSWERS + 1)
            .read_to_string(&mut text)
            .map_err(|source| MediumError::Open { path: path.clone(), source })?;
        if text.len() as u64 > LARGEST_ANSWERS {
            return Err(MediumError::TooLarge { path: path.clone(), limit: LARGEST_ANSWERS }.into());
        }
        let checked = match installer.family {
            Family::DebianInstaller => preseed::check(&text),
            Family::Anaconda => kickstart::check(&text),
            Family::Subiquity => cloud::check_autoinstall(&text),
            Family::CloudImage => cloud::check_user_data(&text),
        };
        checked.map_err(|rejected| self.rejected(path, rejected))?;
        self.note_input(&format!("answers:{}", path.display()), &Digest::of(text.as_bytes()).to_string())?;
        Ok(text)
    }

    fn rejected(&self, path: &Path, rejected: Rejected) -> BuildError {
        BuildError::Answers { path: self.request.beside.shown(path), source: rejected }
    }

    /// Makes what the installer boots from, and the disk that it installs to.
    fn installation(
        &self,
        host: &Host,
        installer: &Installer,
        packages: &Packages,
        (answers, nonce): (&str, &str),
        disk: &Path,
    ) -> Result<Installation, BuildError> {
        let image = &self.request.recipe.image;
        let written = |path: &Path| {
            let path = path.to_owned();
            move |source| BuildError::Write { path, source }
        };
        let rejected = |rejected| self.rejected(&installer.answers, rejected);
        let seed = |files: &[(&str, &[u8])]| -> Result<Disk, BuildError> {
            let path = self.scratch.path().join("seed.img");
            let written = seed::volume(files).and_then(|bytes| fs::write(&path, bytes));
            written.map_err(|source| BuildError::Write { path: path.clone(), source })?;
            Ok(Disk::new(path, DiskFormat::Raw))
        };
        let meta_data = cloud::meta_data(&image.name, &image.hostname);
        if let Medium::Disk(path) = &installer.medium {
            let material = self.cloud_image(host, path, disk)?;
            let user_data = cloud::user_data(answers, nonce).map_err(rejected)?;
            let files: [(&str, &[u8]); 2] =
                [("user-data", user_data.as_bytes()), ("meta-data", meta_data.as_bytes())];
            return Ok(Installation {
                boot: Boot::Disk,
                disks: vec![Disk::new(disk.to_owned(), DiskFormat::Raw), seed(&files)?],
                log_port: None,
                materials: vec![material],
            });
        }
        let made = File::create_new(disk).and_then(|file| file.set_len(image.size));
        made.map_err(written(disk))?;
        let bootable = self.bootable(installer.family, &installer.medium, packages)?;
        let mut disks = vec![Disk::new(disk.to_owned(), DiskFormat::Raw)];
        let label = bootable.disc.as_ref().map(|(_, label)| label.as_str());
        let mut more = Initramfs::default();
        let mut log_port = None;
        let mut arguments = match installer.family {
            Family::DebianInstaller => {
                let selection = &packages.selection;
                let suite = self.request.recipe.debian.suite.as_str();
                let has = |suite: &str| {
                    let is = |one: &crate::debian::Suite| one.name == suite;
                    selection.repositories.iter().find(|repository| repository.suites.iter().any(is))
                };
                let (main, security) = (has(suite), has(&format!("{suite}-security")));
                let sources = selection.image_sources();
                let archive = preseed::Archive {
                    main: main.map_or("debian", |repository| &repository.name),
                    security: security.map(|repository| repository.name.as_str()),
                    has_updates: has(&format!("{suite}-updates")).is_some(),
                    suite,
                    sources: &sources,
                    own_keyring: selection.own_keyring,
                };
                more.file("preseed.cfg", 0o644, preseed::complete(answers, archive));
                for script in preseed::scripts(nonce, archive) {
                    more.file(script.path, 0o755, script.text);
                }
                if let Some(repository) = main.filter(|_| selection.own_keyring) {
                    let keys =
                        crate::debian::signature::read_keyring(&repository.keyring).map_err(|source| {
                            MediumError::Open {
                                path: repository.keyring.clone(),
                                source: io::Error::other(source),
                            }
                        })?;
                    more.file("usr/share/keyrings/archive.gpg", 0o644, keys);
                }
                preseed::arguments(&image.hostname)
            }
            Family::Anaconda => {
                more.file("ks.cfg", 0o644, kickstart::complete(answers, nonce));
                log_port = Some(kickstart::LOG_PORT);
                let tree = release_tree::address();
                kickstart::arguments(label.map_or(kickstart::Source::Tree(&tree), kickstart::Source::Label))
            }
            Family::Subiquity | Family::CloudImage => {
                let user_data = cloud::autoinstall(answers, nonce).map_err(rejected)?;
                let files: [(&str, &[u8]); 2] =
                    [("user-data", user_data.as_bytes()), ("meta-data", meta_data.as_bytes())];
                disks.push(seed(&files)?);
                cloud::autoinstall_arguments()
            }
        };
        arguments.push(NO_TIMER_CHECK.to_owned());
        arguments.extend(installer.arguments.iter().cloned());
        append(&bootable.initrd, &more).map_err(written(&bootable.initrd))?;
        if let Some((path, _)) = bootable.disc {
            disks.push(Disk::disc(path));
        }
        Ok(Installation {
            boot: Boot::Kernel {
                kernel: bootable.kernel,
                initramfs: bootable.initrd,
                command_line: arguments.join(" "),
            },
            disks,
            log_port,
            materials: bootable.materials,
        })
    }

    /// Makes the raw disk of a cloud image, as large as the recipe wants it.
    fn cloud_image(&self, host: &Host, path: &Path, disk: &Path) -> Result<Artifact, BuildError> {
        let source = self.scratch.path().join("cloud-image");
        place(&open(&self.request.beside, path)?, &source, &self.stop)?;
        let layout = boot::disk(&start(&source)?)
            .map_err(|source| MediumError::NotBootable { path: path.to_owned(), source })?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let material = Artifact { name: format!("file:{name}"), sha256: image::digest(&source, &self.stop)? };
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| BuildError::Write { path, source }
        };
        let (format, has) = match layout {
            Layout::Raw => (DiskFormat::Raw, fs::metadata(&source).map_err(failed(&source))?.len()),
            Layout::Qcow2 { size } => (DiskFormat::Qcow2, size),
        };
        // Before it is unpacked: a file of some kilobytes can be a disk of any size.
        let wanted = self.request.recipe.image.size;
        if has > wanted {
            return Err(BuildError::TooSmallForImage { has, wanted });
        }
        image::to_raw(&host.qemu_img, &source, format, disk, &self.stop)?;
        let file = File::options().write(true).open(disk).map_err(failed(disk))?;
        file.set_len(wanted).map_err(failed(disk))?;
        Ok(material)
    }

    /// Boots the installer, and demands its proof; and its own log, if it wrote one.
    fn install(
        &self,
        host: &Host,
        packages: &Packages,
        accelerator: Accelerator,
        (installation, offer): (Installation, Option<Box<dyn Offer>>),
        nonce: &str,
    ) -> Result<(Worked, Option<PathBuf>), BuildError> {
        let recipe = &self.request.recipe;
        let spec = VmSpec {
            accelerator,
            processors: recipe.guest.cpus,
            memory_mib: recipe.guest.memory / (1024 * 1024),
            boot: installation.boot,
            disks: installation.disks,
            network: Network::Mirror,
            port_name: CONTROL_PORT,
            log_port: installation.log_port,
            smbios_serial: None,
        };
        let mirror = GuestMirror::new(packages, offer, recipe.image.size);
        let name = &recipe.image.name;
        let log = self.scratch.path().join(format!("{name}.console.log"));
        let report = self.boot(host, &spec, nonce, Stage::Guest, &log, Some(&mirror))?;
        let fetched = mirror.stop();
        let (report, log) = accept(report, Stage::Guest, log, &spec)?;
        let installer_log = self.scratch.path().join(format!("{name}.installer.log"));
        let has_log = report.installer_log_bytes > 0;
        if has_log {
            fs::rename(Logs::beside(&log).installer, &installer_log)
                .map_err(|source| BuildError::Write { path: installer_log.clone(), source })?;
        }
        Ok((Worked { report, log, fetched }, has_log.then_some(installer_log)))
    }
}

/// Puts an archive behind an initial file system. The kernel unpacks one after the other, whatever the first is
/// compressed with, as long as each begins at a multiple of four (Linux, init/initramfs.c).
fn append(initrd: &Path, more: &Initramfs) -> io::Result<()> {
    let mut file = File::options().append(true).open(initrd)?;
    let size = file.metadata()?.len();
    let padding = size.next_multiple_of(512) - size;
    file.write_all(&vec![0; usize::try_from(padding).unwrap_or(0)])?;
    more.write(BufWriter::new(file))
}
