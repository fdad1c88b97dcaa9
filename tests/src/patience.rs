//! How long tests wait on a machine that is slower than most.
//!
//! Limits in tests are made for a machine that runs on its own processor. `hostler-vm` says in
//! `HOSTLER_TESTS_PATIENCE` by how much its guest is slower: everything that may take "at most" a time
//! may take that many times longer. What has to last "at least" a time is not touched.

use std::sync::LazyLock;
use std::time::Duration;

const VARIABLE: &str = "HOSTLER_TESTS_PATIENCE";

static FACTOR: LazyLock<u32> = LazyLock::new(|| match std::env::var(VARIABLE) {
    Err(_) => 1,
    Ok(text) => match text.parse() {
        Ok(factor @ 1..=100) => factor,
        _ => panic!("{VARIABLE} is {text:?}; give it a number from 1 to 100, or leave it unset"),
    },
});

/// A limit, stretched for this machine.
#[must_use]
pub fn stretched(limit: Duration) -> Duration {
    limit * *FACTOR
}
