//! The command line: what was typed, and what is shown.
//!
//! The only part of the program that prints. Each subcommand returns its exit status, or an
//! [`Failure`] that is shown once, with its causes, and carries its own.

mod lease;
mod run;
mod show;
mod status;

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use hostler_protocol::DEFAULT_SOCKET;
use hostler_protocol::text::without_controls;

use crate::watchdog::WatchdogError;

/// Done.
pub const DONE: u8 = 0;
/// The build or the command failed.
pub const FAILED: u8 = 1;
/// What was typed or written is wrong.
pub const USAGE: u8 = 2;
/// The watchdog refused.
pub const REFUSED: u8 = 3;
/// The watchdog is not reachable.
pub const NO_WATCHDOG: u8 = 4;
/// This host cannot do it.
pub const UNFIT: u8 = 5;

/// Builds operating-system images in virtual machines, and shows what the watchdog knows.
///
/// Exit status: 0 done, 1 the build or command failed, 2 wrong usage, 3 refused, 4 the watchdog is
/// not reachable, 5 this host is not fit (`hostler doctor` tells why).
#[derive(Debug, Parser)]
#[command(name = "hostler", version)]
pub struct Arguments {
    /// What applies to every subcommand.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Flags of every subcommand.
#[derive(Clone, Debug, Args)]
pub struct Global {
    /// The watchdog's socket.
    #[arg(long, global = true, value_name = "PATH", env = "HOSTLER_SOCKET", default_value = DEFAULT_SOCKET)]
    pub socket: PathBuf,
    /// Print one JSON document instead of text.
    #[arg(long, global = true)]
    pub json: bool,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a command under a lease: what it leaves behind is taken back when it ends or dies.
    ///
    /// Exit status, signals and terminal are the command's.
    Run(run::RunArguments),
    /// Open, close and list leases, for jobs that are no single process.
    #[command(subcommand)]
    Lease(lease::LeaseCommand),
    /// Show leases, what belongs to them, and loop devices that belong to none.
    Status(status::StatusArguments),
    /// Show what holds a loop device, a mount point or a process.
    Why {
        /// A loop device (/dev/loop3), a mount point as findmnt shows it, or a process number.
        target: String,
    },
    /// Show what the watchdog would do now for leases that are over.
    Plan,
    /// End a lease and take back all of it now (root only).
    Reclaim {
        /// The lease's number, as `hostler status` shows it.
        #[arg(long, value_name = "ID")]
        lease: u64,
    },
}

/// Why a subcommand did not do what it should.
#[derive(Debug)]
pub struct Failure {
    status: u8,
    cause: anyhow::Error,
}

impl Failure {
    /// A failure with the exit status that scripts see.
    pub fn new(status: u8, cause: impl Into<anyhow::Error>) -> Self {
        Self { status, cause: cause.into() }
    }
}

impl From<WatchdogError> for Failure {
    fn from(error: WatchdogError) -> Self {
        let status = match error {
            WatchdogError::Unreachable { .. } => NO_WATCHDOG,
            WatchdogError::Refused(_) => REFUSED,
            WatchdogError::Socket(_) | WatchdogError::HungUp | WatchdogError::Nonsense { .. } => NO_WATCHDOG,
        };
        Self::new(status, error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::new(FAILED, error)
    }
}

/// Runs what was typed, and returns the exit status.
#[must_use]
pub fn main(arguments: Vec<OsString>) -> u8 {
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version are no errors; clap knows where each goes.
            let _ = error.print();
            return if error.use_stderr() { USAGE } else { DONE };
        }
    };
    let global = &arguments.global;
    let result = match arguments.command {
        Command::Run(run) => run::run(global, &run),
        Command::Lease(command) => lease::lease(global, &command),
        Command::Status(arguments) => status::status(global, &arguments),
        Command::Why { target } => show::why(global, &target),
        Command::Plan => show::plan(global),
        Command::Reclaim { lease } => lease::reclaim(global, lease),
    };
    result.unwrap_or_else(|failure| {
        tell_failure(&failure);
        failure.status
    })
}

fn tell_failure(failure: &Failure) {
    let mut line = "hostler".to_owned();
    for cause in failure.cause.chain() {
        line.push_str(": ");
        line.push_str(&cause.to_string());
    }
    let shown: Vec<String> = line.lines().map(without_controls).collect();
    // Standard error may be closed; the status still tells.
    let _ = writeln!(io::stderr(), "{}", shown.join("\n"));
}

/// Prints to standard output. A reader that went away (`| head`) ends the program quietly.
fn print(text: &str) -> Result<u8, Failure> {
    match io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()) {
        Ok(()) => Ok(DONE),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(DONE),
        Err(error) => Err(error.into()),
    }
}

/// Prints one JSON document.
fn print_json(document: &impl serde::Serialize) -> Result<u8, Failure> {
    let mut text = serde_json::to_string_pretty(document).map_err(|error| Failure::new(FAILED, error))?;
    text.push('\n');
    print(&text)
}
