//! Does a guest get on? Pure.
//!
//! Three questions with three answers. Something *progressed* when the screen shows what it did not show before,
//! a disk or the cache did something, or the guest said so. It *moved* when it progressed or computed: what
//! neither moves nor progresses may wait for somebody. And it *stalls* when it did not progress for the limit,
//! or, as long as it computes, for [`BUSY_SHARE`] times that.

use std::time::Duration;

use super::qmp::BlockTotals;

/// How much longer a guest may compute without a sign of progress than do nothing at all.
const BUSY_SHARE: u32 = 4;
/// The share of one processor above which a guest computes, as one part of this many.
const BUSY_PART: u32 = 4;

/// What a guest did, and when.
#[derive(Debug, Default)]
pub(super) struct Progress {
    progressed: Duration,
    computed: Duration,
    /// When the processors were last looked at, and the time that they had had.
    processors: Option<(Duration, Duration)>,
    cache_bytes: u64,
    blocks: BlockTotals,
}

impl Progress {
    /// Disk totals, as last seen.
    pub(super) fn blocks(&self) -> BlockTotals {
        self.blocks
    }

    /// The guest got on, as it or its screen says.
    pub(super) fn told(&mut self, now: Duration) {
        self.progressed = now;
    }

    /// What the disks did so far.
    pub(super) fn see_blocks(&mut self, now: Duration, blocks: BlockTotals) {
        if blocks != self.blocks {
            self.blocks = blocks;
            self.progressed = now;
        }
    }

    /// What the cache moved so far, in bytes.
    pub(super) fn see_cache(&mut self, now: Duration, bytes: u64) {
        if bytes > self.cache_bytes {
            self.cache_bytes = bytes;
            self.progressed = now;
        }
    }

    /// The time that the machine's processors have had so far.
    pub(super) fn see_processors(&mut self, now: Duration, spent: Duration) {
        if let Some((then, before)) = self.processors {
            let wall = now.saturating_sub(then);
            if spent.saturating_sub(before) * BUSY_PART >= wall && !wall.is_zero() {
                self.computed = now;
            }
        }
        self.processors = Some((now, spent));
    }

    /// For how long nothing progressed.
    pub(super) fn without(&self, now: Duration) -> Duration {
        now.saturating_sub(self.progressed)
    }

    /// For how long nothing moved.
    pub(super) fn still(&self, now: Duration) -> Duration {
        now.saturating_sub(self.progressed.max(self.computed))
    }

    /// When this is a stall, if nothing is seen until then.
    pub(super) fn stalls(&self, limit: Duration) -> Duration {
        let idle = self.progressed.max(self.computed).saturating_add(limit);
        idle.min(self.progressed.saturating_add(limit.saturating_mul(BUSY_SHARE)))
    }

    /// Whether it computed within the limit.
    pub(super) fn is_busy(&self, now: Duration, limit: Duration) -> bool {
        now.saturating_sub(self.computed) < limit
    }
}
