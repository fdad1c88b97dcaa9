//! Commands started by root: root only prepares, waits and takes over the result.
//!
//! The command itself, which reads what the network and guests send, runs in a second process that
//! gives its privileges up before it does anything. Root makes a staging directory that nobody else
//! can reach, with a folder of the build user's in it as that process' working directory, so that
//! all its paths are relative and it needs no way through root's own directories. The cache comes as
//! an open directory on standard input. When the process has ended, the folder is root's again, and
//! regular files without other names move to the output directory.

use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, Read as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, PermissionsExt as _, chown, fchown};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use hostler_runner::build::registrar::Registrar as _;
use hostler_runner::build::scratch::{Scratch, sweep};
use hostler_runner::causes::in_one_line;
use hostler_runner::recipe::Recipe;
use hostler_runner::watchdog::WatchdogError;
use nix::unistd::{Gid, Uid, User, setgid, setgroups, setsid, setuid};
use rustix::fs::{AtFlags, Mode, OFlags, openat, statat};
use rustix::process::{
    DumpableBehavior, Pid, PidfdFlags, Signal, getppid, pidfd_open, pidfd_send_signal, set_dumpable_behavior,
    set_parent_process_death_signal,
};

use super::arguments::{Global, Unprivileged};
use super::build::{Shown, fail, run};
use super::exit::Exit;
use super::registration::Registration;
use super::{doctor, signals};

/// The largest recipe, in bytes.
const LARGEST_RECIPE: u64 = 1024 * 1024;
/// The name of the recipe in the staging folder.
const STAGED_RECIPE: &str = "recipe.toml";
/// Root's download cache where none is asked for.
const SYSTEM_CACHE: &str = "/var/cache/hostler";

#[derive(Debug, thiserror::Error)]
enum PrivilegeError {
    #[error("could not read the recipe {path}")]
    Recipe {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("there is no user to build as; create one: useradd --system hostler")]
    NoUser,
    #[error("could not prepare {path} for the user that builds")]
    Prepare {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "the cache {path} belongs to user {owner}, but the build runs as user {user}; chown it, or choose another with --cache"
    )]
    Cache { path: PathBuf, owner: u32, user: u32 },
    #[error("could not start the build as user {user}")]
    Start {
        user: u32,
        #[source]
        source: io::Error,
    },
    #[error("could not take over {path} from the build")]
    TakeOver {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(transparent)]
    Watchdog(WatchdogError),
    #[error("the build left {path}, which is not a plain file of its own; it was not taken over")]
    Odd { path: PathBuf },
}

/// The user that builds for root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct BuildUser {
    user: u32,
    group: u32,
}

/// A command that root gives to the build user.
pub(crate) struct Delegated<'a> {
    /// The recipe to build; without one, the host is examined.
    pub(crate) recipe: Option<&'a Path>,
    /// Where the image goes, or would go.
    pub(crate) output: &'a Path,
    /// The cache that was asked for.
    pub(crate) cache: Option<&'a Path>,
    /// How long the host may be examined.
    pub(crate) limit: Option<Duration>,
}

/// Runs a command of root's as the build user.
pub(crate) fn main(global: &Global, wanted: &Delegated<'_>) -> Exit {
    match supervise(global, wanted) {
        Ok(exit) => exit,
        Err(error @ PrivilegeError::Recipe { .. }) => fail(&error, Exit::Usage),
        Err(error @ PrivilegeError::Watchdog(WatchdogError::Refused(_))) => fail(&error, Exit::Refused),
        Err(error) => fail(&error, Exit::Failed),
    }
}

fn supervise(global: &Global, wanted: &Delegated<'_>) -> Result<Exit, PrivilegeError> {
    let text = wanted.recipe.map(read_recipe).transpose()?;
    let user = build_user()?;
    let prepare = |path: &Path| {
        let path = path.to_owned();
        move |source| PrivilegeError::Prepare { path, source }
    };
    fs::create_dir_all(wanted.output).map_err(prepare(wanted.output))?;
    sweep(wanted.output).map_err(|error| prepare(wanted.output)(io::Error::other(in_one_line(&error))))?;
    let staging = Scratch::create(wanted.output)
        .map_err(|error| prepare(wanted.output)(io::Error::other(in_one_line(&error))))?;
    let registration = match wanted.recipe {
        Some(recipe) => register(global, recipe, &staging)?,
        None => None,
    };
    let folder = staging.path().join("work");
    DirBuilder::new().mode(0o700).create(&folder).map_err(prepare(&folder))?;
    if let Some(text) = text {
        let recipe = folder.join(STAGED_RECIPE);
        fs::write(&recipe, text).map_err(prepare(&recipe))?;
        fs::set_permissions(&recipe, Permissions::from_mode(0o644)).map_err(prepare(&recipe))?;
    }
    chown(&folder, Some(user.user), Some(user.group)).map_err(prepare(&folder))?;
    let cache = open_cache(wanted.cache, user)?;

    let start = |source| PrivilegeError::Start { user: user.user, source };
    let mut command = Command::new("/proc/self/exe");
    command.arg0("hostler").arg("__unprivileged").arg("--socket").arg(&global.socket);
    if global.json {
        command.arg("--json");
    }
    command.arg(format!("--user={}", user.user)).arg(format!("--group={}", user.group));
    command.arg(format!("--parent={}", std::process::id()));
    if registration.is_some() {
        command.arg("--registered");
    }
    if let Some(group) = kvm_group() {
        command.arg(format!("--kvm-group={group}"));
    }
    if let Some(recipe) = wanted.recipe {
        command.arg("--recipe").arg(recipe);
    }
    command.arg("--output").arg(wanted.output);
    if let Some(limit) = wanted.limit {
        command.arg(format!("--limit={}", humantime::format_duration(limit)));
    }
    command.current_dir(&folder).stdin(cache);
    let mut child = command.spawn().map_err(start)?;
    let pidfd = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or(rustix::io::Errno::SRCH)
        .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()));
    let forwarded = pidfd.map_err(io::Error::from).and_then(|pidfd| {
        signals::watch(move |number| {
            // Gone already: then there is nobody to tell.
            if let Some(signal) = Signal::from_named_raw(i32::from(number)) {
                let _ = pidfd_send_signal(pidfd.as_fd(), signal);
            }
        })
    });
    if let Err(error) = forwarded {
        let _ = child.kill();
        let _ = child.wait();
        return Err(start(error));
    }
    let status = child.wait().map_err(start)?;
    take_over(&folder, wanted.output, user, status.success())?;
    let removed = staging.remove();
    removed.map_err(|error| prepare(wanted.output)(io::Error::other(in_one_line(&error))))?;
    if let Some(registration) = registration {
        registration.close().map_err(PrivilegeError::Watchdog)?;
    }
    Ok(match (status.code(), status.signal()) {
        (Some(code), _) => Exit::Other(u8::try_from(code).unwrap_or(1)),
        (None, Some(signal)) => Exit::Stopped(u8::try_from(signal).unwrap_or(0)),
        (None, None) => Exit::Failed,
    })
}

/// Puts this process under a lease, and with it the one that builds: should it be killed, its staging
/// directory and all that the build runs are taken back.
fn register(
    global: &Global,
    recipe: &Path,
    staging: &Scratch,
) -> Result<Option<Registration>, PrivilegeError> {
    let name = format!("build {} for root", recipe.display());
    let registration = match Registration::open(&global.socket, &name) {
        Ok(registration) => registration,
        // The build says what that means.
        Err(WatchdogError::Unreachable { .. }) => return Ok(None),
        Err(error) => return Err(PrivilegeError::Watchdog(error)),
    };
    registration
        .claim_directory(staging.as_fd())
        .map_err(|source| PrivilegeError::Prepare { path: staging.path().to_owned(), source })?;
    Ok(Some(registration))
}

/// Continues as the build user, in the process that [`main`] started.
pub(crate) fn unprivileged(global: &Global, wanted: &Unprivileged) -> Exit {
    if let Err(error) = give_up_privileges(wanted) {
        return fail(&error, Exit::Failed);
    }
    // By the number of this process, so that its children can follow it as well.
    let cache = PathBuf::from(format!("/proc/{}/fd/0", std::process::id()));
    let Some(recipe) = &wanted.recipe else {
        let limit = wanted.limit.unwrap_or(Duration::MAX);
        return doctor::examine_host(global, Path::new("."), &cache, limit);
    };
    let text = match fs::read_to_string(STAGED_RECIPE) {
        Ok(text) => text,
        Err(error) => return fail(&error, Exit::Failed),
    };
    // Staged by root, and not to be taken for a result; root takes it away if this fails.
    let _ = fs::remove_file(STAGED_RECIPE);
    match Recipe::parse(&text, recipe) {
        Ok(recipe) => {
            let shown = Shown { folder: &wanted.output, registered: wanted.registered };
            run(global, recipe, ".".into(), cache, Some(&shown))
        }
        Err(error) => fail(&error, Exit::Usage),
    }
}

fn give_up_privileges(wanted: &Unprivileged) -> Result<(), PrivilegeError> {
    let failed = |source: io::Error| PrivilegeError::Start { user: wanted.user, source };
    // A session of its own: with root's terminal it could type into root's shell.
    setsid().map_err(|error| failed(error.into()))?;
    let groups: Vec<Gid> = wanted.kvm_group.map(Gid::from_raw).into_iter().collect();
    setgroups(&groups).map_err(|error| failed(error.into()))?;
    setgid(Gid::from_raw(wanted.group)).map_err(|error| failed(error.into()))?;
    setuid(Uid::from_raw(wanted.user)).map_err(|error| failed(error.into()))?;
    if setuid(Uid::from_raw(0)).is_ok() {
        return Err(failed(io::Error::other("root's privileges came back")));
    }
    rustix::thread::set_no_new_privs(true).map_err(|error| failed(error.into()))?;
    // Changing the user made this process' own files in /proc root's.
    set_dumpable_behavior(DumpableBehavior::Dumpable).map_err(|error| failed(error.into()))?;
    set_parent_process_death_signal(Some(Signal::TERM)).map_err(|error| failed(error.into()))?;
    let parent = getppid().map(Pid::as_raw_nonzero).map(std::num::NonZero::get);
    if parent.and_then(|pid| u32::try_from(pid).ok()) != Some(wanted.parent) {
        return Err(failed(io::Error::other("the process that started it is gone")));
    }
    Ok(())
}

fn read_recipe(path: &Path) -> Result<String, PrivilegeError> {
    let failed = |source| PrivilegeError::Recipe { path: path.to_owned(), source };
    let mut text = String::new();
    let file = File::open(path).map_err(failed)?;
    file.take(LARGEST_RECIPE + 1).read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > LARGEST_RECIPE {
        return Err(failed(io::Error::other("it has more than 1 MiB, so it is no recipe")));
    }
    Ok(text)
}

/// The user `hostler` if there is one, else who called sudo, else `nobody`.
fn build_user() -> Result<BuildUser, PrivilegeError> {
    let named = |name: &str| {
        let user = User::from_name(name).ok().flatten()?;
        Some(BuildUser { user: user.uid.as_raw(), group: user.gid.as_raw() })
    };
    let number = |name: &str| std::env::var(name).ok()?.parse().ok();
    let caller = || Some(BuildUser { user: number("SUDO_UID")?, group: number("SUDO_GID")? });
    choose_user([named("hostler"), caller(), named("nobody")]).ok_or(PrivilegeError::NoUser)
}

/// The first that is not root in any respect.
fn choose_user(candidates: [Option<BuildUser>; 3]) -> Option<BuildUser> {
    candidates.into_iter().flatten().find(|candidate| candidate.user != 0 && candidate.group != 0)
}

/// The group that may use `/dev/kvm`, where a group may.
fn kvm_group() -> Option<u32> {
    let device = fs::metadata("/dev/kvm").ok()?;
    let group_may = device.mode() & 0o060 == 0o060;
    (group_may && device.gid() != 0).then(|| device.gid())
}

fn open_cache(asked: Option<&Path>, user: BuildUser) -> Result<File, PrivilegeError> {
    let path = match asked {
        Some(path) => path.to_owned(),
        None => std::env::var_os("HOSTLER_CACHE")
            .filter(|value| !value.is_empty())
            .map_or_else(|| SYSTEM_CACHE.into(), PathBuf::from),
    };
    let prepare = |source| PrivilegeError::Prepare { path: path.clone(), source };
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent).map_err(prepare)?;
    }
    let made = match DirBuilder::new().mode(0o755).create(&path) {
        Ok(()) => true,
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => false,
        Err(error) => return Err(prepare(error)),
    };
    let directory = File::open(&path).map_err(prepare)?;
    if made {
        fchown(&directory, Some(user.user), Some(user.group)).map_err(prepare)?;
    }
    let owner = directory.metadata().map_err(prepare)?.uid();
    if owner == user.user {
        Ok(directory)
    } else {
        Err(PrivilegeError::Cache { path, owner, user: user.user })
    }
}

/// Moves what the build left in `folder` to `output`, and makes it root's.
fn take_over(folder: &Path, output: &Path, user: BuildUser, succeeded: bool) -> Result<(), PrivilegeError> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |source| PrivilegeError::TakeOver { path, source }
    };
    // From here on no process of the build user's can change what is in the folder: not by its
    // owner's rights, and not by others' that it may have given away.
    chown(folder, Some(0), Some(0)).map_err(failed(folder))?;
    fs::set_permissions(folder, Permissions::from_mode(0o700)).map_err(failed(folder))?;
    let directory = File::open(folder).map_err(failed(folder))?;
    for entry in fs::read_dir(folder).map_err(failed(folder))? {
        let name = entry.map_err(failed(folder))?.file_name();
        let path = folder.join(&name);
        if !name.to_str().is_some_and(|name| is_a_result(name, succeeded)) {
            continue;
        }
        let named = statat(&directory, &name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(|error| failed(&path)(error.into()))?;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let Ok(file) = openat(&directory, &name, flags, Mode::empty()).map(File::from) else {
            return Err(PrivilegeError::Odd { path });
        };
        let data = file.metadata().map_err(failed(&path))?;
        let plain =
            data.is_file() && data.nlink() == 1 && data.uid() == user.user && data.ino() == named.st_ino;
        if !plain {
            return Err(PrivilegeError::Odd { path });
        }
        fchown(&file, Some(0), Some(0)).map_err(failed(&path))?;
        file.set_permissions(Permissions::from_mode(0o644)).map_err(failed(&path))?;
        fs::rename(&path, output.join(&name)).map_err(failed(&path))?;
    }
    Ok(())
}

/// Whether a build makes a file of this name: nothing else of what a subverted one leaves comes near
/// root's own files. The image only comes of a build that succeeded.
fn is_a_result(name: &str, succeeded: bool) -> bool {
    let is_log = name.ends_with(".console.log") || name.ends_with(".verify.log");
    let is_image = name.ends_with(".qcow2") || name.ends_with(".qcow2.sha256");
    !name.starts_with('.') && (is_log || is_image && succeeded)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn root_takes_over_results_and_nothing_else() {
        assert!(is_a_result("debian-12.qcow2", true) && is_a_result("debian-12.qcow2.sha256", true));
        assert!(!is_a_result("debian-12.qcow2", false));
        assert!(is_a_result("debian-12.console.log", false));
        for name in ["Makefile", "passwd", ".qcow2", ".profile.console.log", "recipe.toml", "deploy.sh"] {
            assert!(!is_a_result(name, true), "{name}");
        }
    }

    #[test]
    fn root_is_never_the_build_user() {
        let root = BuildUser { user: 0, group: 0 };
        let half = BuildUser { user: 5, group: 0 };
        let nobody = BuildUser { user: 65534, group: 65534 };
        assert_eq!(choose_user([None, Some(root), Some(nobody)]), Some(nobody));
        assert_eq!(choose_user([Some(half), None, Some(nobody)]), Some(nobody));
        assert_eq!(choose_user([Some(nobody), Some(root), None]), Some(nobody));
        assert_eq!(choose_user([Some(root), Some(root), None]), None);
    }
}
