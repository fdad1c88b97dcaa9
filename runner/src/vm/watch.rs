//! Judges a running guest: what counts as success, as failure, as progress.
//!
//! Pure: it is told what was seen and when (time since the start), and says whether the run is
//! over. Success is one thing only, the guest's own nonce on the control port; a machine that ends
//! by itself, with whatever status, has failed. Deliberately absent: every descriptor, the clock,
//! and what to do about an ending.

use std::time::Duration;

use super::console::{Sign, SignKind};
use super::control::Message;
use super::outcome::{Failure, Outcome};
use super::qmp::BlockTotals;

/// How long a machine that asked for its own end may take to be gone, and for how long after a
/// step failed its last words are waited for.
const GRACE: Duration = Duration::from_secs(20);

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
    /// The console shows one of these.
    Sign(Sign),
    /// The guest wrote to its control port.
    Control(Message),
    /// What the disks did so far.
    Blocks(BlockTotals),
    /// What the mirror sent so far, in bytes.
    MirrorBytes(u64),
    /// A disk could not be used.
    DiskError {
        /// Whether the host's disk is full.
        no_space: bool,
    },
    /// The guest told the machine that it panicked.
    GuestPanicked,
    /// qemu ended, with this said about it.
    QemuEnded(String),
    /// qemu does not answer, or not sensibly.
    QemuUnresponsive(String),
    /// Someone wants the run to end.
    Cancelled,
}

/// The judge of one run.
#[derive(Debug)]
pub struct Watch {
    nonce: String,
    limits: Limits,
    progressed: Duration,
    console_bytes: u64,
    mirror_bytes: u64,
    blocks: BlockTotals,
    stage: Option<String>,
    suspicion: Option<Sign>,
    failed: Option<(Duration, Failure)>,
    over: Option<Outcome>,
}

impl Watch {
    /// A judge that accepts exactly `nonce`.
    #[must_use]
    pub fn new(nonce: String, limits: Limits) -> Self {
        Self {
            nonce,
            limits,
            progressed: Duration::ZERO,
            console_bytes: 0,
            mirror_bytes: 0,
            blocks: BlockTotals::default(),
            stage: None,
            suspicion: None,
            failed: None,
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
        self.blocks
    }

    /// When to look at the clock again at the latest.
    #[must_use]
    pub fn deadline(&self) -> Duration {
        let limits = self.limits.left().min(self.progressed.saturating_add(self.limits.no_progress));
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
            let stage = self.stage.clone();
            let late = if let Some((at, failure)) = &self.failed
                && now >= at.saturating_add(GRACE)
            {
                Some(failure.clone())
            } else if now >= self.limits.left() {
                Some(Failure::TimedOut { limit: self.limits.total, stage })
            } else if now >= self.progressed.saturating_add(self.limits.no_progress) {
                Some(Failure::Stalled { limit: self.limits.no_progress, stage })
            } else {
                None
            };
            self.over = late.map(|late| Outcome::Failed(self.earlier_or(late)));
        }
        self.over.clone()
    }

    /// `Some(None)` is success.
    fn judge(&mut self, now: Duration, seen: Seen) -> Option<Option<Failure>> {
        let ending = match seen {
            Seen::ConsoleBytes(bytes) => {
                if bytes > self.console_bytes {
                    self.console_bytes = bytes;
                    self.progressed = now;
                }
                return None;
            }
            Seen::MirrorBytes(bytes) => {
                if bytes > self.mirror_bytes {
                    self.mirror_bytes = bytes;
                    self.progressed = now;
                }
                return None;
            }
            Seen::Blocks(blocks) => {
                if blocks != self.blocks {
                    self.blocks = blocks;
                    self.progressed = now;
                }
                return None;
            }
            Seen::Sign(sign) => return self.judge_sign(sign).map(Some),
            Seen::Control(message) => return self.judge_message(now, message),
            Seen::DiskError { no_space: true } => Failure::HostDiskFull,
            Seen::DiskError { no_space: false } => Failure::HostDiskError,
            Seen::GuestPanicked => Failure::KernelPanic { line: "reported to the machine".to_owned() },
            Seen::QemuEnded(said) => self.earlier_or(Failure::QemuDied { said }),
            Seen::QemuUnresponsive(said) => Failure::QemuUnresponsive { said },
            Seen::Cancelled => Failure::Cancelled,
        };
        Some(Some(ending))
    }

    fn judge_sign(&mut self, sign: Sign) -> Option<Failure> {
        match sign.kind {
            SignKind::KernelPanic => Some(Failure::KernelPanic { line: sign.line }),
            SignKind::EmergencyMode => Some(Failure::Emergency { line: sign.line }),
            // These may be survived; they explain a failure that follows.
            SignKind::OutOfMemory | SignKind::NoSpaceInGuest | SignKind::DiskLost => {
                self.suspicion.get_or_insert(sign);
                None
            }
        }
    }

    fn judge_message(&mut self, now: Duration, message: Message) -> Option<Option<Failure>> {
        self.progressed = now;
        match message {
            Message::Stage(stage) => {
                self.stage = Some(stage);
                None
            }
            // The guest still has to print its last words and end; the first failure counts.
            Message::Failed { step, status } => {
                let sign = self.suspicion.clone();
                self.failed.get_or_insert((now, Failure::GuestFailed { step, status, sign }));
                None
            }
            Message::Done(nonce) if self.failed.is_none() && nonce == self.nonce => Some(None),
            Message::Done(_) => Some(Some(self.earlier_or(Failure::NoProof {
                instead: "a nonce that is not the one it was given".to_owned(),
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
            Some(Outcome::Failed(failure)) => failure.class(),
        }
    }

    fn done(nonce: &str) -> Seen {
        Seen::Control(Message::Done(nonce.into()))
    }

    fn failed(step: &str) -> Seen {
        Seen::Control(Message::Failed { step: step.into(), status: 1 })
    }

    fn sign(kind: SignKind) -> Seen {
        Seen::Sign(Sign { kind, line: "line".into() })
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
        assert_eq!(watch.see(at(1), sign(SignKind::NoSpaceInGuest)), None);
        assert_eq!(watch.see(at(2), failed("configure")), None);
        assert_eq!(watch.see(at(2), failed("later")), None);
        assert_eq!(
            watch.see(at(3), Seen::QemuEnded("exit status: 0".into())),
            Some(Outcome::Failed(Failure::GuestFailed {
                step: "configure".into(),
                status: 1,
                sign: Some(Sign { kind: SignKind::NoSpaceInGuest, line: "line".into() })
            }))
        );
        let mut other = self::watch();
        other.see(at(2), failed("configure"));
        assert_eq!(class(other.see(at(3), done("5fe7"))), "guest_failed");
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
        assert_eq!(class(watch.look(at(25))), "guest_failed");
    }

    #[test]
    fn a_panic_ends_at_once() {
        assert_eq!(class(watch().see(at(1), sign(SignKind::KernelPanic))), "kernel_panic");
    }

    #[test]
    fn every_source_of_progress_moves_the_deadline() {
        let sources = [
            Seen::ConsoleBytes(1),
            Seen::MirrorBytes(1),
            Seen::Blocks(BlockTotals { operations: 1, ..BlockTotals::default() }),
            Seen::Control(Message::Stage("x".into())),
        ];
        for seen in sources {
            let mut watch = watch();
            assert_eq!(watch.deadline(), at(10));
            watch.see(at(9), seen.clone());
            assert_eq!(watch.deadline(), at(19), "{seen:?}");
            // The same total again is no progress.
            if !matches!(seen, Seen::Control(_)) {
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
            Some(Outcome::Failed(Failure::Stalled { limit: at(10), stage: Some("mount".into()) }))
        );
        let mut chatty = watch();
        for second in 1..100 {
            assert_eq!(chatty.see(at(second), Seen::ConsoleBytes(second)), None);
            assert_eq!(chatty.look(at(second)), None);
        }
        // The message names the limit that the recipe has, not what was left of it.
        let limit = Duration::from_secs(160);
        assert_eq!(chatty.look(at(100)), Some(Outcome::Failed(Failure::TimedOut { limit, stage: None })));
    }

    #[test]
    fn a_full_host_disk_is_told_from_a_broken_one() {
        assert_eq!(class(watch().see(at(1), Seen::DiskError { no_space: true })), "host_disk_full");
        assert_eq!(class(watch().see(at(1), Seen::DiskError { no_space: false })), "host_disk_error");
    }

    fn any_seen() -> impl Strategy<Value = Seen> {
        prop_oneof![
            any::<u64>().prop_map(Seen::ConsoleBytes),
            any::<u64>().prop_map(Seen::MirrorBytes),
            "[0-9a-f]{4}".prop_map(|nonce| done(&nonce)),
            Just(Seen::QemuEnded("exit status: 0".into())),
            Just(failed("x")),
            Just(sign(SignKind::OutOfMemory)),
            Just(sign(SignKind::KernelPanic)),
            Just(Seen::Cancelled),
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
