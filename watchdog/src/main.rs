//! `hostlerd`: the command line of the watchdog.

use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use hostler_watchdog::causes::chain;
use hostler_watchdog::config::{Config, ConfigError};
use hostler_watchdog::daemon::{self, DaemonError, Options};
use hostler_watchdog::{http, reader, worker};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::debug_fn;
use tracing_subscriber::prelude::*;

/// Takes back loop devices, mounts, processes and scratch directories that dead owners left behind.
///
/// Runs in the foreground. SIGHUP reads the configuration again; SIGTERM stops, and leases are
/// taken up again at the next start. HOSTLER_LOG sets what is logged (such as "debug").
#[derive(Debug, Parser)]
#[command(name = "hostlerd", version)]
struct Arguments {
    /// The configuration's file; without one, everything is as by default.
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Watch over this mount namespace only, although it is not the host's (tests, containers).
    #[arg(long)]
    own_mount_namespace: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Check a configuration's file: exit status 0, or what is wrong with its line.
    CheckConfig {
        /// The file.
        file: PathBuf,
    },
    /// Serve one request after the other on standard input; started by hostlerd itself.
    #[command(hide = true)]
    Worker,
    /// Serve one user's connections; started by hostlerd itself.
    #[command(hide = true)]
    Reader {
        /// The user.
        uid: u32,
        /// The group.
        gid: u32,
    },
    /// Serve the metrics; started by hostlerd itself.
    #[command(hide = true)]
    MetricsServer,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match arguments.command {
        Some(Command::CheckConfig { file }) => match Config::read(&file) {
            Ok(_) => ExitCode::SUCCESS,
            Err(error) => fail(&error, 2),
        },
        Some(Command::Worker) => match worker::serve() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error, 1),
        },
        Some(Command::Reader { uid, gid }) => match reader::serve(uid, gid) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error, 1),
        },
        Some(Command::MetricsServer) => match http::serve() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => fail(&error, 1),
        },
        None => {
            start_logging();
            let options =
                Options { config: arguments.config, own_mount_namespace: arguments.own_mount_namespace };
            match daemon::run(&options) {
                Ok(()) => ExitCode::SUCCESS,
                Err(error) => fail(&error, status_of(&error)),
            }
        }
    }
}

/// 2 for what was written wrong, 5 for a host that is not fit.
fn status_of(error: &DaemonError) -> u8 {
    match error {
        DaemonError::Config(ConfigError::Read { .. } | ConfigError::Invalid { .. })
        | DaemonError::NoGroup(_) => 2,
        DaemonError::NotRoot
        | DaemonError::Journal(_)
        | DaemonError::ForeignNamespace { .. }
        | DaemonError::UnclearNamespace(_)
        | DaemonError::Listen { .. }
        | DaemonError::Confine(_)
        | DaemonError::Kernel { .. } => 5,
    }
}

/// To the journal under systemd, where each field stays a field; else to standard error.
fn start_logging() {
    let filter = EnvFilter::try_from_env("HOSTLER_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    let registry = tracing_subscriber::registry().with(filter);
    let journal = std::env::var_os("JOURNAL_STREAM").and_then(|_| tracing_journald::layer().ok());
    let journal = journal.map(|journal| journal.with_field_prefix(Some("HOSTLER".to_owned())));
    match journal {
        Some(journal) => registry.with(journal).init(),
        None => {
            let colours = std::io::stderr().is_terminal();
            // The sentence says it all; the fields are for the journal, where they can be searched.
            let sentence = debug_fn(|writer, field, value| match field.name() {
                "message" => write!(writer, "{value:?}"),
                _ => Ok(()),
            });
            let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(colours);
            registry.with(lines.with_target(false).fmt_fields(sentence)).init();
        }
    }
}

fn fail(error: &dyn std::error::Error, status: u8) -> ExitCode {
    let line = format!("hostlerd: {}", chain(error));
    // Standard error may be closed; the status still tells.
    let _ = writeln!(std::io::stderr(), "{line}");
    ExitCode::from(status)
}
