//! How a run can end: one way to succeed, a closed set of ways to fail.
//!
//! Plain data with its wording. Deliberately absent: how an ending is found, which is [`super::watch`].

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use crate::cache::Refusal;
use crate::class::Class;
use crate::signs::Finding;

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest gave its proof.
    Proven,
    /// Anything else.
    Failed(Failure),
}

/// A file that the guest asked the mirror for and did not get.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Refused {
    /// The path, as the guest asked for it.
    pub path: String,
    /// What kind of refusal it is.
    pub refusal: Refusal,
    /// What upstream answered, where it was asked and did.
    pub status: Option<u16>,
    /// What went wrong, with its causes.
    pub reason: String,
}

impl Refused {
    /// The class of a failure that it explains.
    fn class(&self) -> Class {
        match self.refusal {
            Refusal::Limit => Class::DownloadLimit,
            Refusal::Beside => Class::RecipeFiles,
            Refusal::Unnamed | Refusal::Unavailable => Class::DownloadFailed,
        }
    }

    /// The file's name and why it did not come; no control characters.
    #[must_use]
    pub fn told(&self) -> String {
        let name = self.path.rsplit('/').next().unwrap_or(&self.path);
        let text = match self.status {
            Some(status) => format!("{name}: upstream answered {status}"),
            None => format!("{name}: {}", self.reason),
        };
        text.chars().filter(|character| !character.is_control()).take(300).collect()
    }
}

/// What a machine's processors did while nothing else was to be seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activity {
    /// Next to nothing.
    Idle,
    /// They computed.
    Busy,
}

/// What explains a failure beside the failure itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Because {
    /// Something that was said before and that may be the reason.
    pub sign: Option<Box<Finding>>,
    /// A file that upstream refused.
    pub refused: Option<Box<Refused>>,
}

/// Why a run failed. Closed: a new kind is a decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// A rule recognised what the guest or its installer said.
    Recognised {
        /// What it said.
        finding: Box<Finding>,
        /// What explains it.
        because: Because,
    },
    /// The guest's kernel told the machine that it panicked.
    PanicReported,
    /// A step in the guest failed and told so.
    StepFailed {
        /// The step.
        step: String,
        /// Its exit status.
        status: i32,
        /// What explains it.
        because: Because,
    },
    /// The console ends in what looks like a question, and nothing moves.
    WaitingForInput {
        /// The last line.
        prompt: String,
    },
    /// The guest ended, or claimed to be done, without the right proof.
    NoProof {
        /// What came instead.
        instead: String,
        /// What explains it.
        because: Because,
    },
    /// qemu ended without the guest having been done.
    QemuDied {
        /// Its exit and what it printed.
        said: String,
        /// What explains it.
        because: Because,
    },
    /// qemu does not answer.
    QemuUnresponsive {
        /// What was wrong.
        said: String,
    },
    /// The guest never said anything.
    NeverBooted {
        /// For how long.
        limit: Duration,
    },
    /// Nothing happened for too long.
    Stalled {
        /// The limit.
        limit: Duration,
        /// The step in which it was.
        stage: Option<String>,
        /// What its processors did.
        activity: Activity,
    },
    /// The build took too long as a whole.
    TimedOut {
        /// The build's limit.
        limit: Duration,
        /// The step in which it was.
        stage: Option<String>,
    },
    /// The console printed too much.
    ConsoleFlood {
        /// How much, in bytes.
        bytes: u64,
    },
    /// The host's disk is full.
    HostDiskFull,
    /// The host's disk gave an error.
    HostDiskError,
    /// It was told to stop.
    Cancelled,
}

impl Failure {
    /// The class. What explains a failure names it where the failure itself says nothing but that there
    /// is one.
    #[must_use]
    pub fn class(&self) -> Class {
        match self {
            Self::Recognised { finding, because } => match finding.class {
                Class::InstallerError => because.class().unwrap_or(Class::InstallerError),
                // The screen only says that a download failed.
                Class::DownloadFailed => {
                    because.refused.as_ref().map_or(Class::DownloadFailed, |refused| refused.class())
                }
                class => class,
            },
            Self::PanicReported => Class::KernelPanic,
            Self::StepFailed { because, .. } => because.class().unwrap_or(Class::StepFailed),
            Self::WaitingForInput { .. } => Class::WaitingForInput,
            Self::NoProof { .. } => Class::NoProof,
            Self::QemuDied { .. } => Class::QemuDied,
            Self::QemuUnresponsive { .. } => Class::QemuUnresponsive,
            Self::NeverBooted { .. } => Class::BootFailed,
            Self::Stalled { .. } => Class::Stalled,
            Self::TimedOut { .. } => Class::Timeout,
            Self::ConsoleFlood { .. } => Class::ConsoleFlood,
            Self::HostDiskFull => Class::HostDiskFull,
            Self::HostDiskError => Class::HostDiskError,
            Self::Cancelled => Class::Cancelled,
        }
    }

    /// The rules that led to it, the decisive one first.
    #[must_use]
    pub fn findings(&self) -> Vec<&Finding> {
        match self {
            Self::Recognised { finding, because } => {
                std::iter::once(finding).chain(&because.sign).map(Box::as_ref).collect()
            }
            Self::StepFailed { because, .. }
            | Self::NoProof { because, .. }
            | Self::QemuDied { because, .. } => because.sign.iter().map(Box::as_ref).collect(),
            _ => Vec::new(),
        }
    }
}

impl Because {
    fn class(&self) -> Option<Class> {
        let refused = self.refused.as_ref().map(|refused| refused.class());
        match self.sign.as_ref().map(|sign| sign.class) {
            Some(Class::DownloadFailed) | None => refused.or(self.sign.as_ref().map(|sign| sign.class)),
            sign => sign,
        }
    }

    /// What is put behind a failure's own text.
    fn behind(&self) -> String {
        let sign = self.sign.as_ref().map(|sign| format!("; {sign}"));
        let refused =
            self.refused.as_ref().map(|refused| format!("; it could not download {}", refused.told()));
        [sign, refused].into_iter().flatten().collect()
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let within = |stage: &Option<String>| match stage {
            Some(stage) => format!("in step {stage}"),
            None => "before its first step".to_owned(),
        };
        match self {
            // The screen only says that a download failed; the mirror knows which and why.
            Self::Recognised { finding, because: Because { refused: Some(refused), .. } }
                if finding.class == Class::DownloadFailed =>
            {
                write!(formatter, "{} could not download {}", finding.speaker, refused.told())
            }
            Self::Recognised { finding, because } => write!(formatter, "{finding}{}", because.behind()),
            Self::PanicReported => formatter.write_str("the guest's kernel panicked and told the machine so"),
            Self::StepFailed { step, status, because } => {
                write!(formatter, "step {step} in the guest failed with status {status}{}", because.behind())
            }
            Self::WaitingForInput { prompt } => {
                write!(formatter, "the guest waits for somebody to answer: {prompt}")
            }
            Self::NoProof { instead, because } => {
                write!(formatter, "the guest gave no proof of success: {instead}{}", because.behind())
            }
            Self::QemuDied { said, because } => {
                write!(formatter, "qemu ended before the guest: {said}{}", because.behind())
            }
            Self::QemuUnresponsive { said } => write!(formatter, "qemu does not respond: {said}"),
            Self::NeverBooted { limit } => write!(
                formatter,
                "the guest printed next to nothing in {}: it did not start to boot, or its console is not the serial port",
                humantime::format_duration(*limit)
            ),
            Self::Stalled { limit, stage, activity } => write!(
                formatter,
                "the guest showed no sign of progress for {} {}; its processors were {}",
                humantime::format_duration(*limit),
                within(stage),
                match activity {
                    Activity::Idle => "idle",
                    Activity::Busy => "busy all the time",
                }
            ),
            Self::TimedOut { limit, stage } => write!(
                formatter,
                "the guest was not done within the build's total limit of {}; it was {}",
                humantime::format_duration(*limit),
                within(stage)
            ),
            Self::ConsoleFlood { bytes } => write!(
                formatter,
                "the guest printed {} on its console, so it prints the same for ever",
                bytesize::ByteSize(*bytes)
            ),
            Self::HostDiskFull => formatter
                .write_str("the disk of this host is full; free some space where the scratch directory lies"),
            Self::HostDiskError => {
                formatter.write_str("the disk of this host gave an error; see its kernel's log")
            }
            Self::Cancelled => formatter.write_str("it was told to stop"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::signs::{Place, Rules};

    fn refused() -> Box<Refused> {
        Box::new(Refused {
            path: "/debian/pool/main/e/e2fsprogs/e2fsprogs-udeb_1.47.0-2_amd64.udeb".into(),
            refusal: Refusal::Unavailable,
            status: Some(404),
            reason: "the server says so".into(),
        })
    }

    fn finding(place: Place, text: &str) -> Box<Finding> {
        Box::new(Rules::builtin().find(place, text).unwrap())
    }

    #[test]
    fn a_person_reads_which_file_it_was_where_the_screen_only_says_that_one_failed() {
        let finding =
            finding(Place::Screen, "[!!] Download installer components Downloading a file failed: Retry?");
        let because = |refused| Because { sign: None, refused: Some(refused) };
        let limit = Box::new(Refused { refusal: Refusal::Limit, ..*refused() });
        let greedy = Failure::Recognised { finding: finding.clone(), because: because(limit) };
        assert_eq!(greedy.class(), Class::DownloadLimit);
        let beside = Box::new(Refused { refusal: Refusal::Beside, status: None, ..*refused() });
        let own = Failure::Recognised { finding: finding.clone(), because: because(beside) };
        assert_eq!(own.class(), Class::RecipeFiles);
        let failure = Failure::Recognised { finding, because: because(refused()) };
        assert_eq!(failure.class(), Class::DownloadFailed);
        assert_eq!(
            failure.to_string(),
            "debian-installer could not download e2fsprogs-udeb_1.47.0-2_amd64.udeb: upstream answered 404"
        );
    }

    #[test]
    fn an_explanation_names_the_class_of_a_failure_that_says_nothing() {
        let step = |because| Failure::StepFailed { step: "run-1".into(), status: 1, because };
        assert_eq!(step(Because::default()).class(), Class::StepFailed);
        let full = finding(Place::Line, "tar: x: No space left on device");
        let failure = step(Because { sign: Some(full), refused: None });
        assert_eq!(failure.class(), Class::DiskFull);
        assert_eq!(
            failure.to_string(),
            "step run-1 in the guest failed with status 1; the guest has a full file system: tar: x: No space left on device"
        );
        let refused = step(Because { sign: None, refused: Some(refused()) });
        assert_eq!(refused.class(), Class::DownloadFailed);
    }

    #[test]
    fn what_a_guest_asked_for_moves_no_cursor() {
        let refused = Refused {
            path: "/a/\u{1b}[2Jb".into(),
            refusal: Refusal::Unavailable,
            status: None,
            reason: "x\ny".into(),
        };
        assert_eq!(refused.told(), "[2Jb: xy");
    }
}
