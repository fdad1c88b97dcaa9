//! One run of the machine: what it is made of, and that nothing of it stays.
//!
//! Everything lies in one scratch directory of the runner's kind: it goes when this program ends, and
//! if that is killed, the next one sweeps it away. qemu dies with this program in any case.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use hostler_runner::build::scratch::{Scratch, sweep};
use hostler_runner::cancel::Cancel;
use hostler_runner::child::HostTool;
use hostler_runner::event::{Silent, Stage};
use hostler_runner::stop::Stop;
use hostler_runner::vm::NO_TIMER_CHECK;
use hostler_runner::vm::argv::{Accelerator, Boot, CONTROL_PORT, Disk, DiskFormat, Network, VmSpec};
use hostler_runner::vm::canary::Canary;
use hostler_runner::vm::launch::Programs;
use hostler_runner::vm::nonce::nonce;
use hostler_runner::vm::outcome::Outcome;
use hostler_runner::vm::qemu;
use hostler_runner::vm::run::{Downloads, PowerOff, Run, run};
use hostler_runner::vm::watch::Limits;

use super::Arguments;
use super::payload::{self, Work};
use super::transcript::{Line, Transcript};

/// How long `qemu-img` may take for an empty overlay.
const OVERLAY_DEADLINE: Duration = Duration::from_secs(60);

/// The kernel's command line. A fault of the kernel's must end the run; what only costs time in a
/// guest that is thrown away is left out, and the serial line is the tests' alone.
const COMMAND_LINE: &str = "root=/dev/vda1 rw console=ttyS0 loglevel=3 panic=-1 oops=panic mitigations=off \
     audit=0 apparmor=0 fsck.mode=skip systemd.show_status=false systemd.mask=serial-getty@ttyS0.service \
     systemd.mask=getty@tty1.service systemd.mask=getty-static.service selinux=0 systemd.mask=systemd-logind.service systemd.mask=systemd-timesyncd.service";

/// How the disk with the tests comes to run: systemd runs a command from the kernel's command line,
/// which here comes in addition to what it starts anyhow, and that command starts a service. So the
/// image has nothing of the tests in it. Tests make control groups below the service's.
const START: &str = "systemd.unit=multi-user.target systemd.wants=kernel-command-line.service \
     systemd.run_success_action=none systemd.run_failure_action=none \
     systemd.run=\"/bin/sh -c 'mount -o ro /dev/vdb /mnt && exec systemd-run --no-block --collect \
     --unit=hostler-tests -p Delegate=yes -p OOMPolicy=continue -p TasksMax=infinity \
     -p StandardOutput=tty -p StandardError=tty -p TTYPath=/dev/ttyS0 /mnt/start'\"";

/// What came of the command.
pub(crate) struct Ended {
    /// The verdict.
    pub(crate) outcome: Outcome,
    /// How long the machine ran.
    pub(crate) took: Duration,
    /// The console's log; only kept after a failure.
    pub(crate) log: PathBuf,
    /// The last of the console that was not shown.
    pub(crate) tail: Vec<String>,
}

/// Boots the machine, and returns when it is gone.
pub(crate) fn boot(arguments: &Arguments, cancel: &Arc<Cancel>) -> anyhow::Result<Ended> {
    let work = &arguments.work;
    fs::create_dir_all(work).with_context(|| format!("making {}", work.display()))?;
    // qemu and qemu-img take relative paths from where they run.
    let work = fs::canonicalize(work)?;
    let image = fs::canonicalize(&arguments.image)
        .with_context(|| format!("finding the image {}; tests/vm.sh builds it", arguments.image.display()))?;
    sweep(&work)?;
    let scratch = Scratch::create(&work)?;
    let ended = boot_in(arguments, &work, &image, scratch.path(), cancel);
    scratch.remove()?;
    ended
}

fn boot_in(
    arguments: &Arguments,
    work: &Path,
    image: &Path,
    scratch: &Path,
    cancel: &Arc<Cancel>,
) -> anyhow::Result<Ended> {
    let stop = Stop::new(Arc::clone(cancel));
    let programs = Programs {
        // Not the path of the program: a build may put another one there meanwhile.
        shim: "/proc/self/exe".into(),
        qemu: HostTool { name: "qemu-system-x86_64", package: "qemu-system-x86" }
            .find()?
            .program()
            .to_owned(),
    };
    let accelerator = accelerator(&programs, work, image, scratch, &stop)?;
    // Two secrets: the mark lets tests tell this machine from any other, the nonce is the proof.
    let (mark, nonce) = (nonce()?, nonce()?);
    let environment = [
        ("HOSTLER_TESTS_GUEST", mark.clone()),
        ("TERM", "dumb".to_owned()),
        ("HOSTLER_TESTS_PATIENCE", accelerator.patience().to_string()),
    ];
    let puts = Work { puts: &arguments.puts, environment: &environment, command: &arguments.command };
    let payload = payload::write(&puts, scratch, &stop)?;
    let overlay = overlay(&image.join("disk.raw"), scratch, &stop)?;
    let spec = VmSpec {
        accelerator,
        processors: 2,
        memory_mib: arguments.memory,
        boot: Boot::Kernel {
            kernel: image.join("vmlinuz"),
            initramfs: image.join("initrd.img"),
            command_line: format!(
                "{COMMAND_LINE} {NO_TIMER_CHECK} {START} hostler.tests={mark} {}",
                arguments.append
            ),
        },
        disks: vec![Disk::new(overlay, DiskFormat::Qcow2), Disk::new(payload, DiskFormat::Raw)],
        network: Network::None,
        port_name: CONTROL_PORT,
        log_port: None,
        smbios_serial: Some(nonce.clone()),
    };
    let (console, transcript) = console(&scratch.join("console.log"), cancel)?;
    let report = run(
        &mut Run {
            programs: &programs,
            spec: &spec,
            nonce: &nonce,
            limits: Limits {
                total: arguments.total,
                used: Duration::ZERO,
                no_progress: arguments.no_progress,
            },
            register: &|_| Ok(()),
            serve: &|_| Ok(()),
            downloads: &Downloads::default,
            viewers: None,
            holds: false,
            installer_log: None,
            power_off: PowerOff { within: Duration::from_secs(15), is_needed: false },
            picture: None,
            cancel,
            sink: &Silent,
            stage: Stage::Guest,
        },
        console,
    )?;
    let Ok(transcript) = transcript.join() else {
        bail!("the reader of the machine's console panicked");
    };
    let log = work.join("console.log");
    if report.outcome != Outcome::Proven {
        fs::rename(scratch.join("console.log"), &log)?;
    }
    Ok(Ended { outcome: report.outcome, took: report.took, log, tail: transcript.tail() })
}

/// What really runs a guest on this host. Found out once per boot of the host.
fn accelerator(
    programs: &Programs,
    work: &Path,
    image: &Path,
    scratch: &Path,
    stop: &Stop,
) -> anyhow::Result<Accelerator> {
    let version = qemu::version(&programs.qemu, stop)?.unwrap_or_default();
    let canary = Canary {
        programs,
        qemu_version: &version,
        kernel: &image.join("vmlinuz"),
        busybox: &image.join("busybox"),
        scratch,
        register: &|_| Ok(()),
        stop,
    };
    let verdicts = canary.judge(Some(&work.join("acceleration")))?;
    match verdicts.best() {
        Some(accelerator) => Ok(accelerator),
        None => bail!("no virtual machine runs on this host: {verdicts}; `hostler doctor` tells more"),
    }
}

/// A disk that shows `base` and takes the writes in its stead.
fn overlay(base: &Path, scratch: &Path, stop: &Stop) -> anyhow::Result<PathBuf> {
    let target = scratch.join("overlay.qcow2");
    let qemu_img = HostTool { name: "qemu-img", package: "qemu-utils" }.find()?;
    let qemu_img = qemu_img.arguments(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).argument(base);
    let made = qemu_img.argument("--").argument(&target).run(OVERLAY_DEADLINE, stop)?;
    made.success().context("making an overlay of the image")?;
    Ok(target)
}

/// Where the console goes: into the log as it is, and to standard output line by line.
fn console(log: &Path, cancel: &Arc<Cancel>) -> anyhow::Result<(File, thread::JoinHandle<Transcript>)> {
    let mut log = File::create(log).with_context(|| format!("making {}", log.display()))?;
    let (mut reader, writer) = std::io::pipe()?;
    let cancel = Arc::clone(cancel);
    let started = Instant::now();
    let thread = thread::Builder::new().name("console".to_owned()).spawn(move || {
        let mut transcript = Transcript::default();
        let mut buffer = [0; 16 * 1024];
        // It ends when the run drops the other side.
        while let Ok(length @ 1..) = reader.read(&mut buffer) {
            // A full disk stops qemu as well, and that is told.
            let _ = log.write_all(&buffer[..length]);
            for line in transcript.push(&buffer[..length]) {
                let shown = match line {
                    Line::Begin => {
                        format!("hostler-vm: the machine is up after {} s", started.elapsed().as_secs())
                    }
                    Line::Said(line) => line,
                };
                if writeln!(std::io::stdout(), "{shown}").is_err() {
                    // Nobody reads it any more, as in `| head`.
                    cancel.cancel();
                }
            }
        }
        transcript
    })?;
    Ok((File::from(OwnedFd::from(writer)), thread))
}
