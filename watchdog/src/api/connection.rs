//! Accepts connections and carries messages.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use hostler_protocol::frame::{Decoder, FrameError, MESSAGE_LIMIT, encode};
use hostler_protocol::message::{Call, Reply};
use nix::sys::socket::{getsockopt, sockopt::PeerPidfd};
use tokio::io::Interest;
use tokio::net::{UnixListener, UnixStream};
use tokio::time::{Instant, timeout, timeout_at};

use super::dispatch::{dispatch, error_reply};
use crate::causes::chain;
use crate::engine::{Caller, Engine};
use crate::kernel::{processes, signals};
use crate::model::ProcessIdentity;
use crate::worker::{receive, send};

/// How long a connection may be silent between two messages.
const IDLE_LIMIT: Duration = Duration::from_secs(60);
/// How long a message may take from its first byte to its last, and an answer to be read.
const MESSAGE_TIME: Duration = Duration::from_secs(10);
/// The most descriptors that may wait beside a message. No method takes more than one.
const DESCRIPTOR_LIMIT: usize = 8;

/// Why a connection was dropped.
#[derive(Debug, thiserror::Error)]
enum Dropped {
    #[error("the socket failed")]
    Socket(#[from] io::Error),
    #[error(transparent)]
    Frame(#[from] FrameError),
    #[error("a message is no Varlink call")]
    NoCall(#[source] serde_json::Error),
    #[error("an answer could not be encoded")]
    NoReply(#[source] serde_json::Error),
    #[error("a message was not whole within {} s", MESSAGE_TIME.as_secs())]
    HalfMessage,
    #[error("an answer was not read within {} s", MESSAGE_TIME.as_secs())]
    NotReading,
    #[error("nothing came for {} s", IDLE_LIMIT.as_secs())]
    Idle,
    #[error("more than {DESCRIPTOR_LIMIT} descriptors came with a message")]
    TooManyDescriptors,
    #[error("user {0} has too many connections")]
    TooManyConnections(u32),
}

type Counts = Rc<RefCell<HashMap<u32, usize>>>;

/// One of a user's connections, for as long as it lives.
struct Counted {
    counts: Counts,
    uid: u32,
}

impl Counted {
    fn new(counts: &Counts, uid: u32, limit: usize) -> Option<Self> {
        let mut all = counts.borrow_mut();
        let count = all.entry(uid).or_default();
        if *count >= limit {
            return None;
        }
        *count += 1;
        Some(Self { counts: Rc::clone(counts), uid })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut all = self.counts.borrow_mut();
        if let Some(count) = all.get_mut(&self.uid) {
            *count -= 1;
            if *count == 0 {
                all.remove(&self.uid);
            }
        }
    }
}

/// Accepts connections for as long as the daemon lives.
pub async fn serve(listener: UnixListener, engine: Engine) {
    /// Without descriptors left, accepting fails at once, again and again.
    const PAUSE: Duration = Duration::from_millis(100);
    let counts = Counts::default();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let engine = engine.clone();
                let counts = Rc::clone(&counts);
                tokio::task::spawn_local(async move {
                    if let Err(dropped) = converse(&stream, &engine, &counts).await {
                        if !matches!(dropped, Dropped::Idle) {
                            engine.metrics().connections_refused.inc();
                        }
                        tracing::debug!("connection dropped: {}", chain(&dropped));
                    }
                });
            }
            Err(error) => {
                tracing::warn!("a connection could not be accepted: {error}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn converse(stream: &UnixStream, engine: &Engine, counts: &Counts) -> Result<(), Dropped> {
    let uid = stream.peer_cred()?.uid();
    let limit = engine.config().limits.connections;
    let _counted = Counted::new(counts, uid, limit).ok_or(Dropped::TooManyConnections(uid))?;
    let caller = Caller { uid, process: peer(stream)? };
    let mut decoder = Decoder::new(MESSAGE_LIMIT);
    let mut buffer = vec![0u8; 16 * 1024];
    let mut descriptors = Vec::new();
    let mut deadline = Instant::now() + IDLE_LIMIT;
    loop {
        while let Some(message) = decoder.next_message()? {
            let passed = std::mem::take(&mut descriptors);
            answer(stream, engine, caller, &message, passed).await?;
            deadline = Instant::now() + IDLE_LIMIT;
        }
        let was_mid_message = decoder.is_mid_message();
        let late = if was_mid_message { Dropped::HalfMessage } else { Dropped::Idle };
        let count =
            timeout_at(deadline, read(stream, &mut buffer, &mut descriptors)).await.map_err(|_| late)??;
        if count == 0 {
            decoder.finish()?;
            return Ok(());
        }
        if descriptors.len() > DESCRIPTOR_LIMIT {
            return Err(Dropped::TooManyDescriptors);
        }
        decoder.push(&buffer[..count]);
        if !was_mid_message {
            deadline = Instant::now() + MESSAGE_TIME;
        }
    }
}

/// The process that connected, while it lives.
fn peer(stream: &UnixStream) -> io::Result<Option<ProcessIdentity>> {
    match getsockopt(stream, PeerPidfd) {
        Ok(pidfd) => signals::process_of(&pidfd),
        // Before Linux 6.5 there is only the number. Should it be given again between connect and
        // here, the lease would be that process's: of the same user, and ended with it.
        Err(nix::errno::Errno::ENOPROTOOPT) => {
            let Some(pid) = stream.peer_cred()?.pid().and_then(|pid| u32::try_from(pid).ok()) else {
                return Ok(None);
            };
            Ok(processes::start_time(pid).ok().map(|start| ProcessIdentity { pid, start }))
        }
        // The process was waited for before its connection was accepted.
        Err(nix::errno::Errno::ESRCH | nix::errno::Errno::ENODATA | nix::errno::Errno::EINVAL) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

async fn answer(
    stream: &UnixStream,
    engine: &Engine,
    caller: Caller,
    message: &[u8],
    descriptors: Vec<OwnedFd>,
) -> Result<(), Dropped> {
    let call: Call = serde_json::from_slice(message).map_err(Dropped::NoCall)?;
    let oneway = call.oneway;
    let reply = match dispatch(engine, caller, call, descriptors).await {
        Ok(parameters) => Reply { parameters: Some(parameters), ..Reply::default() },
        Err(error) => error_reply(error),
    };
    if oneway {
        return Ok(());
    }
    let bytes = encode(&reply).map_err(Dropped::NoReply)?;
    timeout(MESSAGE_TIME, write(stream, &bytes)).await.map_err(|_| Dropped::NotReading)??;
    Ok(())
}

async fn read(stream: &UnixStream, buffer: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> io::Result<usize> {
    stream.async_io(Interest::READABLE, || receive(stream.as_fd(), buffer, descriptors)).await
}

async fn write(stream: &UnixStream, bytes: &[u8]) -> io::Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        let sent = stream.async_io(Interest::WRITABLE, || send(stream.as_fd(), rest, &[])).await?;
        rest = &rest[sent..];
    }
    Ok(())
}
