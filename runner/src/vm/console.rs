//! The serial console: kept as it came, interpreted as a terminal, searched for known disasters.
//!
//! Deliberately absent: the socket (bytes are pushed in) and any judgement of what a sign means.
//! Installers draw curses screens on it, so the last screen is that of a real terminal, and the
//! text that leaves this module has no escape sequence.

use std::io::{self, Write};
use std::num::NonZeroU16;

/// Rows of the terminal: enough for a kernel's panic with its trace.
const ROWS: NonZeroU16 = NonZeroU16::new(50).expect("is not zero");
/// Columns of the terminal.
const COLUMNS: NonZeroU16 = NonZeroU16::new(160).expect("is not zero");
/// The longest line that is searched, in bytes.
const LONGEST_LINE: usize = 4096;
/// How many signs are kept.
const MOST_SIGNS: usize = 64;

/// Something in the console's text that a reader would stop at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sign {
    /// What it is.
    pub kind: SignKind,
    /// The line, without control characters.
    pub line: String,
}

/// The kinds of [`Sign`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SignKind {
    /// The kernel gave up.
    KernelPanic,
    /// The kernel killed a program for want of memory.
    OutOfMemory,
    /// systemd waits for a person.
    EmergencyMode,
    /// The guest's file system is full.
    NoSpaceInGuest,
    /// The guest's kernel lost its disk.
    DiskLost,
}

/// The console of one guest.
pub struct Console<W> {
    terminal: vt100::Parser,
    log: W,
    limit: u64,
    bytes: u64,
    line: Vec<u8>,
    signs: Vec<Sign>,
}

impl<W: Write> Console<W> {
    /// A console whose bytes go to `log`, the first `limit` of them.
    pub fn new(log: W, limit: u64) -> Self {
        Self {
            terminal: vt100::Parser::new(ROWS, COLUMNS, 0),
            log,
            limit,
            bytes: 0,
            line: Vec::new(),
            signs: Vec::new(),
        }
    }

    /// Takes bytes as they come; gives the signs in the lines that they complete.
    ///
    /// # Errors
    /// When the log cannot be written.
    pub fn push(&mut self, bytes: &[u8]) -> io::Result<Vec<Sign>> {
        self.log_bounded(bytes)?;
        self.bytes += bytes.len() as u64;
        self.terminal.process(bytes);
        let mut found = Vec::new();
        for &byte in bytes {
            if byte == b'\n' {
                let line = std::mem::take(&mut self.line);
                found.extend(sign(&String::from_utf8_lossy(&line)));
            } else if self.line.len() < LONGEST_LINE {
                self.line.push(byte);
            }
        }
        let room = MOST_SIGNS.saturating_sub(self.signs.len());
        self.signs.extend(found.iter().take(room).cloned());
        Ok(found)
    }

    /// Bytes so far.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What was noticed so far, the first of it.
    #[must_use]
    pub fn signs(&self) -> &[Sign] {
        &self.signs
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

    fn log_bounded(&mut self, bytes: &[u8]) -> io::Result<()> {
        let room = self.limit.saturating_sub(self.bytes);
        if room == 0 {
            return Ok(());
        }
        let fits = usize::try_from(room).unwrap_or(usize::MAX).min(bytes.len());
        let (kept, rest) = bytes.split_at(fits);
        self.log.write_all(kept)?;
        if !rest.is_empty() || room == bytes.len() as u64 {
            let limit = self.limit;
            write!(
                self.log,
                "\n[hostler: the console printed more than {limit} bytes; the rest was not kept]\n"
            )?;
        }
        self.log.flush()
    }
}

/// What a line tells, if anything.
fn sign(line: &str) -> Option<Sign> {
    let kind = if is_kernels(line, "Kernel panic - not syncing") {
        SignKind::KernelPanic
    } else if line.contains("invoked oom-killer:") {
        SignKind::OutOfMemory
    } else if line.contains("You are in emergency mode")
        || line.contains("Press Enter for maintenance")
        || line.contains("Press Enter for emergency shell")
    {
        SignKind::EmergencyMode
    } else if line.contains("No space left on device") {
        SignKind::NoSpaceInGuest
    } else if line.contains("rejecting I/O to offline device") {
        SignKind::DiskLost
    } else {
        return None;
    };
    let line = line.chars().filter(|character| !character.is_control()).take(240).collect();
    Some(Sign { kind, line })
}

/// Whether the kernel itself printed `text`: its lines start with the time, `[   12.345678] `. A
/// package that only talks about panics must not end a build.
fn is_kernels(line: &str, text: &str) -> bool {
    let Some(rest) = line.trim_start().strip_prefix('[') else {
        return false;
    };
    let Some((time, message)) = rest.split_once("] ") else {
        return false;
    };
    time.trim().parse::<f64>().is_ok() && message.starts_with(text)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn console() -> Console<Vec<u8>> {
        Console::new(Vec::new(), 1024)
    }

    #[test]
    fn a_panic_is_found_across_chunks() {
        let mut console = console();
        assert_eq!(console.push(b"\r\n[    4.25] Kernel pan").unwrap(), []);
        let found = console.push(b"ic - not syncing: VFS: Unable to mount root\r\nmore").unwrap();
        assert_eq!(
            found,
            [Sign {
                kind: SignKind::KernelPanic,
                line: "[    4.25] Kernel panic - not syncing: VFS: Unable to mount root".into()
            }]
        );
        assert_eq!(console.signs(), found);
    }

    #[test]
    fn a_program_that_mentions_a_panic_is_no_panic() {
        let mut console = console();
        for line in [
            "Kernel panic - not syncing\n",
            "[x] Kernel panic - not syncing\n",
            "[ 1.0] echo: Kernel panic - not syncing\n",
        ] {
            assert_eq!(console.push(line.as_bytes()).unwrap(), [], "{line}");
        }
    }

    #[test]
    fn the_screen_is_what_a_person_would_see() {
        let mut console = console();
        console.push(b"gone\x1b[2J\x1b[1;1H\x1b[31mInstallation step failed\x1b[0m\r\n\r\nRetry?").unwrap();
        assert_eq!(console.screen(), "Installation step failed\n\nRetry?");
        assert_eq!(console.last_line(), "Retry?");
    }

    #[test]
    fn the_log_stops_at_its_limit_and_says_so_once() {
        let mut console = Console::new(Vec::new(), 10);
        console.push(b"0123456").unwrap();
        console.push(b"789abc").unwrap();
        console.push(b"def").unwrap();
        let log = String::from_utf8(console.log).unwrap();
        assert_eq!(
            log,
            "0123456789\n[hostler: the console printed more than 10 bytes; the rest was not kept]\n"
        );
        assert_eq!(console.bytes, 16);
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
        }
    }
}
