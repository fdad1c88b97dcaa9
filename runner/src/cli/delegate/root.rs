//! Root's side: starts the building process, waits for it, and copies what it finishes.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::Path;
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use hostler_runner::beside::Beside;
use hostler_runner::cancel::Cancel;
use hostler_runner::passing;
use hostler_runner::stop::Stop;
use hostler_runner::watchdog::WatchdogError;
use nix::sched::{CloneFlags, unshare};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::message::{FromBuilder, FromRoot, receive, send};
use super::results::Results;
use super::user::{BuildUser, build_user, kvm_group};
use super::{DelegateError, Delegated, Task, cache_directory};
use crate::cli::arguments::Global;
use crate::cli::build::tell;
use crate::cli::exit::Exit;
use crate::cli::progress::Files;
use crate::cli::registration::Registration;
use crate::cli::signals;

/// How long a build that was told to stop may take to clean up; then it is killed.
const STOP_PATIENCE: Duration = Duration::from_secs(60);

/// What the building process may see of root's environment: what it is told by, how it reaches the
/// network, and how it shows things.
const VARIABLES: &[&str] = &[
    "PATH",
    "LANG",
    "LC_ALL",
    "TERM",
    "NO_COLOR",
    "HOSTLER_LOG",
    "HOSTLER_CACHE_LIMIT",
    "HOSTLER_MIRROR",
    "HOSTLER_STORE",
    "AWS_ENDPOINT_URL",
    "AWS_REGION",
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "http_proxy",
    "https_proxy",
    "HTTPS_PROXY",
    "no_proxy",
    "NO_PROXY",
    "SSL_CERT_FILE",
    "SSL_CERT_DIR",
    "SOURCE_DATE_EPOCH",
];

pub(super) fn supervise(global: &Global, wanted: &Delegated<'_>) -> Result<Exit, DelegateError> {
    let (recipe, results, files) = match wanted.task {
        Task::Build { recipe, output, telling, supply, .. } => (
            Some(open_recipe(recipe)?),
            Some(open_results(output, supply.written())?),
            telling.open().map_err(DelegateError::Telling)?,
        ),
        Task::Examine { .. } => (None, None, Files::default()),
    };
    let lock = match wanted.task {
        Task::Build { recipe, supply, .. } => supply.kept(recipe).map(|path| open_lock(&path)).transpose()?,
        Task::Examine { .. } => None,
    };
    let user = build_user().ok_or(DelegateError::NoUser)?;
    let (cache, cache_path) = cache_directory::open(wanted.cache, user)?;
    let registration = match wanted.task {
        Task::Build { recipe, .. } => register(global, recipe)?,
        Task::Examine { .. } => None,
    };
    let start = |source: io::Error| DelegateError::Start { user: user.user, source };
    let (socket, theirs) = passing::packet_pair().map_err(|error| start(error.into()))?;
    let mut command = command(global, wanted, user, &cache_path, registration.is_some());
    // The directory itself, whatever lies at its path by now.
    command.current_dir(format!("/proc/self/fd/{}", cache.as_raw_fd())).stdin(theirs);
    let mut builder = Builder::start(command).map_err(start)?;
    if !builder.alone {
        tell(
            "hostler: this root may not make process namespaces: what escapes from the build would outlive it",
        );
    }
    if let Some(recipe) = &recipe {
        let (recipe, beside) = recipe;
        send(&socket, &FromRoot::Recipe, Some(recipe.as_fd())).map_err(start)?;
        send(&socket, &FromRoot::Beside, Some(beside.descriptor().as_fd())).map_err(start)?;
        if let Some(lock) = &lock {
            send(&socket, &FromRoot::Lock, Some(lock.as_fd())).map_err(start)?;
        }
        for (message, file) in [(FromRoot::Events, &files.events), (FromRoot::Junit, &files.junit)] {
            if let Some(file) = file {
                send(&socket, &message, Some(file.as_fd())).map_err(start)?;
            }
        }
        send(&socket, &FromRoot::Go, None).map_err(start)?;
    }
    drop(files);
    let status = builder.attend(&socket, results.as_ref()).map_err(start)?;
    if let Some(registration) = registration {
        registration.close().map_err(DelegateError::Watchdog)?;
    }
    Ok(match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Other(u8::try_from(code).unwrap_or(1)),
        (None, Some(signal)) => {
            tell(&format!("hostler: the build's process was ended by signal {signal}"));
            Exit::Stopped(u8::try_from(signal).unwrap_or(0))
        }
        (None, None) => Exit::Failed,
    })
}

/// The recipe and the folder that it lies in.
fn open_recipe(path: &Path) -> Result<(File, Beside), DelegateError> {
    let failed = |source| DelegateError::Recipe { path: path.to_owned(), source };
    let file = File::open(path).map_err(failed)?;
    Ok((file, Beside::of(path).map_err(|error| failed(error.source))?))
}

fn open_results(path: &Path, lock: Option<&Path>) -> Result<Results, DelegateError> {
    let failed = |path: &Path, source| DelegateError::Prepare { path: path.to_owned(), source };
    let results = Results::open(path).map_err(|source| failed(path, source))?;
    match lock {
        Some(lock) => results.with_lock_at(lock).map_err(|source| failed(lock, source)),
        None => Ok(results),
    }
}

fn open_lock(path: &Path) -> Result<File, DelegateError> {
    File::open(path).map_err(|source| DelegateError::Lock { path: path.to_owned(), source })
}

/// Puts this process under a lease, and with it the one that builds: should it be killed, all that the
/// build runs is ended.
fn register(global: &Global, recipe: &Path) -> Result<Option<Registration>, DelegateError> {
    match Registration::open(&global.socket, &format!("build {} for root", recipe.display())) {
        Ok(registration) => Ok(Some(registration)),
        // The build says what that means.
        Err(WatchdogError::Unreachable { .. }) => Ok(None),
        Err(error) => Err(DelegateError::Watchdog(error)),
    }
}

fn command(
    global: &Global,
    wanted: &Delegated<'_>,
    user: BuildUser,
    cache_path: &Path,
    registered: bool,
) -> Command {
    let mut command = Command::new("/proc/self/exe");
    // It works in another directory.
    let socket = std::path::absolute(&global.socket).unwrap_or_else(|_| global.socket.clone());
    command.arg0("hostler").arg("__unprivileged").arg("--socket").arg(socket);
    if global.json {
        command.arg("--json");
    }
    command.arg(format!("--user={}", user.user)).arg(format!("--group={}", user.group));
    if let Some(group) = kvm_group() {
        command.arg(format!("--kvm-group={group}"));
    }
    if registered {
        command.arg("--registered");
    }
    command.arg("--cache").arg(cache_path);
    match wanted.task {
        Task::Build { recipe, telling, supply, explains, debugging, .. } => {
            if let Some(lock) = supply.kept(recipe) {
                command.arg("--locked").arg(lock);
            }
            let flags = [
                ("--locks", supply.written().is_some()),
                ("--offline", supply.offline),
                ("--explain-confinement", explains),
                ("--keep", debugging.keeps),
                ("--shell-on-failure", debugging.holds),
            ];
            command.args(flags.iter().filter(|(_, given)| *given).map(|(flag, _)| flag));
            let form = telling.progress.settled().word();
            command.arg("--recipe").arg(recipe).arg(format!("--progress={form}"))
        }
        Task::Examine { limit } => command.arg(format!("--limit={}", humantime::format_duration(limit))),
    };
    command.env_clear();
    command.envs(VARIABLES.iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
    command
}

/// The building process. Dropping it ends it, with all that it started.
struct Builder {
    child: Child,
    pidfd: OwnedFd,
    /// Whether it is the first process of a namespace of its own: when it has ended, the kernel has
    /// ended everything that came from it (pid_namespaces(7)).
    alone: bool,
}

impl Builder {
    fn start(mut command: Command) -> io::Result<Self> {
        // Only children of the thread that asks for the namespace are in it, and that thread can make
        // no other threads.
        let started = thread::Builder::new().name("builder".to_owned()).spawn(move || {
            let alone = unshare(CloneFlags::CLONE_NEWPID).is_ok();
            command.spawn().map(|child| (child, alone))
        })?;
        let (mut child, alone) =
            started.join().map_err(|_| io::Error::other("the thread that starts it has died"))??;
        match pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
            Ok(pidfd) => Ok(Self { child, pidfd, alone }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(error.into())
            }
        }
    }

    /// Copies what it finishes, and passes signals on, until it has ended.
    fn attend(&mut self, socket: &OwnedFd, results: Option<&Results>) -> io::Result<ExitStatus> {
        let asked: Arc<Mutex<Option<Instant>>> = Arc::default();
        let (told, to_builder) = (Arc::clone(&asked), socket.try_clone()?);
        let cancel = Arc::new(Cancel::new()?);
        let stop = Stop::new(Arc::clone(&cancel));
        signals::watch(move |number| {
            told.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(Instant::now);
            // Gone already: then there is nobody to tell. Not as a signal, which it could get before
            // it has learnt to listen.
            let _ = send(&to_builder, &FromRoot::Stop(number), None);
            // After that: a copy that is given up is to be heard of by one who knows why.
            cancel.cancel();
        })?;
        let mut open = true;
        loop {
            let (said, ended) = self.wait(open.then_some(socket))?;
            if said {
                open = answer(socket, results, &stop)?;
            } else if ended {
                return self.child.wait();
            }
            let asked = *asked.lock().unwrap_or_else(PoisonError::into_inner);
            if asked.is_some_and(|asked| asked.elapsed() > STOP_PATIENCE) {
                tell("hostler: the build does not stop, and is killed");
                let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
            }
        }
    }

    /// Whether it has said something, and whether it has ended; waits a second for that.
    fn wait(&self, socket: Option<&OwnedFd>) -> io::Result<(bool, bool)> {
        let second = Timespec { tv_sec: 1, tv_nsec: 0 };
        let mut polled = vec![PollFd::new(&self.pidfd, PollFlags::IN)];
        polled.extend(socket.map(|socket| PollFd::new(socket, PollFlags::IN)));
        match poll(&mut polled, Some(&second)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
        let ready = |index: usize| polled.get(index).is_some_and(|one| !one.revents().is_empty());
        Ok((ready(1), ready(0)))
    }
}

impl Drop for Builder {
    fn drop(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// Does what the building process asks for; false once it asks for nothing any more.
fn answer(socket: impl AsFd, results: Option<&Results>, stop: &Stop) -> io::Result<bool> {
    let Some((FromBuilder::Finished { name, folder }, file)) = receive(socket.as_fd(), Duration::ZERO)?
    else {
        return Ok(false);
    };
    let taken = match (results, file) {
        (Some(results), Some(file)) => results.take(&name, folder.as_deref(), &file.into(), stop),
        _ => Err(io::Error::other("no file was expected, or none came")),
    };
    let answer = match taken {
        Ok(path) => FromRoot::Taken(path),
        Err(error) => FromRoot::NotTaken(error.to_string()),
    };
    send(socket, &answer, None)?;
    Ok(true)
}
