//! One boot of one machine, from the launch to the verdict.
//!
//! The loop waits for the machine's channels, its process, the wish to stop and the clock all at
//! once, turns what comes into [`Seen`] and lets [`Watch`] judge. Whatever the verdict, qemu is gone
//! and reaped when [`run`] returns. Deliberately absent: any judgement, and any thread.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::TcpListener;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::cancel::Cancel;
use crate::event::{Event, Sink, Stage};

use super::argv::VmSpec;
use super::console::{Console, Sign};
use super::control;
use super::launch::{LaunchError, Machine, Programs, launch};
use super::outcome::Outcome;
use super::qmp::{self, BlockTotals, Said};
use super::watch::{Limits, Seen, Watch};

/// The most that is kept of a console, in bytes.
const CONSOLE_LIMIT: u64 = 64 * 1024 * 1024;
/// How often the disks' statistics and the mirror are looked at, and progress is told.
const BEAT: Duration = Duration::from_secs(2);
/// How long qemu may leave a question unanswered, whatever the guest does.
const ANSWER_DEADLINE: Duration = Duration::from_secs(90);
/// How long a guest that gave its proof may take to switch itself off.
const POWER_OFF_DEADLINE: Duration = Duration::from_secs(15);

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
    /// Bytes that the mirror has sent.
    pub mirror_bytes: &'a dyn Fn() -> u64,
    /// The wish to stop.
    pub cancel: &'a Cancel,
    /// Takes the progress.
    pub sink: &'a dyn Sink,
    /// The stage of the build that this is.
    pub stage: Stage,
}

/// What came of it.
#[derive(Clone, Debug)]
pub struct Report {
    /// The verdict.
    pub outcome: Outcome,
    /// The console's last screen, as plain text.
    pub screen: String,
    /// What the console showed that a reader would stop at.
    pub signs: Vec<Sign>,
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
pub fn run(run: &Run<'_>, console_log: File) -> Result<Report, RunError> {
    let started = Instant::now();
    let mut machine = launch(run.programs, run.spec, run.register)?;
    if let Some(listener) = machine.mirror.take() {
        (run.serve)(listener).map_err(RunError::Serve)?;
    }
    let isolated = machine.isolated;
    let mut session = Session {
        started,
        watch: Watch::new(run.nonce.to_owned(), run.limits),
        console: Console::new(console_log, CONSOLE_LIMIT),
        control: control::Parser::default(),
        qmp: qmp::Client::default(),
        asked: started,
        stages: Vec::new(),
        open: [true; 3],
    };
    let outcome = session.attend(run, &mut machine)?;
    let pid = machine.pid();
    if outcome == Outcome::Proven {
        // The guest has synced and unmounted; letting it switch itself off leaves a clean end in
        // the console's log.
        let _ = machine.wait(POWER_OFF_DEADLINE);
    }
    let _ = session.drain(&mut machine);
    machine.end().map_err(|source| RunError::End { pid, source })?;
    Ok(Report {
        outcome,
        screen: session.console.screen(),
        signs: session.console.signs().to_vec(),
        console_bytes: session.console.bytes(),
        blocks: session.watch.blocks(),
        stages: session.stages,
        took: started.elapsed(),
        isolated,
    })
}

/// The channels, in the order in which they are polled.
#[derive(Clone, Copy)]
enum Channel {
    Console = 0,
    Control = 1,
    Qmp = 2,
}

const CHANNELS: [Channel; 3] = [Channel::Console, Channel::Control, Channel::Qmp];

fn stream(machine: &mut Machine, channel: Channel) -> &mut UnixStream {
    match channel {
        Channel::Console => &mut machine.console,
        Channel::Control => &mut machine.control,
        Channel::Qmp => &mut machine.qmp,
    }
}

struct Session {
    started: Instant,
    watch: Watch,
    console: Console<File>,
    control: control::Parser,
    qmp: qmp::Client,
    /// When the question that qemu has not answered was asked.
    asked: Instant,
    stages: Vec<(String, Duration)>,
    open: [bool; 3],
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
                if let Some(outcome) = self.beat(run) {
                    return Ok(outcome);
                }
            }
            self.talk(machine);
            let ready = self.wait(run, machine, beat + BEAT).map_err(RunError::Watch)?;
            for channel in CHANNELS {
                if ready[channel as usize]
                    && let Some(outcome) = self.take(machine, channel)?
                {
                    return Ok(outcome);
                }
            }
            if ready[3]
                && let Some(outcome) = self.ended(machine)?
            {
                return Ok(outcome);
            }
            if let Some(outcome) = self.watch.look(self.started.elapsed()) {
                return Ok(outcome);
            }
        }
    }

    fn see(&mut self, seen: Seen) -> Option<Outcome> {
        self.watch.see(self.started.elapsed(), seen)
    }

    /// Waits until a channel, the process or the wish to stop has something, or until `beat`.
    fn wait(&self, run: &Run<'_>, machine: &Machine, beat: Instant) -> io::Result<[bool; 4]> {
        let now = self.started.elapsed();
        let left =
            self.watch.deadline().saturating_sub(now).min(beat.saturating_duration_since(Instant::now()));
        let timeout = Timespec::try_from(left).map_err(io::Error::other)?;
        let flags = |channel: Channel| {
            if self.open[channel as usize] { PollFlags::IN } else { PollFlags::empty() }
        };
        let mut polled = [
            PollFd::new(&machine.console, flags(Channel::Console)),
            PollFd::new(&machine.control, flags(Channel::Control)),
            PollFd::new(&machine.qmp, flags(Channel::Qmp)),
            PollFd::from_borrowed_fd(machine.pidfd(), PollFlags::IN),
            PollFd::from_borrowed_fd(run.cancel.as_fd(), PollFlags::IN),
        ];
        match poll(&mut polled, Some(&timeout)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready = |index: usize| !polled[index].revents().is_empty();
        Ok([self.open[0] && ready(0), self.open[1] && ready(1), self.open[2] && ready(2), ready(3)])
    }

    /// Reads once from a channel.
    fn take(&mut self, machine: &mut Machine, channel: Channel) -> Result<Option<Outcome>, RunError> {
        let mut buffer = [0; 64 * 1024];
        let length = match stream(machine, channel).read(&mut buffer) {
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
                let signs = self.console.push(bytes).map_err(RunError::Log)?;
                seen.push(Seen::ConsoleBytes(self.console.bytes()));
                seen.extend(signs.into_iter().map(Seen::Sign));
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
            Channel::Qmp => match self.qmp.push(bytes) {
                Ok(said) => seen.extend(said.into_iter().filter_map(|said| match said {
                    Said::Blocks(blocks) => Some(Seen::Blocks(blocks)),
                    Said::DiskError { no_space } => Some(Seen::DiskError { no_space }),
                    Said::GuestPanicked => Some(Seen::GuestPanicked),
                    Said::Ready | Said::Shutdown | Said::Refused(_) => None,
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

    /// Asks for statistics, looks at the mirror, tells the progress.
    fn beat(&mut self, run: &Run<'_>) -> Option<Outcome> {
        let mirror = (run.mirror_bytes)();
        let mut outcome = self.see(Seen::MirrorBytes(mirror));
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

    /// Reads what is left in the console and control channels.
    fn drain(&mut self, machine: &mut Machine) -> Result<Option<Outcome>, RunError> {
        let mut outcome = None;
        for channel in [Channel::Control, Channel::Console] {
            let mut buffer = [0; 64 * 1024];
            // A live guest can write for ever; a dead one leaves at most what a socket holds.
            for _ in 0..64 {
                let Ok(length @ 1..) = stream(machine, channel).read(&mut buffer) else {
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
