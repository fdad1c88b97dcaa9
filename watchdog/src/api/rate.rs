//! How often a user may ask. Pure but for the clock, which is an argument.

use std::time::Duration;

use tokio::time::Instant;

/// A bucket that holds a second's requests and fills as fast as they may come.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rate {
    /// When the bucket would be full if nobody asked any more.
    full_at: Instant,
}

impl Rate {
    pub(super) fn new(now: Instant) -> Self {
        Self { full_at: now }
    }

    /// Takes one request out, and says how long it has to wait: not at all while fewer than `a_second` came
    /// within the last second.
    pub(super) fn take(&mut self, now: Instant, a_second: u32) -> Duration {
        let each = Duration::from_secs(1) / a_second.max(1);
        self.full_at = self.full_at.max(now) + each;
        self.full_at.saturating_duration_since(now + Duration::from_secs(1))
    }

    /// Takes one out if there is one, of a bucket that holds `burst` and gets another every `each`.
    pub(super) fn try_take(&mut self, now: Instant, each: Duration, burst: u32) -> bool {
        let full_at = self.full_at.max(now) + each;
        let has_one = full_at <= now + each * burst;
        if has_one {
            self.full_at = full_at;
        }
        has_one
    }

    /// Nothing was taken out that has not come back.
    pub(super) fn is_full(&self, now: Instant) -> bool {
        self.full_at <= now
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_a_flood_waits_its_turn() {
        let start = Instant::now();
        let mut rate = Rate::new(start);
        let waits: Vec<Duration> = (0..30).map(|_| rate.take(start, 10)).collect();
        assert!(waits[..10].iter().all(Duration::is_zero), "{waits:?}");
        assert_eq!(waits[10], Duration::from_millis(100));
        assert_eq!(waits[29], Duration::from_secs(2));
        // Patience pays: after a while the bucket is full again.
        let later = start + Duration::from_secs(10);
        assert!((0..10).all(|_| rate.take(later, 10).is_zero()));
        assert_eq!(rate.take(later, 10), Duration::from_millis(100));
    }

    #[test]
    fn what_is_refused_costs_nothing() {
        let start = Instant::now();
        let mut rate = Rate::new(start);
        let second = Duration::from_secs(1);
        let taken = (0..1000).filter(|_| rate.try_take(start, second, 8)).count();
        assert_eq!((taken, rate.is_full(start), rate.is_full(start + 8 * second)), (8, false, true));
        assert!(rate.try_take(start + second, second, 8) && !rate.try_take(start + second, second, 8));
    }
}
