//! `hostler attach`: the console of a machine that a build runs right now.

use std::io::{self, IsTerminal as _, Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use hostler_runner::vm::viewers::{SOCKET, connect};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use super::Failure;
use super::build::tell;
use super::exit::Exit;

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
    let raw = is_terminal.then(Raw::enter).transpose()?;
    let ended = talk(stream.into());
    drop(raw);
    ended?;
    if is_terminal {
        println!();
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

/// Passes bytes both ways. Without an end of input: a script may only want to look.
fn talk(stream: OwnedFd) -> io::Result<()> {
    let mut console = std::fs::File::from(stream);
    let mut typing = true;
    let mut buffer = [0; 16 * 1024];
    loop {
        let stdin = io::stdin();
        let mut polled = vec![PollFd::new(&console, PollFlags::IN)];
        if typing {
            polled.push(PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN));
        }
        match poll(&mut polled, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready: Vec<bool> = polled.iter().map(|one| !one.revents().is_empty()).collect();
        if ready.first() == Some(&true) {
            let length = console.read(&mut buffer)?;
            if length == 0 {
                return Ok(());
            }
            let mut stdout = io::stdout();
            stdout.write_all(&buffer[..length])?;
            stdout.flush()?;
        }
        if ready.get(1) == Some(&true) {
            let length = rustix::io::read(&stdin, &mut buffer)?;
            let typed = &buffer[..length];
            if typed.contains(&DETACH) {
                return Ok(());
            }
            typing = length > 0;
            console.write_all(typed)?;
        }
    }
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
        print!("\u{1b}[0m\u{1b}[?25h");
        let _ = io::stdout().flush();
    }
}

#[cfg(test)]
mod tests {
    use hostler_runner::vm::viewers::Viewers;

    use super::*;

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
