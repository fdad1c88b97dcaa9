//! `hostler lease` and `hostler reclaim`.

use std::fs::File;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anyhow::Context;
use clap::Subcommand;
use hostler_protocol::lease::{Epoch, LeaseId, Report};
use hostler_protocol::methods::{Reclaim, Status};
use hostler_protocol::text::without_controls;
use rustix::process::{Pid, PidfdFlags, getppid, pidfd_open};

use super::arguments::{self, Global};
use super::exit::Exit;
use super::{Failure, print, print_json};
use hostler_runner::watchdog::{Lease, Watchdog};

/// `hostler lease …`
#[derive(Debug, Subcommand)]
pub(crate) enum LeaseCommand {
    /// Open a lease for a process that lives as long as the job, and print its token.
    Open {
        /// What to call it.
        #[arg(long, default_value = "job")]
        name: String,
        /// The process whose death ends the lease; the one that started hostler when absent.
        #[arg(long, value_name = "PID")]
        owner: Option<i32>,
        /// A directory of yours to claim; can be given more than once.
        #[arg(long = "claim", value_name = "DIR")]
        claims: Vec<PathBuf>,
        /// A directory of yours to claim, and to remove when the lease ends.
        #[arg(long = "scratch", value_name = "DIR")]
        scratches: Vec<PathBuf>,
    },
    /// Close a lease, and wait until what it left is gone. Exit status 1 when something is not.
    Close {
        /// What `hostler lease open` printed.
        token: Token,
    },
    /// List the leases.
    List,
}

/// A lease's number and fence, as scripts keep it: `NUMBER:EPOCH`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Token {
    lease: LeaseId,
    epoch: Epoch,
}

impl FromStr for Token {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let parts = text.split_once(':').and_then(|(lease, epoch)| {
            Some(Self { lease: LeaseId(lease.parse().ok()?), epoch: Epoch(epoch.parse().ok()?) })
        });
        parts.ok_or_else(|| {
            "a token is what `hostler lease open` printed, such as 12:1700000000000".to_owned()
        })
    }
}

pub(crate) fn lease(global: &Global, command: &LeaseCommand) -> Result<Exit, Failure> {
    match command {
        LeaseCommand::Open { name, owner, claims, scratches } => {
            open(global, name, *owner, claims, scratches)
        }
        LeaseCommand::Close { token } => {
            tell_report(global, &Lease::known(&global.socket, token.lease, token.epoch).close()?)
        }
        LeaseCommand::List => {
            let status = Watchdog::connect(&global.socket)?.call(&Status {})?;
            if global.json {
                return print_json(&status.leases);
            }
            print(&super::status::lease_table(&status.leases))
        }
    }
}

fn open(
    global: &Global,
    name: &str,
    owner: Option<i32>,
    claims: &[PathBuf],
    scratches: &[PathBuf],
) -> Result<Exit, Failure> {
    let pid = match owner {
        Some(pid) => Pid::from_raw(pid),
        None => getppid(),
    };
    let pid = pid
        .ok_or_else(|| Failure::new(Exit::Usage, anyhow::anyhow!("--owner takes the number of a process")))?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty())
        .with_context(|| format!("process {} cannot own a lease", pid.as_raw_nonzero()))
        .map_err(|error| Failure::new(Exit::Usage, error))?;
    let lease = Lease::open_for(&global.socket, name, &pidfd)?;
    let all = claims.iter().map(|path| (path, false)).chain(scratches.iter().map(|path| (path, true)));
    for (path, scratch) in all {
        let claimed = File::open(path)
            .with_context(|| format!("opening the claimed directory {}", path.display()))
            .map_err(|error| Failure::new(Exit::Usage, error))
            .and_then(|directory| lease.claim(&directory, scratch).map_err(Failure::from));
        if let Err(failure) = claimed {
            // Half a lease is none: the script has no token to close it with.
            lease.close()?;
            return Err(failure);
        }
    }
    let opened = lease.opened();
    if global.json {
        return print_json(&opened);
    }
    print(&format!("{}:{}\n", opened.lease.0, opened.epoch.0))
}

pub(crate) fn reclaim(global: &Global, wanted: &arguments::Reclaim) -> Result<Exit, Failure> {
    let call = Reclaim { lease: wanted.lease.map(LeaseId), target: wanted.target.clone() };
    let limit = Duration::from_secs(600);
    let report = Watchdog::connect(&global.socket)?.call_with(&call, &[], limit)?.report;
    tell_report(global, &report)
}

fn tell_report(global: &Global, report: &Report) -> Result<Exit, Failure> {
    if global.json {
        print_json(report)?;
    } else {
        let mut text = String::new();
        for resource in &report.resources {
            let line = format!("{} {}: {}", resource.kind.name(), resource.name, resource.outcome.name());
            text.push_str(&without_controls(&line));
            if !resource.detail.is_empty() {
                text.push_str(&without_controls(&format!(" ({})", resource.detail)));
            }
            text.push('\n');
        }
        print(&text)?;
    }
    Ok(if report.complete { Exit::Done } else { Exit::Failed })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_its_own_token_and_nothing_else() {
        assert_eq!("12:34".parse(), Ok(Token { lease: LeaseId(12), epoch: Epoch(34) }));
        for wrong in ["", "12", "12:", "a:b", "12:34:56", "-1:2"] {
            assert!(wrong.parse::<Token>().is_err(), "{wrong}");
        }
    }
}
