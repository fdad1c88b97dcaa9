//! `hostler run`.

use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use hostler_protocol::lease::Report;
use hostler_protocol::resource::{Kind, Outcome};
use hostler_protocol::text::without_controls;

use super::Failure;
use super::arguments::Global;
use super::exit::Exit;
use hostler_runner::calls::restore_default;
use hostler_runner::command::{Ended, supervise};
use hostler_runner::watchdog::{Lease, WatchdogError};

/// Arguments of `hostler run`.
#[derive(Debug, Args)]
pub(crate) struct RunArguments {
    /// What to call the lease; the command's name when absent.
    #[arg(long)]
    name: Option<String>,
    /// A directory of yours: loop devices whose files lie below it, and mounts made below it while
    /// the command runs, are taken back. Can be given more than once.
    #[arg(long = "claim", value_name = "DIR")]
    claims: Vec<PathBuf>,
    /// Like --claim, and the directory itself is removed with all it holds.
    #[arg(long = "scratch", value_name = "DIR")]
    scratches: Vec<PathBuf>,
    /// Run it even if no watchdog can be reached: then nothing is taken back.
    #[arg(long)]
    no_watchdog: bool,
    /// The command and its arguments.
    // No `allow_hyphen_values`: a misspelt flag of ours would be taken for the command.
    #[arg(required = true, trailing_var_arg = true, value_name = "CMD")]
    command: Vec<OsString>,
}

pub(crate) fn run(global: &Global, arguments: &RunArguments) -> Result<Exit, Failure> {
    let lease = open_lease(global, arguments)?;
    let ended = supervise(&arguments.command, |pidfd| -> Result<(), Failure> {
        if let Some(lease) = &lease {
            lease.adopt(pidfd)?;
        }
        Ok(())
    })?;
    if let Some(lease) = &lease {
        close(lease);
    }
    Ok(pass_on(ended))
}

fn open_lease(global: &Global, arguments: &RunArguments) -> Result<Option<Lease>, Failure> {
    let name = match (&arguments.name, arguments.command.first()) {
        (Some(name), _) => name.clone(),
        (None, Some(program)) => program.to_string_lossy().into_owned(),
        (None, None) => return Err(Failure::new(Exit::Usage, anyhow::anyhow!("no command was given"))),
    };
    let lease = match Lease::open(&global.socket, &name) {
        Ok(lease) => lease,
        Err(error @ WatchdogError::Unreachable { .. }) if arguments.no_watchdog => {
            tell(&format!("hostler: {error}; running without it: what the command leaves behind stays"));
            return Ok(None);
        }
        Err(error) => return Err(error.into()),
    };
    let claims = arguments.claims.iter().map(|path| (path, false));
    let scratches = arguments.scratches.iter().map(|path| (path, true));
    for (path, scratch) in claims.chain(scratches) {
        let directory = File::open(path)
            .with_context(|| format!("opening the claimed directory {}", path.display()))
            .map_err(|error| Failure::new(Exit::Usage, error))?;
        lease.claim(&directory, scratch)?;
    }
    Ok(Some(lease))
}

/// Closes the lease and tells what was left. Whatever happens here, the exit status stays the
/// command's.
fn close(lease: &Lease) {
    match lease.close() {
        Ok(report) => {
            for line in lines(&report) {
                tell(&format!("hostler: {line}"));
            }
        }
        Err(error) => tell(&format!("hostler: what the command left could not be taken back now: {error}")),
    }
}

/// What a person should know of a report: nothing when the command left nothing.
fn lines(report: &Report) -> Vec<String> {
    let mut lines = Vec::new();
    let mut counts = Vec::new();
    for (kind, one, many) in [
        (Kind::Process, "process", "processes"),
        (Kind::Mount, "mount", "mounts"),
        (Kind::Loop, "loop device", "loop devices"),
        (Kind::Map, "map", "maps"),
        (Kind::Nbd, "network block device", "network block devices"),
        (Kind::Swap, "swap area", "swap areas"),
        (Kind::Directory, "directory", "directories"),
    ] {
        let count = report
            .resources
            .iter()
            .filter(|resource| resource.kind == kind && resource.outcome == Outcome::Reclaimed)
            .count();
        match count {
            0 => {}
            1 => counts.push(format!("1 {one}")),
            _ => counts.push(format!("{count} {many}")),
        }
    }
    if !counts.is_empty() {
        lines.push(format!("took back what the command left: {}", counts.join(", ")));
    }
    for resource in &report.resources {
        match resource.outcome {
            Outcome::Reclaimed | Outcome::AlreadyGone | Outcome::Replaced => {}
            Outcome::Pinned | Outcome::Unknown => {
                let detail =
                    if resource.detail.is_empty() { "for an unknown reason" } else { &resource.detail };
                let (kind, name) = (resource.kind.name(), &resource.name);
                let more = match resource.kind {
                    Kind::Process | Kind::Mount | Kind::Loop | Kind::Map | Kind::Nbd | Kind::Swap => {
                        format!(", `hostler why {name}` tells more")
                    }
                    Kind::Directory | Kind::Cgroup => String::new(),
                };
                lines
                    .push(format!("{kind} {name} is still there: {detail}; the watchdog keeps trying{more}"));
            }
        }
    }
    lines
}

fn tell(line: &str) {
    // Standard error may be closed; the command's exit status is what counts.
    let _ = writeln!(io::stderr(), "{}", without_controls(line));
}

/// The command's end as this process's own.
fn pass_on(ended: Ended) -> Exit {
    match ended {
        Ended::Exited(status) => Exit::Other(status),
        Ended::Killed(signal) => {
            end_by(signal);
            // Only when the signal could not end this process: what a shell would report.
            Exit::Stopped(u8::try_from(signal).unwrap_or(u8::MAX))
        }
    }
}

/// Ends this process by the signal that ended the command, so that whoever waits for it sees the
/// same; without a core dump of its own.
fn end_by(signal: i32) {
    use nix::sys::signal::{SigSet, SigmaskHow, Signal, raise, sigprocmask};
    let Ok(signal) = Signal::try_from(signal) else { return };
    let none = rustix::process::Rlimit { current: Some(0), maximum: None };
    let _ = rustix::process::setrlimit(rustix::process::Resource::Core, none);
    let mut only = SigSet::empty();
    only.add(signal);
    let _ = sigprocmask(SigmaskHow::SIG_UNBLOCK, Some(&only), None);
    let _ = restore_default(signal);
    let _ = raise(signal);
}

#[cfg(test)]
mod tests {
    use hostler_protocol::lease::ResourceOutcome;

    use super::*;

    fn resource(kind: Kind, name: &str, outcome: Outcome, detail: &str) -> ResourceOutcome {
        let (name, detail) = (name.to_owned(), detail.to_owned());
        ResourceOutcome { kind, name, outcome, reasons: Vec::new(), detail }
    }

    #[test]
    fn a_clean_command_is_not_talked_about() {
        let report = Report {
            complete: true,
            seconds: 0.1,
            resources: vec![resource(Kind::Cgroup, "/c", Outcome::Reclaimed, "")],
        };
        assert_eq!(lines(&report), Vec::<String>::new());
    }

    #[test]
    fn what_was_left_is_counted_and_what_stays_is_explained() {
        let report = Report {
            complete: false,
            seconds: 0.1,
            resources: vec![
                resource(Kind::Process, "4", Outcome::Reclaimed, ""),
                resource(Kind::Mount, "/a", Outcome::Reclaimed, ""),
                resource(Kind::Mount, "/b", Outcome::Reclaimed, ""),
                resource(Kind::Loop, "/dev/loop3", Outcome::Pinned, "held by process 9 (cat, uid 7)"),
            ],
        };
        assert_eq!(
            lines(&report),
            [
                "took back what the command left: 1 process, 2 mounts",
                "loop /dev/loop3 is still there: held by process 9 (cat, uid 7); the watchdog keeps trying, `hostler why /dev/loop3` tells more",
            ]
        );
    }
}
