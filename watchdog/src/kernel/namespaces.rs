//! The mount namespaces besides the own one, with and without processes.
//!
//! A namespace lives on without any process while its nsfs file is mounted or open somewhere, and all
//! that is mounted in it stays mounted. Since Linux 6.12 the kernel has a list of all; before, they are
//! found by what `/proc` shows of tasks and by the nsfs mounts in namespaces found so far. One that only
//! an open descriptor keeps is not found there.
//!
//! Nothing here keeps a namespace: all descriptors are closed before anything is returned, but the one
//! that was asked for.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use linux_raw_sys::general::NSFS_MAGIC;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, fstat, fstatfs, open, openat2, stat};

use super::budget::{self, Budget};
use super::mounts::{self, Wanted};
use super::namespace_calls::{self, Neighbour};
use super::statmount;
use super::visit::Visit;
use crate::model::{Mount, MountNamespace, MountNumber, Namespace};

/// What was found of the mount namespaces besides the own one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Others {
    /// The namespaces.
    pub namespaces: Vec<Namespace>,
    /// Those of their mounts that are wanted.
    pub mounts: Vec<Mount>,
    /// Namespaces whose mounts could not be read, and why.
    pub unreadable: Vec<(MountNamespace, String)>,
    /// Why there may be namespaces that were not found.
    pub unlisted: Option<String>,
    budget: Budget,
}

/// How namespaces are found and their mounts read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Means {
    /// By the kernel's own list, and by number without going there (Linux 6.13).
    Numbers,
    /// By the kernel's own list, and by going there (Linux 6.12).
    Visits,
    /// By tasks and nsfs mounts, and by going there.
    Search,
}

/// Reads all mount namespaces but the own one, of which all mounts are given. For a process with one
/// thread, as it may have to visit them. `may_look` is asked before the mounts of each are read, and can
/// refuse.
///
/// # Errors
/// When the namespaces cannot be listed at all.
pub fn others(
    own_mounts: &[Mount],
    wanted: &Wanted,
    may_look: &mut dyn FnMut(MountNamespace) -> bool,
) -> io::Result<Others> {
    match others_by(best_means(own_mounts), own_mounts, wanted, may_look) {
        Err(error) if is_unknown_request(&error) => others_by(Means::Search, own_mounts, wanted, may_look),
        result => result,
    }
}

/// How this kernel lets mounts be read best, given that it has a list.
fn best_means(own_mounts: &[Mount]) -> Means {
    let named = own_mounts.iter().find(|mount| !mount.source.is_empty());
    match named.map(|mount| mount.identity.number) {
        Some(MountNumber::Unique(unique)) if statmount::tells_all(unique) => Means::Numbers,
        Some(_) | None => Means::Visits,
    }
}

fn is_unknown_request(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ENOTTY)
}

fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

/// The same by means that the caller chooses, so that those of older kernels can be tried on newer ones.
///
/// # Errors
/// As [`others`].
pub fn others_by(
    means: Means,
    own_mounts: &[Mount],
    wanted: &Wanted,
    may_look: &mut dyn FnMut(MountNamespace) -> bool,
) -> io::Result<Others> {
    let mut found = Others::default();
    match means {
        Means::Numbers | Means::Visits => walk(&mut |held| {
            if !may_look(held.namespace.namespace) {
                found.take(held, Err(hung_before()));
                return ControlFlow::Continue(());
            }
            let by_number = held.namespace.unique.filter(|_| means == Means::Numbers);
            let mounts = match by_number {
                Some(unique) => mounts::of_number(unique, held.namespace.namespace, wanted),
                None => Visit::to(&held.file)
                    .and_then(|visit| mounts::table(&visit))
                    .and_then(|mounts| budget::of_one(mounts::keep_wanted(mounts, wanted))),
            };
            found.take(held, mounts);
            ControlFlow::Continue(())
        })?,
        Means::Search => {
            let missed = search(own_mounts, may_look, |held, mounts| {
                found.take(
                    held,
                    mounts.and_then(|mounts| budget::of_one(mounts::keep_wanted(mounts, wanted))),
                );
                ControlFlow::Continue(())
            })?;
            found.unreadable.extend(missed.unopened);
            found.unlisted = missed.untold;
        }
    }
    Ok(found)
}

fn hung_before() -> io::Error {
    io::Error::other("reading them took too long before")
}

impl Others {
    fn take(&mut self, held: &Held, mounts: io::Result<Vec<Mount>>) {
        match mounts {
            Ok(mounts) => {
                let left_out = self.budget.take(held.namespace.namespace, &mounts);
                self.mounts.extend(mounts);
                for namespace in left_out {
                    self.mounts.retain(|mount| mount.identity.namespace != namespace);
                    self.unreadable.push((namespace, budget::too_much().to_string()));
                }
            }
            // It went meanwhile.
            Err(error) if is_gone(&error) => return,
            Err(error) => self.unreadable.push((held.namespace.namespace, error.to_string())),
        }
        self.namespaces.push(held.namespace);
    }
}

/// Opens a mount namespace by its inode; `None` when there is none. Pins it until it is closed.
///
/// # Errors
/// When the namespaces cannot be listed.
pub fn open_by_inode(wanted: MountNamespace) -> io::Result<Option<OwnedFd>> {
    let mut found = None;
    let mut look = |held: &Held| {
        if held.namespace.namespace != wanted {
            return ControlFlow::Continue(());
        }
        found = Some(held.file.try_clone());
        ControlFlow::Break(())
    };
    match walk(&mut look) {
        Ok(()) => {}
        Err(error) if is_unknown_request(&error) => {
            search(&mounts::own()?.1, &mut |_| true, |held, _| look(held))?;
        }
        Err(error) => return Err(error),
    }
    found.transpose()
}

/// A mount namespace, held by a descriptor.
#[derive(Debug)]
struct Held {
    namespace: Namespace,
    file: OwnedFd,
}

/// The own user namespace, by inode.
#[derive(Clone, Copy, Debug)]
struct OwnUsers(u64);

impl OwnUsers {
    /// Read at home: what a namespace that is being visited has at `/proc` may be anything.
    fn read() -> io::Result<Self> {
        Ok(Self(stat("/proc/thread-self/ns/user")?.st_ino))
    }
}

impl Held {
    fn new(file: OwnedFd, own: OwnUsers) -> io::Result<Self> {
        let unique = namespace_calls::namespace_number(&file).ok();
        Self::with_number(file, unique, own)
    }

    fn with_number(file: OwnedFd, unique: Option<u64>, own: OwnUsers) -> io::Result<Self> {
        let namespace = MountNamespace(fstat(&file)?.st_ino);
        let other_user_namespace = match namespace_calls::user_namespace(&file) {
            Ok(users) => fstat(users)?.st_ino != own.0,
            // It is none below the own one.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => true,
            Err(error) => return Err(error),
        };
        Ok(Self { namespace: Namespace { namespace, unique, other_user_namespace }, file })
    }
}

/// Shows each mount namespace but the own one. The kernel's list can be gone along only, and not begun at
/// its begin, so this goes both ways from the own one.
fn walk(look: &mut dyn FnMut(&Held) -> ControlFlow<()>) -> io::Result<()> {
    let own = open("/proc/thread-self/ns/mnt", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    let users = OwnUsers::read()?;
    for way in [Neighbour::Previous, Neighbour::Next] {
        let mut at = namespace_calls::neighbour(&own, way)?;
        while let Some((file, unique)) = at {
            let held = Held::with_number(file, Some(unique), users)?;
            if look(&held).is_break() {
                return Ok(());
            }
            at = namespace_calls::neighbour(&held.file, way)?;
        }
    }
    Ok(())
}

/// What a search could not find out.
#[derive(Debug, Default)]
struct Missed {
    /// Namespaces that are known by their files' mounts only, which could not be opened.
    unopened: BTreeMap<MountNamespace, String>,
    /// Why there may be others.
    untold: Option<String>,
}

/// Shows each mount namespace but the own one that can be found without the kernel's list, with all of
/// its mounts. A namespace that is mounted in another is opened while that one is visited, and held until
/// its turn comes.
fn search(
    own_mounts: &[Mount],
    may_look: &mut dyn FnMut(MountNamespace) -> bool,
    mut look: impl FnMut(&Held, io::Result<Vec<Mount>>) -> ControlFlow<()>,
) -> io::Result<Missed> {
    let (tasks, untold) = tasks(Path::new("/proc"))?;
    let mut missed = Missed { untold, ..Missed::default() };
    let mut seen = BTreeSet::from([mounts::namespace_of(None)?]);
    let users = OwnUsers::read()?;
    let mut kept = open_kept(own_mounts, users, &seen, &mut missed);
    let mut tasks = tasks.into_iter();
    loop {
        let held = match tasks.next() {
            Some((namespace, _)) if seen.contains(&namespace) => continue,
            Some((namespace, tasks)) => open_of_tasks(namespace, &tasks, users)?,
            None if kept.is_empty() => break,
            None => kept.pop(),
        };
        let Some(held) = held.filter(|held| seen.insert(held.namespace.namespace)) else { continue };
        if !may_look(held.namespace.namespace) {
            if look(&held, Err(hung_before())).is_break() {
                break;
            }
            continue;
        }
        let mounts = Visit::to(&held.file).and_then(|visit| {
            let mounts = mounts::table(&visit)?;
            kept.extend(open_kept(&mounts, users, &seen, &mut missed));
            Ok(mounts)
        });
        if look(&held, mounts).is_break() {
            break;
        }
    }
    missed.unopened.retain(|namespace, _| !seen.contains(namespace));
    Ok(missed)
}

/// Opens the mount namespaces whose files are mounted where the process is now.
fn open_kept(
    mounts: &[Mount],
    users: OwnUsers,
    seen: &BTreeSet<MountNamespace>,
    missed: &mut Missed,
) -> Vec<Held> {
    let mut opened = Vec::new();
    for mount in mounts.iter().filter(|mount| mount.filesystem == "nsfs") {
        let Some(namespace) = parse_link(&mount.root).filter(|namespace| !seen.contains(namespace)) else {
            continue;
        };
        match open_nsfs(mount, namespace).and_then(|file| Held::new(file, users)) {
            Ok(held) => opened.push(held),
            Err(error) => {
                missed.unopened.insert(namespace, format!("its file cannot be opened: {error}"));
            }
        }
    }
    opened
}

/// Tasks by the mount namespace that they are in.
type Tasks = BTreeMap<MountNamespace, Vec<(u32, u32)>>;

/// All tasks, not only processes: each thread may be in a namespace of its own. `proc` is where procfs is
/// mounted. Also why some could not be told.
fn tasks(proc: &Path) -> io::Result<(Tasks, Option<String>)> {
    let mut tasks = Tasks::new();
    let mut unreadable = None;
    for process in numbers_in(proc)? {
        let folder = proc.join(process.to_string()).join("task");
        let threads = match numbers_in(&folder) {
            Ok(threads) => threads,
            Err(error) if is_gone(&error) => continue,
            Err(error) => return Err(error),
        };
        for thread in threads {
            match fs::read_link(folder.join(thread.to_string()).join("ns/mnt")) {
                Ok(link) => {
                    if let Some(namespace) = parse_link(link.as_os_str().as_bytes()) {
                        tasks.entry(namespace).or_default().push((process, thread));
                    }
                }
                Err(error) if is_gone(&error) => {}
                Err(error) => {
                    unreadable = Some(format!("the namespace of process {process} cannot be told: {error}"));
                }
            }
        }
    }
    Ok((tasks, unreadable))
}

fn numbers_in(folder: &Path) -> io::Result<Vec<u32>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(folder)? {
        numbers.extend(entry?.file_name().to_str().and_then(|name| name.parse::<u32>().ok()));
    }
    Ok(numbers)
}

/// `mnt:[INODE]`, as links in `/proc` and the roots of nsfs mounts have it.
fn parse_link(text: &[u8]) -> Option<MountNamespace> {
    let inode = std::str::from_utf8(text).ok()?.strip_prefix("mnt:[")?.strip_suffix(']')?;
    inode.parse().ok().map(MountNamespace)
}

/// Opens a namespace by the first of these tasks that is still in it.
fn open_of_tasks(
    namespace: MountNamespace,
    tasks: &[(u32, u32)],
    users: OwnUsers,
) -> io::Result<Option<Held>> {
    for (process, thread) in tasks {
        let path = format!("/proc/{process}/task/{thread}/ns/mnt");
        match open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()) {
            Ok(file) => {
                let held = Held::new(file, users)?;
                if held.namespace.namespace == namespace {
                    return Ok(Some(held));
                }
            }
            Err(error) if is_gone(&error.into()) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

/// Opens the file of a namespace where it is mounted.
fn open_nsfs(mount: &Mount, namespace: MountNamespace) -> io::Result<OwnedFd> {
    let point = OsStr::from_bytes(&mount.point);
    let how = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let check = |file: OwnedFd| {
        let is_it =
            fstat(&file)?.st_ino == namespace.0 && fstatfs(&file)?.f_type as u64 == u64::from(NSFS_MAGIC);
        let hidden = || io::Error::new(io::ErrorKind::NotFound, "something else is there");
        is_it.then_some(file).ok_or_else(hidden)
    };
    // Not before it is known what it is: opening a device or a pipe does something.
    check(openat2(CWD, point, OFlags::PATH | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty(), how)?)?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    check(openat2(CWD, point, flags, Mode::empty(), how)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn groups_tasks_by_namespace_and_says_which_it_cannot_tell() {
        let proc = tempfile::tempdir().expect("a temporary directory");
        let task = |process: u32, thread: u32, link: Option<&str>| {
            let folder = proc.path().join(format!("{process}/task/{thread}/ns"));
            fs::create_dir_all(&folder).expect("fresh");
            match link {
                Some(link) => symlink(link, folder.join("mnt")).expect("fresh"),
                // A file is no link, so reading it as one fails, as for a process that may not be seen.
                None => fs::write(folder.join("mnt"), "").expect("fresh"),
            }
        };
        task(1, 1, Some("mnt:[4026531832]"));
        task(7, 7, Some("mnt:[4026531832]"));
        task(7, 8, Some("mnt:[4026532201]"));
        fs::create_dir_all(proc.path().join("9/task/9/ns")).expect("a task that ended");
        fs::create_dir_all(proc.path().join("self/task")).expect("what is no process");
        let both = BTreeMap::from([
            (MountNamespace(4_026_531_832), vec![(1, 1), (7, 7)]),
            (MountNamespace(4_026_532_201), vec![(7, 8)]),
        ]);
        let sorted = |mut tasks: Tasks| {
            tasks.values_mut().for_each(|tasks| tasks.sort_unstable());
            tasks
        };
        let (found, unreadable) = tasks(proc.path()).expect("readable");
        assert_eq!((sorted(found), unreadable), (both.clone(), None));

        task(11, 11, None);
        let (found, unreadable) = tasks(proc.path()).expect("readable");
        assert_eq!(sorted(found), both);
        assert!(unreadable.is_some_and(|cause| cause.contains("process 11")));
    }

    #[test]
    fn only_mount_namespaces_are_taken_for_one() {
        assert_eq!(parse_link(b"mnt:[4026531840]"), Some(MountNamespace(4_026_531_840)));
        for other in [&b"net:[4026531840]"[..], b"mnt:[]", b"mnt:[1", b"/", b"mnt:[-1]", b"mnt:[1] (deleted)"]
        {
            assert_eq!(parse_link(other), None);
        }
    }

    #[test]
    fn the_own_namespace_is_not_among_the_others() {
        let own = mounts::namespace_of(None).expect("readable");
        let mut found = Vec::new();
        let walked = walk(&mut |held| {
            found.push(held.namespace.namespace);
            ControlFlow::Continue(())
        });
        // Without privileges the kernel refuses; then there is nothing to tell.
        if walked.is_ok() {
            assert!(!found.contains(&own));
            let unique: BTreeSet<_> = found.iter().collect();
            assert_eq!(unique.len(), found.len());
        }
    }
}
