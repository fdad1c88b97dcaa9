//! A Varlink client of the tests' own, which can also misbehave.

use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use hostler_protocol::INTERFACE;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

use crate::failure::OrFail;
use crate::patience::stretched;

/// How long an answer may take.
const ANSWER_TIME: Duration = Duration::from_secs(20);

/// An error as it came: its name, and its details.
#[derive(Clone, Debug, PartialEq)]
pub struct Refusal {
    /// With its interface.
    pub name: String,
    /// What else was said.
    pub details: Value,
}

impl fmt::Display for Refusal {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} {}", self.name, self.details)
    }
}

/// A connection.
#[derive(Debug)]
pub struct Client {
    /// The socket, to be used as badly as a test likes.
    pub stream: UnixStream,
}

impl Client {
    /// Connects as the test's own user.
    ///
    /// # Errors
    /// When nobody listens.
    pub fn connect(socket: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(socket)?;
        stream.set_read_timeout(Some(stretched(ANSWER_TIME)))?;
        stream.set_write_timeout(Some(stretched(ANSWER_TIME)))?;
        Ok(Self { stream })
    }

    /// Connects as another user: the daemon sees that user on the socket for as long as it lives.
    ///
    /// # Panics
    /// When nobody listens.
    #[must_use]
    pub fn connect_as(user: u32, socket: &Path) -> Self {
        as_user(user, || Self::connect(socket)).or_fail("connecting as another user")
    }

    /// Calls a method of the daemon's interface.
    ///
    /// # Errors
    /// What the daemon answers instead of results.
    ///
    /// # Panics
    /// When there is no answer.
    pub fn call(
        &mut self,
        method: &str,
        parameters: &Value,
        passed: &[BorrowedFd<'_>],
    ) -> Result<Value, Refusal> {
        let call = json!({ "method": format!("{INTERFACE}.{method}"), "parameters": parameters });
        self.send(&call, passed).or_fail(format_args!("sending {method}"));
        let reply = self.receive().or_fail(format_args!("the answer to {method}"));
        let parameters = reply.get("parameters").cloned().unwrap_or(Value::Null);
        match reply.get("error").and_then(Value::as_str) {
            None => Ok(parameters),
            Some(name) => Err(Refusal { name: name.to_owned(), details: parameters }),
        }
    }

    /// Whether the daemon answers, and with no error; one that hangs up does not.
    pub fn is_answered(&mut self, method: &str) -> bool {
        let call = json!({ "method": method });
        self.send(&call, &[]).is_ok() && self.receive().is_ok_and(|answer| answer["error"].is_null())
    }

    /// Sends a message with descriptors.
    ///
    /// # Errors
    /// When the daemon hung up.
    pub fn send(&mut self, message: &Value, passed: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut bytes = message.to_string().into_bytes();
        bytes.push(0);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(250))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !passed.is_empty() {
            assert!(control.push(SendAncillaryMessage::ScmRights(passed)), "at most 250 descriptors");
        }
        let sent = sendmsg(&self.stream, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)?;
        self.stream.write_all(&bytes[sent..])
    }

    /// The next message.
    ///
    /// # Errors
    /// When the daemon hung up, or said nothing in time.
    pub fn receive(&mut self) -> io::Result<Value> {
        let mut bytes = Vec::new();
        let mut byte = [0u8; 1];
        loop {
            if self.stream.read(&mut byte)? == 0 {
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the daemon hung up"));
            }
            if byte == [0] {
                return serde_json::from_slice(&bytes).map_err(io::Error::other);
            }
            bytes.push(byte[0]);
        }
    }
}

/// A lease as a test holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    /// Its number.
    pub lease: u64,
    /// Its fence.
    pub epoch: u64,
}

impl Client {
    /// Opens a lease whose owner is the process of a pidfd.
    ///
    /// # Panics
    /// When it is refused.
    pub fn open_lease(&mut self, name: &str, owner: impl AsFd) -> Opened {
        let answer = self.call("OpenLease", &json!({ "name": name, "owner": 0 }), &[owner.as_fd()]);
        let answer = answer.or_fail("opening a lease");
        let number = |field: &str| answer[field].as_u64().or_fail(field);
        Opened { lease: number("lease"), epoch: number("epoch") }
    }

    /// Claims a directory.
    ///
    /// # Errors
    /// The daemon's.
    pub fn claim(&mut self, lease: Opened, directory: impl AsFd, scratch: bool) -> Result<Value, Refusal> {
        let parameters =
            json!({ "lease": lease.lease, "epoch": lease.epoch, "directory": 0, "scratch": scratch });
        self.call("ClaimDirectory", &parameters, &[directory.as_fd()])
    }
}

/// Does something as another user, and as the group of the same number, with no privileges, in a thread of its own.
///
/// # Panics
/// When the user cannot be taken on.
pub fn as_user<T: Send>(user: u32, act: impl FnOnce() -> T + Send) -> T {
    use rustix::process::{Gid, Uid};
    use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || {
            let (uid, gid) = (Uid::from_raw(user), Gid::from_raw(user));
            set_thread_groups(&[]).or_fail("giving up groups");
            set_thread_res_gid(gid, gid, gid).or_fail("giving up root's group");
            set_thread_res_uid(uid, uid, uid).or_fail("giving up root");
            act()
        });
        match thread.join() {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}
