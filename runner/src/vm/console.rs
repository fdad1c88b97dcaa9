//! The serial console: kept as it came, interpreted as a terminal, searched for known ways to fail.
//!
//! Deliberately absent: the socket (bytes are pushed in) and any judgement of what a finding means.
//! Installers draw curses screens on it, so the last screen is that of a real terminal, and the
//! text that leaves this module has no escape sequence. Whatever a guest prints, what is kept of it is
//! bounded.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::num::NonZeroU16;

use crate::signs::{Finding, Lines, Place, Rules, flattened, prompt};

use super::bounded::Bounded;
use super::line_drawing::LineDrawing;
use super::novelty::Novelty;
use super::watch::ScreenSeen;

/// Rows of the terminal: enough for a kernel's panic with its trace.
const ROWS: NonZeroU16 = NonZeroU16::new(50).expect("is not zero");
/// Columns of the terminal.
const COLUMNS: NonZeroU16 = NonZeroU16::new(160).expect("is not zero");
/// How many findings are kept.
const MOST_FINDINGS: usize = 64;

/// How many of the last lines are kept, and of each how many characters.
pub(super) const TAIL: (usize, usize) = (60, 300);

/// The console of one guest.
pub struct Console<W> {
    drawing: LineDrawing,
    terminal: vt100::Parser,
    lines: Lines,
    log: Bounded<W>,
    findings: Vec<Finding>,
    tail: VecDeque<String>,
    novelty: Novelty,
}

impl<W: Write> Console<W> {
    /// A console whose bytes go to `log`, the first `limit` of them.
    pub fn new(log: W, limit: u64) -> Self {
        Self {
            drawing: LineDrawing::default(),
            terminal: vt100::Parser::new(ROWS, COLUMNS, 0),
            lines: Lines::default(),
            log: Bounded::new(log, "console", limit),
            findings: Vec::new(),
            tail: VecDeque::new(),
            novelty: Novelty::default(),
        }
    }

    /// Takes bytes as they come; gives what rules find in the lines that they complete.
    ///
    /// # Errors
    /// When the log cannot be written.
    pub fn push(&mut self, bytes: &[u8]) -> io::Result<Vec<Finding>> {
        self.log.push(bytes)?;
        let bytes = &self.drawing.translate(bytes);
        self.terminal.process(bytes);
        let mut found = Vec::new();
        let Self { lines, tail, .. } = self;
        lines.push(bytes, |line| {
            keep_last(tail, line);
            found.extend(Rules::builtin().find(Place::Line, line));
        });
        self.keep(&found);
        Ok(found)
    }

    /// Looks at the screen as a whole.
    pub fn look(&mut self) -> ScreenSeen {
        let screen = self.terminal.screen();
        let contents = screen.contents();
        let (row, column) = screen.cursor_position();
        let line = screen.rows(0, COLUMNS.get()).nth(usize::from(row)).unwrap_or_default();
        let before: String = line.chars().take(usize::from(column)).collect();
        let is_at_the_end = before.trim_end() == line.trim_end();
        let prompt = prompt(&before).filter(|_| is_at_the_end);
        let prompt = prompt.map(|prompt| prompt.chars().filter(|one| !one.is_control()).take(200).collect());
        let is_new = self.novelty.is_new(&contents);
        // The cursor is where a person would type: what is below it is not the screen's end.
        let finding = Rules::builtin().find(Place::Screen, &flattened(&contents));
        if is_new {
            let found: Vec<Finding> = finding.iter().cloned().collect();
            self.keep(&found);
        }
        ScreenSeen { is_new, finding, prompt }
    }

    /// The terminal's screen.
    pub(super) fn terminal(&self) -> &vt100::Screen {
        self.terminal.screen()
    }

    /// Bytes so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.log.bytes()
    }

    /// What was noticed so far, the first of it.
    #[must_use]
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// The last lines that were printed, without control characters.
    #[must_use]
    pub fn tail(&self) -> Vec<String> {
        self.tail.iter().cloned().collect()
    }

    /// The screen as text: no escapes, no trailing blanks, no empty lines at either end.
    #[must_use]
    pub fn screen(&self) -> String {
        let contents = self.terminal.screen().contents();
        let lines: Vec<&str> = contents.lines().map(str::trim_end).collect();
        let text = lines.join("\n");
        let text = text.trim_matches('\n');
        text.chars().filter(|&character| character == '\n' || !character.is_control()).collect()
    }

    /// The last line with text in it.
    #[must_use]
    pub fn last_line(&self) -> String {
        self.screen().lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default().trim().to_owned()
    }

    fn keep(&mut self, found: &[Finding]) {
        let room = MOST_FINDINGS.saturating_sub(self.findings.len());
        self.findings.extend(found.iter().take(room).cloned());
    }
}

/// Keeps a line as the last of some.
pub(super) fn keep_last(tail: &mut VecDeque<String>, line: &str) {
    let (lines, characters) = TAIL;
    if tail.len() >= lines {
        tail.pop_front();
    }
    tail.push_back(line.chars().take(characters).collect());
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn console() -> Console<Vec<u8>> {
        Console::new(Vec::new(), 1024)
    }

    #[test]
    fn a_panic_is_found_across_chunks_and_colours() {
        let mut console = console();
        assert_eq!(console.push(b"\r\n[    4.25] \x1b[1mKernel pan").unwrap(), []);
        let found = console.push(b"ic\x1b[0m - not syncing: VFS: Unable to mount root\r\nmore").unwrap();
        let lines: Vec<&str> = found.iter().map(|finding| finding.line.as_str()).collect();
        assert_eq!(lines, ["[    4.25] Kernel panic - not syncing: VFS: Unable to mount root"]);
        assert_eq!(console.findings(), found);
    }

    #[test]
    fn a_dialog_is_read_as_a_person_reads_it() {
        let mut console = console();
        // Drawn out of order, over what was there before, with a frame, and broken into lines.
        console
            .push(b"old text\x1b[2J\x1b[6;3H\xe2\x94\x82 failed:\x1b[5;3H\xe2\x94\x82 Downloading a file")
            .unwrap();
        let seen = console.look();
        assert!(seen.is_new);
        assert_eq!(seen.finding.unwrap().rule, "download-dialog");
        assert!(!console.look().is_new);
    }

    #[test]
    fn a_prompt_is_what_is_before_the_cursor_and_nothing_behind_it() {
        let mut console = console();
        console.push(b"first\r\nContinue? [Y/n] ").unwrap();
        assert_eq!(console.look().prompt.as_deref(), Some("Continue? [Y/n]"));
        console.push(b"y\r\n").unwrap();
        assert_eq!(console.look().prompt, None);
        console.push(b"Name: here\x1b[3;6H").unwrap();
        assert_eq!(console.look().prompt, None);
    }

    #[test]
    fn a_sequence_without_an_end_takes_no_memory() {
        let chunk = vec![b'x'; 64 * 1024];
        // Other tests of this process take memory as well: the least of several counts.
        let grew = (0..8).map(|_| {
            let mut console = Console::new(io::sink(), 0);
            console.push(b"\x1b]0;").unwrap();
            let before = resident();
            for _ in 0..512 {
                console.push(&chunk).unwrap();
            }
            resident().saturating_sub(before)
        });
        let grew = grew.min().unwrap();
        assert!(grew < 16 << 20, "{grew}");
    }

    /// What this process has in memory, in bytes; proc_pid_statm(5).
    fn resident() -> u64 {
        let text = std::fs::read_to_string("/proc/self/statm").unwrap();
        text.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 4096
    }

    #[test]
    fn the_screen_is_what_a_person_would_see() {
        let mut console = console();
        console.push(b"gone\x1b[2J\x1b[1;1H\x1b[31mInstallation step failed\x1b[0m\r\n\r\nRetry?").unwrap();
        assert_eq!(console.screen(), "Installation step failed\n\nRetry?");
        assert_eq!(console.last_line(), "Retry?");
    }

    proptest! {
        #[test]
        fn no_bytes_panic_and_no_escape_leaves(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let mut console = console();
            console.push(&bytes).unwrap();
            let escaped = console.screen().contains('\u{1b}');
            prop_assert!(!escaped);
        }

        #[test]
        fn escape_sequences_do_not_panic(
            parts in prop::collection::vec("(\u{1b}\\[[0-9;]{0,12}[A-Za-z@`]|[ -~]{0,200}|\u{1b}[78DEM]|世界|\r|\n|\t)", 0..60)
        ) {
            let mut console = console();
            console.push(parts.concat().as_bytes()).unwrap();
            let _ = console.screen();
            let _ = console.look();
        }
    }
}
