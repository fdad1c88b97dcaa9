//! Makes text that others control fit to be read.
//!
//! Mount points, file names and process names come from whoever made them. They may hold terminal
//! escapes, newlines or bytes that are no UTF-8. Whatever leaves the daemon, and whatever a client
//! prints, passes through here; identities never do.

use std::fmt::Write as _;

/// `bytes` as one line of text: control characters, invisible direction marks and bytes that are no
/// UTF-8 appear as escapes (`\n`, `\u{1b}`, `\xff`), a backslash as `\\`.
#[must_use]
pub fn printable(bytes: &[u8]) -> String {
    let mut line = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for character in chunk.valid().chars() {
            push_character(&mut line, character);
        }
        for byte in chunk.invalid() {
            write!(line, "\\x{byte:02x}").expect("writing to a String cannot fail");
        }
    }
    line
}

/// `text` with everything a terminal could act on escaped, and backslashes left as they are: for
/// text that has passed [`printable`] already, and must be safe even if it has not.
#[must_use]
pub fn without_controls(text: &str) -> String {
    let mut line = String::with_capacity(text.len());
    for character in text.chars() {
        if character == '\\' { line.push('\\') } else { push_character(&mut line, character) }
    }
    line
}

/// What stands in the place of what [`shortened`] left out.
pub const LEFT_OUT: char = '…';

/// The end of `line`, which tells more of a path than its begin does, where it has more than `limit` bytes.
#[must_use]
pub fn shortened(line: &str, limit: usize) -> String {
    if line.len() <= limit {
        return line.to_owned();
    }
    let begin = (line.len() - limit..line.len()).find(|at| line.is_char_boundary(*at)).unwrap_or(line.len());
    format!("{LEFT_OUT}{}", &line[begin..])
}

fn push_character(line: &mut String, character: char) {
    match character {
        '\\' => line.push_str("\\\\"),
        '\n' => line.push_str("\\n"),
        '\t' => line.push_str("\\t"),
        '\r' => line.push_str("\\r"),
        _ if character.is_control() || changes_direction(character) => {
            write!(line, "{}", character.escape_unicode()).expect("writing to a String cannot fail");
        }
        _ => line.push(character),
    }
}

/// Marks that reorder or hide what follows (Unicode's bidirectional controls, line and paragraph
/// separators, zero-width characters, the byte order mark).
fn changes_direction(character: char) -> bool {
    matches!(
        character,
        '\u{061c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{2069}' | '\u{feff}'
    )
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_long_line_keeps_its_end() {
        assert_eq!(shortened("/a/b", 4), "/a/b");
        assert_eq!(shortened("/a/bc", 4), "…a/bc");
        assert_eq!(shortened("/äb", 2), "…b");
    }

    #[test]
    fn leaves_ordinary_names_alone() {
        assert_eq!(printable("/srv/Büro image.img".as_bytes()), "/srv/Büro image.img");
    }

    #[test]
    fn escapes_what_a_terminal_or_a_log_would_act_on() {
        assert_eq!(printable(b"a\x1b[2Jb\nc\\d\xff"), "a\\u{1b}[2Jb\\nc\\\\d\\xff");
        assert_eq!(printable("x\u{202e}gpj".as_bytes()), "x\\u{202e}gpj");
    }

    proptest! {
        #[test]
        fn never_lets_a_control_character_through(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let line = printable(&bytes);
            prop_assert!(!line.chars().any(char::is_control));
            prop_assert_eq!(without_controls(&line), line);
        }

        #[test]
        fn different_names_stay_different(one in proptest::collection::vec(any::<u8>(), 0..20), other in proptest::collection::vec(any::<u8>(), 0..20)) {
            prop_assert_eq!(printable(&one) == printable(&other), one == other);
        }
    }
}
