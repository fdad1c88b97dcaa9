//! What a daemon and its workers cost: CPU time, wake-ups, memory, as the kernel counts them.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use crate::daemon::Daemon;
use crate::failure::OrFail;

/// Longest wait until a daemon has nothing to do.
const PATIENCE: Duration = Duration::from_secs(60);
/// Nothing of the daemon's own takes this long to begin after an event.
const QUIET: Duration = Duration::from_millis(60);

/// The daemon's process and its workers'.
#[must_use]
pub fn processes(daemon: &Daemon<'_>) -> Vec<u32> {
    let own = daemon.pid();
    let parent = |pid: &u32| {
        let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
        let stat = String::from_utf8_lossy(&stat).into_owned();
        stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse::<u32>().ok()
    };
    let all = fs::read_dir("/proc").or_fail("reading /proc").flatten();
    let pids = all.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    let workers = pids.filter(|pid| parent(pid) == Some(own));
    std::iter::once(own).chain(workers).collect()
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

/// The time that the tasks of these processes were running.
#[must_use]
pub fn cpu_time(pids: &[u32]) -> Duration {
    let of_task = |text: &String| text.split_whitespace().next()?.parse::<u64>().ok();
    let nanoseconds: u64 =
        pids.iter().flat_map(|pid| of_tasks(*pid, "schedstat")).filter_map(|text| of_task(&text)).sum();
    Duration::from_nanos(nanoseconds)
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
    let state = || {
        let pids = processes(daemon);
        (cpu_time(&pids), pids)
    };
    let mut before = state();
    loop {
        std::thread::sleep(QUIET);
        let now = state();
        if now == before {
            return;
        }
        assert!(begun.elapsed() < PATIENCE, "hostlerd does not come to rest");
        before = now;
    }
}

/// The length of a daemon's journal: it grows when the daemon has come to know something.
#[must_use]
pub fn journal_length(journal: &Path) -> u64 {
    fs::metadata(journal).map_or(0, |metadata| metadata.len())
}
