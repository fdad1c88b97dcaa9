//! What hung looks not long ago, so that the next ones need not find it out again.

use std::collections::HashMap;
use std::time::{Duration, Instant};

/// For how long it is left out of looks before it is tried again. Each time that it hangs again doubles
/// it, up to [`LONGEST`]: who makes many things hang may not keep all looks busy.
const FIRST: Duration = Duration::from_secs(30);
const LONGEST: Duration = Duration::from_secs(16 * 60);

/// Something that hung a look.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Hung {
    /// A loop device.
    Device(u32),
    /// Anything else, in the words in which a worker announced it.
    Thing(String),
}

/// Since when, and for how long, something is left out.
#[derive(Clone, Copy, Debug)]
struct Kept {
    since: Instant,
    span: Duration,
}

/// All of it.
#[derive(Debug, Default)]
pub(super) struct HungThings {
    kept: HashMap<Hung, Kept>,
}

impl HungThings {
    /// Notes that something hung a look.
    pub(super) fn note(&mut self, hung: Hung, now: Instant) {
        let span = match self.kept.get(&hung) {
            // Several looks at once found it out.
            Some(kept) if now - kept.since < kept.span => return,
            Some(kept) => (kept.span * 2).min(LONGEST),
            None => FIRST,
        };
        self.kept.insert(hung, Kept { since: now, span });
    }

    /// What is to be left out now.
    pub(super) fn lately(&mut self, now: Instant) -> Vec<Hung> {
        // Remembered for as long again, so that it counts when it hangs at the next try.
        self.kept.retain(|_, kept| now - kept.since < kept.span * 2);
        let is_left_out = |kept: &Kept| now - kept.since < kept.span;
        self.kept.iter().filter(|(_, kept)| is_left_out(kept)).map(|(hung, _)| hung.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn after(begin: Instant, seconds: u64) -> Instant {
        begin + Duration::from_secs(seconds)
    }

    #[test]
    fn what_hangs_again_is_left_out_for_twice_as_long() {
        let begin = Instant::now();
        let mut things = HungThings::default();
        things.note(Hung::Device(3), begin);
        assert_eq!(things.lately(after(begin, 29)), [Hung::Device(3)]);
        assert_eq!(things.lately(after(begin, 31)), []);
        things.note(Hung::Device(3), after(begin, 31));
        // Another look that had begun before finds the same.
        things.note(Hung::Device(3), after(begin, 32));
        assert_eq!(things.lately(after(begin, 31 + 59)), [Hung::Device(3)]);
        assert_eq!(things.lately(after(begin, 31 + 61)), []);
    }

    #[test]
    fn what_went_on_well_is_forgotten() {
        let begin = Instant::now();
        let mut things = HungThings::default();
        things.note(Hung::Thing("a mount".to_owned()), begin);
        assert_eq!(things.lately(after(begin, 61)), []);
        things.note(Hung::Thing("a mount".to_owned()), after(begin, 61));
        assert_eq!(things.lately(after(begin, 61 + 31)), [], "it counts as the first time");
    }
}
