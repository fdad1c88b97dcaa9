//! Is a screen new? Pure.
//!
//! A screen that differs from an earlier one only in a clock, or in how long something has taken, tells that a
//! clock runs and nothing of the guest. One that was there before (a spinner comes round, a dialog is drawn
//! anew) tells no more. Numbers that are no times, such as a share or an amount, do count.

use std::collections::VecDeque;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

/// How many screens are remembered; no spinner has more pictures.
const MOST_REMEMBERED: usize = 64;

/// The screens of one console.
#[derive(Debug, Default)]
pub(super) struct Novelty {
    remembered: VecDeque<u64>,
}

impl Novelty {
    /// Whether the screen shows what it did not show before.
    pub(super) fn is_new(&mut self, screen: &str) -> bool {
        let mut hasher = DefaultHasher::new();
        without_times(screen).hash(&mut hasher);
        let hash = hasher.finish();
        if self.remembered.contains(&hash) {
            return false;
        }
        if self.remembered.len() >= MOST_REMEMBERED {
            self.remembered.pop_front();
        }
        self.remembered.push_back(hash);
        true
    }
}

/// The words of a text, without the times in them.
fn without_times(text: &str) -> String {
    let mut plain = String::with_capacity(text.len());
    let mut words = text.split_whitespace().peekable();
    while let Some(word) = words.next() {
        let mut rest = word;
        while let Some(at) = rest.find(|one: char| one.is_ascii_digit()) {
            let (before, number) = rest.split_at(at);
            let length = number.find(|one: char| !one.is_ascii_digit() && one != ':' && one != '.');
            let (number, after) = number.split_at(length.unwrap_or(number.len()));
            plain.push_str(before);
            let behind = if after.is_empty() { words.peek().copied().unwrap_or("") } else { after };
            plain.push_str(if is_time(number, behind) { "0" } else { number });
            rest = after;
        }
        plain.push_str(rest);
        plain.push(' ');
    }
    plain
}

/// Whether a number with this behind it is a time of day, a duration, or a time of the kernel's.
fn is_time(number: &str, behind: &str) -> bool {
    const UNITS: [&str; 14] = [
        "ms", "s", "sec", "secs", "second", "seconds", "m", "min", "mins", "minute", "minutes", "h", "hour",
        "hours",
    ];
    let number = number.trim_end_matches([':', '.']);
    let parts: Vec<&str> = number.split(':').collect();
    let is_clock = match parts.as_slice() {
        [hours, rest @ ..] => {
            matches!(rest.len(), 1 | 2) && hours.len() <= 2 && rest.iter().all(|part| part.len() == 2)
        }
        [] => false,
    };
    let unit = behind.split(|one: char| !one.is_ascii_alphabetic()).next().unwrap_or("");
    let is_kernels =
        behind.starts_with(']') && number.split_once('.').is_some_and(|(_, part)| part.len() == 6);
    is_clock || UNITS.contains(&unit) || is_kernels
}

#[cfg(test)]
mod tests {
    use super::*;

    fn are_the_same(first: &str, second: &str) -> bool {
        without_times(first) == without_times(second)
    }

    #[test]
    fn clocks_and_durations_are_not_compared() {
        for (first, second) in [
            (
                "[ (1*installer)  2 shell  4- log ][ Nov 24  9:59 ]",
                "[ (1*installer)  2 shell  4- log ][ Nov 24 10:00 ]",
            ),
            ("waiting 12:00:01", "waiting 12:07:59"),
            (
                "A start job is running for x (2min 59s / 1min 30s)",
                "A start job is running for x (1min 4s / 1min 30s)",
            ),
            ("[   12.345678] still waiting", "[  102.000001] still waiting"),
            ("elapsed: 4m12s", "elapsed: 5m1s"),
            ("trying again in 9 seconds.", "trying again in 10 seconds."),
        ] {
            assert!(are_the_same(first, second), "{} | {}", without_times(first), without_times(second));
        }
    }

    #[test]
    fn amounts_shares_and_versions_are_compared() {
        for (first, second) in [
            ("Downloading 45%", "Downloading 46%"),
            ("file 3 of 7", "file 4 of 7"),
            ("12.5 MB", "12.6 MB"),
            ("Setting up less (590-2)", "Setting up less (590-3)"),
            ("sector 1:200", "sector 1:201"),
            ("128M", "129M"),
        ] {
            assert!(!are_the_same(first, second), "{first}");
        }
    }

    #[test]
    fn a_spinner_comes_round() {
        let mut novelty = Novelty::default();
        let frames = ["|", "/", "-", "\\"];
        let is_new: Vec<bool> =
            (0..12).map(|turn| novelty.is_new(&format!("Loading {}", frames[turn % 4]))).collect();
        assert_eq!(is_new.iter().filter(|new| **new).count(), 4);
        assert!(novelty.is_new("Loaded"));
    }

    proptest::proptest! {
        #[test]
        fn a_text_without_numbers_is_its_words(text in "[^0-9]{0,200}") {
            let words: Vec<&str> = text.split_whitespace().collect();
            let plain = without_times(&text);
            proptest::prop_assert_eq!(plain.trim_end(), words.join(" "));
        }

        #[test]
        fn no_text_panics(text in ".{0,200}") {
            Novelty::default().is_new(&text);
        }
    }
}
