//! Carries the messages of one client's connection.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::time::Duration;

use hostler_protocol::frame::{Decoder, FrameError, MESSAGE_LIMIT, encode};
use hostler_protocol::message::{Call, Reply};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::{Instant, timeout, timeout_at};

use super::calls::{self, Read};
use super::message::Asked;
use crate::descriptors::{receive_from, send_all};

/// How long a connection may be silent between two messages.
const IDLE_LIMIT: Duration = Duration::from_secs(60);
/// How long a message may take from its first byte to its last, and an answer to be read.
const MESSAGE_TIME: Duration = Duration::from_secs(10);
/// The most descriptors that may wait beside a message. No method takes more than one.
const DESCRIPTOR_LIMIT: usize = 8;

/// Why a connection was dropped.
#[derive(Debug, thiserror::Error)]
pub(super) enum Dropped {
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
    #[error("user {sender} sent a message over user {connected}'s connection")]
    OtherSender { sender: u32, connected: u32 },
}

/// What a connection needs of the process around it.
pub(super) trait Around {
    /// Has the daemon answer.
    async fn ask(&self, call: Box<Asked>) -> Option<Reply>;
    /// Closes what a client passed, without waiting for it.
    fn dispose(&self, descriptors: Vec<OwnedFd>);
}

/// Descriptors that a client passed, which are never closed on the thread that reads.
struct Passed<'around, A: Around> {
    around: &'around A,
    descriptors: Vec<OwnedFd>,
}

impl<A: Around> Drop for Passed<'_, A> {
    fn drop(&mut self) {
        if !self.descriptors.is_empty() {
            self.around.dispose(std::mem::take(&mut self.descriptors));
        }
    }
}

/// Answers a client of `user`'s until it ends the connection.
pub(super) async fn converse(stream: &UnixStream, user: u32, around: &impl Around) -> Result<(), Dropped> {
    let mut decoder = Decoder::new(MESSAGE_LIMIT);
    let mut buffer = vec![0u8; 16 * 1024];
    let mut waiting = Passed { around, descriptors: Vec::new() };
    let mut deadline = Instant::now() + IDLE_LIMIT;
    loop {
        while let Some(message) = decoder.next_message()? {
            let passed = Passed { around, descriptors: std::mem::take(&mut waiting.descriptors) };
            answer(stream, &message, &passed, around).await?;
            deadline = Instant::now() + IDLE_LIMIT;
        }
        let was_mid_message = decoder.is_mid_message();
        let late = if was_mid_message { Dropped::HalfMessage } else { Dropped::Idle };
        let read = stream.async_io(Interest::READABLE, || {
            receive_from(stream.as_fd(), &mut buffer, &mut waiting.descriptors)
        });
        let (count, sender) = timeout_at(deadline, read).await.map_err(|_| late)??;
        if count == 0 {
            decoder.finish()?;
            return Ok(());
        }
        // Whoever connected may have passed the socket on, on purpose or not, and a program with another
        // user's rights may have connected for whoever started it. Only root speaks for others.
        if sender != user && sender != 0 {
            return Err(Dropped::OtherSender { sender, connected: user });
        }
        if waiting.descriptors.len() > DESCRIPTOR_LIMIT {
            return Err(Dropped::TooManyDescriptors);
        }
        decoder.push(&buffer[..count]);
        if !was_mid_message {
            deadline = Instant::now() + MESSAGE_TIME;
        }
    }
}

async fn answer<A: Around>(
    stream: &UnixStream,
    message: &[u8],
    passed: &Passed<'_, A>,
    around: &A,
) -> Result<(), Dropped> {
    let call: Call = serde_json::from_slice(message).map_err(Dropped::NoCall)?;
    let oneway = call.oneway;
    let numbers: Vec<RawFd> = passed.descriptors.iter().map(AsRawFd::as_raw_fd).collect();
    let reply = match calls::read(call, &numbers) {
        Read::Say(reply) => reply,
        Read::Ask(asked) => {
            let ended = || io::Error::new(io::ErrorKind::NotConnected, "hostlerd has ended");
            around.ask(asked).await.ok_or_else(ended)?
        }
    };
    if oneway { Ok(()) } else { say(stream, &reply).await }
}

/// Sends a reply.
pub(super) async fn say(stream: &UnixStream, reply: &Reply) -> Result<(), Dropped> {
    let bytes = encode(reply).map_err(Dropped::NoReply)?;
    timeout(MESSAGE_TIME, send_all(stream, &bytes, &[])).await.map_err(|_| Dropped::NotReading)??;
    Ok(())
}
