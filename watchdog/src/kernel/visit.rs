//! Being in another mount namespace, or in a directory, for a moment.
//!
//! Both are of the whole process as long as its threads share them, so this is for worker processes,
//! which have one thread. (`setns(2)` refuses a process whose threads share their root and current
//! directory.) Whoever cannot go back must not go on: what he would touch next is somebody else's.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};

use nix::sched::{CloneFlags, setns};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::process::{chdir, fchdir};

use super::mounts;
use crate::model::MountNamespace;

/// A stay in a mount namespace, which ends when this is dropped.
#[derive(Debug)]
pub struct Visit {
    /// `/proc` of the own namespace: the other one may have none, or something else there.
    proc: OwnedFd,
    namespace: MountNamespace,
    /// Where to return to; absent for a visit at home.
    home: Option<OwnedFd>,
}

impl Visit {
    /// Stays in the own namespace.
    ///
    /// # Errors
    /// When `/proc` cannot be opened.
    pub fn at_home() -> io::Result<Self> {
        Ok(Self { proc: open_proc()?, namespace: mounts::namespace_of(None)?, home: None })
    }

    /// Goes to the namespace of an nsfs file. The process's root and current directory are that
    /// namespace's root afterwards, whatever root its own processes have.
    ///
    /// # Errors
    /// `EINVAL` when the process has several threads, `EPERM` without the capabilities `SYS_ADMIN` and
    /// `SYS_CHROOT`.
    pub fn to(namespace: impl AsFd) -> io::Result<Self> {
        let proc = open_proc()?;
        let home = openat(&proc, "thread-self/ns/mnt", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        let inode = rustix::fs::fstat(&namespace)?.st_ino;
        setns(&namespace, CloneFlags::CLONE_NEWNS)?;
        Ok(Self { proc, namespace: MountNamespace(inode), home: Some(home) })
    }

    /// Which namespace this is.
    #[must_use]
    pub fn namespace(&self) -> MountNamespace {
        self.namespace
    }

    /// Opens the table of the mounts in it, which tells whether they change from now on.
    ///
    /// # Errors
    /// What `open(2)` says.
    pub fn table(&self) -> io::Result<Table> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        Ok(Table(File::from(openat(&self.proc, "thread-self/mountinfo", flags, Mode::empty())?)))
    }
}

fn open_proc() -> io::Result<OwnedFd> {
    Ok(openat(CWD, "/proc", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

impl Drop for Visit {
    fn drop(&mut self) {
        let Some(home) = self.home.take() else { return };
        if let Err(error) = setns(home, CloneFlags::CLONE_NEWNS) {
            cannot_go_on("returning from another mount namespace", &error.into());
        }
    }
}

/// Runs `act` with the process's current directory there; the root is it afterwards. A descriptor opened
/// with `O_PATH` will do, so no file system is asked for anything.
///
/// # Errors
/// What `fchdir(2)` says; then `act` has not run.
pub fn standing_in<T>(directory: impl AsFd, act: impl FnOnce() -> T) -> io::Result<T> {
    fchdir(directory)?;
    let result = act();
    if let Err(error) = chdir("/") {
        cannot_go_on("leaving a directory", &error.into());
    }
    Ok(result)
}

fn cannot_go_on(doing: &str, error: &io::Error) -> ! {
    eprintln!("hostlerd: {doing} failed, so this worker process ends: {error}");
    std::process::exit(1);
}

/// An open mountinfo. It pins the namespace that it is of, so it is not to be kept.
#[derive(Debug)]
pub struct Table(File);

impl Table {
    /// Its text.
    ///
    /// # Errors
    /// What `read(2)` says.
    pub fn read(&mut self) -> io::Result<Vec<u8>> {
        // The kernel gives a page at most for each call, however long the buffer.
        let mut text = Vec::with_capacity(64 * 1024);
        self.0.read_to_end(&mut text)?;
        Ok(text)
    }

    /// Whether a mount came, went or was moved in the namespace since the table was opened
    /// (`proc_pid_mounts(5)`: the file then polls as `POLLPRI`). Which mount is on which cannot be
    /// learnt from comparing numbers before and after: a mount that is moved keeps its number.
    ///
    /// # Errors
    /// What `poll(2)` says.
    pub fn has_changed(&self) -> io::Result<bool> {
        let mut polled = [PollFd::new(&self.0, PollFlags::PRI)];
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut polled, Some(&at_once))?;
        Ok(polled[0].revents().intersects(PollFlags::PRI | PollFlags::ERR))
    }
}
