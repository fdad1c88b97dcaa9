//! How much a guest may have brought into the cache.
//!
//! Its mirror offers whole archives, which have more than most disks. What the cache has already is free.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use super::digest::Digest;

/// What may still be brought for one guest.
#[derive(Debug)]
pub(super) struct Allowance {
    limit: u64,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    contents: HashSet<Digest>,
    bytes: u64,
}

impl Allowance {
    /// An allowance of so many bytes.
    pub(super) fn new(limit: u64) -> Self {
        Self { limit, taken: Mutex::default() }
    }

    /// Bytes in all.
    pub(super) fn limit(&self) -> u64 {
        self.limit
    }

    /// Takes so many bytes for a content, if they are left. It is counted once, however often it is asked for,
    /// and also when it does not come: a part of it may lie there.
    pub(super) fn take(&self, digest: Digest, size: u64) -> bool {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        if taken.contents.contains(&digest) {
            return true;
        }
        if size > self.limit - taken.bytes {
            return false;
        }
        taken.bytes += size;
        taken.contents.insert(digest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_is_counted_once_and_what_does_not_fit_leaves_the_rest() {
        let allowance = Allowance::new(10);
        let [one, two, three] = [b"1", b"2", b"3"].map(|text| Digest::of(text));
        assert!(allowance.take(one, 6) && allowance.take(one, 6));
        assert!(!allowance.take(two, 5));
        assert!(allowance.take(three, 4));
        assert!(!allowance.take(two, 1));
        assert!(allowance.take(one, 6), "it is there");
    }
}
