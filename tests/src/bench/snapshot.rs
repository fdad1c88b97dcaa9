//! What a look at a busy host costs.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hostler_watchdog::model::SnapshotDepth;
use hostler_watchdog::worker::look;
use serde_json::json;

use super::cost;
use super::host::{Host, Size};
use super::raw::{self, Depth};
use super::report::{Goal, Row, Sample, Section, show};
use crate::daemon::{Daemon, Settings};
use crate::failure::OrFail;
use crate::place::Place;

/// Measures a host of that size, all ways by turns so many rounds.
///
/// # Panics
/// When anything does not go as it should.
#[must_use]
pub fn measure(place: &Place, size: Size, rounds: usize) -> Section {
    let daemon = Daemon::start(place, &Settings::default());
    let host = Host::make(place, size);
    let seen = check(&host);
    let pid = std::process::id().to_string();
    let mut client = daemon.client();
    let mut samples: [Sample; 9] = Default::default();
    for _ in 0..rounds {
        let mut turn = |which: usize, act: &mut dyn FnMut()| {
            let begun = Instant::now();
            act();
            samples[which].push(begun.elapsed());
        };
        turn(0, &mut || drop(look(SnapshotDepth::Ownership)));
        turn(1, &mut || assert!(raw::read(Depth::Ownership) > 0));
        turn(2, &mut || drop(client.call("Status", &json!({}), &[]).or_fail("the status")));
        turn(3, &mut || run("losetup", &["--json"]));
        turn(4, &mut || run("findmnt", &["--json"]));
        turn(5, &mut || drop(look(SnapshotDepth::Holders)));
        turn(6, &mut || assert!(raw::read(Depth::Holders) > 0));
        turn(7, &mut || drop(client.call("Why", &json!({ "target": pid }), &[]).or_fail("the reasons")));
        turn(8, &mut || run("lsof", &["-w"]));
    }
    let median = |which: usize| samples[which].median();
    let tools = median(3) + median(4);
    let with_lsof = tools + median(8);
    let (own, both) = ("`losetup --json` + `findmnt --json`", "these + `lsof -w`");
    let faster = Goal::TimesFaster(20.0);
    let rows = vec![
        Row::times("a look at who owns what", median(0), own, tools, Goal::None),
        Row::times("a look at who owns what", median(0), both, with_lsof, faster),
        Row::times("a look at who owns what", median(0), "raw reads", median(1), Goal::AtMost(1.5)),
        Row::times("the same through the daemon (`Status`)", median(2), own, tools, Goal::None),
        Row::times("the same through the daemon (`Status`)", median(2), both, with_lsof, faster),
        Row::times("a look at who holds what", median(5), both, with_lsof, faster),
        Row::times("a look at who holds what", median(5), "raw reads", median(6), Goal::AtMost(1.5)),
        Row::times("the same through the daemon (`Why`)", median(7), both, with_lsof, faster),
    ];
    let memory = cost::private_memory(&cost::processes(&daemon));
    drop(daemon);
    place.empty();
    let Size { loops, mounts, namespaces, processes } = host.size;
    Section {
        title: "A busy host".to_owned(),
        how: format!(
            "{loops} loop devices, {mounts} mounts in {namespaces} namespaces, {processes} processes, besides \
             what the host has. Medians of {rounds} rounds, all by turns. A look is the worker's function by \
             itself; through the daemon it is a client's call until its answer. Raw reads are of the same \
             files of the kernel's, without parsing. `findmnt` tells of one namespace only, the looks of all."
        ),
        rows,
        notes: vec![
            format!(
                "`losetup` took {}, `findmnt` {}, `lsof` {}.",
                show(median(3)),
                show(median(4)),
                show(median(8))
            ),
            seen,
            format!(
                "Afterwards the daemon and its workers' origin had {memory:.1} MiB of memory of their own."
            ),
        ],
    }
}

/// A look that missed what is there would be fast.
fn check(host: &Host) -> String {
    let seen = look(SnapshotDepth::Holders);
    let of_lines = |kind: &str| format!("{kind} that the look did not tell");
    assert!(seen.loops.len() >= host.size.loops, "{}", of_lines("loop devices"));
    assert!(seen.processes.len() >= host.size.processes, "{}", of_lines("processes"));
    assert!(seen.namespaces.len() + 1 >= host.size.namespaces, "{}", of_lines("namespaces"));
    let length = |depth| serde_json::to_vec(&look(depth)).map_or(0, |text| text.len() / 1024);
    format!(
        "It told of {} loop devices, {} mounts (of other namespaces only those that matter), {} processes with {} files; gaps: {}. As JSON from worker to daemon that is {} KiB, without what is held {} KiB.",
        seen.loops.len(),
        seen.mounts.len(),
        seen.processes.len(),
        seen.processes.iter().map(|process| process.files.len()).sum::<usize>(),
        seen.gaps.len(),
        length(SnapshotDepth::Holders),
        length(SnapshotDepth::Ownership)
    )
}

/// Runs a tool to its end and reads all that it says, as whoever uses it does.
fn run(tool: &str, arguments: &[&str]) {
    let mut command = Command::new(tool);
    command.args(arguments).stdin(Stdio::null()).stderr(Stdio::null());
    let output = command.output().or_fail(format_args!("running {tool}"));
    // lsof says 1 when anything could not be told.
    assert!(!output.stdout.is_empty(), "{tool} told nothing");
}

/// How long the host may take to be made and measured.
pub const LIMIT: Duration = Duration::from_secs(1800);
