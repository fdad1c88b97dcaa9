//! `hostler attach`: the console of a machine that a build runs right now.

use std::io::{self, IsTerminal as _, Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use hostler_runner::cancel::Cancel;
use hostler_runner::vm::viewers::{SOCKET, connect};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use super::build::tell;
use super::exit::Exit;
use super::{Failure, print, signals};

/// Ctrl-], as telnet and virsh have it.
const DETACH: u8 = 0x1d;

/// Why there is no console.
#[derive(Debug, thiserror::Error)]
enum AttachError {
    #[error(
        "no build runs a machine in {}: give the output directory of a build of yours, or the directory that the build names; builds of root's work in /var/cache/hostler", .0.display()
    )]
    None(PathBuf),
    #[error("several builds run machines in {}: give one of {}", folder.display(), listed(.builds))]
    Several { folder: PathBuf, builds: Vec<PathBuf> },
    #[error("could not look into {}", folder.display())]
    Look {
        folder: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("could not connect to the console in {}: it may have no machine right now", build.display())]
    Connect {
        build: PathBuf,
        #[source]
        source: io::Error,
    },
}

fn listed(builds: &[PathBuf]) -> String {
    builds.iter().map(|build| build.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// Shows the console, and passes on what is typed, until the machine ends or the person leaves.
pub(crate) fn attach(folder: &Path) -> Result<Exit, Failure> {
    let build = find(folder).map_err(|error| Failure::new(Exit::Failed, error))?;
    let stream = connect(&build)
        .map_err(|source| Failure::new(Exit::Failed, AttachError::Connect { build, source }))?;
    let is_terminal = io::stdin().is_terminal();
    if is_terminal {
        tell("hostler: this is the machine's serial console; Ctrl-] leaves it");
    }
    // A signal leaves the terminal as it was, too.
    let cancel = signals::cancel()?;
    let raw = is_terminal.then(Raw::enter).transpose()?;
    let ended = talk(stream.into(), io::stdin(), is_terminal, &cancel);
    drop(raw);
    ended?;
    if let Some(signal) = signals::received() {
        return Ok(Exit::Stopped(signal));
    }
    if is_terminal {
        let _ = print("\n");
    }
    Ok(Exit::Done)
}

/// The directory of the one build that runs a machine in `folder`, or is it.
fn find(folder: &Path) -> Result<PathBuf, AttachError> {
    if folder.join(SOCKET).exists() {
        return Ok(folder.to_owned());
    }
    let looked = |source| AttachError::Look { folder: folder.to_owned(), source };
    let mut builds = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(looked)? {
        let path = entry.map_err(looked)?.path();
        // A socket that a killed build left answers nobody.
        if path.join(SOCKET).exists() && connect(&path).is_ok() {
            builds.push(path);
        }
    }
    match builds.len() {
        0 => Err(AttachError::None(folder.to_owned())),
        1 => Ok(builds.remove(0)),
        _ => Err(AttachError::Several { folder: folder.to_owned(), builds }),
    }
}

/// The most that was typed and that the machine has not taken yet, in bytes.
const LARGEST_WAIT: usize = 64 * 1024;

/// Passes bytes both ways. Without an end of input: a script may only want to look. A machine that takes nothing
/// does not keep a person from leaving, or a signal from ending it.
fn talk(stream: OwnedFd, input: impl AsFd, is_terminal: bool, cancel: &Cancel) -> io::Result<()> {
    rustix::io::ioctl_fionbio(&stream, true)?;
    let mut console = std::fs::File::from(stream);
    let mut typing = true;
    let mut waiting: Vec<u8> = Vec::new();
    let mut buffer = [0; 16 * 1024];
    loop {
        let wish = if waiting.is_empty() { PollFlags::IN } else { PollFlags::IN | PollFlags::OUT };
        let mut polled = vec![PollFd::new(&console, wish), PollFd::new(cancel, PollFlags::IN)];
        // What a script sends waits until there is room; of a person, Ctrl-] is to be heard.
        if typing && (is_terminal || waiting.len() < LARGEST_WAIT) {
            polled.push(PollFd::new(&input, PollFlags::IN));
        }
        match poll(&mut polled, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready: Vec<PollFlags> = polled.iter().map(PollFd::revents).collect();
        let is_ready = |place: usize| ready.get(place).is_some_and(|flags| !flags.is_empty());
        if is_ready(1) {
            return Ok(());
        }
        if is_ready(0) {
            match console.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(length) => {
                    let mut stdout = io::stdout();
                    stdout.write_all(&buffer[..length])?;
                    stdout.flush()?;
                }
                Err(error) if is_for_later(&error) => {}
                Err(error) => return Err(error),
            }
        }
        if is_ready(2) {
            let length = rustix::io::read(&input, &mut buffer)?;
            let typed = &buffer[..length];
            if typed.contains(&DETACH) {
                return Ok(());
            }
            typing = length > 0;
            if waiting.len() < LARGEST_WAIT {
                waiting.extend_from_slice(typed);
            }
        }
        if waiting.is_empty() {
            continue;
        }
        match console.write(&waiting) {
            Ok(length) => drop(waiting.drain(..length)),
            Err(error) if is_for_later(&error) => {}
            Err(error) => return Err(error),
        }
    }
}

fn is_for_later(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

/// The terminal, passing on every key; as it was once this is dropped.
struct Raw(Termios);

impl Raw {
    fn enter() -> io::Result<Self> {
        let before = tcgetattr(io::stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(io::stdin(), OptionalActions::Now, &raw)?;
        Ok(Self(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // A terminal that is gone needs nothing.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.0);
        let _ = print("\u{1b}[0m\u{1b}[?25h");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use hostler_runner::vm::viewers::Viewers;

    use super::*;

    #[test]
    fn a_machine_that_takes_nothing_is_left_with_the_key_and_with_a_signal() {
        let (console, _machine) = std::os::unix::net::UnixStream::pair().unwrap();
        let (keys, mut person) = io::pipe().unwrap();
        let cancel = Arc::new(Cancel::new().unwrap());
        let asked = Arc::clone(&cancel);
        let stream: OwnedFd = console.try_clone().unwrap().into();
        let talking = std::thread::spawn(move || talk(stream, keys, true, &cancel));
        // More than any socket takes.
        for _ in 0..64 {
            person.write_all(&[b'x'; 16 * 1024]).unwrap();
        }
        person.write_all(&[DETACH]).unwrap();
        talking.join().unwrap().unwrap();
        let (keys, _person) = io::pipe().unwrap();
        asked.cancel();
        talk(console.into(), keys, true, &asked).unwrap();
    }

    #[test]
    fn the_one_build_that_runs_a_machine_is_found_and_a_dead_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| {
            let path = folder.path().join(name);
            std::fs::create_dir_all(&path).unwrap();
            path
        };
        assert!(matches!(find(folder.path()), Err(AttachError::None(_))));
        let first = at(".hostler-build.1");
        let viewers = Viewers::open(&first).unwrap();
        drop(Viewers::open(&at(".hostler-build.dead")).unwrap());
        assert_eq!(find(folder.path()).unwrap(), first);
        assert_eq!(find(&first).unwrap(), first);
        let _other = Viewers::open(&at(".hostler-build.2")).unwrap();
        assert!(matches!(find(folder.path()), Err(AttachError::Several { builds, .. }) if builds.len() == 2));
        drop(viewers);
    }
}
