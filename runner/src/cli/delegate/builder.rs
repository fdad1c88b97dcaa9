//! The building side: gives root's privileges up, then does the work as any user would.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use hostler_runner::beside::Beside;
use hostler_runner::build::Debugging;
use hostler_runner::build::delivery::{Delivery, DeliveryError};
use hostler_runner::build::preflight::Workspace;
use hostler_runner::cache::Supply;
use hostler_runner::cancel::Cancel;
use hostler_runner::lock::{Lock, LockError};
use hostler_runner::recipe::Recipe;
use hostler_runner::stop::Stop;
use nix::unistd::{Gid, Uid, setgid, setgroups, setsid, setuid};
use rustix::io::fcntl_dupfd_cloexec;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{
    CapabilitySet, capabilities, clear_ambient_capability_set, remove_capability_from_bounding_set,
    set_no_new_privs,
};

use super::message::{FromBuilder, FromRoot, receive, send};
use super::user::BuildUser;
use crate::cli::arguments::{Global, Unprivileged};
use crate::cli::build::{Around, fail, run};
use crate::cli::exit::Exit;
use crate::cli::progress::Files;
use crate::cli::{doctor, signals};

/// The largest recipe, in bytes.
const LARGEST_RECIPE: u64 = 1024 * 1024;
/// The largest lock, in bytes.
const LARGEST_LOCK: u64 = 256 * 1024 * 1024;
/// How long root's process may take to hand over the recipe.
const RECIPE_PATIENCE: Duration = Duration::from_secs(30);
/// How long root's process may take to copy a file.
const COPY_PATIENCE: Duration = Duration::from_secs(3600);

#[derive(Debug, thiserror::Error)]
enum BuilderError {
    #[error("could not give up root's privileges for user {user}")]
    Privileges {
        user: u32,
        #[source]
        source: io::Error,
    },
    #[error("could not listen to signals")]
    Signals(#[source] io::Error),
    #[error("the process of root's that started this one does not answer")]
    Root(#[source] io::Error),
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error("could not read the recipe {}", path.display())]
    Recipe {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// Continues as the build user, in the process that root's started.
pub(crate) fn main(global: &Global, wanted: &Unprivileged) -> Exit {
    let privileges = |source| BuilderError::Privileges { user: wanted.user, source };
    let prepared = give_up_privileges(wanted).map_err(privileges).and_then(|()| {
        let socket = fcntl_dupfd_cloexec(io::stdin().as_fd(), 3);
        let socket = socket.map_err(|error| BuilderError::Root(error.into()))?;
        Ok((socket, signals::cancel().map_err(BuilderError::Signals)?))
    });
    let (socket, cancel) = match prepared {
        Ok(prepared) => prepared,
        Err(error) => return fail(&error, Exit::Failed),
    };
    let workspace = Workspace { folder: ".".into(), shown: wanted.cache.clone(), option: "--cache" };
    let given = wanted.recipe.as_deref().map(|path| {
        let text = read_recipe(&socket, path)?;
        let lock = wanted.locked.as_deref().map(|path| read_lock(&socket, path)).transpose()?;
        Ok((text, lock, receive_files(&socket).map_err(BuilderError::Root)?))
    });
    let link = given.transpose().and_then(|given| {
        Link::new(socket, Arc::clone(&cancel)).map(|link| (given, link)).map_err(BuilderError::Root)
    });
    let (given, link) = match link {
        Ok(link) => link,
        Err(error @ (BuilderError::Recipe { .. } | BuilderError::Lock(_))) => {
            return fail(&error, Exit::Usage);
        }
        Err(error) => return fail(&error, Exit::Failed),
    };
    let (Some(((text, beside), lock, files)), Some(path)) = (given, &wanted.recipe) else {
        return doctor::examine_host(global, &workspace, Path::new("."), wanted.limit, cancel);
    };
    let recipe = match Recipe::parse(&text, path) {
        Ok(recipe) => recipe,
        Err(error) => return fail(&error, Exit::Usage),
    };
    let unwatched = format!(
        "no watchdog is reachable: if this build is killed, its machine dies with it, and its scratch directory stays until the next build with the cache {}",
        wanted.cache.display()
    );
    let around = Around {
        supply: Supply { lock: lock.map(Arc::new), offline: wanted.offline },
        locks: wanted.locks,
        beside,
        workspace,
        cache: ".".into(),
        delivery: Arc::new(link),
        cancel,
        unwatched: (!wanted.registered).then_some(unwatched),
        progress: wanted.progress,
        files,
        explains: wanted.explain_confinement,
        debugging: Debugging { keeps: wanted.keep, holds: wanted.shell_on_failure },
    };
    // Root's process puts the lock where it was asked for.
    run(global, recipe, around).0
}

/// The lock to keep to, which root has opened.
fn read_lock(socket: &OwnedFd, path: &Path) -> Result<Lock, BuilderError> {
    let file = match receive(socket, RECIPE_PATIENCE).map_err(BuilderError::Root)? {
        Some((FromRoot::Lock, Some(file))) => File::from(file),
        _ => return Err(BuilderError::Root(io::Error::other("it hands over no lock"))),
    };
    let mut text = String::new();
    let read = file.take(LARGEST_LOCK).read_to_string(&mut text);
    let failed = |source| LockError::Read { path: path.to_owned(), source };
    read.map_err(failed)?;
    Ok(Lock::parse(&text, path)?)
}

fn give_up_privileges(wanted: &Unprivileged) -> io::Result<()> {
    // A session of its own: with root's terminal it could type into root's shell.
    setsid()?;
    become_user(BuildUser { user: wanted.user, group: wanted.group }, wanted.kvm_group)
}

/// Becomes the user for good, with nothing of root's left.
pub(super) fn become_user(wanted: BuildUser, kvm_group: Option<u32>) -> io::Result<()> {
    let groups: Vec<Gid> = kvm_group.map(Gid::from_raw).into_iter().collect();
    setgroups(&groups)?;
    // While it may: what is not in this set comes with no program, whatever its bits say.
    for capability in CapabilitySet::all().iter() {
        // One that this kernel does not know cannot be removed, nor had.
        let _ = remove_capability_from_bounding_set(capability);
    }
    clear_ambient_capability_set()?;
    setgid(Gid::from_raw(wanted.group))?;
    setuid(Uid::from_raw(wanted.user))?;
    let left = capabilities(None)?;
    if setuid(Uid::from_raw(0)).is_ok() || !(left.effective | left.permitted | left.inheritable).is_empty() {
        return Err(io::Error::other("some of root's privileges are left"));
    }
    set_no_new_privs(true)?;
    // Changing the user made this process' own files in /proc root's.
    set_dumpable_behavior(DumpableBehavior::Dumpable)?;
    Ok(())
}

/// The text of the recipe, which root has opened: this user may not be able to. And its folder, in which
/// this user can open what it may read, whoever may look at the folders above.
fn read_recipe(socket: &OwnedFd, path: &Path) -> Result<(String, Beside), BuilderError> {
    let failed = |source| BuilderError::Recipe { path: path.to_owned(), source };
    let file = match receive(socket, RECIPE_PATIENCE).map_err(BuilderError::Root)? {
        Some((FromRoot::Recipe, Some(file))) => File::from(file),
        _ => return Err(BuilderError::Root(io::Error::other("it hands over no recipe"))),
    };
    let beside = match receive(socket, RECIPE_PATIENCE).map_err(BuilderError::Root)? {
        Some((FromRoot::Beside, Some(folder))) => {
            Beside::new(folder, path.parent().unwrap_or(Path::new(".")).to_owned())
        }
        _ => return Err(BuilderError::Root(io::Error::other("it hands over no recipe"))),
    };
    let mut text = String::new();
    file.take(LARGEST_RECIPE + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > LARGEST_RECIPE {
        return Err(failed(io::Error::other("it has more than 1 MiB, so it is no recipe")));
    }
    Ok((text, beside))
}

/// The files to which root wants to have written what happens.
fn receive_files(socket: &OwnedFd) -> io::Result<Files> {
    let mut files = Files::default();
    loop {
        match receive(socket, RECIPE_PATIENCE)? {
            Some((FromRoot::Events, Some(file))) => files.events = Some(file.into()),
            Some((FromRoot::Junit, Some(file))) => files.junit = Some(file.into()),
            Some((FromRoot::Go, _)) => return Ok(files),
            _ => return Err(io::Error::other("it says something else than which files to write")),
        }
    }
}

/// The way to root's process.
struct Link {
    socket: Arc<OwnedFd>,
    cancel: Arc<Cancel>,
    /// Locked from a question to its answer.
    answers: Mutex<Receiver<Result<PathBuf, String>>>,
}

impl Link {
    /// Listens to root's process from now on: its wish to stop, and its death, end the build in order.
    fn new(socket: OwnedFd, cancel: Arc<Cancel>) -> io::Result<Self> {
        let socket = Arc::new(socket);
        let (sender, answers) = channel();
        let (heard, told) = (Arc::clone(&socket), Arc::clone(&cancel));
        thread::Builder::new().name("root".to_owned()).spawn(move || {
            listen(&heard, &sender, &told);
            told.cancel();
        })?;
        Ok(Self { socket, cancel, answers: Mutex::new(answers) })
    }
}

/// Returns when root's process is gone.
fn listen(socket: &OwnedFd, answers: &Sender<Result<PathBuf, String>>, cancel: &Cancel) {
    loop {
        let answer = match receive(socket, Duration::from_secs(3600)) {
            Ok(Some((FromRoot::Taken(path), _))) => Ok(path),
            Ok(Some((FromRoot::NotTaken(reason), _))) => Err(reason),
            Ok(Some((FromRoot::Stop(signal), _))) => {
                signals::pretend(signal);
                cancel.cancel();
                continue;
            }
            Err(error) if error.kind() == io::ErrorKind::TimedOut => continue,
            Ok(
                Some((
                    FromRoot::Recipe
                    | FromRoot::Beside
                    | FromRoot::Lock
                    | FromRoot::Events
                    | FromRoot::Junit
                    | FromRoot::Go,
                    _,
                ))
                | None,
            )
            | Err(_) => return,
        };
        if answers.send(answer).is_err() {
            return;
        }
    }
}

impl Delivery for Link {
    fn deliver(&self, file: &Path, folder: Option<&str>) -> Result<PathBuf, DeliveryError> {
        let ask = || -> io::Result<PathBuf> {
            let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default().to_owned();
            let opened = File::open(file)?;
            let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
            let folder = folder.map(str::to_owned);
            send(&self.socket, &FromBuilder::Finished { name, folder }, Some(opened.as_fd()))?;
            let answer = answers.recv_timeout(COPY_PATIENCE);
            let answer = answer.map_err(|_| io::Error::other("root's process gave no answer"))?;
            answer.map_err(|reason| {
                // Root was told as well, and gave the copy up.
                Stop::new(Arc::clone(&self.cancel))
                    .check()
                    .err()
                    .map_or_else(|| io::Error::other(reason), io::Error::other)
            })
        };
        ask().map_err(|source| DeliveryError { file: file.to_owned(), source })
    }
}
