//! How a run can end: one way to succeed, a closed set of ways to fail.
//!
//! Plain data with its wording. Deliberately absent: how an ending is found, which is [`super::watch`].

use std::fmt;
use std::time::Duration;

use super::console::Sign;

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest gave its proof.
    Proven,
    /// Anything else.
    Failed(Failure),
}

/// Why a run failed. Closed: a new kind is a decision.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The guest's kernel gave up.
    KernelPanic {
        /// Its line.
        line: String,
    },
    /// A step in the guest failed and told so.
    GuestFailed {
        /// The step.
        step: String,
        /// Its exit status.
        status: i32,
        /// What the console showed that may be the reason.
        sign: Option<Sign>,
    },
    /// The guest stopped at a question for a person.
    Emergency {
        /// The line that says so.
        line: String,
    },
    /// The guest ended, or claimed to be done, without the right proof.
    NoProof {
        /// What came instead.
        instead: String,
    },
    /// qemu ended without the guest having been done.
    QemuDied {
        /// Its exit and what it printed.
        said: String,
    },
    /// qemu does not answer.
    QemuUnresponsive {
        /// What was wrong.
        said: String,
    },
    /// Nothing happened for too long.
    Stalled {
        /// The limit.
        limit: Duration,
        /// The step in which it was.
        stage: Option<String>,
    },
    /// The build took too long as a whole.
    TimedOut {
        /// The build's limit.
        limit: Duration,
        /// The step in which it was.
        stage: Option<String>,
    },
    /// The host's disk is full.
    HostDiskFull,
    /// The host's disk gave an error.
    HostDiskError,
    /// It was told to stop.
    Cancelled,
}

impl Failure {
    /// The class in one word, for logs and metrics.
    #[must_use]
    pub fn class(&self) -> &'static str {
        match self {
            Self::KernelPanic { .. } => "kernel_panic",
            Self::GuestFailed { .. } => "guest_failed",
            Self::Emergency { .. } => "emergency",
            Self::NoProof { .. } => "no_proof",
            Self::QemuDied { .. } => "qemu_died",
            Self::QemuUnresponsive { .. } => "qemu_unresponsive",
            Self::Stalled { .. } => "stalled",
            Self::TimedOut { .. } => "timeout",
            Self::HostDiskFull => "host_disk_full",
            Self::HostDiskError => "host_disk_error",
            Self::Cancelled => "cancelled",
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let within = |stage: &Option<String>| match stage {
            Some(stage) => format!("in step {stage}"),
            None => "before its first step".to_owned(),
        };
        match self {
            Self::KernelPanic { line } => write!(formatter, "the guest's kernel panicked: {line}"),
            Self::GuestFailed { step, status, sign } => {
                write!(formatter, "step {step} in the guest failed with status {status}")?;
                match sign {
                    Some(sign) => write!(formatter, "; the console says: {}", sign.line),
                    None => Ok(()),
                }
            }
            Self::Emergency { line } => {
                write!(formatter, "the guest waits for a person: {line}")
            }
            Self::NoProof { instead } => {
                write!(formatter, "the guest gave no proof of success: {instead}")
            }
            Self::QemuDied { said } => write!(formatter, "qemu ended before the guest: {said}"),
            Self::QemuUnresponsive { said } => write!(formatter, "qemu does not respond: {said}"),
            Self::Stalled { limit, stage } => write!(
                formatter,
                "the guest showed no sign of progress for {} {}",
                humantime::format_duration(*limit),
                within(stage)
            ),
            Self::TimedOut { limit, stage } => write!(
                formatter,
                "the guest was not done within the build's total limit of {}; it was {}",
                humantime::format_duration(*limit),
                within(stage)
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
