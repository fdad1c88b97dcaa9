//! Failing a test with what it was about.

use std::fmt::Display;
use std::time::{Duration, Instant};

use crate::patience::stretched;

/// Ends the test with a sentence when something did not work.
pub trait OrFail<T> {
    /// The value, or a panic that names `what` was tried and why it failed.
    fn or_fail(self, what: impl Display) -> T;
}

impl<T, E: Display> OrFail<T> for Result<T, E> {
    #[track_caller]
    fn or_fail(self, what: impl Display) -> T {
        match self {
            Ok(value) => value,
            Err(error) => panic!("{what}: {error}"),
        }
    }
}

impl<T> OrFail<T> for Option<T> {
    #[track_caller]
    fn or_fail(self, what: impl Display) -> T {
        match self {
            Some(value) => value,
            None => panic!("{what}: nothing is there"),
        }
    }
}

/// Asks again and again until `answer` is there; says how long that took.
///
/// # Panics
/// When it is not there within `limit`, [`stretched`].
#[track_caller]
pub fn wait_for<T>(
    what: impl Display,
    limit: Duration,
    mut answer: impl FnMut() -> Option<T>,
) -> (T, Duration) {
    const INTERVAL: Duration = Duration::from_millis(10);
    let limit = stretched(limit);
    let start = Instant::now();
    loop {
        if let Some(answer) = answer() {
            return (answer, start.elapsed());
        }
        assert!(start.elapsed() < limit, "{what}: not within {limit:?}");
        std::thread::sleep(INTERVAL);
    }
}

/// [`wait_for`] for what is only true or not.
///
/// # Panics
/// When it is not true within `limit`.
#[track_caller]
pub fn wait_until(what: impl Display, limit: Duration, mut is_so: impl FnMut() -> bool) -> Duration {
    wait_for(what, limit, || is_so().then_some(())).1
}
