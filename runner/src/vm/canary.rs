//! Finds out which accelerator really runs a guest, by running one.
//!
//! `/dev/kvm` may open, make a machine and even run its BIOS on hosts where no kernel ever gets
//! through (nested virtualization that is half there), and qemu does not fall back by itself. So
//! each candidate boots the builder's own kernel with a program that prints a nonce. The verdicts
//! are remembered for what they depend on: this boot of the host, qemu's version, the processor,
//! the kernel's digest, and the user's access to `/dev/kvm`.
//!
//! Deliberately absent: a guess from processor flags or from `/dev/kvm` alone.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::stop::{Stop, Stopped};

use super::NO_TIMER_CHECK;
use super::argv::{Accelerator, Boot, CONTROL_PORT, Network, VmSpec};
use super::console::Console;
use super::initramfs::Initramfs;
use super::launch::{LaunchError, Machine, Programs, launch};
use super::nonce::nonce;
use super::qemu;

/// How long a canary may take with kvm; TCG gets its accelerator's share more.
const DEADLINE: Duration = Duration::from_secs(10);
/// How long a canary takes on a host with good virtualization, at most, in milliseconds.
const QUICK: u64 = 2000;
/// By how much limits are stretched at most.
const MOST_SLOWNESS: u32 = 10;
/// The device that kvm is reached through.
const KVM_DEVICE: &str = "/dev/kvm";

/// What is known about one accelerator.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "verdict", rename_all = "snake_case")]
pub enum Verdict {
    /// A guest ran.
    Works {
        /// From the launch to the nonce.
        milliseconds: u64,
    },
    /// No guest ran, and why.
    Refused {
        /// The reason, for people.
        reason: String,
    },
}

/// What is known about this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Verdicts {
    /// About kvm.
    pub kvm: Verdict,
    /// About TCG; not tried where kvm works.
    pub tcg: Option<Verdict>,
}

impl Verdicts {
    /// The accelerator to use, if any works.
    #[must_use]
    pub fn best(&self) -> Option<Accelerator> {
        match (&self.kvm, &self.tcg) {
            (Verdict::Works { .. }, _) => Some(Accelerator::Kvm),
            (_, Some(Verdict::Works { .. })) => Some(Accelerator::Tcg),
            _ => None,
        }
    }
}

impl Verdicts {
    /// How many times as long as on a host with good virtualization things take here, at least 1: by how long
    /// the canary took, which boots a kernel and runs a program. Limits on silence are stretched by it.
    #[must_use]
    pub fn slowness(&self) -> u32 {
        let verdict = match (&self.kvm, &self.tcg) {
            (works @ Verdict::Works { .. }, _) | (_, Some(works)) => works,
            (refused, None) => refused,
        };
        match verdict {
            Verdict::Works { milliseconds } => {
                u32::try_from(milliseconds.div_ceil(QUICK)).unwrap_or(u32::MAX).clamp(1, MOST_SLOWNESS)
            }
            Verdict::Refused { .. } => 1,
        }
    }
}

impl fmt::Display for Verdicts {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut show = |name: &str, verdict: &Verdict| match verdict {
            Verdict::Works { milliseconds } => write!(
                formatter,
                "{name} works, a guest ran after {}.{:01} s",
                milliseconds / 1000,
                milliseconds % 1000 / 100
            ),
            Verdict::Refused { reason } => write!(formatter, "{name} is of no use: {reason}"),
        };
        show("kvm", &self.kvm)?;
        if let Some(tcg) = &self.tcg {
            show("; tcg", tcg)?;
        }
        Ok(())
    }
}

/// Why there is no verdict at all.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CanaryError {
    /// What the verdict depends on could not be read.
    #[error("could not read {path}, on which the choice of an accelerator depends")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The canary's initial file system could not be written.
    #[error("could not write the canary's initial file system {path}; is the disk full?")]
    Write {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// No random number.
    #[error("the kernel gave no random number")]
    Nonce(#[source] io::Error),
    /// The machine did not start, for a reason that no accelerator changes.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The machine could not be watched or ended.
    #[error("could not watch the canary")]
    Watch(#[source] io::Error),
    /// Nobody wants to know any more.
    #[error("the canary was ended")]
    Stopped(#[source] Stopped),
}

/// What a canary boots, and with what.
pub struct Canary<'a> {
    /// The programs.
    pub programs: &'a Programs,
    /// qemu's version, as it tells it.
    pub qemu_version: &'a str,
    /// The kernel.
    pub kernel: &'a Path,
    /// A static busybox.
    pub busybox: &'a Path,
    /// Where to put the canary's files; the caller removes it.
    pub scratch: &'a Path,
    /// Sees each process before it does anything.
    pub register: &'a dyn Fn(BorrowedFd<'_>) -> io::Result<()>,
    /// When to give up.
    pub stop: &'a Stop,
}

impl Canary<'_> {
    /// The verdicts, from `memory` if it holds them for this host as it is now, else by trying.
    /// A memory that cannot be read or written costs only time.
    ///
    /// # Errors
    /// When nothing could be tried; that no accelerator works is a verdict, not an error.
    pub fn judge(&self, memory: Option<&Path>) -> Result<Verdicts, CanaryError> {
        if let Some(verdicts) = self.remembered(memory)? {
            return Ok(verdicts);
        }
        let remembered = self.place(memory)?;
        let kvm = match open_kvm() {
            Ok(()) => self.verdict(Accelerator::Kvm)?,
            Err(reason) => Verdict::Refused { reason },
        };
        let tcg = match kvm {
            Verdict::Works { .. } => None,
            Verdict::Refused { .. } => Some(self.verdict(Accelerator::Tcg)?),
        };
        let verdicts = Verdicts { kvm, tcg };
        // Only good news is worth remembering: a host where nothing works gets mended.
        if verdicts.best().is_some()
            && let Some(path) = &remembered
        {
            let _ = remember(path, &verdicts);
        }
        Ok(verdicts)
    }

    /// The verdicts that `memory` holds for this host as it is now.
    ///
    /// # Errors
    /// When what they depend on cannot be read.
    pub fn remembered(&self, memory: Option<&Path>) -> Result<Option<Verdicts>, CanaryError> {
        Ok(self.place(memory)?.as_deref().and_then(recall))
    }

    /// Where they are remembered.
    fn place(&self, memory: Option<&Path>) -> Result<Option<PathBuf>, CanaryError> {
        let key = self.key()?;
        Ok(memory.map(|memory| memory.join(format!("{key}.json"))))
    }

    fn key(&self) -> Result<String, CanaryError> {
        let read = |path: &Path| {
            fs::read(path).map_err(|source| CanaryError::Read { path: path.to_owned(), source })
        };
        let boot = read(Path::new("/proc/sys/kernel/random/boot_id"))?;
        let processor =
            qemu::processor().map_err(|source| CanaryError::Read { path: "/proc/cpuinfo".into(), source })?;
        let kernel = Sha256::digest(read(self.kernel)?);
        let access = open_kvm().is_ok();
        Ok(key(&boot, self.qemu_version, &processor, &kernel, access))
    }

    fn verdict(&self, accelerator: Accelerator) -> Result<Verdict, CanaryError> {
        let nonce = nonce().map_err(CanaryError::Nonce)?;
        let initramfs = self.scratch.join(format!("canary-{}.cpio", accelerator.name()));
        self.write_initramfs(&initramfs, &nonce)?;
        let spec = VmSpec {
            accelerator,
            processors: 1,
            memory_mib: 256,
            boot: Boot::Kernel {
                kernel: self.kernel.to_owned(),
                initramfs,
                command_line: format!("console=ttyS0 panic=-1 mitigations=off {NO_TIMER_CHECK}"),
            },
            disks: Vec::new(),
            network: Network::None,
            port_name: CONTROL_PORT,
            log_port: None,
            smbios_serial: None,
        };
        let started = Instant::now();
        let deadline = started + DEADLINE * accelerator.patience();
        let mut machine = launch(self.programs, &spec, self.register)?;
        let sung = listen(&mut machine, &format!("hostler-canary {nonce}"), deadline, self.stop)?;
        let (stderr, status) = match &sung {
            Sung::Ended { .. } => {
                let status = machine.wait(Duration::from_secs(5));
                (machine.stderr_text(), status.ok())
            }
            Sung::Heard | Sung::Silent { .. } => (String::new(), None),
        };
        machine.end().map_err(CanaryError::Watch)?;
        Ok(match sung {
            Sung::Heard => Verdict::Works {
                milliseconds: u64::try_from(started.elapsed().as_millis()).unwrap_or(u64::MAX),
            },
            Sung::Silent { last_line } => Verdict::Refused { reason: silence(accelerator, &last_line) },
            Sung::Ended { last_line } => Verdict::Refused { reason: ending(status, &stderr, &last_line) },
        })
    }

    fn write_initramfs(&self, path: &Path, nonce: &str) -> Result<(), CanaryError> {
        let busybox = fs::read(self.busybox)
            .map_err(|source| CanaryError::Read { path: self.busybox.to_owned(), source })?;
        let mut initramfs = Initramfs::new(busybox, include_str!("canary.sh"));
        initramfs.file("nonce", 0o400, format!("{nonce}\n"));
        File::create(path)
            .map(io::BufWriter::new)
            .and_then(|file| initramfs.write(file))
            .map_err(|source| CanaryError::Write { path: path.to_owned(), source })
    }
}

enum Sung {
    Heard,
    Silent { last_line: String },
    Ended { last_line: String },
}

/// Listens to the serial line for the song.
fn listen(machine: &mut Machine, song: &str, deadline: Instant, stop: &Stop) -> Result<Sung, CanaryError> {
    let watch = |error: rustix::io::Errno| CanaryError::Watch(error.into());
    let mut console = Console::new(io::sink(), 0);
    let mut text = Vec::new();
    loop {
        stop.check().map_err(CanaryError::Stopped)?;
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(Sung::Silent { last_line: console.last_line() });
        }
        let timeout = Timespec::try_from(stop.left(left))
            .map_err(|error| CanaryError::Watch(io::Error::other(error)))?;
        let mut polled = vec![PollFd::new(&machine.console, PollFlags::IN)];
        polled.extend(stop.wish().map(|wish| PollFd::from_borrowed_fd(wish, PollFlags::IN)));
        match poll(&mut polled, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(watch(error)),
        }
        let mut buffer = [0; 16 * 1024];
        match machine.console.read(&mut buffer) {
            Ok(0) => {
                return Ok(Sung::Ended { last_line: console.last_line() });
            }
            Ok(length) => {
                console.push(&buffer[..length]).map_err(CanaryError::Watch)?;
                text.extend_from_slice(&buffer[..length]);
                if text.windows(song.len()).any(|window| window == song.as_bytes()) {
                    return Ok(Sung::Heard);
                }
                // What is before the last bytes cannot be part of the song any more.
                text.drain(..text.len().saturating_sub(song.len()));
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(CanaryError::Watch(error)),
        }
    }
}

fn silence(accelerator: Accelerator, last_line: &str) -> String {
    let waited = humantime::format_duration(DEADLINE * accelerator.patience());
    let opened = match accelerator {
        Accelerator::Kvm => "/dev/kvm opens, but ",
        Accelerator::Tcg => "",
    };
    if last_line.is_empty() {
        format!("{opened}no guest ran: nothing on its console for {waited}")
    } else {
        format!("{opened}no guest ran within {waited}; the last on its console was \"{last_line}\"")
    }
}

fn ending(status: Option<std::process::ExitStatus>, stderr: &str, last_line: &str) -> String {
    let mut reason = "qemu ended before a guest ran".to_owned();
    if let Some(status) = status {
        reason.push_str(&format!(" ({status})"));
    }
    // qemu's complaint starts with its own name and that of a source file; the last line is it.
    if let Some(complaint) = stderr.lines().last().filter(|line| !line.is_empty()) {
        reason.push_str(&format!(": {complaint}"));
    } else if !last_line.is_empty() {
        reason.push_str(&format!("; the last on its console was \"{last_line}\""));
    }
    reason
}

fn open_kvm() -> Result<(), String> {
    match File::options().read(true).write(true).open(KVM_DEVICE) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Err(format!("there is no {KVM_DEVICE}")),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Err(format!(
            "this user may not open {KVM_DEVICE}; where it works, membership in the group kvm allows it"
        )),
        Err(error) => Err(format!("{KVM_DEVICE} does not open: {error}")),
    }
}

fn key(boot: &[u8], qemu_version: &str, processor: &str, kernel: &[u8], access: bool) -> String {
    let mut hasher = Sha256::new();
    for part in [boot, qemu_version.as_bytes(), processor.as_bytes(), kernel, &[u8::from(access)]] {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    let digest = hasher.finalize();
    digest.iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

fn recall(path: &Path) -> Option<Verdicts> {
    let mut text = String::new();
    let file = File::open(path).ok()?;
    file.take(16 * 1024).read_to_string(&mut text).ok()?;
    serde_json::from_str(&text).ok()
}

fn remember(path: &Path, verdicts: &Verdicts) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(folder)?;
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    serde_json::to_writer(&mut file, verdicts)?;
    file.flush()?;
    file.persist(path)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn works() -> Verdict {
        Verdict::Works { milliseconds: 3456 }
    }

    fn refused() -> Verdict {
        Verdict::Refused { reason: "because".into() }
    }

    #[test]
    fn kvm_is_used_where_it_works_and_tcg_where_only_that_does() {
        let best = |kvm, tcg| Verdicts { kvm, tcg }.best();
        assert_eq!(best(works(), None), Some(Accelerator::Kvm));
        assert_eq!(best(refused(), Some(works())), Some(Accelerator::Tcg));
        assert_eq!(best(refused(), Some(refused())), None);
        assert_eq!(best(refused(), None), None);
    }

    #[test]
    fn limits_are_stretched_by_how_slow_the_accelerator_is() {
        let slowness = |milliseconds| {
            let tcg = Some(Verdict::Works { milliseconds });
            Verdicts { kvm: refused(), tcg }.slowness()
        };
        assert_eq!([1, 2000, 2001, 5300, 90_000].map(slowness), [1, 1, 2, 3, 10]);
        assert_eq!(Verdicts { kvm: Verdict::Works { milliseconds: 900 }, tcg: None }.slowness(), 1);
    }

    #[test]
    fn verdicts_are_told_with_their_reasons() {
        let verdicts = Verdicts { kvm: refused(), tcg: Some(works()) };
        assert_eq!(verdicts.to_string(), "kvm is of no use: because; tcg works, a guest ran after 3.4 s");
    }

    #[test]
    fn a_verdict_is_recalled_only_for_the_same_host() {
        let one = key(b"boot", "7.2", "cpu", b"kernel", true);
        assert_eq!(one, key(b"boot", "7.2", "cpu", b"kernel", true));
        for other in [
            key(b"boot2", "7.2", "cpu", b"kernel", true),
            key(b"boot", "7.3", "cpu", b"kernel", true),
            key(b"boot", "7.2", "cpu2", b"kernel", true),
            key(b"boot", "7.2", "cpu", b"kernel2", true),
            key(b"boot", "7.2", "cpu", b"kernel", false),
            key(b"boot", "7.", "2cpu", b"kernel", true),
        ] {
            assert_ne!(one, other);
        }
    }

    #[test]
    fn what_is_remembered_is_recalled_and_rubbish_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/key.json");
        let verdicts = Verdicts { kvm: refused(), tcg: Some(works()) };
        remember(&path, &verdicts).unwrap();
        assert_eq!(recall(&path), Some(verdicts));
        fs::write(&path, "{\"kvm\":1}").unwrap();
        assert_eq!(recall(&path), None);
    }

    #[test]
    fn silence_names_the_last_thing_that_was_seen() {
        assert!(silence(Accelerator::Kvm, "Probing EDD").contains("\"Probing EDD\""));
        assert!(silence(Accelerator::Tcg, "").contains("1m"));
    }
}
