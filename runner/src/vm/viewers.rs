//! People who look at a machine's console, and type into it, while it runs.
//!
//! They come through a socket in the build's private directory, so only its user and root can. What they
//! get is the screen as the terminal emulation has it, never the guest's own bytes: nothing that a guest
//! prints acts on a person's terminal. Who is too slow is let go. Deliberately absent: the terminal of the
//! person, which `hostler attach` has.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

/// The socket's name in a build's scratch directory.
pub const SOCKET: &str = "console.sock";
/// How many may look at once.
const MOST: usize = 4;

/// Those who look, and where the next ones come from.
#[derive(Debug)]
pub struct Viewers {
    listener: UnixListener,
    streams: Vec<UnixStream>,
    /// What they see.
    shown: Option<vt100::Screen>,
}

impl Viewers {
    /// Lets people in through a socket in `directory`.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(directory: &Path) -> io::Result<Self> {
        // A socket's path is short; that of a directory need not be.
        let opened = File::open(directory)?;
        let path = format!("/proc/self/fd/{}/{SOCKET}", opened.as_raw_fd());
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(Self { listener, streams: Vec::new(), shown: None })
    }

    /// What is to be polled for reading.
    pub(super) fn descriptors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        std::iter::once(self.listener.as_fd()).chain(self.streams.iter().map(|stream| stream.as_fd()))
    }

    /// Lets new ones in, gives back what was typed, and shows everyone the screen as it is now.
    pub(super) fn serve(&mut self, screen: &vt100::Screen) -> Vec<u8> {
        let mut typed = Vec::new();
        self.streams.retain_mut(|stream| {
            let mut buffer = [0; 1024];
            match stream.read(&mut buffer) {
                Ok(0) => false,
                Ok(length) => {
                    typed.extend_from_slice(&buffer[..length]);
                    true
                }
                Err(error) => matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
            }
        });
        if let Some(shown) = &self.shown {
            let news = screen.contents_diff(shown);
            if !news.is_empty() {
                self.streams.retain_mut(|stream| stream.write_all(news.as_bytes()).is_ok());
            }
        }
        while let Ok((mut stream, _)) = self.listener.accept() {
            let whole = format!("\u{1b}[2J\u{1b}[H{}", screen.contents_formatted());
            let is_let_in = self.streams.len() < MOST
                && stream.set_nonblocking(true).is_ok()
                && stream.write_all(whole.as_bytes()).is_ok();
            if is_let_in {
                self.streams.push(stream);
            }
        }
        // Nobody looks: then nothing is compared.
        self.shown = (!self.streams.is_empty()).then(|| screen.clone());
        typed
    }
}

/// Connects to the console of the build that works in `directory`.
///
/// # Errors
/// When none does, or it has no machine now.
pub fn connect(directory: &Path) -> io::Result<UnixStream> {
    let opened = File::open(directory)?;
    UnixStream::connect(format!("/proc/self/fd/{}/{SOCKET}", opened.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(stream: &mut UnixStream) -> String {
        let mut buffer = [0; 64 * 1024];
        let length = stream.read(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    }

    #[test]
    fn a_person_sees_the_screen_and_types_and_no_escape_of_the_guests_comes_through() {
        let folder = tempfile::tempdir().unwrap();
        let mut viewers = Viewers::open(folder.path()).unwrap();
        let mut terminal = vt100::Parser::default();
        terminal.process(b"before\x1b]0;title\x07\x1b[?1000h");
        let mut person = connect(folder.path()).unwrap();
        assert_eq!(viewers.serve(terminal.screen()), b"");
        let seen = text(&mut person);
        assert!(seen.contains("before") && !seen.contains("title") && !seen.contains("1000"), "{seen:?}");
        terminal.process(b"\r\nnew \x1b]52;c;eA==\x07line");
        viewers.serve(terminal.screen());
        let news = text(&mut person);
        assert!(news.contains("new line") && !news.contains("before") && !news.contains("52;c"), "{news:?}");
        person.write_all(b"ls\n").unwrap();
        assert_eq!(viewers.serve(terminal.screen()), b"ls\n");
        drop(person);
        viewers.serve(terminal.screen());
        assert!(viewers.streams.is_empty());
    }

    #[test]
    fn a_directory_with_a_long_path_has_a_console_too() {
        let folder = tempfile::tempdir().unwrap();
        let deep = folder.path().join("x".repeat(200));
        std::fs::create_dir(&deep).unwrap();
        let _viewers = Viewers::open(&deep).unwrap();
        connect(&deep).unwrap();
        // The next machine of the same build.
        let _next = Viewers::open(&deep).unwrap();
        connect(&deep).unwrap();
    }
}
