//! Seeing to a machine until there is a verdict.
//!
//! The loop waits for the machine's channels, its process, the wish to stop and the clock all at
//! once, turns what comes into [`Seen`] and lets [`Watch`] judge.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::AsFd as _;
use std::time::{Duration, Instant};

use crate::event::Event;
use crate::signs::{Finding, Lines, Place, Rules};

use super::bounded::Bounded;
use super::channels::{self, CHANNELS, Channel, Each, read};
use super::console::{Console, keep_last};
use super::control;
use super::launch::Machine;
use super::outcome::{Outcome, Refused};
use super::processors;
use super::qmp::{self, Said};
use super::run::{Run, RunError};
use super::viewers::Viewers;
use super::watch::{Seen, Watch};

/// The most that is kept of a console, and of an installer's log, in bytes.
const LOG_LIMIT: u64 = 64 * 1024 * 1024;
/// How often the disks' statistics and the mirror are looked at, and progress is told.
pub(super) const BEAT: Duration = Duration::from_secs(2);
/// How long qemu may leave a question unanswered, whatever the guest does.
const ANSWER_DEADLINE: Duration = Duration::from_secs(90);
/// How many refused files are kept for the report.
const MOST_REFUSED: usize = 200;

/// The installer's log: kept, and read line by line.
pub(super) struct InstallerLog {
    pub(super) log: Bounded<File>,
    lines: Lines,
    pub(super) tail: VecDeque<String>,
}

/// What is known of a machine that runs.
pub(super) struct Session {
    started: Instant,
    pub(super) watch: Watch,
    pub(super) console: Console<File>,
    pub(super) installer: Option<InstallerLog>,
    pub(super) findings: Vec<Finding>,
    pub(super) refused: Vec<Refused>,
    pub(super) viewers: Option<Viewers>,
    control: control::Parser,
    pub(super) qmp: qmp::Client,
    /// When the question that qemu has not answered was asked.
    asked: Instant,
    pub(super) stages: Vec<(String, Duration)>,
    open: Each,
}

impl Session {
    pub(super) fn new(
        run: &Run<'_>,
        console_log: File,
        installer_log: Option<File>,
        viewers: Option<Viewers>,
    ) -> Self {
        let started = Instant::now();
        Self {
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
        }
    }

    /// Sees to the machine until there is a verdict.
    pub(super) fn attend(&mut self, run: &Run<'_>, machine: &mut Machine) -> Result<Outcome, RunError> {
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
            let (outcome, ended) = self.turn(run, machine, beat + BEAT)?;
            if let Some(outcome) = outcome {
                return Ok(outcome);
            }
            if ended && let Some(outcome) = self.ended(machine)? {
                return Ok(outcome);
            }
            if let Some(outcome) = self.watch.look(self.started.elapsed()) {
                return Ok(outcome);
            }
        }
    }

    /// Waits until something happens, or until `beat`, and takes it: a verdict, if it led to one, and whether
    /// the process ended.
    pub(super) fn turn(
        &mut self,
        run: &Run<'_>,
        machine: &mut Machine,
        beat: Instant,
    ) -> Result<(Option<Outcome>, bool), RunError> {
        let until_beat = beat.saturating_duration_since(Instant::now());
        // One that is over, and is held, has no deadline but the beat.
        let left = match self.watch.deadline().saturating_sub(self.started.elapsed()) {
            Duration::ZERO => until_beat,
            left => left.min(until_beat),
        };
        let viewers = self.viewers.iter().flat_map(Viewers::descriptors);
        let others = std::iter::once(run.cancel.as_fd()).chain(viewers);
        let (ready, ended) = channels::wait(machine, &self.open, others, left).map_err(RunError::Watch)?;
        let mut outcome = None;
        for channel in CHANNELS {
            if ready[channel as usize] {
                // The first that is seen counts.
                let seen = self.take(machine, channel)?;
                outcome = outcome.or(seen);
            }
        }
        self.show(machine);
        Ok((outcome, ended))
    }

    /// Shows the console to those who look, and has the guest read what they type.
    fn show(&mut self, machine: &mut Machine) {
        if let Some(viewers) = &mut self.viewers {
            let typed = viewers.serve(self.console.terminal());
            // A guest that does not read loses what is typed, as on any serial line.
            let _ = machine.console.write(&typed);
        }
    }

    fn see(&mut self, seen: Seen) -> Option<Outcome> {
        self.watch.see(self.started.elapsed(), seen)
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

    pub(super) fn talk(&mut self, machine: &mut Machine) {
        let output = self.qmp.take_output();
        if !output.is_empty() && machine.qmp.write_all(&output).is_err() {
            // A broken channel shows as an unanswered question or as the process' end.
            self.open[Channel::Qmp as usize] = false;
        }
    }

    /// Reads what is left in all channels: what the guest said before what qemu says of its end.
    pub(super) fn drain(&mut self, machine: &mut Machine) -> Result<Option<Outcome>, RunError> {
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
