//! One boot of one machine, from the launch to the verdict.
//!
//! The loop waits for the machine's channels, its process, the wish to stop and the clock all at
//! once, turns what comes into [`Seen`] and lets [`Watch`] judge. Whatever the verdict, qemu is gone
//! and reaped when [`run`] returns. Deliberately absent: any judgement, and any thread.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::{TcpListener, UdpSocket};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::cancel::Cancel;
use crate::event::{Event, Sink, Stage};
use crate::passing;
use crate::signs::{Finding, Lines, Place, Rules};

use super::argv::{VmSpec, arguments};
use super::bounded::Bounded;
use super::confinement::{Enforced, named_by};
use super::console::{Console, keep_last};
use super::control;
use super::launch::{LaunchError, Machine, Programs, launch};
use super::outcome::{Because, Failure, Outcome, Refused};
use super::processors;
use super::qmp::{self, BlockTotals, Said};
use super::viewers::Viewers;
use super::watch::{Limits, Seen, Watch};

/// The most that is kept of a console, and of an installer's log, in bytes.
const LOG_LIMIT: u64 = 64 * 1024 * 1024;
/// How often the disks' statistics and the mirror are looked at, and progress is told.
const BEAT: Duration = Duration::from_secs(2);
/// How long qemu may leave a question unanswered, whatever the guest does.
const ANSWER_DEADLINE: Duration = Duration::from_secs(90);
/// For how long a machine that failed is kept for a person.
const HOLD: Duration = Duration::from_secs(3600);
/// How long qemu may take for a picture of the screen.
const PICTURE_DEADLINE: Duration = Duration::from_secs(5);
/// How many refused files are kept for the report.
const MOST_REFUSED: usize = 200;

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
    let mut session = Session {
        started,
        watch: Watch::new(run.nonce.to_owned(), run.limits),
        console: Console::new(console_log, LOG_LIMIT),
        installer: installer_log.map(|file| InstallerLog {
            log: Bounded::new(file, "installer's log", LOG_LIMIT),
            lines: Lines::default(),
            tail: VecDeque::new(),
        }),
        findings: Vec::new(),
        refused: Vec::new(),
        viewers,
        control: control::Parser::default(),
        qmp: qmp::Client::default(),
        asked: started,
        stages: Vec::new(),
        open: [true; CHANNELS.len()],
    };
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

/// What is polled, in this order.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Channel {
    Console = 0,
    Control = 1,
    Qmp = 2,
    Log = 3,
    Syslog = 4,
}

const CHANNELS: [Channel; 5] =
    [Channel::Console, Channel::Control, Channel::Qmp, Channel::Log, Channel::Syslog];

/// Reads once from a channel; `WouldBlock` where it does not exist.
fn read(machine: &mut Machine, channel: Channel, buffer: &mut [u8]) -> io::Result<usize> {
    match channel {
        Channel::Console => machine.console.read(buffer),
        Channel::Control => machine.control.read(buffer),
        Channel::Qmp => machine.qmp.read(buffer),
        Channel::Log => match &mut machine.log {
            Some(log) => log.read(buffer),
            None => Err(io::ErrorKind::WouldBlock.into()),
        },
        // An empty datagram is no end.
        Channel::Syslog => match machine.syslog.as_ref().map(|syslog| syslog.recv(buffer)) {
            Some(Ok(0)) | None => Err(io::ErrorKind::WouldBlock.into()),
            Some(result) => result,
        },
    }
}

/// The installer's log: kept, and read line by line.
struct InstallerLog {
    log: Bounded<File>,
    lines: Lines,
    tail: VecDeque<String>,
}

struct Session {
    started: Instant,
    watch: Watch,
    console: Console<File>,
    installer: Option<InstallerLog>,
    findings: Vec<Finding>,
    refused: Vec<Refused>,
    viewers: Option<Viewers>,
    control: control::Parser,
    qmp: qmp::Client,
    /// When the question that qemu has not answered was asked.
    asked: Instant,
    stages: Vec<(String, Duration)>,
    open: [bool; CHANNELS.len()],
}

impl Session {
    fn attend(&mut self, run: &Run<'_>, machine: &mut Machine) -> Result<Outcome, RunError> {
        let mut beat = self.started;
        loop {
            if run.cancel.is_cancelled()
                && let Some(outcome) = self.see(Seen::Cancelled)
            {
                return Ok(outcome);
            }
            if beat.elapsed() >= BEAT || beat == self.started {
                beat = Instant::now();
                if let Some(outcome) = self.beat(run, machine) {
                    return Ok(outcome);
                }
            }
            self.talk(machine);
            let (ready, ended) = self.wait(run, machine, beat + BEAT).map_err(RunError::Watch)?;
            for channel in CHANNELS {
                if ready[channel as usize]
                    && let Some(outcome) = self.take(machine, channel)?
                {
                    return Ok(outcome);
                }
            }
            self.show(machine);
            if ended && let Some(outcome) = self.ended(machine)? {
                return Ok(outcome);
            }
            if let Some(outcome) = self.watch.look(self.started.elapsed()) {
                return Ok(outcome);
            }
        }
    }

    /// Shows the console to those who look, and has the guest read what they type.
    fn show(&mut self, machine: &mut Machine) {
        if let Some(viewers) = &mut self.viewers {
            let typed = viewers.serve(self.console.terminal());
            // A guest that does not read loses what is typed, as on any serial line.
            let _ = machine.console.write(&typed);
        }
    }

    /// Gives a machine that proved itself the time to switch itself off, and says whether it did.
    fn let_switch_off(&mut self, run: &Run<'_>, machine: &mut Machine) -> Result<bool, RunError> {
        let until = Instant::now() + run.power_off.within;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let (ready, ended) =
                self.wait(run, machine, Instant::now() + left.min(BEAT)).map_err(RunError::Watch)?;
            for channel in CHANNELS {
                if ready[channel as usize] {
                    self.take(machine, channel)?;
                }
            }
            self.show(machine);
            if ended || left.is_zero() || run.cancel.is_cancelled() {
                return Ok(ended);
            }
        }
    }

    /// Keeps a machine that failed running for a person to look into it.
    fn hold(&mut self, run: &Run<'_>, machine: &mut Machine, failure: &Failure) -> Result<(), RunError> {
        let until = Instant::now() + HOLD;
        let told = format!(
            "{failure}. The machine is kept for {}, until it is switched off, or this build is told to stop",
            humantime::format_duration(HOLD)
        );
        run.sink.event(Event::Warning(told));
        while Instant::now() < until && !run.cancel.is_cancelled() {
            let (ready, ended) = self.wait(run, machine, Instant::now() + BEAT).map_err(RunError::Watch)?;
            for channel in CHANNELS {
                if ready[channel as usize] {
                    self.take(machine, channel)?;
                }
            }
            self.show(machine);
            if ended {
                return Ok(());
            }
        }
        Ok(())
    }

    fn see(&mut self, seen: Seen) -> Option<Outcome> {
        self.watch.see(self.started.elapsed(), seen)
    }

    /// Waits until a channel, the process or the wish to stop has something, or until `beat`. Which
    /// channels have something, and whether the process ended.
    fn wait(
        &self,
        run: &Run<'_>,
        machine: &Machine,
        beat: Instant,
    ) -> io::Result<([bool; CHANNELS.len()], bool)> {
        let now = self.started.elapsed();
        let until_beat = beat.saturating_duration_since(Instant::now());
        // One that is over, and is held, has no deadline but the beat.
        let left = match self.watch.deadline().saturating_sub(now) {
            Duration::ZERO => until_beat,
            left => left.min(until_beat),
        };
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        let mut polled = vec![
            PollFd::from_borrowed_fd(machine.pidfd(), PollFlags::IN),
            PollFd::from_borrowed_fd(run.cancel.as_fd(), PollFlags::IN),
        ];
        let mut channels = Vec::new();
        for channel in CHANNELS.into_iter().filter(|&channel| self.open[channel as usize]) {
            let descriptor = match channel {
                Channel::Console => Some(machine.console.as_fd()),
                Channel::Control => Some(machine.control.as_fd()),
                Channel::Qmp => Some(machine.qmp.as_fd()),
                Channel::Log => machine.log.as_ref().map(UnixStream::as_fd),
                Channel::Syslog => machine.syslog.as_ref().map(UdpSocket::as_fd),
            };
            if let Some(descriptor) = descriptor {
                polled.push(PollFd::from_borrowed_fd(descriptor, PollFlags::IN));
                channels.push(channel);
            }
        }
        let viewers = self.viewers.iter().flat_map(Viewers::descriptors);
        polled.extend(viewers.map(|viewer| PollFd::from_borrowed_fd(viewer, PollFlags::IN)));
        match poll(&mut polled, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let mut ready = [false; CHANNELS.len()];
        for (channel, polled) in channels.into_iter().zip(polled.iter().skip(2)) {
            ready[channel as usize] = !polled.revents().is_empty();
        }
        Ok((ready, polled.first().is_some_and(|process| !process.revents().is_empty())))
    }

    /// Reads once from a channel.
    fn take(&mut self, machine: &mut Machine, channel: Channel) -> Result<Option<Outcome>, RunError> {
        let mut buffer = [0; 64 * 1024];
        let length = match read(machine, channel, &mut buffer) {
            Ok(0) => {
                self.open[channel as usize] = false;
                return Ok(None);
            }
            Ok(length) => length,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                return Ok(None);
            }
            Err(_) => {
                // The process' end, which follows, is what is judged.
                self.open[channel as usize] = false;
                return Ok(None);
            }
        };
        self.hear(channel, &buffer[..length])
    }

    fn hear(&mut self, channel: Channel, bytes: &[u8]) -> Result<Option<Outcome>, RunError> {
        let mut seen = Vec::new();
        match channel {
            Channel::Console => {
                let found = self.console.push(bytes).map_err(RunError::Log)?;
                seen.push(Seen::ConsoleBytes(self.console.bytes()));
                seen.extend(found.into_iter().map(Seen::Sign));
            }
            Channel::Control => {
                for message in self.control.push(bytes) {
                    if let control::Message::Stage(stage) = &message
                        && self.stages.len() < 1000
                    {
                        self.stages.push((stage.clone(), self.started.elapsed()));
                    }
                    seen.push(Seen::Control(message));
                }
            }
            Channel::Log => seen.extend(self.log(bytes)?),
            Channel::Syslog => {
                // A datagram is a line: `<PRIORITY>text`, RFC 3164.
                let text = bytes.strip_prefix(b"<").and_then(|rest| {
                    let end = rest.iter().position(|&byte| byte == b'>').filter(|&end| end <= 3)?;
                    rest.get(end + 1..)
                });
                let mut line = text.unwrap_or(bytes).trim_ascii_end().to_vec();
                line.push(b'\n');
                seen.extend(self.log(&line)?);
            }
            Channel::Qmp => match self.qmp.push(bytes) {
                Ok(said) => seen.extend(said.into_iter().filter_map(|said| match said {
                    Said::Blocks(blocks) => Some(Seen::Blocks(blocks)),
                    Said::DiskError { no_space } => Some(Seen::DiskError { no_space }),
                    Said::GuestPanicked => Some(Seen::GuestPanicked),
                    Said::Shutdown { by_guest } => by_guest.then_some(Seen::GuestEnded),
                    Said::Ready | Said::FileTaken | Said::Picture | Said::Refused(_) => None,
                })),
                Err(error) => seen.push(Seen::QemuUnresponsive(error.to_string())),
            },
        }
        let mut outcome = None;
        for seen in seen {
            outcome = self.see(seen);
        }
        Ok(outcome)
    }

    /// Takes what came of the installer's log.
    fn log(&mut self, bytes: &[u8]) -> Result<Vec<Seen>, RunError> {
        let Some(installer) = &mut self.installer else { return Ok(Vec::new()) };
        installer.log.push(bytes).map_err(RunError::Log)?;
        let mut found = Vec::new();
        let InstallerLog { lines, tail, .. } = installer;
        lines.push(bytes, |line| {
            keep_last(tail, line);
            found.extend(Rules::builtin().find(Place::Log, line));
        });
        let room = MOST_REFUSED.saturating_sub(self.findings.len());
        self.findings.extend(found.iter().take(room).cloned());
        Ok(found.into_iter().map(Seen::Sign).collect())
    }

    /// Asks for statistics, looks at the downloads, the processors and the screen, tells the progress.
    fn beat(&mut self, run: &Run<'_>, machine: &Machine) -> Option<Outcome> {
        let downloads = (run.downloads)();
        let mut outcome = self.see(Seen::CacheBytes(downloads.bytes));
        for refused in downloads.refused.into_iter().skip(self.refused.len()).take(MOST_REFUSED) {
            outcome = self.see(Seen::Refused(refused.clone()));
            self.refused.push(refused);
        }
        if let Some(spent) = machine.pid_in_proc().and_then(processors::spent) {
            outcome = self.see(Seen::Processors(spent));
        }
        let screen = self.console.look();
        outcome = self.see(Seen::Screen(screen)).or(outcome);
        if self.qmp.ask_block_statistics() {
            self.asked = Instant::now();
        } else if self.open[Channel::Qmp as usize] && self.asked.elapsed() > ANSWER_DEADLINE {
            let said = format!("no answer for {}", humantime::format_duration(ANSWER_DEADLINE));
            outcome = self.see(Seen::QemuUnresponsive(said));
        }
        let blocks = self.watch.blocks();
        run.sink.event(Event::Progress {
            stage: run.stage,
            doing: self.watch.stage().unwrap_or("booting").to_owned(),
            bytes: blocks.read.saturating_add(blocks.written),
            total: None,
        });
        outcome
    }

    fn talk(&mut self, machine: &mut Machine) {
        let output = self.qmp.take_output();
        if !output.is_empty() && machine.qmp.write_all(&output).is_err() {
            // A broken channel shows as an unanswered question or as the process' end.
            self.open[Channel::Qmp as usize] = false;
        }
    }

    /// Has qemu write a picture of the screen. Whether there is one: a machine that is gone or hangs
    /// gives none.
    fn picture(&mut self, machine: &mut Machine, path: &Path) -> bool {
        let Ok(file) = File::create(path) else { return false };
        let deadline = Instant::now() + PICTURE_DEADLINE;
        let mut is_taken = false;
        // An answer to an earlier question may come first, and so each is asked again until it can be.
        let (mut handed_over, mut asked) = (false, false);
        loop {
            if is_taken {
                asked = asked || self.qmp.ask_picture();
                self.talk(machine);
            } else if !handed_over && self.qmp.ask_to_take_file() {
                handed_over = true;
                let command = self.qmp.take_output();
                if passing::send_with(machine.qmp.as_fd(), &command, file.as_fd()).is_err() {
                    return false;
                }
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() || passing::wait_readable(machine.qmp.as_fd(), left).is_err() {
                return false;
            }
            let mut buffer = [0; 64 * 1024];
            let said = match machine.qmp.read(&mut buffer) {
                Ok(length @ 1..) => self.qmp.push(&buffer[..length]).unwrap_or_default(),
                _ => return false,
            };
            is_taken = is_taken || said.contains(&Said::FileTaken);
            if said.contains(&Said::Picture) {
                return true;
            }
            if handed_over && said.iter().any(|said| matches!(said, Said::Refused(_))) {
                return false;
            }
        }
    }

    /// Reads what is left in all channels: what the guest said before what qemu says of its end.
    fn drain(&mut self, machine: &mut Machine) -> Result<Option<Outcome>, RunError> {
        let mut outcome = None;
        for channel in [Channel::Control, Channel::Log, Channel::Syslog, Channel::Console, Channel::Qmp] {
            let mut buffer = [0; 64 * 1024];
            // A live guest can write for ever; a dead one leaves at most what a socket holds.
            for _ in 0..64 {
                let Ok(length @ 1..) = read(machine, channel, &mut buffer) else {
                    break;
                };
                outcome = self.hear(channel, &buffer[..length])?;
            }
        }
        Ok(outcome)
    }

    fn ended(&mut self, machine: &mut Machine) -> Result<Option<Outcome>, RunError> {
        if let Some(outcome) = self.drain(machine)? {
            return Ok(Some(outcome));
        }
        let said = match machine.wait(Duration::ZERO) {
            Ok(status) => {
                let stderr = machine.stderr_text();
                if stderr.is_empty() { status.to_string() } else { format!("{status}; {stderr}") }
            }
            Err(error) => error.to_string(),
        };
        Ok(self.see(Seen::QemuEnded(said)))
    }
}
