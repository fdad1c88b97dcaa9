//! The watchdog as its clients see it: calls over its socket, and a lease of one's own.
//!
//! Blocking, one call at a time: a runner has nothing else to do while it waits. Every wait has a
//! deadline. What the watchdog says is shown to people only after
//! [`without_controls`](hostler_protocol::text::without_controls).

use std::io::{self, IoSlice, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use hostler_protocol::INTERFACE;
use hostler_protocol::frame::{Decoder, FrameError, REPLY_LIMIT, encode};
use hostler_protocol::lease::{Epoch, LeaseId, Report, Tracking};
use hostler_protocol::message::{Call, Reply};
use hostler_protocol::methods::{
    Adopt, CallError, ClaimDirectory, CloseLease, LeaseOpened, Method, OpenLease, ReportBuild,
};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::Value;

/// How long the queue for connections may be full. Being in it is enough to connect, so this is no wait
/// for a daemon that systemd starts first.
const CONNECT_TIME: Duration = Duration::from_secs(5);
/// How long an answer may take that needs no more than a look at the host.
const ANSWER_TIME: Duration = Duration::from_secs(30);
/// How long taking back may take: processes that ignore SIGTERM, many mounts, a deep scratch
/// directory.
const RECLAIM_TIME: Duration = Duration::from_secs(600);

/// Why the watchdog gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum WatchdogError {
    /// Nobody listens.
    #[error("the watchdog is not reachable at {}; start hostlerd, or name its socket with --socket or HOSTLER_SOCKET", path.display())]
    Unreachable {
        /// Where it was looked for.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The connection broke.
    #[error("talking to the watchdog failed; its log tells more (journalctl -u hostlerd)")]
    Socket(#[source] io::Error),
    /// It hung up.
    #[error("the watchdog hung up without an answer; its log tells why (journalctl -u hostlerd)")]
    HungUp,
    /// What it said is no answer to this version.
    #[error(
        "the watchdog's answer is not understood ({cause}); are hostler and hostlerd of the same version?"
    )]
    Nonsense {
        /// What is wrong with it.
        cause: String,
    },
    /// It said no.
    #[error(transparent)]
    Refused(#[from] CallError),
}

impl From<FrameError> for WatchdogError {
    fn from(error: FrameError) -> Self {
        Self::Nonsense { cause: error.to_string() }
    }
}

/// A connection to the watchdog.
#[derive(Debug)]
pub struct Watchdog {
    stream: UnixStream,
}

impl Watchdog {
    /// Connects.
    ///
    /// # Errors
    /// [`WatchdogError::Unreachable`] when nobody listens there.
    pub fn connect(socket: &Path) -> Result<Self, WatchdogError> {
        let stream = connect(socket)
            .map_err(|source| WatchdogError::Unreachable { path: socket.to_owned(), source })?;
        Ok(Self { stream })
    }

    /// Calls a method and waits for its answer.
    ///
    /// # Errors
    /// See [`WatchdogError`].
    pub fn call<M: Method>(&mut self, arguments: &M) -> Result<M::Output, WatchdogError> {
        self.call_with(arguments, &[], ANSWER_TIME)
    }

    /// Calls a method that takes descriptors or takes its time.
    ///
    /// # Errors
    /// See [`WatchdogError`].
    pub fn call_with<M: Method>(
        &mut self,
        arguments: &M,
        descriptors: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<M::Output, WatchdogError> {
        let nonsense = |error: serde_json::Error| WatchdogError::Nonsense { cause: error.to_string() };
        let parameters = match serde_json::to_value(arguments).map_err(nonsense)? {
            Value::Object(parameters) => Some(parameters),
            _ => None,
        };
        let call =
            Call { method: format!("{INTERFACE}.{}", M::NAME), parameters, oneway: false, more: false };
        let bytes = encode(&call).map_err(nonsense)?;
        self.stream.set_write_timeout(Some(ANSWER_TIME)).map_err(WatchdogError::Socket)?;
        self.stream.set_read_timeout(Some(limit)).map_err(WatchdogError::Socket)?;
        send(&self.stream, &bytes, descriptors).map_err(WatchdogError::Socket)?;
        let reply: Reply = serde_json::from_slice(&self.receive(limit)?).map_err(nonsense)?;
        let details = reply.parameters.map_or(Value::Null, Value::Object);
        match reply.error {
            None => serde_json::from_value(details).map_err(nonsense),
            Some(error) => {
                let name = error.strip_prefix(INTERFACE).and_then(|name| name.strip_prefix('.'));
                let ours = name.and_then(|name| CallError::from_the_wire(name, details.clone()));
                Err(ours.map_or_else(
                    || WatchdogError::Nonsense { cause: format!("{error} {details}") },
                    WatchdogError::Refused,
                ))
            }
        }
    }

    fn receive(&mut self, limit: Duration) -> Result<Vec<u8>, WatchdogError> {
        let deadline = Instant::now() + limit;
        let mut decoder = Decoder::new(REPLY_LIMIT);
        let mut buffer = vec![0u8; 64 * 1024];
        loop {
            if let Some(message) = decoder.next_message()? {
                return Ok(message);
            }
            let count = match self.stream.read(&mut buffer) {
                // With a time limit, a signal ends a call even where its handler says to restart.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    let late = || io::Error::from(io::ErrorKind::TimedOut);
                    let left = (!left.is_zero()).then_some(left).ok_or_else(late);
                    let left = left.map_err(WatchdogError::Socket)?;
                    self.stream.set_read_timeout(Some(left)).map_err(WatchdogError::Socket)?;
                    continue;
                }
                count => count.map_err(WatchdogError::Socket)?,
            };
            if count == 0 {
                return Err(WatchdogError::HungUp);
            }
            decoder.push(&buffer[..count]);
        }
    }
}

/// Connects, and waits for a listener that takes no connections for a while only: one that is stuck
/// with a full queue would block for ever.
fn connect(path: &Path) -> io::Result<UnixStream> {
    use rustix::net::sockopt::{Timeout, set_socket_timeout};
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with};
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&socket, Timeout::Send, Some(CONNECT_TIME))?;
    let address = SocketAddrUnix::new(path)?;
    match rustix::io::retry_on_intr(|| rustix::net::connect(&socket, &address)) {
        Ok(()) => Ok(UnixStream::from(socket)),
        Err(rustix::io::Errno::AGAIN) => {
            let cause = format!("it took no connection for {} s", CONNECT_TIME.as_secs());
            Err(io::Error::new(io::ErrorKind::TimedOut, cause))
        }
        Err(error) => Err(error.into()),
    }
}

fn send(stream: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut rest = bytes;
    let mut passed = descriptors;
    while !rest.is_empty() {
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !passed.is_empty() && !control.push(SendAncillaryMessage::ScmRights(passed)) {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "more than four descriptors"));
        }
        let sent = match sendmsg(stream, &[IoSlice::new(rest)], &mut control, SendFlags::NOSIGNAL) {
            // Nothing of it was taken then.
            Err(rustix::io::Errno::INTR) => continue,
            sent => sent?,
        };
        rest = &rest[sent..];
        passed = &[];
    }
    Ok(())
}

/// A lease that this process owns: it ends with it at the latest.
#[derive(Debug)]
pub struct Lease {
    socket: PathBuf,
    opened: LeaseOpened,
}

impl Lease {
    /// Opens a lease that this process owns.
    ///
    /// # Errors
    /// See [`WatchdogError`].
    pub fn open(socket: &Path, name: &str) -> Result<Self, WatchdogError> {
        let name = shortened(name);
        let opened =
            Watchdog::connect(socket)?.call(&OpenLease { name, owner: None, deadline_seconds: None })?;
        Ok(Self { socket: socket.to_owned(), opened })
    }

    /// Opens a lease for another process of this user, which need not know of it.
    ///
    /// # Errors
    /// See [`WatchdogError`].
    pub fn open_for(socket: &Path, name: &str, owner: impl AsFd) -> Result<Self, WatchdogError> {
        let call = OpenLease { name: shortened(name), owner: Some(0), deadline_seconds: None };
        let opened = Watchdog::connect(socket)?.call_with(&call, &[owner.as_fd()], ANSWER_TIME)?;
        Ok(Self { socket: socket.to_owned(), opened })
    }

    /// A lease that was opened before.
    #[must_use]
    pub fn known(socket: &Path, lease: LeaseId, epoch: Epoch) -> Self {
        let opened = LeaseOpened { lease, epoch, tracking: Tracking::Descent };
        Self { socket: socket.to_owned(), opened }
    }

    /// Its number, its fence, and how its processes are known.
    #[must_use]
    pub fn opened(&self) -> LeaseOpened {
        self.opened
    }

    /// Puts a process under it. Each call connects anew, so an idle connection cannot be dropped in
    /// between.
    ///
    /// # Errors
    /// See [`WatchdogError`].
    pub fn adopt(&self, process: impl AsFd) -> Result<(), WatchdogError> {
        let call = Adopt { lease: self.opened.lease, epoch: self.opened.epoch, process: 0 };
        Watchdog::connect(&self.socket)?.call_with(&call, &[process.as_fd()], ANSWER_TIME)?;
        Ok(())
    }

    /// Claims a directory, opened for reading; a scratch one is removed when the lease ends.
    ///
    /// # Errors
    /// See [`WatchdogError`].
    pub fn claim(&self, directory: impl AsFd, scratch: bool) -> Result<(), WatchdogError> {
        let call =
            ClaimDirectory { lease: self.opened.lease, epoch: self.opened.epoch, directory: 0, scratch };
        Watchdog::connect(&self.socket)?.call_with(&call, &[directory.as_fd()], ANSWER_TIME)?;
        Ok(())
    }

    /// Counts a build; `report`'s lease and epoch are filled in.
    ///
    /// # Errors
    /// See [`WatchdogError`].
    pub fn report_build(&self, report: ReportBuild) -> Result<(), WatchdogError> {
        let report = ReportBuild { lease: self.opened.lease, epoch: self.opened.epoch, ..report };
        Watchdog::connect(&self.socket)?.call(&report)?;
        Ok(())
    }

    /// Closes it, and waits until what was left has been taken back or cannot be.
    ///
    /// # Errors
    /// See [`WatchdogError`].
    pub fn close(&self) -> Result<Report, WatchdogError> {
        let call = CloseLease { lease: self.opened.lease, epoch: self.opened.epoch };
        Ok(Watchdog::connect(&self.socket)?.call_with(&call, &[], RECLAIM_TIME)?.report)
    }
}

/// A name that the watchdog takes: at most 200 bytes, cut at a character.
fn shortened(name: &str) -> String {
    name[..name.floor_char_boundary(200)].to_owned()
}
