//! The process between the runner and qemu: it confines itself, then turns into qemu.
//!
//! `hostler __vm` starts with one packet socket as its standard input and does nothing at all until
//! the runner's [`Order`] arrives on it. By then the runner has had the time to hand this process
//! to the watchdog, so that no moment exists in which qemu runs unwatched. Then, in this order:
//! new user and network namespaces with the user mapped to itself, `lo` up and the mirror's socket
//! bound in there and passed back, all capabilities given up, no new privileges, limits and Landlock
//! ([`super::confinement`]), death with the runner, and `execve`. An error goes back as a [`Reply`]; success is the closing
//! of the socket by `execve`.
//!
//! Deliberately absent: any thread, any decision about the machine (the arguments arrive finished),
//! and any way to be of use to a person.

use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use nix::sched::{CloneFlags, unshare};
use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};
use rustix::process::{Signal, getegid, geteuid, getppid, set_parent_process_death_signal};
use rustix::thread::{
    CapabilitySet, CapabilitySets, remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};
use serde::{Deserialize, Serialize};

use crate::passing;

use super::argv::{CONSOLE_FD, MIRROR_PORT, SYSLOG_PORT};
use super::confinement::{Confinement, Enforced};
use super::loopback;

/// How long the shim waits for its order: the runner may be waiting for the watchdog.
const PATIENCE: Duration = Duration::from_secs(120);

/// What network namespace qemu gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Isolation {
    /// One of its own where the host allows it, with nothing in it. The machine has no card, so
    /// this is a second wall.
    Wanted,
    /// One of its own, with the mirror's and the syslog's sockets in it.
    Mirror,
}

/// The runner's order, beside which the descriptors for [`CONSOLE_FD`] and up come.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Order {
    /// The program, as bytes.
    pub(crate) program: Vec<u8>,
    /// Its arguments, as bytes.
    pub(crate) arguments: Vec<Vec<u8>>,
    /// The namespace.
    pub(crate) isolation: Isolation,
    /// What it may touch from then on.
    pub(crate) confinement: Confinement,
    /// The runner's process id, to notice that it died before death with it was arranged.
    pub(crate) parent: u32,
}

/// What the shim has to say.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Reply {
    /// All is set up; the mirror's and the syslog's sockets come beside it when there are any.
    Ready {
        /// Whether the process has a network namespace of its own.
        isolated: bool,
        /// How much of its confinement the kernel enforces.
        enforced: Enforced,
    },
    /// It went wrong at this operation.
    Failed {
        /// What was tried.
        operation: Operation,
        /// The kernel's error number, 0 where there is none.
        errno: i32,
    },
}

/// What the shim does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operation {
    /// Read the order.
    Order,
    /// Create the user and network namespaces.
    Namespace,
    /// Map the user into it.
    Map,
    /// Bring the loopback interface up.
    Loopback,
    /// Bind the mirror's socket.
    Bind,
    /// Give up capabilities.
    Confine,
    /// Set limits and have Landlock enforced.
    Restrict,
    /// Put the descriptors where qemu expects them.
    Descriptors,
    /// The runner had died.
    Orphaned,
    /// Execute qemu.
    Execute,
}

/// Runs the shim; returns only on failure.
#[must_use]
pub fn main() -> ExitCode {
    if close_inherited().is_err() {
        return ExitCode::from(2);
    }
    let stdin = io::stdin();
    // A duplicate that closes on exec: its end is how the runner learns that qemu runs.
    let Ok(socket) = fcntl_dupfd_cloexec(stdin.as_fd(), 3) else {
        return ExitCode::from(2);
    };
    let Failure { operation, errno } = become_machine(&socket);
    let reply = Reply::Failed { operation, errno };
    if let Ok(text) = serde_json::to_vec(&reply) {
        // The runner may be gone; then nobody is left to tell.
        let _ = passing::send(socket.as_fd(), &text, &[]);
    }
    ExitCode::from(2)
}

/// Closes every descriptor but the standard three: what the caller of `hostler` left open to its
/// children, such as a lock, is not for qemu.
fn close_inherited() -> io::Result<()> {
    let mut inherited = Vec::new();
    for entry in fs::read_dir("/proc/self/fd")? {
        let name = entry?.file_name();
        inherited.extend(name.to_str().and_then(|name| name.parse::<i32>().ok()));
    }
    for descriptor in inherited.into_iter().filter(|&descriptor| descriptor > 2) {
        // The one of the listing itself is closed already.
        let _ = nix::unistd::close(descriptor);
    }
    Ok(())
}

struct Failure {
    operation: Operation,
    errno: i32,
}

fn failed<E: Into<io::Error>>(operation: Operation) -> impl FnOnce(E) -> Failure {
    move |error| Failure { operation, errno: error.into().raw_os_error().unwrap_or(0) }
}

/// Never returns on success.
fn become_machine(socket: &OwnedFd) -> Failure {
    match prepare(socket) {
        Ok(mut command) => {
            let error = command.exec();
            failed(Operation::Execute)(error)
        }
        Err(failure) => failure,
    }
}

fn prepare(socket: &OwnedFd) -> Result<Command, Failure> {
    let received = passing::receive(socket.as_fd(), PATIENCE).map_err(failed(Operation::Order))?;
    // A closed socket: the runner gave up before it gave an order.
    let (message, descriptors) = received.ok_or(Failure { operation: Operation::Order, errno: 0 })?;
    let order: Order = serde_json::from_slice(&message).map_err(failed(Operation::Order))?;

    let isolated = isolate(order.isolation)?;
    let mut sockets: Vec<OwnedFd> = Vec::new();
    if order.isolation == Isolation::Mirror {
        loopback::bring_up().map_err(failed(Operation::Loopback))?;
        let at = |port| SocketAddrV4::new(Ipv4Addr::LOCALHOST, port);
        sockets.push(TcpListener::bind(at(MIRROR_PORT)).map_err(failed(Operation::Bind))?.into());
        sockets.push(UdpSocket::bind(at(SYSLOG_PORT)).map_err(failed(Operation::Bind))?.into());
    }
    confine().map_err(failed(Operation::Confine))?;
    place(&descriptors).map_err(failed(Operation::Descriptors))?;

    let enforced = order.confinement.apply().map_err(failed(Operation::Restrict))?;

    let ready = serde_json::to_vec(&Reply::Ready { isolated, enforced }).map_err(failed(Operation::Order))?;
    let passed: Vec<BorrowedFd<'_>> = sockets.iter().map(std::os::fd::AsFd::as_fd).collect();
    passing::send(socket.as_fd(), &ready, &passed).map_err(failed(Operation::Order))?;
    drop(sockets);

    set_parent_process_death_signal(Some(Signal::KILL)).map_err(failed(Operation::Confine))?;
    let parent = getppid().map(rustix::process::Pid::as_raw_nonzero);
    if parent.and_then(|pid| u32::try_from(pid.get()).ok()) != Some(order.parent) {
        return Err(Failure { operation: Operation::Orphaned, errno: 0 });
    }

    let mut command = Command::new(std::ffi::OsString::from_vec(order.program));
    command
        .args(order.arguments.into_iter().map(std::ffi::OsString::from_vec))
        .env_clear()
        .stdin(Stdio::null());
    Ok(command)
}

/// New user and network namespaces. Whether there are any afterwards.
fn isolate(isolation: Isolation) -> Result<bool, Failure> {
    let (user, group) = (geteuid().as_raw(), getegid().as_raw());
    let namespaces = CloneFlags::CLONE_NEWUSER | CloneFlags::CLONE_NEWNET;
    match (unshare(namespaces), isolation) {
        (Ok(()), _) => {}
        (Err(_), Isolation::Wanted) => return Ok(false),
        (Err(error), Isolation::Mirror) => return Err(failed(Operation::Namespace)(error)),
    }
    // The user is itself in there, so that files keep their owner and `execve` drops what
    // capabilities the new namespace gave. user_namespaces(7): setgroups is denied first.
    fs::write("/proc/self/setgroups", "deny").map_err(failed(Operation::Map))?;
    fs::write("/proc/self/uid_map", format!("{user} {user} 1")).map_err(failed(Operation::Map))?;
    fs::write("/proc/self/gid_map", format!("{group} {group} 1")).map_err(failed(Operation::Map))?;
    Ok(true)
}

fn confine() -> Result<(), rustix::io::Errno> {
    // Only matters to a caller that is root: everyone else loses capabilities with `execve`. What
    // the kernel does not know, or this process may not drop, it does not have either.
    for capability in CapabilitySet::all().iter() {
        let _ = remove_capability_from_bounding_set(capability);
    }
    set_capabilities(
        None,
        CapabilitySets {
            effective: CapabilitySet::empty(),
            permitted: CapabilitySet::empty(),
            inheritable: CapabilitySet::empty(),
        },
    )?;
    set_no_new_privs(true)
}

/// Moves the descriptors to [`CONSOLE_FD`] and up, and lets them survive `execve`.
fn place(descriptors: &[OwnedFd]) -> Result<(), rustix::io::Errno> {
    for (wanted, descriptor) in (CONSOLE_FD..).zip(descriptors) {
        let placed = fcntl_dupfd_cloexec(descriptor, wanted)?;
        if placed.as_raw_fd() != wanted {
            return Err(rustix::io::Errno::BUSY);
        }
        fcntl_setfd(&placed, FdFlags::empty())?;
        // Stays open on purpose: it is qemu's from here on.
        let _ = std::os::fd::IntoRawFd::into_raw_fd(placed);
    }
    Ok(())
}
