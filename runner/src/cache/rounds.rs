//! One address of several after the other, again while any of them may do better.

use super::failures::Failures;
use super::fetch_error::FetchError;
use super::transfer::Core;

/// Whom to ask next for one thing.
pub(super) struct Rounds<'a> {
    core: &'a Core,
    urls: &'a [String],
    attempts: u32,
    /// What is left of this round, the last one first.
    left: Vec<usize>,
    asked: usize,
    failures: Failures,
}

impl<'a> Rounds<'a> {
    pub(super) fn new(core: &'a Core, urls: &'a [String]) -> Self {
        Self { core, urls, attempts: 0, left: Vec::new(), asked: 0, failures: Failures::default() }
    }

    /// The next address; between two rounds it waits.
    pub(super) async fn next(&mut self) -> Option<&'a str> {
        loop {
            while let Some(place) = self.left.pop() {
                if self.failures.may_do_better(place) {
                    self.asked = place;
                    return Some(&self.urls[place]);
                }
            }
            let is_over = self.attempts >= self.core.options.attempts.max(1);
            if is_over || self.attempts > 0 && !self.failures.are_transient() {
                return None;
            }
            if self.attempts > 0 {
                let doubled = 1 << (self.attempts - 1).min(6);
                tokio::time::sleep(self.core.options.backoff.saturating_mul(doubled)).await;
            }
            self.attempts += 1;
            self.left = self.core.ledger().order(self.urls);
            self.left.reverse();
        }
    }

    /// The address that was given last failed.
    pub(super) fn failed(&mut self, error: FetchError) {
        self.core.blame(&self.urls[self.asked], self.urls, &error);
        self.failures.note(self.asked, error);
    }

    /// How each failed.
    pub(super) fn into_failures(self) -> Failures {
        self.failures
    }
}
