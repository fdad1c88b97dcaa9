//! How much time a machine's virtual processors have had.
//!
//! Each is a thread of qemu's that says so by its name (`-name …,debug-threads=on`); proc_pid_stat(5) tells
//! what it used. So a guest that computes in silence can be told from one that waits for nothing.

use std::fs;
use std::time::Duration;

/// The time of all of them together, or `None` where it cannot be read.
#[must_use]
pub(super) fn spent(pid: u32) -> Option<Duration> {
    let tick = rustix::param::clock_ticks_per_second();
    let mut ticks = None;
    for task in fs::read_dir(format!("/proc/{pid}/task")).ok()? {
        // A thread may end meanwhile.
        let Ok(text) = fs::read_to_string(task.ok()?.path().join("stat")) else { continue };
        if let Some(used) = parse(&text) {
            ticks = Some(ticks.unwrap_or(0_u64).saturating_add(used));
        }
    }
    let milliseconds = ticks?.saturating_mul(1000).checked_div(tick)?;
    Some(Duration::from_millis(milliseconds))
}

/// The ticks that a thread used, if it is a virtual processor.
fn parse(stat: &str) -> Option<u64> {
    let (start, rest) = stat.rsplit_once(") ")?;
    let (_, name) = start.split_once('(')?;
    if !name.starts_with("CPU ") {
        return None;
    }
    // `rest` begins with field 3; utime and stime are 14 and 15.
    let mut fields = rest.split(' ').skip(11);
    let user: u64 = fields.next()?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    Some(user.saturating_add(system))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_virtual_processors_count() {
        let stat = |name: &str| format!("7 ({name}) S 1 7 7 0 -1 64 0 0 0 0 250 50 0 0 20 0 5 0 100 0 0");
        assert_eq!(parse(&stat("CPU 0/TCG")), Some(300));
        assert_eq!(parse(&stat("CPU 1/KVM")), Some(300));
        assert_eq!(parse(&stat("worker")), None);
        assert_eq!(parse("nonsense"), None);
    }

    #[test]
    fn a_process_that_is_gone_tells_nothing() {
        assert_eq!(spent(u32::MAX), None);
    }
}
