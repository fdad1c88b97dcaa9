//! One boot of one machine, from the launch to the verdict.
//!
//! `attend` is what happens until the verdict, `afterwards` what happens to the machine then.
//! Whatever the verdict, qemu is gone and reaped when [`run`] returns. Deliberately absent: any judgement, and
//! any thread.

use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::cancel::Cancel;
use crate::event::{Sink, Stage};
use crate::signs::Finding;

use super::argv::{VmSpec, arguments};
use super::attend::Session;
use super::confinement::{Enforced, named_by};
use super::launch::{LaunchError, Programs, launch};
use super::outcome::{Because, Failure, Outcome, Refused};
use super::qmp::BlockTotals;
use super::viewers::Viewers;
use super::watch::Limits;

/// What the guest downloaded so far, as its mirror tells it.
#[derive(Clone, Debug, Default)]
pub struct Downloads {
    /// Bytes that were moved, to the guest and from upstream.
    pub bytes: u64,
    /// The files that it asked for and did not get, in their order.
    pub refused: Vec<Refused>,
}

/// What to run and how to judge it.
pub struct Run<'a> {
    /// The programs.
    pub programs: &'a Programs,
    /// The machine.
    pub spec: &'a VmSpec,
    /// What the guest must say to have succeeded.
    pub nonce: &'a str,
    /// The limits.
    pub limits: Limits,
    /// Sees the process before it does anything.
    pub register: &'a dyn Fn(BorrowedFd<'_>) -> io::Result<()>,
    /// Takes the mirror's socket and serves it from then on.
    pub serve: &'a dyn Fn(TcpListener) -> io::Result<()>,
    /// What the guest downloaded so far.
    pub downloads: &'a dyn Fn() -> Downloads,
    /// Where the installer's own log goes, if there is one to expect: what comes on the log port and as
    /// syslog.
    pub installer_log: Option<File>,
    /// How a guest that gave its proof ends.
    pub power_off: PowerOff,
    /// Where a picture of the screen goes when the run fails, as a PNG file.
    pub picture: Option<&'a Path>,
    /// Those who may look at the console, and type.
    pub viewers: Option<Viewers>,
    /// Whether a machine that failed is kept running for them, until it ends, somebody wants to stop, or an
    /// hour is over.
    pub holds: bool,
    /// The wish to stop.
    pub cancel: &'a Cancel,
    /// Takes the progress.
    pub sink: &'a dyn Sink,
    /// The stage of the build that this is.
    pub stage: Stage,
}

/// How a guest that gave its proof ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PowerOff {
    /// How long it may take to switch itself off. That leaves a clean end in the console's log.
    pub within: Duration,
    /// Whether it has to: its file systems are still mounted when it gives the proof.
    pub is_needed: bool,
}

impl PowerOff {
    /// It is not waited for: what it wrote is on its disk, or of no interest.
    pub const AT_ONCE: Self = Self { within: Duration::ZERO, is_needed: false };
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Report {
    /// The verdict.
    pub outcome: Outcome,
    /// The console's last screen, as plain text.
    pub screen: String,
    /// What rules recognised on the console and in the installer's log, the first of it.
    pub findings: Vec<Finding>,
    /// The files that the guest did not get.
    pub refused: Vec<Refused>,
    /// Whether there is a picture of the screen.
    pub has_picture: bool,
    /// What the installer logged, in bytes.
    pub installer_log_bytes: u64,
    /// The last lines that the console printed.
    pub console_tail: Vec<String>,
    /// The last lines of the installer's log.
    pub installer_tail: Vec<String>,
    /// What the console printed, in bytes.
    pub console_bytes: u64,
    /// What the disks did.
    pub blocks: BlockTotals,
    /// The guest's steps, and when each began.
    pub stages: Vec<(String, Duration)>,
    /// How long it took.
    pub took: Duration,
    /// Whether the machine had a network namespace of its own.
    pub isolated: bool,
    /// How much of its confinement the kernel enforced.
    pub enforced: Enforced,
    /// qemu and its arguments.
    pub command: Vec<String>,
}

/// Why there is no verdict.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The machine did not start.
    #[error(transparent)]
    Launch(#[from] LaunchError),
    /// The mirror could not be served.
    #[error("could not serve the mirror for the guest")]
    Serve(#[source] io::Error),
    /// The machine's channels could not be watched.
    #[error("could not watch the machine")]
    Watch(#[source] io::Error),
    /// The console could not be logged.
    #[error("could not write the console's log; is the disk full?")]
    Log(#[source] io::Error),
    /// A disk names other files than it did.
    #[error(
        "the machine's process changed which files its disks lie on, as only one that was taken over does: nothing of this build is used"
    )]
    Disks,
    /// qemu could not be ended.
    #[error("qemu, process {pid}, does not die; the kernel's log may tell why")]
    End {
        /// Its process id.
        pid: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Boots the machine, judges it, and ends it.
///
/// # Errors
/// See [`RunError`]. A guest that fails is no error but a [`Report`].
pub fn run(run: &mut Run<'_>, console_log: File) -> Result<Report, RunError> {
    let (installer_log, viewers) = (run.installer_log.take(), run.viewers.take());
    let run = &*run;
    let started = Instant::now();
    let named = named_by(&run.spec.disks);
    let mut machine = launch(run.programs, run.spec, run.register)?;
    if let Some(listener) = machine.mirror.take() {
        (run.serve)(listener).map_err(RunError::Serve)?;
    }
    let (isolated, enforced) = (machine.isolated, machine.enforced);
    let mut session = Session::new(run, console_log, installer_log, viewers);
    let mut outcome = session.attend(run, &mut machine)?;
    if outcome == Outcome::Proven {
        let went = session.let_switch_off(run, &mut machine)?;
        if run.cancel.is_cancelled() {
            outcome = Outcome::Failed(Failure::Cancelled);
        } else if run.power_off.is_needed && !went {
            let instead = format!(
                "the proof, and then it did not switch itself off within {}: what it has to write may not be on its disk",
                humantime::format_duration(run.power_off.within)
            );
            outcome = Outcome::Failed(Failure::NoProof { instead, because: Because::default() });
        }
    }
    if run.holds
        && let Outcome::Failed(failure) = &outcome
        && *failure != Failure::Cancelled
    {
        session.hold(run, &mut machine, failure)?;
    }
    let pid = machine.pid();
    let _ = session.drain(&mut machine);
    let has_picture = match (&outcome, run.picture) {
        (Outcome::Failed(failure), Some(path)) if *failure != Failure::Cancelled => {
            session.picture(&mut machine, path)
        }
        _ => false,
    };
    machine.end().map_err(|source| RunError::End { pid, source })?;
    if named_by(&run.spec.disks) != named {
        return Err(RunError::Disks);
    }
    Ok(Report {
        outcome,
        screen: session.console.screen(),
        findings: session.console.findings().iter().chain(&session.findings).cloned().collect(),
        refused: session.refused,
        has_picture,
        installer_log_bytes: session.installer.as_ref().map_or(0, |installer| installer.log.bytes()),
        console_tail: session.console.tail(),
        installer_tail: session.installer.map_or_else(Vec::new, |installer| installer.tail.into()),
        console_bytes: session.console.bytes(),
        blocks: session.watch.blocks(),
        stages: session.stages,
        took: started.elapsed(),
        isolated,
        enforced,
        command: command(run),
    })
}

/// qemu and its arguments, for people.
fn command(run: &Run<'_>) -> Vec<String> {
    let program = run.programs.qemu.display().to_string();
    let arguments = arguments(run.spec);
    std::iter::once(program)
        .chain(arguments.iter().map(|argument| argument.to_string_lossy().into_owned()))
        .collect()
}
