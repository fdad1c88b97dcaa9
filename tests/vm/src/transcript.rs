//! The console of the machine as lines: which are shown, which are kept for a failure.
//!
//! Pure. What the command says lies between two lines that `start` prints; before and after them the
//! kernel and systemd speak, which only matters when something went wrong.

use std::collections::VecDeque;

use hostler_protocol::text::without_controls;

/// What `start` prints before the command.
const BEGIN: &str = "hostler-tests: begin";
/// What it prints after it.
const END: &str = "hostler-tests: end";
/// How many lines are kept for a failure.
const KEPT: usize = 40;
/// Where a line is cut that does not end, in bytes.
const LONGEST_LINE: usize = 64 * 1024;

/// What became of a line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Line {
    /// The command begins.
    Begin,
    /// The command said it.
    Said(String),
}

/// Splits the console into lines.
#[derive(Debug, Default)]
pub(crate) struct Transcript {
    rest: Vec<u8>,
    running: bool,
    kept: VecDeque<String>,
}

impl Transcript {
    /// Takes bytes as they come; gives the lines to show that they complete.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Vec<Line> {
        let mut shown = Vec::new();
        for &byte in bytes {
            if byte != b'\n' && self.rest.len() < LONGEST_LINE {
                self.rest.push(byte);
                continue;
            }
            let line = std::mem::take(&mut self.rest);
            let line = without_controls(String::from_utf8_lossy(&line).trim_end());
            if byte != b'\n' {
                self.rest.push(byte);
            }
            shown.extend(self.take(line));
        }
        shown
    }

    fn take(&mut self, line: String) -> Option<Line> {
        // A message of the kernel's may stand before it on the same line.
        if !self.running && line.ends_with(BEGIN) {
            self.running = true;
            return Some(Line::Begin);
        }
        if self.running && line.ends_with(END) {
            self.running = false;
            return None;
        }
        if self.running {
            self.kept.clear();
            return Some(Line::Said(line));
        }
        if !line.trim().is_empty() {
            self.kept.push_back(line);
            if self.kept.len() > KEPT {
                self.kept.pop_front();
            }
        }
        None
    }

    /// The last lines that were not shown.
    pub(crate) fn tail(self) -> Vec<String> {
        self.kept.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_command_says_is_shown() {
        let mut transcript = Transcript::default();
        assert_eq!(transcript.push(b"[ 1.0] boot\r\n\r\nhostler-te"), []);
        assert_eq!(transcript.push(b"sts: begin\r\nhel"), [Line::Begin]);
        assert_eq!(transcript.push(b"lo\x1b[2J\r\n"), [Line::Said("hello\\u{1b}[2J".into())]);
        assert_eq!(transcript.push(b"hostler-tests: end\r\n[ 9.0] off\r\n"), []);
        assert_eq!(transcript.tail(), ["[ 9.0] off"]);
    }

    #[test]
    fn a_machine_that_never_begins_leaves_its_last_words() {
        let mut transcript = Transcript::default();
        for number in 0..100 {
            assert_eq!(transcript.push(format!("line {number}\n").as_bytes()), []);
        }
        let tail = transcript.tail();
        assert_eq!((tail.len(), tail.last().map(String::as_str)), (KEPT, Some("line 99")));
    }

    #[test]
    fn a_line_without_end_is_cut() {
        let mut transcript = Transcript::default();
        transcript.push(b"hostler-tests: begin\n");
        let lines = transcript.push(&vec![b'x'; 3 * LONGEST_LINE]);
        assert_eq!(lines.len(), 2);
        assert!(transcript.rest.len() <= LONGEST_LINE);
    }
}
