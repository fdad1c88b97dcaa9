//! Commands of `hostler`.
//!
//! Only this module prints. Each command returns an [`Exit`]; an error is shown once, with its
//! chain of causes, and tells its own exit status.

mod arguments;
mod attach;
mod build;
mod cache;
mod confinement;
mod delegate;
mod doctor;
mod exit;
mod lease;
mod mirror;
mod progress;
mod registration;
mod run;
mod show;
mod signals;
mod status;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::Parser as _;

use arguments::{Arguments, Command};
use exit::Exit;
use hostler_runner::calls::restore_default;
use hostler_runner::causes::in_one_line;
use hostler_runner::watchdog::WatchdogError;
use nix::sys::signal::Signal;
use tracing_subscriber::EnvFilter;

/// Runs the program.
/// What is no failure and has no place in an answer is told on standard error: what a damaged cache costs, for
/// example. `HOSTLER_LOG` says how much of it; libraries tell errors only.
fn warn_on_stderr() {
    let filter =
        EnvFilter::try_from_env("HOSTLER_LOG").unwrap_or_else(|_| EnvFilter::new("error,hostler=warn"));
    let lines = tracing_subscriber::fmt().with_writer(io::stderr).without_time().with_target(false);
    lines.with_ansi(false).with_env_filter(filter).init();
}

pub(crate) fn main() -> ExitCode {
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version come this way as well. A closed output has no reader to tell.
            let _ = error.print();
            let wrong = error.exit_code() != 0;
            return if wrong { Exit::Usage.into() } else { Exit::Done.into() };
        }
    };
    warn_on_stderr();
    // A caller that ignores SIGCHLD has its children ignore it, and then no process hears of the end of its own.
    // `run` hears of its command's, which is to start with what the caller wanted.
    if !matches!(arguments.command, Command::Run(_)) {
        let _ = restore_default(Signal::SIGCHLD);
    }
    let exit = match arguments.command {
        Command::Build(wanted) => build::main(&arguments.global, &wanted),
        Command::Unprivileged(wanted) => delegate::go_on_as_builder(&arguments.global, &wanted),
        Command::Attach { directory } => shown(attach::attach(&directory)),
        Command::Doctor(wanted) => doctor::main(&arguments.global, &wanted),
        Command::Run(wanted) => shown(run::run(&arguments.global, &wanted)),
        Command::Lease(command) => shown(lease::lease(&arguments.global, &command)),
        Command::Status(wanted) => shown(status::status(&arguments.global, &wanted)),
        Command::Why { target } => shown(show::why(&arguments.global, &target)),
        Command::Plan => shown(show::plan(&arguments.global)),
        Command::Cache(wanted) => shown(cache::cache(&arguments.global, wanted)),
        Command::Mirror(command) => shown(mirror::mirror(&arguments.global, command)),
        Command::Reclaim(wanted) => shown(lease::reclaim(&arguments.global, &wanted)),
    };
    exit.into()
}

/// Why a subcommand did not do what it should, and the exit status that scripts see.
#[derive(Debug)]
pub(crate) struct Failure {
    exit: Exit,
    cause: anyhow::Error,
}

impl Failure {
    pub(crate) fn new(exit: Exit, cause: impl Into<anyhow::Error>) -> Self {
        Self { exit, cause: cause.into() }
    }
}

impl From<WatchdogError> for Failure {
    fn from(error: WatchdogError) -> Self {
        let exit = match error {
            WatchdogError::Refused(_) => Exit::Refused,
            WatchdogError::Unreachable { .. }
            | WatchdogError::Socket(_)
            | WatchdogError::HungUp
            | WatchdogError::Nonsense { .. } => Exit::NoWatchdog,
        };
        Self::new(exit, error)
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        Self::new(Exit::Failed, error)
    }
}

/// Shows a failure once, with its causes.
fn shown(result: Result<Exit, Failure>) -> Exit {
    result.unwrap_or_else(|failure| {
        build::tell(&format!("hostler: {}", in_one_line(failure.cause.as_ref())));
        failure.exit
    })
}

/// Prints to standard output. A reader that went away (`| head`) ends the program quietly.
fn print(text: &str) -> Result<Exit, Failure> {
    print_on(text).map(|_| Exit::Done)
}

/// The same; whether anybody still reads.
fn print_on(text: &str) -> Result<bool, Failure> {
    match io::stdout().write_all(text.as_bytes()).and_then(|()| io::stdout().flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Prints one JSON document.
fn print_json(document: &impl serde::Serialize) -> Result<Exit, Failure> {
    print(&json_text(document)?)
}

fn json_text(document: &impl serde::Serialize) -> Result<String, Failure> {
    let mut text =
        serde_json::to_string_pretty(document).map_err(|error| Failure::new(Exit::Failed, error))?;
    text.push('\n');
    Ok(text)
}
