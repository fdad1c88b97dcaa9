//! Moments and orders that nobody chose, and that can be repeated.

use crate::failure::OrFail;

/// How many points a test tries: few, but for whoever asks for more.
///
/// # Panics
/// When the variable is no number.
#[must_use]
pub fn count(variable: &str, otherwise: usize) -> usize {
    std::env::var(variable).ok().map_or(otherwise, |text| text.parse().or_fail(variable))
}

/// Numbers in no order (splitmix64): the same ones for the same seed.
#[derive(Debug)]
pub struct Numbers(u64);

impl Numbers {
    /// From `HOSTLER_TESTS_SEED` where that is set. The seed is printed.
    #[must_use]
    pub fn new() -> Self {
        let seed = count("HOSTLER_TESTS_SEED", 20_261_124) as u64;
        println!("HOSTLER_TESTS_SEED={seed}");
        Self(seed)
    }

    /// The next one, below a limit.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (mixed ^ (mixed >> 31)) % limit
    }
}

impl Default for Numbers {
    fn default() -> Self {
        Self::new()
    }
}
