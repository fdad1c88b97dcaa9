//! `hostler status`.

use std::io::IsTerminal;
use std::time::Duration;

use clap::Args;
use hostler_protocol::lease::{LeaseState, LeaseView};
use hostler_protocol::methods::{HostStatus, Status, StrayQemu};
use hostler_protocol::resource::{Outcome, ResourceView};
use hostler_protocol::text::without_controls;

use super::arguments::Global;
use super::exit::Exit;
use super::{Failure, json_text, print_on};
use hostler_runner::watchdog::Watchdog;

/// Arguments of `hostler status`.
#[derive(Debug, Args)]
pub(crate) struct StatusArguments {
    /// Show it again every two seconds, until Ctrl-C.
    #[arg(long)]
    watch: bool,
}

pub(crate) fn status(global: &Global, arguments: &StatusArguments) -> Result<Exit, Failure> {
    const INTERVAL: Duration = Duration::from_secs(2);
    loop {
        let status = Watchdog::connect(&global.socket)?.call(&Status {})?;
        let is_read = if global.json {
            print_on(&json_text(&status)?)?
        } else {
            let clear = if arguments.watch && std::io::stdout().is_terminal() { "\x1b[H\x1b[2J" } else { "" };
            print_on(&format!("{clear}{}", text(&status)))?
        };
        if !arguments.watch || !is_read {
            return Ok(Exit::Done);
        }
        std::thread::sleep(INTERVAL);
    }
}

/// The whole status as text, safe for a terminal.
fn text(status: &HostStatus) -> String {
    let limit = status.loops_limit.map_or_else(|| "no limit".to_owned(), |limit| format!("limit {limit}"));
    let mut text = format!("loop devices in use: {} ({limit})\n\n", status.loops_in_use);
    text.push_str(&lease_table(&status.leases));
    for lease in &status.leases {
        for resource in &lease.resources {
            text.push_str(&resource_line(&format!("lease {}", lease.lease), resource));
        }
    }
    if !status.others.is_empty() {
        text.push_str("\nof no lease:\n");
        for resource in &status.others {
            text.push_str(&resource_line("-", resource));
        }
    }
    if !status.stray_qemu.is_empty() {
        text.push_str("\nqemu of no lease, left alone:\n");
        for qemu in &status.stray_qemu {
            text.push_str(&qemu_line(qemu));
        }
    }
    if !status.gaps.is_empty() {
        text.push_str("\ncould not be read, so it is left alone:\n");
        for gap in &status.gaps {
            text.push_str(&format!("  {}\n", without_controls(gap)));
        }
    }
    text
}

fn qemu_line(qemu: &StrayQemu) -> String {
    let disks = if qemu.disks.is_empty() { "no disk".to_owned() } else { qemu.disks.join(", ") };
    let started_by =
        if qemu.started_by.is_empty() { "nobody who is known" } else { qemu.started_by.as_str() };
    let line = format!(
        "  process {} ({}, uid {}) for {}, started by {started_by}: {disks}",
        qemu.pid,
        qemu.program,
        qemu.uid,
        age(qemu.age_seconds)
    );
    format!("{}\n", without_controls(&line))
}

/// Two units are enough: "1h 5m".
fn age(seconds: f64) -> String {
    let age = humantime::format_duration(Duration::from_secs(seconds.max(0.0) as u64)).to_string();
    age.split(' ').take(2).collect::<Vec<_>>().join(" ")
}

fn resource_line(whose: &str, resource: &ResourceView) -> String {
    let line = format!(
        "  {whose:<10} {:<11} {:<9} {}  {}",
        resource.verdict.name(),
        resource.kind.name(),
        resource.name,
        resource.detail
    );
    format!("{}\n", without_controls(line.trim_end()))
}

/// One line a lease.
pub(crate) fn lease_table(leases: &[LeaseView]) -> String {
    if leases.is_empty() {
        return "no leases\n".to_owned();
    }
    let mut text = format!("{:<7} {:<11} {:>6} {:>8} {:>9}  NAME\n", "LEASE", "STATE", "UID", "OWNER", "AGE");
    for lease in leases {
        let line = format!(
            "{:<7} {:<11} {:>6} {:>8} {:>9}  {}{}",
            lease.lease.0,
            state_name(lease.state),
            lease.uid,
            lease.owner_pid,
            age(lease.age_seconds),
            lease.name,
            summary(lease)
        );
        text.push_str(&without_controls(&line));
        text.push('\n');
    }
    text
}

fn state_name(state: LeaseState) -> &'static str {
    match state {
        LeaseState::Open => "open",
        LeaseState::Closing => "closing",
        LeaseState::Reclaiming => "reclaiming",
        LeaseState::Pinned => "PINNED",
        LeaseState::Ended => "ended",
    }
}

/// What the last attempt to take it back came to.
fn summary(lease: &LeaseView) -> String {
    let Some(report) = &lease.report else { return String::new() };
    let count = |wanted| report.resources.iter().filter(|resource| resource.outcome == wanted).count();
    let stuck: Vec<String> = report
        .resources
        .iter()
        .filter(|resource| matches!(resource.outcome, Outcome::Pinned | Outcome::Unknown))
        .map(|resource| format!("{} {}", resource.kind.name(), resource.name))
        .collect();
    if stuck.is_empty() {
        format!("  [{} taken back in {:.2} s]", count(Outcome::Reclaimed), report.seconds)
    } else {
        format!("  [stuck: {}; see hostler why]", stuck.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use hostler_protocol::lease::{LeaseId, Tracking};
    use hostler_protocol::resource::{Kind, Verdict};

    use super::*;

    #[test]
    fn shows_who_owns_what_and_lets_no_escape_through() {
        let resource = ResourceView {
            kind: Kind::Mount,
            name: "/srv/\u{1b}[31m".to_owned(),
            detail: "ext4 on /dev/loop3".to_owned(),
            verdict: Verdict::Owned,
            lease: Some(LeaseId(7)),
        };
        let lease = LeaseView {
            lease: LeaseId(7),
            name: "kiwi".to_owned(),
            uid: 1000,
            owner_pid: 4242,
            state: LeaseState::Open,
            tracking: Tracking::Cgroup,
            age_seconds: 65.2,
            resources: vec![resource],
            report: None,
        };
        let status = HostStatus {
            version: "1".to_owned(),
            loops_in_use: 1,
            loops_limit: None,
            leases: vec![lease],
            others: Vec::new(),
            stray_qemu: vec![StrayQemu {
                pid: 77,
                uid: 1000,
                program: "qemu-system-x86_64".to_owned(),
                started_by: "process 5 (make)".to_owned(),
                disks: vec!["/a.qcow2".to_owned(), "/\u{1b}b".to_owned()],
                age_seconds: 3661.9,
            }],
            gaps: Vec::new(),
        };
        assert_eq!(
            text(&status),
            "loop devices in use: 1 (no limit)\n\n\
             LEASE   STATE          UID    OWNER       AGE  NAME\n\
             7       open          1000     4242     1m 5s  kiwi\n  \
             lease 7    owned       mount     /srv/\\u{1b}[31m  ext4 on /dev/loop3\n\n\
             qemu of no lease, left alone:\n  \
             process 77 (qemu-system-x86_64, uid 1000) for 1h 1m, started by process 5 (make): /a.qcow2, /\\u{1b}b\n"
        );
    }
}
