//! Lines of text out of what a console prints.
//!
//! Escape sequences are interpreted, not shown: a colour is nothing, a jump of the cursor ends a line.
//! So a rule sees the words that a person sees, whatever was between them.

use vte::{Params, Parser, Perform};

/// The longest line that is kept, in bytes.
const LONGEST: usize = 4096;

/// Splits a stream of bytes into lines.
#[derive(Default)]
pub struct Lines {
    parser: Parser,
    writer: Writer,
}

impl Lines {
    /// Takes bytes as they come, and hands over each line that they complete.
    pub fn push(&mut self, bytes: &[u8], mut take: impl FnMut(&str)) {
        self.parser.advance(&mut self.writer, bytes);
        for line in self.writer.done.drain(..) {
            take(&line);
        }
    }
}

#[derive(Default)]
struct Writer {
    line: String,
    /// The cursor was put back to the line's start: what comes next begins a new one.
    returned: bool,
    done: Vec<String>,
}

impl Writer {
    fn end(&mut self) {
        self.returned = false;
        if !self.line.trim().is_empty() {
            self.done.push(std::mem::take(&mut self.line));
        }
        self.line.clear();
    }
}

impl Perform for Writer {
    fn print(&mut self, character: char) {
        if self.returned {
            self.end();
        }
        // DEL and the C1 controls come as characters.
        if self.line.len() < LONGEST && !character.is_control() {
            self.line.push(character);
        }
    }

    fn execute(&mut self, byte: u8) {
        match byte {
            b'\n' | 0x0b | 0x0c => self.end(),
            b'\r' => self.returned = true,
            b'\t' => self.print(' '),
            _ => {}
        }
    }

    fn csi_dispatch(&mut self, _: &Params, _: &[u8], _: bool, action: char) {
        match action {
            // Over a gap on the same line; programs save spaces that way.
            'C' | 'G' | '`' => self.print(' '),
            'A' | 'B' | 'E' | 'F' | 'H' | 'f' | 'd' | 'J' => self.end(),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lines(chunks: &[&[u8]]) -> Vec<String> {
        let mut lines = Lines::default();
        let mut all = Vec::new();
        for chunk in chunks {
            lines.push(chunk, |line| all.push(line.to_owned()));
        }
        all
    }

    #[test]
    fn colours_are_nothing_and_jumps_end_a_line() {
        assert_eq!(lines(&[b"\x1b[31mKernel\x1b[0m pan", b"ic\r\n"]), ["Kernel panic"]);
        assert_eq!(lines(&[b"\x1b[5;3HTitle\x1b[7;3HText\x1b[2Cmore\x1b[1;1H"]), ["Title", "Text more"]);
    }

    #[test]
    fn a_line_that_is_written_over_is_one_each_time() {
        assert_eq!(lines(&[b"10%\r20%\r\n\r\nend\n"]), ["10%", "20%", "end"]);
    }

    #[test]
    fn a_line_without_end_is_not_kept() {
        let endless = vec![b'x'; 1 << 20];
        let all = lines(&[&endless, b"\n", b"y\n"]);
        assert_eq!((all[0].len(), all[1].as_str()), (LONGEST, "y"));
    }

    proptest! {
        #[test]
        fn no_control_character_comes_out(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            for line in lines(&[&bytes, b"\n"]) {
                prop_assert!(!line.chars().any(char::is_control), "{line:?}");
            }
        }
    }
}
