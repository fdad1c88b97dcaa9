//! What a daemon and its workers cost: CPU time, wake-ups, memory, as the kernel counts them.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::daemon::Daemon;
use crate::failure::OrFail;
use crate::processes;

/// Longest wait until a daemon has nothing to do.
const PATIENCE: Duration = Duration::from_secs(60);
/// Nothing of the daemon's own takes this long to begin after an event.
const QUIET: Duration = Duration::from_millis(60);

/// The daemon's process, and those that it keeps: its workers' origin, and the readers of users who are
/// connected. Workers themselves come and go.
#[must_use]
pub fn processes(daemon: &Daemon<'_>) -> Vec<u32> {
    let kept = processes::children(daemon.pid()).into_iter().map(|child| child.pid);
    std::iter::once(daemon.pid()).chain(kept).collect()
}

/// Reads a file of each task of a process.
fn of_tasks(pid: u32, file: &str) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task"));
    tasks
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|task| fs::read_to_string(task.path().join(file)).ok())
        .collect()
}

/// The time that the daemon and all that it started were running, also what has ended: as their control group
/// counts it, in which the test itself is not.
///
/// # Panics
/// When the host has no control groups of version 2, or does not let them be read.
#[must_use]
pub fn cpu_time(daemon: &Daemon<'_>) -> Duration {
    let groups = daemon.place().groups().iter().map(|group| group.join("cpu.stat"));
    let text = groups.filter_map(|file| fs::read_to_string(file).ok()).next();
    let text = text.or_fail("cpu.stat of a control group of version 2");
    let line = text.lines().find_map(|line| line.strip_prefix("usage_usec ")).or_fail("usage_usec");
    Duration::from_micros(line.parse().or_fail("a number"))
}

/// How often the tasks of these processes stopped running: each wake-up ends so.
#[must_use]
pub fn switches(pids: &[u32]) -> u64 {
    let of_line = |line: &str| {
        let (name, count) = line.split_once(':')?;
        name.ends_with("voluntary_ctxt_switches").then(|| count.trim().parse::<u64>().ok())?
    };
    let tasks = pids.iter().flat_map(|pid| of_tasks(*pid, "status"));
    tasks.map(|text| text.lines().filter_map(of_line).sum::<u64>()).sum()
}

/// Memory that is these processes' alone, in MiB.
#[must_use]
pub fn private_memory(pids: &[u32]) -> f64 {
    let of_line = |line: &str| {
        let rest = line.strip_prefix("Private_Clean:").or_else(|| line.strip_prefix("Private_Dirty:"))?;
        rest.trim().strip_suffix(" kB")?.parse::<u32>().ok()
    };
    let of_process = |pid: &u32| {
        let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap_or_default();
        text.lines().filter_map(of_line).sum::<u32>()
    };
    f64::from(pids.iter().map(of_process).sum::<u32>()) / 1024.0
}

/// Waits until the daemon and its workers have done nothing for a while.
///
/// # Panics
/// When they go on for a minute.
pub fn wait_until_quiet(daemon: &Daemon<'_>) {
    let begun = Instant::now();
    let mut before = cpu_time(daemon);
    loop {
        std::thread::sleep(QUIET);
        let now = cpu_time(daemon);
        if now == before {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "hostlerd does not come to rest");
        before = now;
    }
}

/// How much a daemon's journal tells, in bytes: it grows when the daemon has come to know something.
#[must_use]
pub fn journal_length(journal: &Path) -> usize {
    // Its end is empty lines.
    fs::read(journal).map_or(0, |bytes| bytes.trim_ascii_end().len())
}
