//! Debian's order of versions (Debian Policy 5.6.12, deb-version(7)).
//!
//! Works on bytes in place: the resolver compares some hundred thousand pairs per build. Deliberately
//! absent: judging whether a version is well formed. Upstream's index is signed; an odd version still
//! has a place in the order, as dpkg gives it one.

use std::cmp::Ordering;

/// Compares two versions: epoch, then upstream version, then revision.
#[must_use]
pub fn compare(left: &str, right: &str) -> Ordering {
    let (left_epoch, left) = split_epoch(left);
    let (right_epoch, right) = split_epoch(right);
    let (left_upstream, left_revision) = left.rsplit_once('-').unwrap_or((left, ""));
    let (right_upstream, right_revision) = right.rsplit_once('-').unwrap_or((right, ""));
    compare_numbers(left_epoch, right_epoch)
        .then_with(|| compare_part(left_upstream.as_bytes(), right_upstream.as_bytes()))
        .then_with(|| compare_part(left_revision.as_bytes(), right_revision.as_bytes()))
}

fn split_epoch(version: &str) -> (&[u8], &str) {
    match version.split_once(':') {
        Some((epoch, rest)) => (epoch.as_bytes(), rest),
        None => (b"", version),
    }
}

/// Alternates between runs of non-digits and of digits, as Policy describes.
fn compare_part(mut left: &[u8], mut right: &[u8]) -> Ordering {
    while !left.is_empty() || !right.is_empty() {
        let left_text = run(left, |byte| !byte.is_ascii_digit());
        let right_text = run(right, |byte| !byte.is_ascii_digit());
        let longest = left_text.max(right_text);
        for index in 0..longest {
            let order = weight(left[..left_text].get(index)).cmp(&weight(right[..right_text].get(index)));
            if order != Ordering::Equal {
                return order;
            }
        }
        left = &left[left_text..];
        right = &right[right_text..];
        let left_digits = run(left, u8::is_ascii_digit);
        let right_digits = run(right, u8::is_ascii_digit);
        let order = compare_numbers(&left[..left_digits], &right[..right_digits]);
        if order != Ordering::Equal {
            return order;
        }
        left = &left[left_digits..];
        right = &right[right_digits..];
    }
    Ordering::Equal
}

fn run(text: &[u8], belongs: impl Fn(&u8) -> bool) -> usize {
    text.iter().take_while(|byte| belongs(byte)).count()
}

/// A tilde sorts before the end, the end before letters, letters before the rest.
fn weight(byte: Option<&u8>) -> i32 {
    match byte {
        Some(b'~') => -1,
        None => 0,
        Some(letter) if letter.is_ascii_alphabetic() => i32::from(*letter),
        Some(other) => i32::from(*other) + 256,
    }
}

/// Compares numbers of any length, so that no digit string overflows.
fn compare_numbers(left: &[u8], right: &[u8]) -> Ordering {
    let left = &left[run(left, |byte| *byte == b'0')..];
    let right = &right[run(right, |byte| *byte == b'0')..];
    left.len().cmp(&right.len()).then_with(|| left.cmp(right))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn policy_examples() {
        let ascending = ["~~", "~~a", "~", "", "a"];
        for pair in ascending.windows(2) {
            assert_eq!(compare(pair[0], pair[1]), Ordering::Less, "{pair:?}");
        }
    }

    #[test]
    fn versions_seen_in_archives() {
        for (less, more) in [
            ("1.0~rc1-1", "1.0-1"),
            ("1.0-1", "1.0-1+deb12u1"),
            ("2.36-9+deb12u9", "2.36-9+deb12u10"),
            ("9:0", "10:0"),
            ("99", "1:0"),
            ("22.01+dfsg-8", "22.01+really26.02+dfsg-0+deb12u1"),
            ("1.2.3", "1.2.3-1"),
            ("1.2-0", "1.2-0.1"),
            ("6.1.9-1", "6.1.10-1"),
            ("1.18446744073709551616", "1.18446744073709551617"),
            ("1a", "1+"),
        ] {
            assert_eq!(compare(less, more), Ordering::Less, "{less} < {more}");
            assert_eq!(compare(more, less), Ordering::Greater, "{more} > {less}");
        }
        for (left, right) in [("1.0", "0:1.0"), ("1.0-0", "1.0"), ("1.00", "1.0"), ("001-01", "1-1")] {
            assert_eq!(compare(left, right), Ordering::Equal, "{left} = {right}");
        }
    }

    proptest! {
        #[test]
        fn is_a_total_order(a in "[0-9a-z.~+:-]{0,8}", b in "[0-9a-z.~+:-]{0,8}", c in "[0-9a-z.~+:-]{0,8}") {
            prop_assert_eq!(compare(&a, &a), Ordering::Equal);
            prop_assert_eq!(compare(&a, &b), compare(&b, &a).reverse());
            if compare(&a, &b) != Ordering::Greater && compare(&b, &c) != Ordering::Greater {
                prop_assert_ne!(compare(&a, &c), Ordering::Greater);
            }
        }
    }
}
