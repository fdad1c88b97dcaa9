//! Starts qemu, and owns it until it is gone.
//!
//! [`launch`] makes the channels, spawns the shim, lets the caller register the process while it
//! still waits, gives the order, and hands back a [`Machine`]. Whoever holds the `Machine` owns the
//! process: dropping it kills qemu and reaps it. Deliberately absent: what goes over the channels.

use std::ffi::OsString;
use std::io::{self, Read as _};
use std::net::{TcpListener, UdpSocket};
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::child::spawner;
use crate::passing;

use super::argv::{Network, VmSpec, arguments};
use super::confinement::{Confinement, Enforced};
use super::control_group::{Group, Unlimited};
use super::shim::{Isolation, Operation, Order, Reply};

/// How long the shim may take for its few system calls.
const SHIM_DEADLINE: Duration = Duration::from_secs(20);
/// How long a killed process may take to die; longer than that it hangs in the kernel.
const DEATH_DEADLINE: Duration = Duration::from_secs(10);

/// Why a machine did not start.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaunchError {
    /// A channel could not be made.
    #[error("could not make the machine's sockets")]
    Channels(#[source] io::Error),
    /// The shim could not be started.
    #[error("could not start {program} for the machine")]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The caller's registration failed.
    #[error("could not register the machine with the watchdog")]
    Register(#[source] io::Error),
    /// The shim died or gave no answer.
    #[error("the machine's process ended before it became qemu{}", shown(.stderr))]
    Shim {
        /// What it printed.
        stderr: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// User namespaces are forbidden.
    #[error(
        "this host forbids user namespaces, which shut the guest off from the network; an administrator can allow them: sysctl user.max_user_namespaces=15000, and where it exists kernel.unprivileged_userns_clone=1 or an AppArmor profile for hostler"
    )]
    UserNamespaces(#[source] io::Error),
    /// Something else in the shim failed.
    #[error("setting up the machine's process failed ({operation:?})")]
    Setup {
        /// The operation.
        operation: Operation,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// qemu could not be executed.
    #[error("could not execute {program}; install qemu-system-x86")]
    Execute {
        /// The program.
        program: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

fn shown(stderr: &str) -> String {
    if stderr.is_empty() { String::new() } else { format!(": {stderr}") }
}

/// The programs that a machine needs.
#[derive(Clone, Debug)]
pub struct Programs {
    /// The `hostler` program, for `hostler __vm`.
    pub shim: PathBuf,
    /// qemu.
    pub qemu: PathBuf,
}

/// A running qemu and its channels. Dropping it ends the process.
#[derive(Debug)]
pub struct Machine {
    started: Started,
    /// The serial console.
    pub console: UnixStream,
    /// The control port.
    pub control: UnixStream,
    /// QMP.
    pub qmp: UnixStream,
    /// The installer's log port, when the machine was to have one.
    pub log: Option<UnixStream>,
    /// Where to serve the mirror, when the machine was to have one.
    pub mirror: Option<TcpListener>,
    /// Where an installer's syslog comes in, when the machine was to have a mirror.
    pub syslog: Option<UdpSocket>,
    /// Whether it has a network namespace of its own.
    pub isolated: bool,
    /// How much of its confinement the kernel enforces.
    pub enforced: Enforced,
}

impl Machine {
    /// The process, for polling and for the watchdog.
    #[must_use]
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.started.process.pidfd.as_fd()
    }

    /// Its own control group.
    ///
    /// # Errors
    /// Why it has none.
    pub fn group(&self) -> Result<&Group, &Unlimited> {
        self.started.group.as_ref()
    }

    /// The process id, for people.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.started.process.child.id()
    }

    /// The process id in this `/proc`, which may be of another namespace of processes than this process is
    /// in: what a pidfd's own entry there says (proc_pid_fdinfo(5)).
    #[must_use]
    pub fn pid_in_proc(&self) -> Option<u32> {
        self.started.process.pid_in_proc()
    }

    /// Waits up to `within` for the process to end by itself.
    ///
    /// # Errors
    /// When waiting fails; `TimedOut` when it still runs.
    pub fn wait(&mut self, within: Duration) -> io::Result<ExitStatus> {
        self.started.process.wait(within)
    }

    /// The last of what the process printed, once it has ended; cleaned of control characters.
    #[must_use]
    pub fn stderr_text(&mut self) -> String {
        self.started.process.stderr_text()
    }

    /// Kills the process, if it still runs, and reaps it.
    ///
    /// # Errors
    /// When it does not die.
    pub fn end(mut self) -> io::Result<ExitStatus> {
        self.started.process.end()
    }
}

/// The process and its group, which are dropped in this order: what is in a group has to be gone before it is.
#[derive(Debug)]
struct Started {
    process: Process,
    group: Result<Group, Unlimited>,
}

#[derive(Debug)]
struct Process {
    child: Child,
    pidfd: OwnedFd,
    stderr: Option<ChildStderr>,
    reaped: bool,
}

impl Process {
    fn pid_in_proc(&self) -> Option<u32> {
        let path = format!("/proc/self/fdinfo/{}", self.pidfd.as_raw_fd());
        let text = std::fs::read_to_string(path).ok()?;
        text.lines().find_map(|line| line.strip_prefix("Pid:"))?.trim().parse().ok()
    }

    fn wait(&mut self, within: Duration) -> io::Result<ExitStatus> {
        passing::wait_readable(self.pidfd.as_fd(), within)?;
        let status = self.child.wait()?;
        self.reaped = true;
        Ok(status)
    }

    fn end(&mut self) -> io::Result<ExitStatus> {
        if !self.reaped {
            match pidfd_send_signal(&self.pidfd, Signal::KILL) {
                Ok(()) | Err(Errno::SRCH) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.wait(DEATH_DEADLINE)
    }

    /// The last of what the process printed; at most what a pipe holds, read after its death.
    fn stderr_text(&mut self) -> String {
        let Some(mut stderr) = self.stderr.take() else {
            return String::new();
        };
        // A descendant could keep the pipe open, and the sandbox forbids descendants only to qemu.
        let mut bytes = Vec::new();
        if rustix::io::ioctl_fionbio(&stderr, true).is_ok() {
            let _ = stderr.by_ref().take(64 * 1024).read_to_end(&mut bytes);
        }
        let text = String::from_utf8_lossy(&bytes);
        let tail: Vec<char> = text.trim().chars().rev().take(2000).collect();
        tail.into_iter().rev().filter(|&character| character == '\n' || !character.is_control()).collect()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.reaped {
            // Nothing more can be done for a process that survives this.
            let _ = self.end();
        }
    }
}

/// Starts a machine. `register` sees the process before it does anything.
///
/// # Errors
/// See [`LaunchError`]; nothing is left running then.
pub fn launch(
    programs: &Programs,
    spec: &VmSpec,
    register: &dyn Fn(BorrowedFd<'_>) -> io::Result<()>,
) -> Result<Machine, LaunchError> {
    start(programs, spec, &arguments(spec), register)
}

/// The same with other arguments than the machine's.
pub(super) fn start(
    programs: &Programs,
    spec: &VmSpec,
    arguments: &[OsString],
    register: &dyn Fn(BorrowedFd<'_>) -> io::Result<()>,
) -> Result<Machine, LaunchError> {
    let channels = |error: Errno| LaunchError::Channels(error.into());
    let (socket, theirs) = passing::packet_pair().map_err(channels)?;
    let (console, console_theirs) = passing::stream_pair().map_err(channels)?;
    let (control, control_theirs) = passing::stream_pair().map_err(channels)?;
    let (qmp, qmp_theirs) = passing::stream_pair().map_err(channels)?;
    let log = spec.log_port.map(|_| passing::stream_pair()).transpose().map_err(channels)?;
    let (log, log_theirs) = log.unzip();

    let process = start_shim(&programs.shim, theirs)?;
    register(process.pidfd.as_fd()).map_err(LaunchError::Register)?;
    let group = Group::around(process.child.id(), process.pid_in_proc(), spec.memory_mib);
    let mut started = Started { process, group };

    let order = Order {
        program: programs.qemu.as_os_str().as_bytes().to_vec(),
        arguments: arguments.iter().map(|argument| argument.as_bytes().to_vec()).collect(),
        isolation: match spec.network {
            Network::None => Isolation::Wanted,
            Network::Mirror => Isolation::Mirror,
        },
        confinement: Confinement::of(spec, &programs.qemu),
        parent: std::process::id(),
    };
    let mut passed = vec![console_theirs.as_fd(), control_theirs.as_fd(), qmp_theirs.as_fd()];
    passed.extend(log_theirs.iter().map(OwnedFd::as_fd));
    let answer = command(&socket, &order, &passed);
    drop((console_theirs, control_theirs, qmp_theirs, log_theirs));
    let Answer { isolated, enforced, mirror, syslog } = match answer {
        Ok(answer) => answer,
        Err(Refusal::Failed { operation, errno }) => {
            return Err(setup_error(programs, operation, errno));
        }
        Err(Refusal::Lost(source)) => {
            let _ = started.process.end();
            let stderr = started.process.stderr_text();
            return Err(LaunchError::Shim { stderr, source });
        }
    };
    Ok(Machine {
        started,
        console: console.into(),
        control: control.into(),
        qmp: qmp.into(),
        log: log.map(UnixStream::from),
        mirror,
        syslog,
        isolated,
        enforced,
    })
}

fn start_shim(program: &Path, socket: OwnedFd) -> Result<Process, LaunchError> {
    let spawn_error = |source| LaunchError::Spawn { program: program.to_owned(), source };
    let mut command = Command::new(program);
    command
        .arg0("hostler")
        .arg("__vm")
        .env_clear()
        .stdin(socket)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        // A group of its own: the terminal's ^C is for the runner, which ends qemu in order.
        .process_group(0);
    let mut child = spawner::spawn(command).map_err(spawn_error)?;
    let stderr = child.stderr.take();
    let pidfd = i32::try_from(child.id())
        .ok()
        .and_then(Pid::from_raw)
        .ok_or(Errno::SRCH)
        .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()));
    match pidfd {
        Ok(pidfd) => Ok(Process { child, pidfd, stderr, reaped: false }),
        Err(error) => {
            let _ = child.kill();
            let _ = child.wait();
            Err(spawn_error(error.into()))
        }
    }
}

enum Refusal {
    Failed { operation: Operation, errno: i32 },
    Lost(io::Error),
}

/// What the shim said before it became qemu.
struct Answer {
    isolated: bool,
    enforced: Enforced,
    mirror: Option<TcpListener>,
    syslog: Option<UdpSocket>,
}

/// Gives the order and waits until the process has become qemu.
fn command(socket: &OwnedFd, order: &Order, descriptors: &[BorrowedFd<'_>]) -> Result<Answer, Refusal> {
    let lost = |error: Errno| Refusal::Lost(error.into());
    let message = serde_json::to_vec(order).map_err(|error| Refusal::Lost(io::Error::other(error)))?;
    passing::send(socket.as_fd(), &message, descriptors).map_err(lost)?;
    let mut ready = None;
    loop {
        let received = passing::receive(socket.as_fd(), SHIM_DEADLINE).map_err(lost)?;
        let Some((message, passed)) = received else {
            return ready.ok_or_else(|| {
                Refusal::Lost(io::Error::new(
                    io::ErrorKind::UnexpectedEof,
                    "it closed its socket without an answer",
                ))
            });
        };
        match serde_json::from_slice(&message) {
            Ok(Reply::Ready { isolated, enforced }) => {
                let mut passed = passed.into_iter();
                let mirror = passed.next().map(TcpListener::from);
                let syslog = passed.next().map(UdpSocket::from);
                if let Some(syslog) = &syslog {
                    syslog.set_nonblocking(true).map_err(Refusal::Lost)?;
                }
                ready = Some(Answer { isolated, enforced, mirror, syslog });
            }
            Ok(Reply::Failed { operation, errno }) => {
                return Err(Refusal::Failed { operation, errno });
            }
            Err(error) => return Err(Refusal::Lost(io::Error::other(error))),
        }
    }
}

fn setup_error(programs: &Programs, operation: Operation, errno: i32) -> LaunchError {
    let source =
        if errno == 0 { io::Error::other("no error number") } else { io::Error::from_raw_os_error(errno) };
    match operation {
        Operation::Namespace | Operation::Map => LaunchError::UserNamespaces(source),
        Operation::Execute => LaunchError::Execute { program: programs.qemu.clone(), source },
        operation => LaunchError::Setup { operation, source },
    }
}
