//! The names of snapshots, which are in the order of their times. Pure.

use std::time::{Duration, UNIX_EPOCH};

/// The first second of the year 10000, in which names would have another form.
const END_OF_NAMES: u64 = 253_402_300_800;

/// The name of a snapshot that is made in this second.
pub(super) fn name_of(time: u64) -> String {
    let time = UNIX_EPOCH + Duration::from_secs(time.min(END_OF_NAMES - 1));
    let text = humantime::format_rfc3339_seconds(time).to_string();
    text.chars().filter(|sign| !matches!(sign, '-' | ':')).collect()
}

/// When a snapshot of this name was made, in seconds since 1970; `None` for what is no snapshot's name.
pub(super) fn time_of(name: &str) -> Option<u64> {
    if name.len() != 16 || !name.is_ascii() {
        return None;
    }
    let (date, clock) = (&name[..8], &name[8..]);
    let text = format!(
        "{}-{}-{}{}:{}:{}",
        &date[..4],
        &date[4..6],
        &date[6..],
        &clock[..3],
        &clock[3..5],
        &clock[5..]
    );
    let time = humantime::parse_rfc3339(&text).ok()?.duration_since(UNIX_EPOCH).ok()?.as_secs();
    (time < END_OF_NAMES - 1 && name_of(time) == name).then_some(time)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_times_and_other_names_are_no_snapshots() {
        assert_eq!(name_of(1_795_222_382), "20261121T005302Z");
        assert_eq!(time_of("20261121T005302Z"), Some(1_795_222_382));
        for name in
            ["backup", "lost+found", ".new-20261121T005302Z", "20261121T005302Z.old", "20261341T005302Z"]
                .into_iter()
                .chain(["99991231T235959Z", "20261121t005302z", "20261121T0053022", "2026\u{e9}121T00530Z"])
        {
            assert_eq!(time_of(name), None, "{name}");
        }
    }

    proptest::proptest! {
        #[test]
        fn names_are_in_the_order_of_their_times(one in 0..END_OF_NAMES - 2, other in 0..END_OF_NAMES - 2) {
            assert_eq!(time_of(&name_of(one)), Some(one));
            assert_eq!(one.cmp(&other), name_of(one).cmp(&name_of(other)));
        }

        #[test]
        fn no_name_panics(name in "\\PC{0,20}|[0-9TZ]{16}") {
            let _ = time_of(&name);
        }
    }
}
