//! Judges a running guest: what counts as success, as failure, as progress.
//!
//! Pure: it is told what was seen and when (time since the start), and says whether the run is
//! over. Success is one thing only, the guest's own nonce on the control port; a machine that ends
//! by itself, with whatever status, has failed. Deliberately absent: every descriptor, the clock,
//! and what to do about an ending.
//!
//! What progress is, `progress` says. A guest that shows a question and does nothing at all has not
//! stalled but waits, and that is known much sooner.

use std::time::Duration;

use crate::cache::Refusal;
use crate::class::Class;
use crate::signs::{Finding, Weight};

use super::control::Message;
use super::outcome::{Activity, Because, Failure, Outcome, Refused};
use super::progress::Progress;
use super::qmp::BlockTotals;

/// How long a machine that asked for its own end may take to be gone, and for how long after a
/// step failed its last words are waited for.
const GRACE: Duration = Duration::from_secs(20);
/// For how long a screen that a rule knows as a question has to stay with nothing moving.
const QUESTION_PATIENCE: Duration = Duration::from_secs(20);
/// The same for a line that only looks like a question.
const PROMPT_PATIENCE: Duration = Duration::from_secs(45);
/// What a console may print, in bytes. Installations print some megabytes.
pub const MOST_CONSOLE_BYTES: u64 = 128 * 1024 * 1024;
/// What firmware and a boot loader print before a system boots, in bytes.
const FIRMWARE_BYTES: u64 = 2048;
/// How many explanations and refusals are kept.
const MOST_KEPT: usize = 32;

/// Limits of one run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// From the start of the build to the run's proof.
    pub total: Duration,
    /// What of that was over when the run began.
    pub used: Duration,
    /// The longest time in which nothing that counts as progress happens.
    pub no_progress: Duration,
}

impl Limits {
    fn left(&self) -> Duration {
        self.total.saturating_sub(self.used)
    }
}

/// Something that was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Seen {
    /// The console printed, this many bytes so far.
    ConsoleBytes(u64),
    /// A rule recognised something.
    Sign(Finding),
    /// The console's screen, as it is now.
    Screen(ScreenSeen),
    /// The guest wrote to its control port.
    Control(Message),
    /// What the disks did so far.
    Blocks(BlockTotals),
    /// What the cache moved so far, in bytes: what it sent to the guest and what it got from upstream.
    CacheBytes(u64),
    /// The mirror could not give the guest a file.
    Refused(Refused),
    /// The time that the machine's processors have had so far.
    Processors(Duration),
    /// A disk could not be used.
    DiskError {
        /// Whether the host's disk is full.
        no_space: bool,
    },
    /// The guest told the machine that it panicked.
    GuestPanicked,
    /// The guest switched the machine off, or began anew.
    GuestEnded,
    /// qemu ended, with this said about it.
    QemuEnded(String),
    /// qemu does not answer, or not sensibly.
    QemuUnresponsive(String),
    /// Someone wants the run to end.
    Cancelled,
}

/// A look at the screen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ScreenSeen {
    /// Whether it shows what it did not show before; a clock that ran on is nothing new.
    pub is_new: bool,
    /// The rule that it matches.
    pub finding: Option<Finding>,
    /// The line before the cursor, when it looks like a question.
    pub prompt: Option<String>,
}

/// The judge of one run.
#[derive(Debug)]
pub struct Watch {
    nonce: String,
    limits: Limits,
    progress: Progress,
    console_bytes: u64,
    stage: Option<String>,
    screen: ScreenSeen,
    explanations: Vec<Finding>,
    refused: Vec<Refused>,
    failed: Option<(Duration, Failure)>,
    /// The guest has ended the machine.
    has_ended: bool,
    over: Option<Outcome>,
}

impl Watch {
    /// A judge that accepts exactly `nonce`.
    #[must_use]
    pub fn new(nonce: String, limits: Limits) -> Self {
        Self {
            nonce,
            limits,
            progress: Progress::default(),
            console_bytes: 0,
            stage: None,
            screen: ScreenSeen::default(),
            explanations: Vec::new(),
            refused: Vec::new(),
            failed: None,
            has_ended: false,
            over: None,
        }
    }

    /// The step that the guest is in.
    #[must_use]
    pub fn stage(&self) -> Option<&str> {
        self.stage.as_deref()
    }

    /// Console bytes, as last seen.
    #[must_use]
    pub fn console_bytes(&self) -> u64 {
        self.console_bytes
    }

    /// Disk totals, as last seen.
    #[must_use]
    pub fn blocks(&self) -> BlockTotals {
        self.progress.blocks()
    }

    /// When to look at the clock again at the latest.
    #[must_use]
    pub fn deadline(&self) -> Duration {
        let limits = self.limits.left().min(self.stalls());
        match &self.failed {
            Some((at, _)) => limits.min(at.saturating_add(GRACE)),
            None => limits,
        }
    }

    /// Takes what was seen at `now`; the ending, once there is one. It never changes afterwards.
    pub fn see(&mut self, now: Duration, seen: Seen) -> Option<Outcome> {
        if self.over.is_none() {
            let verdict = self.judge(now, seen);
            self.over = verdict.map(|failure| match failure {
                None => Outcome::Proven,
                Some(failure) => Outcome::Failed(failure),
            });
        }
        self.over.clone()
    }

    /// Judges the clock alone.
    pub fn look(&mut self, now: Duration) -> Option<Outcome> {
        if self.over.is_none() {
            let late = if let Some((at, failure)) = &self.failed
                && now >= at.saturating_add(GRACE)
            {
                Some(failure.clone())
            } else if now >= self.limits.left() {
                Some(Failure::TimedOut { limit: self.limits.total, stage: self.stage.clone() })
            } else if let Some(waiting) = self.waiting(now) {
                Some(waiting)
            } else if now >= self.stalls() {
                Some(self.stalled(now))
            } else {
                None
            };
            self.over = late.map(|late| Outcome::Failed(self.earlier_or(late)));
        }
        self.over.clone()
    }

    fn stalls(&self) -> Duration {
        self.progress.stalls(self.limits.no_progress)
    }

    fn stalled(&self, now: Duration) -> Failure {
        let limit = self.progress.without(now);
        // What is told is the limit, not by how much the look was late.
        let limit = Duration::from_secs(limit.as_secs());
        let has_spoken = self.console_bytes > FIRMWARE_BYTES || self.stage.is_some();
        if !has_spoken {
            return Failure::NeverBooted { limit };
        }
        let is_busy = self.progress.is_busy(now, self.limits.no_progress);
        let activity = if is_busy { Activity::Busy } else { Activity::Idle };
        Failure::Stalled { limit, stage: self.stage.clone(), activity }
    }

    /// Whether the guest waits for somebody: it shows a question, and nothing moves.
    fn waiting(&self, now: Duration) -> Option<Failure> {
        let still = self.progress.still(now);
        match (&self.screen.finding, &self.screen.prompt) {
            (Some(finding), _) if finding.weight == Weight::Stays && still >= QUESTION_PATIENCE => {
                Some(Failure::Recognised { finding: Box::new(finding.clone()), because: self.because() })
            }
            (_, Some(prompt)) if still >= PROMPT_PATIENCE => {
                Some(Failure::WaitingForInput { prompt: prompt.clone() })
            }
            _ => None,
        }
    }

    /// `Some(None)` is success.
    fn judge(&mut self, now: Duration, seen: Seen) -> Option<Option<Failure>> {
        let ending = match seen {
            Seen::ConsoleBytes(bytes) => {
                self.console_bytes = self.console_bytes.max(bytes);
                if bytes <= MOST_CONSOLE_BYTES {
                    return None;
                }
                Failure::ConsoleFlood { bytes }
            }
            Seen::CacheBytes(bytes) => {
                self.progress.see_cache(now, bytes);
                return None;
            }
            Seen::Blocks(blocks) => {
                self.progress.see_blocks(now, blocks);
                return None;
            }
            Seen::Processors(spent) => {
                self.progress.see_processors(now, spent);
                return None;
            }
            Seen::Refused(refused) => {
                // What no index names is asked for by every installer; only what upstream should have
                // had explains anything.
                if refused.refusal != Refusal::Unnamed && self.refused.len() < MOST_KEPT {
                    self.refused.push(refused);
                }
                return None;
            }
            Seen::Screen(screen) => return self.judge_screen(now, screen).map(Some),
            Seen::Sign(finding) => return self.judge_sign(finding).map(Some),
            Seen::Control(message) => return self.judge_message(now, message),
            Seen::DiskError { no_space: true } => Failure::HostDiskFull,
            Seen::DiskError { no_space: false } => Failure::HostDiskError,
            Seen::GuestPanicked => Failure::PanicReported,
            Seen::GuestEnded => {
                self.has_ended = true;
                return None;
            }
            Seen::QemuEnded(_) if self.has_ended => self.earlier_or(Failure::NoProof {
                instead: "it switched itself off, or began anew".to_owned(),
                because: self.because(),
            }),
            Seen::QemuEnded(said) => self.earlier_or(Failure::QemuDied { said, because: self.because() }),
            Seen::QemuUnresponsive(said) => Failure::QemuUnresponsive { said },
            Seen::Cancelled => Failure::Cancelled,
        };
        Some(Some(ending))
    }

    fn judge_screen(&mut self, now: Duration, screen: ScreenSeen) -> Option<Failure> {
        if screen.is_new {
            self.progress.told(now);
        }
        self.screen = screen;
        let finding = self.screen.finding.clone()?;
        // What stays is judged by the clock.
        if finding.weight == Weight::Stays { None } else { self.judge_sign(finding) }
    }

    fn judge_sign(&mut self, finding: Finding) -> Option<Failure> {
        match finding.weight {
            Weight::Ends => Some(Failure::Recognised { finding: Box::new(finding), because: self.because() }),
            Weight::Explains | Weight::Stays => {
                if self.explanations.len() >= MOST_KEPT {
                    self.explanations.remove(0);
                }
                self.explanations.push(finding);
                None
            }
        }
    }

    /// What explains a failure of now: the rarest kind of cause that was seen, and of that the latest;
    /// and the latest file that upstream refused.
    fn because(&self) -> Because {
        let sign = self.explanations.iter().max_by_key(|finding| match finding.class {
            Class::OutOfMemory | Class::DiskFull | Class::DiskError => 2,
            Class::DownloadFailed | Class::AnswersRejected | Class::PackagesRefused => 1,
            _ => 0,
        });
        Because { sign: sign.cloned().map(Box::new), refused: self.refused.last().cloned().map(Box::new) }
    }

    fn judge_message(&mut self, now: Duration, message: Message) -> Option<Option<Failure>> {
        self.progress.told(now);
        match message {
            Message::Stage(stage) => {
                self.stage = Some(stage);
                // The step before got over what was seen in it.
                self.explanations.clear();
                self.refused.clear();
                None
            }
            // The guest still has to print its last words and end; the first failure counts.
            Message::Failed { step, status } => {
                let because = self.because();
                self.failed.get_or_insert((now, Failure::StepFailed { step, status, because }));
                None
            }
            Message::Done(nonce) if self.failed.is_none() && nonce == self.nonce => Some(None),
            Message::Done(_) => Some(Some(self.earlier_or(Failure::NoProof {
                instead: "a nonce that is not the one it was given".to_owned(),
                because: Because::default(),
            }))),
            Message::Unknown => None,
        }
    }

    /// The failure that the guest itself told, if it did: it names the cause.
    fn earlier_or(&self, failure: Failure) -> Failure {
        match &self.failed {
            Some((_, earlier)) => earlier.clone(),
            None => failure,
        }
    }
}

#[cfg(test)]
#[path = "watch_tests.rs"]
mod tests;
