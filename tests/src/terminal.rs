//! A terminal of a test's own, with a program on it.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};

use crate::failure::{OrFail, wait_for};
use crate::patience::stretched;

/// How long any text may take to appear.
const PATIENCE: Duration = Duration::from_secs(15);

/// The terminal: what is typed goes in, what is shown is kept.
#[derive(Debug)]
pub struct Terminal {
    keyboard: File,
    screen: OwnedFd,
    shown: Arc<Mutex<Vec<u8>>>,
    /// How much of what was shown has been waited for.
    seen: usize,
}

impl Terminal {
    /// A terminal of that size.
    ///
    /// # Panics
    /// When none can be had.
    #[must_use]
    pub fn new(rows: u16, columns: u16) -> Self {
        // Not by openpty(3), whose descriptors whatever another test starts meanwhile would inherit.
        let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
        let keyboard = openpt(flags).or_fail("opening a terminal");
        grantpt(&keyboard).and_then(|()| unlockpt(&keyboard)).or_fail("taking the terminal");
        let name = ptsname(&keyboard, Vec::new()).or_fail("the terminal's name");
        let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
        let screen = open(name.as_c_str(), flags, Mode::empty()).or_fail("opening its other side");
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&screen, size).or_fail("setting its size");
        let keyboard = File::from(keyboard);
        let mut output = keyboard.try_clone().or_fail("another handle of the terminal");
        let shown = Arc::new(Mutex::new(Vec::new()));
        let collected = Arc::clone(&shown);
        // It ends with the last handle of the other side.
        std::thread::spawn(move || {
            let mut buffer = [0u8; 4096];
            while let Ok(length) = output.read(&mut buffer) {
                if length == 0 {
                    return;
                }
                let mut collected = collected.lock().unwrap_or_else(PoisonError::into_inner);
                collected.extend_from_slice(&buffer[..length]);
            }
        });
        Self { keyboard, screen, shown, seen: 0 }
    }

    /// A command in a session of its own, whose terminal this is.
    ///
    /// # Panics
    /// When the terminal's handle cannot be copied.
    #[must_use]
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let handle = || Stdio::from(self.screen.try_clone().or_fail("another handle of the terminal"));
        // A test that is run in the background, or by CI, has signals of the keyboard ignored, and what
        // it starts inherits that.
        let mut command = Command::new("env");
        command.args(["--default-signal", "setsid", "--ctty", "--wait"]).arg(program.as_ref());
        command.stdin(handle()).stdout(handle()).stderr(handle());
        command
    }

    /// Types.
    ///
    /// # Panics
    /// When the terminal is gone.
    pub fn type_text(&mut self, text: &str) {
        self.keyboard.write_all(text.as_bytes()).or_fail("typing");
    }

    /// Waits for text to be shown, after what was waited for before.
    ///
    /// # Panics
    /// When it is not shown in time; the message has all that was.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) {
        let start = self.seen;
        let all = || {
            let shown = self.shown.lock().unwrap_or_else(PoisonError::into_inner);
            String::from_utf8_lossy(&shown).into_owned()
        };
        let found = || Some(start + all().get(start..)?.find(text)? + text.len());
        let begun = std::time::Instant::now();
        while found().is_none() && begun.elapsed() < stretched(PATIENCE) {
            std::thread::sleep(Duration::from_millis(10));
        }
        let what = format!("{text:?} on the terminal, which shows:\n{}", all());
        self.seen = wait_for(what, Duration::ZERO, found).0;
    }
}
