//! The lines a guest writes to its control port, as a bounded, pure parser.
//!
//! `stage NAME`, `fail STEP STATUS`, `done NONCE`; each at most [`LONGEST_LINE`] bytes. A guest is
//! not trusted: what is no such line is counted and dropped, names are cut down to characters that
//! cannot move a terminal's cursor, and nothing grows with what it sends.

/// The longest line that is looked at, in bytes.
const LONGEST_LINE: usize = 1024;
/// The longest name that is kept, in characters.
const LONGEST_NAME: usize = 64;

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// A step begins.
    Stage(String),
    /// A step failed, with this exit status.
    Failed {
        /// The step.
        step: String,
        /// Its exit status.
        status: i32,
    },
    /// The guest is done, and this is its proof.
    Done(String),
    /// A line that is none of these.
    Unknown,
}

/// Splits bytes into lines and reads them.
#[derive(Debug, Default)]
pub struct Parser {
    line: Vec<u8>,
    overlong: bool,
}

impl Parser {
    /// Takes bytes as they come, and gives the messages that they complete.
    pub fn push(&mut self, bytes: &[u8]) -> Vec<Message> {
        let mut messages = Vec::new();
        for &byte in bytes {
            if byte == b'\n' {
                let line = std::mem::take(&mut self.line);
                let overlong = std::mem::take(&mut self.overlong);
                messages.push(if overlong { Message::Unknown } else { parse(&line) });
            } else if self.line.len() < LONGEST_LINE {
                self.line.push(byte);
            } else {
                self.overlong = true;
            }
        }
        messages
    }
}

fn parse(line: &[u8]) -> Message {
    let Ok(line) = std::str::from_utf8(line) else {
        return Message::Unknown;
    };
    let mut words = line.trim_end_matches('\r').split(' ');
    match (words.next(), words.next(), words.next(), words.next()) {
        (Some("stage"), Some(name), None, None) => Message::Stage(cleaned(name)),
        (Some("fail"), Some(step), Some(status), None) => match status.parse() {
            Ok(status) => Message::Failed { step: cleaned(step), status },
            Err(_) => Message::Unknown,
        },
        (Some("done"), Some(nonce), None, None) => Message::Done(nonce.to_owned()),
        _ => Message::Unknown,
    }
}

fn cleaned(name: &str) -> String {
    name.chars()
        .take(LONGEST_NAME)
        .map(
            |character| {
                if character.is_ascii_alphanumeric() || "-_.".contains(character) { character } else { '?' }
            },
        )
        .collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn lines_are_read_across_chunks() {
        let mut parser = Parser::default();
        assert_eq!(parser.push(b"stage conf"), []);
        assert_eq!(
            parser.push(b"igure\nfail run-1 100\ndone 5f"),
            [Message::Stage("configure".into()), Message::Failed { step: "run-1".into(), status: 100 }]
        );
        assert_eq!(parser.push(b"e7\r\n"), [Message::Done("5fe7".into())]);
    }

    #[test]
    fn what_is_no_message_is_unknown() {
        let mut parser = Parser::default();
        for line in ["", "done", "done a b", "fail x y", "stage", "hello"] {
            assert_eq!(parser.push(format!("{line}\n").as_bytes()), [Message::Unknown], "{line:?}");
        }
    }

    #[test]
    fn a_line_without_end_is_not_kept() {
        let mut parser = Parser::default();
        assert_eq!(parser.push(&vec![b'x'; 1 << 20]), []);
        assert!(parser.line.len() <= LONGEST_LINE);
        assert_eq!(parser.push(b"\n"), [Message::Unknown]);
        assert_eq!(parser.push(b"done n\n"), [Message::Done("n".into())]);
    }

    #[test]
    fn escapes_in_names_do_not_reach_a_terminal() {
        assert_eq!(Parser::default().push("stage \u{1b}[2J\n".as_bytes()), [Message::Stage("??2J".into())]);
    }

    proptest! {
        #[test]
        fn chunks_do_not_matter(bytes in prop::collection::vec(any::<u8>(), 0..300), at in 0_usize..300) {
            let at = at.min(bytes.len());
            let mut parser = Parser::default();
            let mut split = parser.push(&bytes[..at]);
            split.extend(parser.push(&bytes[at..]));
            prop_assert_eq!(split, Parser::default().push(&bytes));
        }
    }
}
