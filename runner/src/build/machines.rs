//! The stages that boot a machine: the builder guest, and the finished image.

use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::cache::{Failure, Mirror};
use crate::disk::{self, ComposedDisk};
use crate::event::Stage;
use crate::vm::argv::{Accelerator, Boot, CONTROL_PORT, Disk, DiskFormat, Network, PROOF_PORT, VmSpec};
use crate::vm::nonce::nonce;
use crate::vm::outcome::Outcome;
use crate::vm::run::{Report, Run, run};
use crate::vm::watch::Limits;

use super::error::{BuildError, GuestError};
use super::finish::{GuestPrograms, Work, initramfs, mirror_base};
use super::image;
use super::preflight::Host;
use super::session::{Packages, Session};

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
        let nonce = nonce().map_err(BuildError::Nonce)?;
        let preinst: Vec<String> = disk.preinst.iter().map(preinst_line).collect();
        let sources = packages.selection.guest_sources(&mirror_base());
        let work = Work {
            nonce: &nonce,
            root_partition: disk.partition.number,
            root_uuid: &disk.root_uuid,
            preinst: &preinst,
            run: &recipe.guest.run,
            sources: (!recipe.guest.run.is_empty()).then_some(sources.as_str()),
            verify: recipe.verify.boot,
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
                command_line: "console=ttyS0 panic=-1 loglevel=4 mitigations=off audit=0 apparmor=0"
                    .to_owned(),
            },
            disks: vec![Disk { path: disk.image.clone(), format: DiskFormat::Raw }],
            network: if work.sources.is_some() { Network::Mirror } else { Network::None },
            port_name: CONTROL_PORT,
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
        let served = || {
            let mirror = mirror.lock().unwrap_or_else(PoisonError::into_inner);
            mirror.as_ref().map_or(0, |mirror| mirror.report().served_bytes)
        };
        let log = self.scratch.path().join(format!("{}.console.log", recipe.image.name));
        let report = self.boot(host, &spec, &nonce, Stage::Guest, &log, (&serve, &served))?;
        let missing = mirror
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
            .map_or_else(Vec::new, |mirror| mirror.stop().failures.iter().map(shown_failure).collect());
        self.accept(report, Stage::Guest, log, missing)
    }

    /// The finished image boots from a scratch copy of itself.
    pub(super) fn verify(
        &self,
        host: &Host,
        qcow2: &Path,
        accelerator: Accelerator,
    ) -> Result<PathBuf, BuildError> {
        let recipe = &self.request.recipe;
        let nonce = nonce().map_err(BuildError::Nonce)?;
        let overlay = self.scratch.path().join("verify.qcow2");
        image::overlay(&host.qemu_img, qcow2, &overlay, &self.stop)?;
        let spec = VmSpec {
            accelerator,
            processors: recipe.guest.cpus,
            memory_mib: recipe.guest.memory / (1024 * 1024),
            boot: Boot::Disk,
            disks: vec![Disk { path: overlay, format: DiskFormat::Qcow2 }],
            network: Network::None,
            port_name: PROOF_PORT,
            smbios_serial: Some(nonce.clone()),
        };
        let log = self.scratch.path().join(format!("{}.verify.log", recipe.image.name));
        let report = self.boot(host, &spec, &nonce, Stage::Verify, &log, (&|_| Ok(()), &|| 0))?;
        let (_, log) = self.accept(report, Stage::Verify, log, Vec::new())?;
        Ok(log)
    }

    fn boot(
        &self,
        host: &Host,
        spec: &VmSpec,
        nonce: &str,
        stage: Stage,
        log: &Path,
        (serve, mirror_bytes): (&dyn Fn(TcpListener) -> io::Result<()>, &dyn Fn() -> u64),
    ) -> Result<Report, BuildError> {
        let file = File::create(log).map_err(|source| BuildError::Write { path: log.to_owned(), source })?;
        let asked = Run {
            programs: &host.programs,
            spec,
            nonce,
            limits: Limits {
                total: self.request.recipe.limits.total,
                used: self.started.elapsed(),
                no_progress: self.request.recipe.limits.no_progress,
            },
            register: &|process| self.environment.registrar.adopt(process),
            serve,
            mirror_bytes,
            cancel: &self.environment.cancel,
            sink: self.environment.sink.as_ref(),
            stage,
        };
        run(&asked, file).map_err(|source| BuildError::Run { stage, source })
    }

    /// A guest's success, or its failure with the log kept.
    fn accept(
        &self,
        report: Report,
        stage: Stage,
        log: PathBuf,
        missing: Vec<String>,
    ) -> Result<(Report, PathBuf), BuildError> {
        let Outcome::Failed(failure) = report.outcome else {
            return Ok((report, log));
        };
        // An empty one tells nothing.
        let has_text = fs::metadata(&log).is_ok_and(|data| data.len() > 0);
        let log = if has_text { self.environment.delivery.deliver(&log).ok() } else { None };
        Err(BuildError::Guest(Box::new(GuestError { stage, failure, screen: report.screen, log, missing })))
    }
}

/// One line of what `guest/preinst.sh` reads.
fn preinst_line(preinst: &disk::Preinst) -> String {
    format!("{} {} {} {}", preinst.package, preinst.architecture, preinst.version, preinst.script)
}

/// A line about something that the mirror could not give; the guest wrote half of it.
fn shown_failure(failure: &Failure) -> String {
    let text = format!("{}: {}", failure.path, failure.reason);
    text.chars().filter(|character| !character.is_control()).take(400).collect()
}
