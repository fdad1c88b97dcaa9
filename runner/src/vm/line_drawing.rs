//! The line drawing characters of a VT100, as Unicode.
//!
//! Dialogs draw their frames by switching to another character set in which `q` is a horizontal line.
//! The terminal emulation does not know that, and would show a wall of letters. So what comes in is
//! translated first: printable bytes while that set is active, and nothing within an escape sequence.
//! vt100.net, VT100 User Guide, table 3-9; ECMA-35 for the switching.

use std::borrow::Cow;

/// The state of a stream of bytes.
#[derive(Debug, Default)]
pub(super) struct LineDrawing {
    place: Place,
    /// Which of the two sets G0 and G1 is the line drawing set.
    drawing: [bool; 2],
    /// Which of the two is in use.
    active: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Place {
    #[default]
    Text,
    Escape,
    /// After `ESC (` or `ESC )`: the next byte says which set that is.
    Designation(usize),
    Sequence,
    /// An operating system's command, up to BEL or `ESC \`.
    Command,
}

/// What 0x60 to 0x7e are.
const DRAWN: [char; 31] = [
    '◆', '▒', '␉', '␌', '␍', '␊', '°', '±', '␤', '␋', '┘', '┐', '┌', '└', '┼', '⎺', '⎻', '─', '⎼', '⎽', '├',
    '┤', '┴', '┬', '│', '≤', '≥', 'π', '≠', '£', '·',
];

impl LineDrawing {
    /// Translates bytes as they come.
    pub(super) fn translate<'a>(&mut self, bytes: &'a [u8]) -> Cow<'a, [u8]> {
        // Most of what is printed is plain text, and a guest that floods its console is to cost little.
        let is_plain = self.place == Place::Text && !self.drawing[self.active];
        if is_plain && memchr::memchr3(0x1b, 0x0e, 0x0f, bytes).is_none() {
            return Cow::Borrowed(bytes);
        }
        let mut translated = Vec::with_capacity(bytes.len());
        for &byte in bytes {
            match self.drawn(byte) {
                Some(character) => {
                    translated.extend_from_slice(character.encode_utf8(&mut [0; 4]).as_bytes());
                }
                None => translated.push(byte),
            }
        }
        Cow::Owned(translated)
    }

    fn drawn(&mut self, byte: u8) -> Option<char> {
        self.place = match (self.place, byte) {
            (_, 0x1b) => Place::Escape,
            (Place::Escape, b'(') => Place::Designation(0),
            (Place::Escape, b')') => Place::Designation(1),
            (Place::Escape, b'[') => Place::Sequence,
            (Place::Escape, b']' | b'P' | b'^' | b'_' | b'X') => Place::Command,
            (Place::Escape, b'c') => {
                *self = Self::default();
                Place::Text
            }
            // Intermediate bytes, as in `ESC # 8`.
            (Place::Escape, 0x20..=0x2f) => Place::Escape,
            (Place::Designation(set), _) => {
                self.drawing[set] = byte == b'0';
                Place::Text
            }
            (Place::Sequence, 0x40..=0x7e) | (Place::Escape, _) | (Place::Command, 0x07) => Place::Text,
            (Place::Text, 0x0e) => {
                self.active = 1;
                Place::Text
            }
            (Place::Text, 0x0f) => {
                self.active = 0;
                Place::Text
            }
            (Place::Text, 0x60..=0x7e) if self.drawing[self.active] => {
                return DRAWN.get(usize::from(byte - 0x60)).copied();
            }
            (place, _) => place,
        };
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn translated(bytes: &[u8]) -> String {
        String::from_utf8_lossy(&LineDrawing::default().translate(bytes)).into_owned()
    }

    #[test]
    fn a_frame_is_drawn_with_either_way_of_switching() {
        assert_eq!(translated(b"\x1b(0lqk\x1b(Blqk"), "\u{1b}(0┌─┐\u{1b}(Blqk");
        assert_eq!(translated(b"\x1b)0\x0elqk\x0flqk"), "\u{1b})0\u{e}┌─┐\u{f}lqk");
    }

    #[test]
    fn sequences_and_titles_stay_what_they_are() {
        let bytes = b"\x1b(0\x1b[1;5m\x1b[71Cx\x1b]0;title\x07x\x1bP1q\x1b\\x";
        assert_eq!(translated(bytes), "\u{1b}(0\u{1b}[1;5m\u{1b}[71C│\u{1b}]0;title\u{7}│\u{1b}P1q\u{1b}\\│");
    }

    proptest! {
        #[test]
        fn chunks_do_not_matter(bytes in prop::collection::vec(prop_oneof![any::<u8>(), Just(0x1b), Just(b'('), Just(b'0')], 0..200), at in 0_usize..200) {
            let at = at.min(bytes.len());
            let mut drawing = LineDrawing::default();
            let mut split = drawing.translate(&bytes[..at]).into_owned();
            split.extend_from_slice(&drawing.translate(&bytes[at..]));
            prop_assert_eq!(&split[..], &*LineDrawing::default().translate(&bytes));
        }

        #[test]
        fn what_is_no_graphic_set_passes_unchanged(text in "[ -~\r\n\u{1b}äß]{0,100}") {
            prop_assume!(!text.contains("\u{1b}(") && !text.contains("\u{1b})"));
            prop_assert_eq!(translated(text.as_bytes()), text);
        }
    }
}
