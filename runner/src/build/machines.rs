//! The stages that boot a machine: the builder guest, and the finished image.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::sync::PoisonError;
use std::time::Duration;

use crate::class::Class;
use crate::contents::provenance::Artifact;
use crate::disk::{self, ComposedDisk};
use crate::event::{Event, Stage};
use crate::lock::LockedMachine;
use crate::recipe::{Family, Kind, Verify};
use crate::vm::NO_TIMER_CHECK;
use crate::vm::argv::{
    Accelerator, Boot, CONTROL_PORT, Disk, DiskFormat, Network, PROOF_PORT, VmSpec, arguments,
};
use crate::vm::confinement::Enforced;
use crate::vm::nonce::nonce;
use crate::vm::outcome::{self, Outcome};
use crate::vm::run::{PowerOff, Report, Run, run};
use crate::vm::viewers::Viewers;
use crate::vm::watch::Limits;

use super::error::{BuildError, GuestError};
use super::finish::{GuestPrograms, Task, Work, initramfs, mirror_base};
use super::guest_mirror::GuestMirror;
use super::image;
use super::inside::Contents;
use super::preflight::Host;
use super::session::{Packages, Session};

/// How often the finished image is booted, where it is this host's load that keeps it from booting.
const MOST_BOOTS: u32 = 3;

/// A guest that Hostler's own init runs in.
pub(super) struct Guest<'a> {
    pub(super) task: Task<'a>,
    /// Number of the partition with the root file system, and its UUID.
    pub(super) root: (u32, &'a str),
    pub(super) disks: Vec<Disk>,
    /// Whether it reaches the mirror.
    pub(super) is_networked: bool,
    pub(super) stage: Stage,
    /// What the name of the console's log ends with.
    pub(super) log: &'a str,
}

/// What a guest of Hostler's own came to.
pub(super) struct Worked {
    pub(super) report: Report,
    /// Its console's log.
    pub(super) log: PathBuf,
    /// What it fetched from the mirror.
    pub(super) fetched: Vec<Artifact>,
}

impl Session<'_> {
    /// The builder guest finishes the disk.
    pub(super) fn guest(
        &self,
        host: &Host,
        packages: &Packages,
        disk: &ComposedDisk,
        accelerator: Accelerator,
    ) -> Result<(Worked, Contents), BuildError> {
        let recipe = &self.request.recipe;
        let preinst = preinst_lines(disk);
        // Where the disk is to be written anew, it is out of that.
        let is_rewritten = self.request.time.is_some();
        let telling = self.telling(recipe.image.size, is_rewritten)?;
        let mut disks = vec![Disk::new(disk.image.clone(), DiskFormat::Raw)];
        disks.extend(telling.disks());
        let guest = Guest {
            task: Task::Finish {
                preinst: &preinst,
                run: &recipe.guest.run,
                verify: recipe.verify.boot,
                tell: Some(telling.tell()),
            },
            root: (disk.partition.number, &disk.root_uuid),
            disks,
            is_networked: !recipe.guest.run.is_empty(),
            stage: Stage::Guest,
            log: "console.log",
        };
        let worked = self.work_in_guest(host, packages, accelerator, &guest)?;
        Ok((worked, self.told(telling)?))
    }

    /// Boots a guest of Hostler's own, and demands its proof.
    pub(super) fn work_in_guest(
        &self,
        host: &Host,
        packages: &Packages,
        accelerator: Accelerator,
        guest: &Guest<'_>,
    ) -> Result<Worked, BuildError> {
        let recipe = &self.request.recipe;
        let nonce = nonce().map_err(BuildError::Nonce)?;
        let sources = packages.selection.guest_sources(&mirror_base());
        let (root_partition, root_uuid) = guest.root;
        let work = Work {
            nonce: &nonce,
            root_partition,
            root_uuid,
            sources: guest.is_networked.then_some(sources.as_str()),
            time: self.request.epoch(),
            task: guest.task,
        };
        let programs = GuestPrograms { busybox: &packages.tools.busybox, modules: &packages.tools.modules };
        let path = self.scratch.path().join("builder.cpio");
        let written = File::create(&path).map(BufWriter::new);
        initramfs(programs, &work)?
            .write(written.map_err(|source| BuildError::Write { path: path.clone(), source })?)
            .map_err(|source| BuildError::Write { path: path.clone(), source })?;
        let spec = VmSpec {
            accelerator,
            processors: recipe.guest.cpus,
            memory_mib: recipe.guest.memory / (1024 * 1024),
            boot: Boot::Kernel {
                kernel: packages.tools.kernel.clone(),
                initramfs: path,
                // Nothing in a throwaway guest is worth the price of these under emulation.
                command_line: format!(
                    "console=ttyS0 panic=-1 loglevel=4 mitigations=off audit=0 apparmor=0 {NO_TIMER_CHECK}{}",
                    if self.request.debugging.holds { " hostler.shell" } else { "" }
                ),
            },
            disks: guest.disks.clone(),
            network: if guest.is_networked { Network::Mirror } else { Network::None },
            port_name: CONTROL_PORT,
            log_port: None,
            smbios_serial: None,
        };
        let mirror = GuestMirror::new(packages, None, recipe.image.size);
        let log = self.scratch.path().join(format!("{}.{}", recipe.image.name, guest.log));
        let report = self.boot(host, &spec, &nonce, guest.stage, &log, Some(&mirror))?;
        let fetched = mirror.stop();
        let (report, log) = accept(report, guest.stage, log, &spec)?;
        Ok(Worked { report, log, fetched })
    }

    /// The finished image boots from a scratch copy of itself.
    pub(super) fn verify(
        &self,
        host: &Host,
        (image, format): (&Path, DiskFormat),
        accelerator: Accelerator,
    ) -> Result<PathBuf, BuildError> {
        let recipe = &self.request.recipe;
        let overlay = self.scratch.path().join("verify.qcow2");
        let log = self.scratch.path().join(format!("{}.verify.log", recipe.image.name));
        let mut boots = 0;
        loop {
            boots += 1;
            image::overlay(&host.qemu_img, image, format, &overlay, &self.stop)?;
            let (report, spec) = self.boot_image(host, &overlay, &log, accelerator)?;
            if boots < MOST_BOOTS && was_starved(&report.outcome) {
                let told = "this host gave the booting image no processor time when it checked its clock; booting it again";
                self.environment.sink.event(Event::Warning(told.to_owned()));
                continue;
            }
            return accept(report, Stage::Verify, log, &spec).map(|(_, log)| log);
        }
    }

    fn boot_image(
        &self,
        host: &Host,
        overlay: &Path,
        log: &Path,
        accelerator: Accelerator,
    ) -> Result<(Report, VmSpec), BuildError> {
        let recipe = &self.request.recipe;
        let nonce = nonce().map_err(BuildError::Nonce)?;
        let path = self.scratch.path().join("checks");
        fs::write(&path, checks(&recipe.verify))
            .map_err(|source| BuildError::Write { path: path.clone(), source })?;
        let serial = Some("hostler-checks");
        // Always there, so that one that cannot be read is never taken for nothing to check.
        let disks = vec![
            Disk::new(overlay.to_owned(), DiskFormat::Qcow2),
            Disk { serial, ..Disk::new(path, DiskFormat::Raw) },
        ];
        let spec = VmSpec {
            accelerator,
            processors: recipe.guest.cpus,
            memory_mib: recipe.guest.memory / (1024 * 1024),
            boot: Boot::Disk,
            disks,
            network: Network::None,
            port_name: PROOF_PORT,
            log_port: None,
            smbios_serial: Some(nonce.clone()),
        };
        let report = self.boot(host, &spec, &nonce, Stage::Verify, log, None)?;
        Ok((report, spec))
    }

    pub(super) fn boot(
        &self,
        host: &Host,
        spec: &VmSpec,
        nonce: &str,
        stage: Stage,
        log: &Path,
        mirror: Option<&GuestMirror>,
    ) -> Result<Report, BuildError> {
        self.note_machine(spec, nonce, stage);
        let logs = Logs::beside(log);
        let create = |path: &Path| {
            File::create(path).map_err(|source| BuildError::Write { path: path.to_owned(), source })
        };
        let file = create(&logs.console)?;
        // Only a guest with a network or a log port has an installer that can log.
        let has_log = spec.network == Network::Mirror || spec.log_port.is_some();
        let installer_log = has_log.then(|| create(&logs.installer)).transpose()?;
        // Nobody needs them for a build.
        let viewers = Viewers::open(self.scratch.path())
            .inspect_err(|error| {
                let told = format!("hostler attach cannot be used: {error}");
                self.environment.sink.event(Event::Note(told));
            })
            .ok();
        if self.request.debugging.holds {
            let name = self.scratch.path().file_name().unwrap_or_default();
            let place = self.request.workspace.shown.join(name);
            let told = format!("look at the machine's console with: hostler attach {}", place.display());
            self.environment.sink.event(Event::Note(told));
        }
        let power_off = match (stage, &self.request.recipe.kind) {
            // A throwaway copy.
            (Stage::Verify, _) => PowerOff::AT_ONCE,
            (Stage::Guest, Kind::Installer(installer)) => match installer.family {
                // They have unmounted, or can write no more, when they give the proof.
                Family::DebianInstaller | Family::CloudImage => PowerOff::AT_ONCE,
                Family::Anaconda | Family::Subiquity => {
                    PowerOff { within: Duration::from_secs(120), is_needed: true }
                }
            },
            _ => PowerOff { within: Duration::from_secs(15), is_needed: false },
        };
        let mut asked = Run {
            programs: &host.programs,
            spec,
            nonce,
            limits: Limits {
                total: self.request.recipe.limits.total,
                used: self.started.elapsed(),
                no_progress: self.request.recipe.limits.no_progress.saturating_mul(self.slowness),
            },
            register: &|process| self.environment.registrar.adopt(process),
            serve: &|listener| mirror.map_or(Ok(()), |mirror| mirror.start(listener)),
            downloads: &|| mirror.map(GuestMirror::downloads).unwrap_or_default(),
            viewers,
            holds: self.request.debugging.holds,
            installer_log,
            power_off,
            picture: Some(&logs.picture),
            cancel: &self.environment.cancel,
            sink: self.environment.sink.as_ref(),
            stage,
        };
        let report = run(&mut asked, file).map_err(|source| BuildError::Run { stage, source })?;
        // What the host does not allow is said.
        if report.enforced != Enforced::Fully && stage != Stage::Verify {
            let told = "this kernel's Landlock does not keep qemu from all files that are not its own; see hostler build --explain-confinement";
            self.environment.sink.event(Event::Warning(told.to_owned()));
        }
        Ok(report)
    }

    /// Notes what a machine is told, without what is another's each time.
    fn note_machine(&self, spec: &VmSpec, nonce: &str, stage: Stage) {
        let scratch = self.scratch.path().to_string_lossy();
        let plain = |argument: &OsString| {
            argument.to_string_lossy().replace(&*scratch, "SCRATCH").replace(nonce, "NONCE")
        };
        let arguments = arguments(spec).iter().map(plain).collect();
        let machine = LockedMachine { stage: stage.name().to_owned(), arguments };
        self.machines.lock().unwrap_or_else(PoisonError::into_inner).push(machine);
    }
}

/// What is kept of a guest's run, in the scratch directory.
#[derive(Clone, Debug)]
pub(super) struct Logs {
    pub(super) console: PathBuf,
    pub(super) installer: PathBuf,
    pub(super) picture: PathBuf,
}

impl Logs {
    /// Those beside a console's log.
    pub(super) fn beside(console: &Path) -> Self {
        let beside = |ending: &str| {
            let mut name = console.as_os_str().to_owned();
            name.push(ending);
            PathBuf::from(name)
        };
        Self { console: console.to_owned(), installer: beside(".installer"), picture: beside(".png") }
    }
}

/// A guest's success, or its failure with all that is known of it.
pub(super) fn accept(
    report: Report,
    stage: Stage,
    log: PathBuf,
    spec: &VmSpec,
) -> Result<(Report, PathBuf), BuildError> {
    let Outcome::Failed(failure) = &report.outcome else {
        return Ok((report, log));
    };
    let failure = failure.clone();
    Err(BuildError::Guest(Box::new(GuestError {
        stage,
        failure,
        report,
        logs: Logs::beside(&log),
        disks: spec.disks.clone(),
        boot: spec.boot.clone(),
    })))
}

/// What `guest/verify-boot` reads: as many bytes as make whole sectors.
fn checks(verify: &Verify) -> Vec<u8> {
    let mut text = format!("{} {}\n", verify.commands.len(), verify.target.as_deref().unwrap_or(""));
    for command in &verify.commands {
        text.push_str(&format!("{command}\n"));
    }
    let mut bytes = text.into_bytes();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

/// What `guest/preinst.sh` reads, line by line.
pub(super) fn preinst_lines(disk: &ComposedDisk) -> Vec<String> {
    disk.preinst.iter().map(preinst_line).collect()
}

fn preinst_line(preinst: &disk::Preinst) -> String {
    format!("{} {} {} {}", preinst.package, preinst.architecture, preinst.version, preinst.script)
}

/// Whether a kernel gave up because its clock stood still when it tried it: it looks for a tick within
/// some milliseconds, in which an emulated processor on a busy host may not run at all. The builder's
/// own guests are told not to look ([`NO_TIMER_CHECK`]); what the image is told is its own affair.
fn was_starved(outcome: &Outcome) -> bool {
    matches!(
        outcome,
        Outcome::Failed(outcome::Failure::Recognised { finding, .. })
            if finding.class == Class::KernelPanic && finding.line.contains("IO-APIC + timer doesn't work")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::signs::{Place, Rules};

    #[test]
    fn checks_are_lines_on_whole_sectors() {
        let verify =
            Verify { boot: true, target: None, commands: vec!["true".to_owned(), "id -u".to_owned()] };
        let bytes = checks(&verify);
        assert_eq!(bytes.len(), 512);
        assert!(bytes.starts_with(b"2 \ntrue\nid -u\n\0"));
    }

    #[test]
    fn only_a_clock_that_stood_still_is_the_hosts_fault() {
        let panic = |line: &str| {
            let finding = Box::new(Rules::builtin().find(Place::Line, line).expect("a panic"));
            Outcome::Failed(outcome::Failure::Recognised { finding, because: outcome::Because::default() })
        };
        assert!(was_starved(&panic(
            "[    0.052000] Kernel panic - not syncing: IO-APIC + timer doesn't work!  Boot with apic=debug"
        )));
        assert!(!was_starved(&panic("[ 1.0] Kernel panic - not syncing: VFS: Unable to mount root fs")));
        assert!(!was_starved(&Outcome::Proven));
    }
}
