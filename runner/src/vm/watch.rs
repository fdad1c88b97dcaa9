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
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::signs::{Place, Rules, prompt};
    use crate::vm::console::Console;

    const LIMITS: Limits = Limits {
        total: Duration::from_secs(160),
        used: Duration::from_secs(60),
        no_progress: Duration::from_secs(10),
    };

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn watch() -> Watch {
        Watch::new("5fe7".into(), LIMITS)
    }

    fn class(outcome: Option<Outcome>) -> &'static str {
        match outcome {
            None => "running",
            Some(Outcome::Proven) => "proven",
            Some(Outcome::Failed(failure)) => failure.class().name(),
        }
    }

    fn done(nonce: &str) -> Seen {
        Seen::Control(Message::Done(nonce.into()))
    }

    fn failed(step: &str) -> Seen {
        Seen::Control(Message::Failed { step: step.into(), status: 1 })
    }

    fn finding(place: Place, text: &str) -> Finding {
        Rules::builtin().find(place, text).unwrap()
    }

    fn full() -> Finding {
        finding(Place::Line, "No space left on device")
    }

    fn panic() -> Seen {
        Seen::Sign(finding(Place::Line, "[ 1.0] Kernel panic - not syncing: x"))
    }

    /// A look at a screen that shows this, with the cursor behind it.
    fn screen(is_new: bool, text: &str) -> Seen {
        let finding = Rules::builtin().find(Place::Screen, text);
        Seen::Screen(ScreenSeen { is_new, finding, prompt: prompt(text).map(str::to_owned) })
    }

    #[test]
    fn the_right_nonce_is_success() {
        assert_eq!(watch().see(at(1), done("5fe7")), Some(Outcome::Proven));
    }

    #[test]
    fn another_nonce_is_no_proof_and_stays_so() {
        let mut watch = watch();
        assert_eq!(class(watch.see(at(1), done("5fe8"))), "no_proof");
        assert_eq!(class(watch.see(at(2), done("5fe7"))), "no_proof");
    }

    #[test]
    fn an_end_of_qemu_is_never_success() {
        let ended = Seen::QemuEnded("exit status: 0".into());
        assert_eq!(class(watch().see(at(1), ended)), "qemu_died");
    }

    #[test]
    fn a_failed_step_outlives_the_machines_end_and_a_late_proof() {
        let mut watch = watch();
        assert_eq!(watch.see(at(1), Seen::Sign(full())), None);
        assert_eq!(watch.see(at(2), failed("configure")), None);
        assert_eq!(watch.see(at(2), failed("later")), None);
        assert_eq!(
            watch.see(at(3), Seen::QemuEnded("exit status: 0".into())),
            Some(Outcome::Failed(Failure::StepFailed {
                step: "configure".into(),
                status: 1,
                because: Because { sign: Some(Box::new(full())), refused: None }
            }))
        );
        let mut other = self::watch();
        other.see(at(2), failed("configure"));
        assert_eq!(class(other.see(at(3), done("5fe7"))), "step_failed");
    }

    #[test]
    fn a_guest_that_failed_and_lingers_is_ended_as_failed() {
        let mut watch = Watch::new(
            "5fe7".into(),
            Limits { no_progress: Duration::from_secs(1000), total: Duration::from_secs(1000), ..LIMITS },
        );
        watch.see(at(5), failed("configure"));
        assert_eq!(watch.deadline(), at(25));
        assert_eq!(class(watch.look(at(24))), "running");
        assert_eq!(class(watch.look(at(25))), "step_failed");
    }

    #[test]
    fn a_panic_ends_at_once() {
        assert_eq!(class(watch().see(at(1), panic())), "kernel_panic");
    }

    #[test]
    fn a_guest_that_switches_itself_off_gave_no_proof() {
        let mut watch = watch();
        assert_eq!(watch.see(at(1), Seen::GuestEnded), None);
        assert_eq!(class(watch.see(at(2), Seen::QemuEnded("exit status: 0".into()))), "no_proof");
    }

    #[test]
    fn every_source_of_progress_moves_the_deadline() {
        let sources = [
            screen(true, "Setting up less"),
            Seen::CacheBytes(1),
            Seen::Blocks(BlockTotals { operations: 1, ..BlockTotals::default() }),
            Seen::Control(Message::Stage("x".into())),
        ];
        for seen in sources {
            let mut watch = watch();
            assert_eq!(watch.deadline(), at(10));
            watch.see(at(9), seen.clone());
            assert_eq!(watch.deadline(), at(19), "{seen:?}");
            // The same total again is no progress.
            if !matches!(seen, Seen::Control(_) | Seen::Screen(_)) {
                watch.see(at(12), seen.clone());
                assert_eq!(watch.deadline(), at(19), "{seen:?}");
            }
        }
    }

    #[test]
    fn silence_is_a_stall_and_chatter_ends_at_the_total() {
        let mut silent = watch();
        silent.see(at(0), Seen::Control(Message::Stage("mount".into())));
        assert_eq!(
            silent.look(at(10)),
            Some(Outcome::Failed(Failure::Stalled {
                limit: at(10),
                stage: Some("mount".into()),
                activity: Activity::Idle
            }))
        );
        let mut chatty = watch();
        for second in 1..100 {
            assert_eq!(chatty.see(at(second), Seen::ConsoleBytes(second)), None);
            assert_eq!(chatty.see(at(second), screen(true, "more")), None);
            assert_eq!(chatty.look(at(second)), None);
        }
        // The message names the limit that the recipe has, not what was left of it.
        let limit = Duration::from_secs(160);
        assert_eq!(chatty.look(at(100)), Some(Outcome::Failed(Failure::TimedOut { limit, stage: None })));
    }

    #[test]
    fn a_guest_that_never_says_anything_did_not_boot() {
        assert_eq!(class(watch().look(at(10))), "boot_failed");
    }

    #[test]
    fn a_guest_that_computes_in_silence_has_longer_than_an_idle_one_but_not_for_ever() {
        let mut watch = watch();
        watch.see(at(0), Seen::ConsoleBytes(5000));
        for second in 0..40 {
            // Half a processor.
            watch.see(at(second), Seen::Processors(at(second) / 2));
            assert_eq!(watch.look(at(second)), None, "{second}");
        }
        watch.see(at(40), Seen::Processors(at(20)));
        assert_eq!(
            watch.look(at(40)),
            Some(Outcome::Failed(Failure::Stalled { limit: at(40), stage: None, activity: Activity::Busy }))
        );
    }

    #[test]
    fn a_slow_download_lives() {
        let mut watch = watch();
        for second in 1..100 {
            // One byte from upstream in a while, and nothing else at all.
            if second % 9 == 0 {
                watch.see(at(second), Seen::CacheBytes(second));
            }
            assert_eq!(watch.look(at(second)), None, "{second}");
        }
    }

    #[test]
    fn a_question_that_stays_is_known_within_a_minute() {
        let limits = Limits { no_progress: at(1000), total: at(1000), used: at(0) };
        for (text, known) in [
            ("[!] Configure the network Hostname: debian <Go Back> <Continue>", 20),
            ("Do you want to continue? [Y/n]", 45),
        ] {
            let mut watch = Watch::new("5fe7".into(), limits);
            watch.see(at(0), Seen::ConsoleBytes(9));
            watch.see(at(2), screen(true, text));
            for second in 3..known + 2 {
                watch.see(at(second), screen(false, text));
                assert_eq!(class(watch.look(at(second))), "running", "{text} at {second}");
            }
            assert_eq!(class(watch.look(at(known + 2))), "waiting_for_input", "{text}");
        }
    }

    /// What an installer showed for 55 minutes: a question, and below a clock that is drawn anew each minute.
    #[test]
    fn a_question_below_a_clock_is_known_within_a_minute() {
        let bytes = include_bytes!("../../tests/waiting/debian-installer.console.log");
        let redraw = b"\x1b[H\x1b[7m";
        let redraws: Vec<usize> = memchr::memmem::find_iter(bytes, redraw).skip(1).collect();
        let (question, clocks) = bytes.split_at(redraws[0]);
        let limits = Limits { no_progress: at(1000), total: at(3600), used: at(0) };
        // As it was, and as it would be with a clock that tells seconds.
        for seconds_between in [60, 1] {
            let mut console = Console::new(std::io::sink(), 0);
            let mut watch = Watch::new("5fe7".into(), limits);
            console.push(question).unwrap();
            let mut clock = clocks.split_inclusive(|byte| *byte == b'B').cycle();
            let known = (0..120).find(|second| {
                if second % seconds_between == 0 {
                    console.push(clock.next().unwrap()).unwrap();
                }
                watch.see(at(*second), Seen::ConsoleBytes(console.bytes()));
                watch.see(at(*second), Seen::Screen(console.look()));
                watch.look(at(*second)).is_some()
            });
            assert!(known.is_some_and(|second| second <= 60), "{known:?}");
            let outcome = watch.look(at(120));
            let Some(Outcome::Failed(failure)) = &outcome else { panic!("{outcome:?}") };
            assert_eq!(failure.class().name(), "waiting_for_input");
            assert!(failure.to_string().contains("Select your location"), "{failure}");
        }
    }

    #[test]
    fn a_clock_that_runs_is_no_progress() {
        let mut console = Console::new(std::io::sink(), 0);
        let mut watch = Watch::new("5fe7".into(), LIMITS);
        watch.see(at(0), Seen::Control(Message::Stage("x".into())));
        for second in 0..12 {
            console.push(format!("\rwaiting ({second}s / no limit)").as_bytes()).unwrap();
            watch.see(at(second), Seen::ConsoleBytes(console.bytes()));
            watch.see(at(second), Seen::Screen(console.look()));
        }
        assert_eq!(class(watch.look(at(12))), "stalled");
    }

    #[test]
    fn a_question_on_the_screen_of_a_guest_that_works_is_none() {
        let text = "Do you want to continue? [Y/n]";
        let limits = Limits { no_progress: at(1000), total: at(1000), used: at(0) };
        type Work = fn(u64) -> Seen;
        let works: [Work; 4] = [
            |second| Seen::Blocks(BlockTotals { operations: second, ..BlockTotals::default() }),
            Seen::CacheBytes,
            |second| Seen::Processors(Duration::from_secs(second)),
            |_| screen(true, "Do you want to continue? [Y/n]"),
        ];
        for work in works {
            let mut watch = Watch::new("5fe7".into(), limits);
            for second in 0..200 {
                watch.see(at(second), screen(false, text));
                watch.see(at(second), work(second));
                assert_eq!(watch.look(at(second)), None);
            }
        }
    }

    #[test]
    fn a_flood_on_the_console_ends_the_run() {
        assert_eq!(class(watch().see(at(1), Seen::ConsoleBytes(MOST_CONSOLE_BYTES))), "running");
        assert_eq!(class(watch().see(at(1), Seen::ConsoleBytes(MOST_CONSOLE_BYTES + 1))), "console_flood");
    }

    #[test]
    fn a_file_that_upstream_refused_explains_a_failure_of_the_same_step_only() {
        let refused = |refusal| {
            let (path, reason) = ("/x.deb".into(), "no".into());
            Seen::Refused(Refused { path, refusal, status: None, reason })
        };
        let mut watch = watch();
        watch.see(at(1), refused(Refusal::Unavailable));
        watch.see(at(2), failed("configure"));
        assert_eq!(class(watch.see(at(3), Seen::QemuEnded(String::new()))), "download_failed");
        let mut other = self::watch();
        other.see(at(1), refused(Refusal::Unavailable));
        other.see(at(1), refused(Refusal::Unnamed));
        other.see(at(2), Seen::Control(Message::Stage("next".into())));
        other.see(at(2), refused(Refusal::Unnamed));
        other.see(at(2), failed("next"));
        assert_eq!(class(other.see(at(3), Seen::QemuEnded(String::new()))), "step_failed");
        let mut greedy = self::watch();
        greedy.see(at(1), refused(Refusal::Limit));
        greedy.see(at(2), failed("configure"));
        assert_eq!(class(greedy.see(at(3), Seen::QemuEnded(String::new()))), "download_limit");
    }

    #[test]
    fn a_full_host_disk_is_told_from_a_broken_one() {
        assert_eq!(class(watch().see(at(1), Seen::DiskError { no_space: true })), "host_disk_full");
        assert_eq!(class(watch().see(at(1), Seen::DiskError { no_space: false })), "host_disk_error");
    }

    fn any_seen() -> impl Strategy<Value = Seen> {
        prop_oneof![
            any::<u64>().prop_map(Seen::ConsoleBytes),
            any::<u64>().prop_map(Seen::CacheBytes),
            "[0-9a-f]{4}".prop_map(|nonce| done(&nonce)),
            Just(Seen::QemuEnded("exit status: 0".into())),
            Just(failed("x")),
            Just(Seen::Sign(full())),
            Just(screen(true, "Hostname: <Go Back>")),
            (0_u64..100).prop_map(|spent| Seen::Processors(at(spent))),
            Just(panic()),
            Just(Seen::Cancelled),
            Just(Seen::GuestEnded),
            any::<bool>().prop_map(|no_space| Seen::DiskError { no_space }),
        ]
    }

    proptest! {
        #[test]
        fn nothing_but_the_nonce_is_ever_success(events in prop::collection::vec(any_seen(), 0..40)) {
            let mut watch = Watch::new("a nonce nobody can guess".into(), LIMITS);
            for (second, seen) in (0..).zip(events) {
                prop_assert_ne!(watch.see(at(second), seen), Some(Outcome::Proven));
                prop_assert_ne!(watch.look(at(second)), Some(Outcome::Proven));
            }
        }

        #[test]
        fn every_run_ends_by_its_total_limit(events in prop::collection::vec(any_seen(), 0..40)) {
            let mut watch = watch();
            for (second, seen) in (0..).zip(events) {
                watch.see(at(second), seen);
            }
            prop_assert!(watch.look(LIMITS.left()).is_some());
        }
    }
}
