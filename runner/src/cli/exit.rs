//! The exit statuses of `hostler`, a contract with scripts.

use std::process::ExitCode;

/// How the program ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done.
    Done,
    /// The build or the command failed.
    Failed,
    /// Wrong usage, or a wrong recipe.
    Usage,
    /// The watchdog refused.
    Refused,
    /// The watchdog is not reachable.
    NoWatchdog,
    /// The host is not fit.
    Unfit,
    /// A signal with this number told it to stop, and it did so in order.
    Stopped(u8),
    /// Another process of this program ended with this status.
    Other(u8),
}

impl Exit {
    /// The number that the caller sees.
    pub(crate) fn number(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::Refused => 3,
            Self::NoWatchdog => 4,
            Self::Unfit => 5,
            Self::Stopped(signal) => 128_u8.saturating_add(signal),
            Self::Other(status) => status,
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.number())
    }
}
