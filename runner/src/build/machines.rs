//! The stages that boot a machine: the builder guest, and the finished image.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufWriter};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::cache::{Failure, Mirror};
use crate::class::Class;
use crate::disk::{self, ComposedDisk};
use crate::event::{Event, Stage};
use crate::lock::LockedMachine;
use crate::vm::NO_TIMER_CHECK;
use crate::vm::argv::{
    Accelerator, Boot, CONTROL_PORT, Disk, DiskFormat, Network, PROOF_PORT, VmSpec, arguments,
};
use crate::vm::confinement::Enforced;
use crate::vm::nonce::nonce;
use crate::vm::outcome::{self, Outcome, Refused};
use crate::vm::run::{Downloads, Report, Run, run};
use crate::vm::viewers::Viewers;
use crate::vm::watch::Limits;

use super::error::{BuildError, GuestError};
use super::finish::{GuestPrograms, Task, Work, initramfs, mirror_base};
use super::image;
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

impl Session<'_> {
    /// The builder guest finishes the disk.
    pub(super) fn guest(
        &self,
        host: &Host,
        packages: &Packages,
        disk: &ComposedDisk,
        accelerator: Accelerator,
    ) -> Result<(Report, PathBuf), BuildError> {
        let recipe = &self.request.recipe;
        let preinst = preinst_lines(disk);
        let guest = Guest {
            task: Task::Finish { preinst: &preinst, run: &recipe.guest.run, verify: recipe.verify.boot },
            root: (disk.partition.number, &disk.root_uuid),
            disks: vec![Disk { path: disk.image.clone(), format: DiskFormat::Raw }],
            is_networked: !recipe.guest.run.is_empty(),
            stage: Stage::Guest,
            log: "console.log",
        };
        self.work_in_guest(host, packages, accelerator, &guest)
    }

    /// Boots a guest of Hostler's own, and demands its proof.
    pub(super) fn work_in_guest(
        &self,
        host: &Host,
        packages: &Packages,
        accelerator: Accelerator,
        guest: &Guest<'_>,
    ) -> Result<(Report, PathBuf), BuildError> {
        let recipe = &self.request.recipe;
        let nonce = nonce().map_err(BuildError::Nonce)?;
        let sources = packages.selection.guest_sources(&mirror_base());
        let (root_partition, root_uuid) = guest.root;
        let work = Work {
            nonce: &nonce,
            root_partition,
            root_uuid,
            sources: guest.is_networked.then_some(sources.as_str()),
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
        let mirror = Mutex::new(None);
        let serve = |listener: TcpListener| {
            let selection = Arc::clone(&packages.selection);
            let fetcher = Arc::clone(&packages.fetcher);
            let started = Mirror::start(listener, selection, fetcher).map_err(io::Error::other)?;
            *mirror.lock().unwrap_or_else(PoisonError::into_inner) = Some(started);
            Ok(())
        };
        let downloads = || {
            let mirror = mirror.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(mirror) = mirror.as_ref() else { return Downloads::default() };
            let report = mirror.report();
            // What upstream sends counts as well: a file is served once all of it is there.
            let counted = packages.fetcher.counted();
            let bytes = report.served_bytes + counted.upstream_bytes + counted.metadata_bytes;
            Downloads { bytes, refused: report.failures.into_iter().map(refused).collect() }
        };
        let log = self.scratch.path().join(format!("{}.{}", recipe.image.name, guest.log));
        let report = self.boot(host, &spec, &nonce, guest.stage, &log, (&serve, &downloads))?;
        drop(mirror);
        accept(report, guest.stage, log, &spec.disks)
    }

    /// The finished image boots from a scratch copy of itself.
    pub(super) fn verify(
        &self,
        host: &Host,
        qcow2: &Path,
        accelerator: Accelerator,
    ) -> Result<PathBuf, BuildError> {
        let recipe = &self.request.recipe;
        let overlay = self.scratch.path().join("verify.qcow2");
        let log = self.scratch.path().join(format!("{}.verify.log", recipe.image.name));
        let mut boots = 0;
        loop {
            boots += 1;
            image::overlay(&host.qemu_img, qcow2, &overlay, &self.stop)?;
            let report = self.boot_image(host, &overlay, &log, accelerator)?;
            if boots < MOST_BOOTS && was_starved(&report.outcome) {
                let told = "this host gave the booting image no processor time when it checked its clock; booting it again";
                self.environment.sink.event(Event::Warning(told.to_owned()));
                continue;
            }
            return accept(report, Stage::Verify, log, &[]).map(|(_, log)| log);
        }
    }

    fn boot_image(
        &self,
        host: &Host,
        overlay: &Path,
        log: &Path,
        accelerator: Accelerator,
    ) -> Result<Report, BuildError> {
        let recipe = &self.request.recipe;
        let nonce = nonce().map_err(BuildError::Nonce)?;
        let spec = VmSpec {
            accelerator,
            processors: recipe.guest.cpus,
            memory_mib: recipe.guest.memory / (1024 * 1024),
            boot: Boot::Disk,
            disks: vec![Disk { path: overlay.to_owned(), format: DiskFormat::Qcow2 }],
            network: Network::None,
            port_name: PROOF_PORT,
            log_port: None,
            smbios_serial: Some(nonce.clone()),
        };
        self.boot(host, &spec, &nonce, Stage::Verify, log, (&|_| Ok(()), &Downloads::default))
    }

    fn boot(
        &self,
        host: &Host,
        spec: &VmSpec,
        nonce: &str,
        stage: Stage,
        log: &Path,
        (serve, downloads): (&dyn Fn(TcpListener) -> io::Result<()>, &dyn Fn() -> Downloads),
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
            serve,
            downloads,
            viewers,
            holds: self.request.debugging.holds,
            installer_log,
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
    fn beside(console: &Path) -> Self {
        let beside = |ending: &str| {
            let mut name = console.as_os_str().to_owned();
            name.push(ending);
            PathBuf::from(name)
        };
        Self { console: console.to_owned(), installer: beside(".installer"), picture: beside(".png") }
    }
}

/// A guest's success, or its failure with all that is known of it.
fn accept(
    report: Report,
    stage: Stage,
    log: PathBuf,
    disks: &[Disk],
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
        disks: disks.iter().map(|disk| disk.path.clone()).collect(),
    })))
}

/// What `guest/preinst.sh` reads, line by line.
pub(super) fn preinst_lines(disk: &ComposedDisk) -> Vec<String> {
    disk.preinst.iter().map(preinst_line).collect()
}

fn preinst_line(preinst: &disk::Preinst) -> String {
    format!("{} {} {} {}", preinst.package, preinst.architecture, preinst.version, preinst.script)
}

/// The mirror's record of a file that it could not give, for the judge of the run.
fn refused(failure: Failure) -> Refused {
    Refused { path: failure.path, status: failure.upstream_status, reason: failure.reason }
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
