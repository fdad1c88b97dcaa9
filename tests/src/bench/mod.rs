//! Measurements against goals: what `make bench` runs, and the tests in small.
//!
//! Each is made in a place of its own, in a mount namespace of its own, by turns with what it is compared
//! with: a ratio is of one run or it is none. Nothing of it outlives the run, whatever ends it; see
//! [`guardian`]. That everything is gone is looked for in `/proc` and `/sys`, the daemon is not asked.
//!
//! Unlike the tests, these call one function of the daemon's own: a worker's look at the host, without the
//! process around it.

pub mod burst;
pub mod cache;
pub mod cost;
pub mod guardian;
pub mod host;
pub mod idle;
pub mod raw;
pub mod reclaim;
pub mod report;
pub mod snapshot;
pub mod stack;
mod steps;
pub mod ways;

use std::time::Duration;

use crate::place::Place;
use crate::scenario;
use guardian::Guardian;
use report::Section;

/// How much is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// How often one stack is taken back.
    pub repetitions: usize,
    /// How many stacks leak at once.
    pub stacks: usize,
    /// How often that, and a look at a busy host, is measured.
    pub rounds: usize,
    /// The busy host.
    pub host: host::Size,
    /// Rest and events.
    pub idle: idle::Size,
    /// What the cache hands out.
    pub cache: cache::Size,
}

impl Sizes {
    /// What the goals are about.
    pub const FULL: Self = Self {
        repetitions: 200,
        stacks: 64,
        rounds: 9,
        host: host::Size { loops: 256, mounts: 5000, namespaces: 50, processes: 2000 },
        idle: idle::Size { idle: Duration::from_secs(120), events: 15, mounts: [100, 10_000] },
        cache: cache::Size { large: 256, small: 4000, rounds: 9 },
    };
    /// Enough to see that it works, and for no number.
    pub const SMALL: Self = Self {
        repetitions: 2,
        stacks: 3,
        rounds: 1,
        host: host::Size { loops: 4, mounts: 120, namespaces: 3, processes: 12 },
        idle: idle::Size { idle: Duration::from_millis(500), events: 1, mounts: [50, 100] },
        cache: cache::Size { large: 2, small: 8, rounds: 1 },
    };
}

/// One measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measurement {
    /// One stack.
    Reclaim,
    /// Many stacks at once.
    Burst,
    /// A look at a busy host.
    Snapshot,
    /// Rest, and one event.
    Idle,
    /// What the cache hands out.
    Cache,
}

impl Measurement {
    /// All, in their order.
    pub const ALL: [Self; 5] = [Self::Reclaim, Self::Burst, Self::Snapshot, Self::Idle, Self::Cache];

    /// Its word on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Reclaim => "reclaim",
            Self::Burst => "burst",
            Self::Snapshot => "snapshot",
            Self::Idle => "idle",
            Self::Cache => "cache",
        }
    }

    /// Measures.
    ///
    /// # Panics
    /// When it is not root who does, when anything does not go as it should, or when something is left.
    #[must_use]
    pub fn run(self, sizes: &Sizes) -> Section {
        let mut section = Section::default();
        scenario::privileged_within(self.name(), snapshot::LIMIT, |place: &Place| {
            let _guardian = Guardian::of(place);
            section = match self {
                Self::Reclaim => reclaim::measure(place, sizes.repetitions),
                Self::Burst => burst::measure(place, sizes.stacks, sizes.rounds),
                Self::Snapshot => snapshot::measure(place, sizes.host, sizes.rounds),
                Self::Idle => idle::measure(place, sizes.idle),
                Self::Cache => cache::measure(place, sizes.cache),
            };
        });
        section
    }
}
