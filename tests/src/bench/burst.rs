//! Many stacks that leak together, and what of taking them back the kernel does one after the other.

use std::time::{Duration, Instant};

use super::report::{Goal, Row, Sample, Section, show};
use super::stack::{Leak, Stack, directories};
use super::steps;
use super::ways::{Way, Ways, at_once};
use crate::daemon::{Daemon, Settings};
use crate::failure::OrFail;
use crate::place::Place;

/// Measures so many stacks, and all ways by turns so many rounds.
///
/// # Panics
/// When anything does not go as it should.
#[must_use]
pub fn measure(place: &Place, stacks: usize, rounds: usize) -> Section {
    let daemon = Daemon::start(place, &Settings::default());
    let directories = directories(place, stacks);
    let ways = Ways { place, daemon: &daemon, directories: &directories, interval: Duration::from_millis(1) };
    let mut samples: [Sample; 4] = Default::default();
    let all = [Way::Daemon, Way::Janitor, Way::Threads, Way::Calls];
    for round in 0..rounds {
        for turn in 0..all.len() {
            let which = (round + turn) % all.len();
            samples[which].push(ways.by(all[which]));
        }
    }
    let [own, janitor, threads, calls] = &samples;
    let line = |against: &str, other: &Sample, goal| {
        Row::times("from the first SIGKILL until all is gone", own.median(), against, other.median(), goal)
    };
    let by_threads = format!("bare calls of {stacks} threads");
    Section {
        title: format!("{stacks} stacks at once"),
        how: format!(
            "As above, {stacks} times at once, each under a lease of its own. Medians of {rounds} rounds, all \
             ways by turns. The janitor is `tests/src/bench/janitor.sh`."
        ),
        rows: vec![
            line("a careful shell janitor", janitor, Goal::AtMost(0.3)),
            line(&by_threads, threads, Goal::AtMost(1.2)),
            line("bare calls, one after the other", calls, Goal::None),
        ],
        notes: vec![steps::told_by(&daemon.log()), what_the_kernel_does_in_turn(place, &directories)],
    }
}

/// A part of taking back, with its name.
type Part = (&'static str, fn(&Stack));

/// All of them, in order.
const PARTS: [Part; 4] = [
    ("kill, wait", Stack::end_process),
    ("`umount2` of three bind mounts", |stack| stack.unmount_inside().or_fail("unmounting what is inside")),
    ("`umount2` of the file system", |stack| stack.unmount_root().or_fail("unmounting")),
    ("open, `LOOP_CLR_FD`, close", |stack| stack.detach().or_fail("detaching")),
];

/// Does each part to all stacks, by more and more threads: what a second thread does not make faster is
/// done one after the other.
fn what_the_kernel_does_in_turn(place: &Place, directories: &[std::path::PathBuf]) -> String {
    const ROUNDS: usize = 3;
    let counts = [1, 2, 8, directories.len()];
    let mut samples: [[Sample; 4]; 4] = Default::default();
    for _ in 0..ROUNDS {
        for (threads, samples) in counts.iter().zip(&mut samples) {
            let leaks: Vec<Leak> =
                directories.iter().map(|directory| Leak::unknown(place, directory)).collect();
            for ((_, part), sample) in PARTS.iter().zip(samples) {
                let begun = at_once(&leaks, *threads, |leak| part(leak.stack()));
                sample.push(Instant::now() - begun);
            }
        }
    }
    let heading: Vec<String> = counts.iter().map(|count| format!("{count} threads")).collect();
    let mut text = format!(
        "What the kernel does one after the other: each part done to all {} stacks before the next one, by so many threads (medians of {ROUNDS}).\n\n| part | {} |\n|---|---|---|---|---|\n",
        directories.len(),
        heading.join(" | ")
    );
    for (part, (name, _)) in PARTS.iter().enumerate() {
        let times: Vec<String> = samples.iter().map(|samples| show(samples[part].median())).collect();
        text.push_str(&format!("| {name} | {} |\n", times.join(" | ")));
    }
    text
}
