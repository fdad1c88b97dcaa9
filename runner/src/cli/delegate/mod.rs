//! Commands started by root: root only prepares, waits and copies the result.
//!
//! The command itself, which reads what the network and guests send, runs in a second process
//! ([`builder`]) that gives its privileges up before it does anything. It works in its user's cache
//! directory, which is its working directory from the start: so all its paths are relative, it needs
//! no way through root's own directories, and whatever happens to root's process it can clean up
//! itself. Root's process ([`root`]) keeps to directories that it holds open, and reads of the other
//! one only small [`message`]s on a socket. A finished file comes as an open descriptor; root copies
//! it, so that nobody else ever had the file open that root calls its result.
//!
//! ```text
//! root ── socket, cache directory ──► builder ──► qemu, gpgv, mke2fs, …
//!   ◄──────── finished files ───────────┘
//! ```

mod builder;
mod cache_directory;
mod message;
mod results;
mod root;
mod user;

use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hostler_runner::build::Debugging;
use hostler_runner::watchdog::WatchdogError;

pub(crate) use builder::main as go_on_as_builder;

use super::arguments::{Global, SupplyArguments};
use super::build::fail;
use super::exit::Exit;
use super::progress::Telling;

/// A command that root gives to the build user.
pub(crate) struct Delegated<'a> {
    /// What to do.
    pub(crate) task: Task<'a>,
    /// The cache that was asked for.
    pub(crate) cache: Option<&'a Path>,
}

/// What the build user is to do.
pub(crate) enum Task<'a> {
    /// Build this recipe, whose results root puts there.
    Build {
        recipe: &'a Path,
        output: &'a Path,
        telling: &'a Telling,
        supply: &'a SupplyArguments,
        explains: bool,
        debugging: Debugging,
    },
    /// Examine the host, for this long at most.
    Examine { limit: Duration },
}

#[derive(Debug, thiserror::Error)]
enum DelegateError {
    #[error("could not read the recipe {}", path.display())]
    Recipe {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("could not open a file that was to be written")]
    Telling(#[source] io::Error),
    #[error("could not read the lock {}: make one with --lock", path.display())]
    Lock {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("there is no user to build as; create one: useradd --system hostler")]
    NoUser,
    #[error("could not prepare {} for the user that builds", path.display())]
    Prepare {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "the cache {} belongs to user {owner}, but the build runs as user {user}; give it to root (chown 0:0), and each user that builds gets a directory of its own in there, or choose another with --cache",
        path.display()
    )]
    Cache { path: PathBuf, owner: u32, user: u32 },
    #[error("could not start the build as user {user}")]
    Start {
        user: u32,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Watchdog(WatchdogError),
}

/// Runs a command of root's as the build user.
pub(crate) fn main(global: &Global, wanted: &Delegated<'_>) -> Exit {
    match root::supervise(global, wanted) {
        Ok(exit) => exit,
        Err(
            error @ (DelegateError::Recipe { .. } | DelegateError::Lock { .. } | DelegateError::Telling(_)),
        ) => fail(&error, Exit::Usage),
        Err(error @ DelegateError::Watchdog(WatchdogError::Refused(_))) => fail(&error, Exit::Refused),
        Err(error) => fail(&error, Exit::Failed),
    }
}

/// Goes on as the build user, in that user's cache directory, as whose `.` the cache is then found. For
/// commands that only work with the cache; files of root's are to be opened before.
///
/// # Errors
/// There is no such user, no such directory, or root's privileges cannot be given up.
pub(crate) fn enter_cache(
    asked: Option<&Path>,
) -> Result<PathBuf, impl std::error::Error + Send + Sync + use<>> {
    let enter = || {
        let user = user::build_user().ok_or(DelegateError::NoUser)?;
        let (directory, path) = cache_directory::open(asked, user)?;
        let start = |source| DelegateError::Start { user: user.user, source };
        rustix::process::fchdir(&directory).map_err(|error| start(error.into()))?;
        builder::become_user(user, None).map_err(start)?;
        Ok::<_, DelegateError>(path)
    };
    enter()
}

/// Goes on as the user to whom a directory belongs, if this is root's process.
///
/// # Errors
/// It cannot be opened, it belongs to root, or root's privileges cannot be given up.
pub(crate) fn become_owner(directory: &Path) -> io::Result<()> {
    if !rustix::process::geteuid().is_root() {
        return Ok(());
    }
    let data = std::fs::metadata(directory)?;
    let (user, group) = (data.uid(), data.gid());
    if user == 0 || group == 0 {
        return Err(io::Error::other(format!(
            "it belongs to root, and nothing that reads what the network sends runs as root: give it to a user (chown hostler: {})",
            directory.display()
        )));
    }
    builder::become_user(user::BuildUser { user, group }, None)
}
