//! Ways to take leaks back, each timed from the first owner's SIGKILL until nothing of any is left.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use super::cost;
use super::stack::{Leak, when_gone};
use crate::daemon::Daemon;
use crate::failure::OrFail;
use crate::place::Place;

const JANITOR: &str = include_str!("janitor.sh");

/// Leaks that are made anew, one in each directory, for one measurement after the other.
#[derive(Clone, Copy, Debug)]
pub struct Ways<'bench> {
    /// Where everything is made.
    pub place: &'bench Place,
    /// The daemon, which has nothing to do while others are measured.
    pub daemon: &'bench Daemon<'bench>,
    /// A directory with an image for each leak.
    pub directories: &'bench [PathBuf],
    /// How often it is looked whether all is gone.
    pub interval: Duration,
}

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// The daemon.
    Daemon,
    /// The script of a careful administrator.
    Janitor,
    /// System calls of a thread for each leak, all at once.
    Threads,
    /// System calls, one after the other.
    Calls,
}

impl Ways<'_> {
    /// Makes the leaks, has them taken back, and says how long that took.
    ///
    /// # Panics
    /// When something fails or is left.
    #[must_use]
    pub fn by(&self, way: Way) -> Duration {
        match way {
            Way::Daemon => self.by_daemon(),
            Way::Janitor => self.by_janitor(),
            Way::Threads => self.by_threads(),
            Way::Calls => self.by_calls(),
        }
    }

    fn unknown(&self) -> Vec<Leak> {
        let leaks = self.directories.iter().map(|directory| Leak::unknown(self.place, directory)).collect();
        // It hears of each mount and loop device.
        cost::wait_until_quiet(self.daemon);
        leaks
    }

    fn by_daemon(&self) -> Duration {
        let mut client = self.daemon.client();
        let lease = |directory: &PathBuf| Leak::leased(self.place, directory, &mut client);
        let leaks: Vec<Leak> = self.directories.iter().map(lease).collect();
        cost::wait_until_quiet(self.daemon);
        let begun = Instant::now();
        for leak in &leaks {
            leak.kill_owner();
        }
        let time = when_gone(&leaks, self.interval) - begun;
        drop(leaks);
        cost::wait_until_quiet(self.daemon);
        time
    }

    fn by_calls(&self) -> Duration {
        let leaks = self.unknown();
        let begun = Instant::now();
        for leak in &leaks {
            leak.take_back().or_fail("taking back by calls");
        }
        when_gone(&leaks, self.interval) - begun
    }

    fn by_threads(&self) -> Duration {
        let leaks = self.unknown();
        let begun = at_once(&leaks, leaks.len(), |leak| leak.take_back().or_fail("taking back by calls"));
        when_gone(&leaks, self.interval) - begun
    }

    fn by_janitor(&self) -> Duration {
        let mut leaks = self.unknown();
        let begun = Instant::now();
        for leak in &leaks {
            leak.kill_owner();
        }
        let mut command = self.place.command("bash");
        command.args(["-c", JANITOR, "janitor"]).args(self.directories).stdin(Stdio::null());
        let mut janitor = command.spawn().or_fail("starting the janitor");
        let status = loop {
            // Whoever asks for a process by number takes one that nobody has waited for as running.
            leaks.iter_mut().for_each(Leak::reap);
            if let Some(status) = janitor.try_wait().or_fail("waiting for the janitor") {
                break status;
            }
            std::thread::sleep(Duration::from_millis(1));
        };
        assert!(status.success(), "the janitor left something: {status}");
        when_gone(&leaks, self.interval) - begun
    }
}

/// Does something to each leak, by so many threads that begin together, and says when they began.
///
/// # Panics
/// When a thread does.
pub fn at_once(leaks: &[Leak], threads: usize, act: impl Fn(&Leak) + Sync) -> Instant {
    let threads = threads.clamp(1, leaks.len().max(1));
    let start = Barrier::new(threads + 1);
    std::thread::scope(|scope| {
        for share in leaks.chunks(leaks.len().div_ceil(threads)) {
            let (start, act) = (&start, &act);
            scope.spawn(move || {
                start.wait();
                share.iter().for_each(act);
            });
        }
        let begun = Instant::now();
        start.wait();
        begun
    })
}
