//! What the daemon says to one reader, and hears from it.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use hostler_protocol::frame::{Decoder, FrameError, MESSAGE_LIMIT, encode};
use hostler_protocol::message::Reply;
use hostler_protocol::methods::CallError;
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Instant, sleep_until, timeout};

use super::answer::answer;
use super::readers::{Reader, Readers};
use crate::descriptors::send_all;
use crate::engine::Caller;
use crate::lines::Lines;
use crate::reader::message::{Asked, ConnectionId, FromReader, ToReader};

/// How long a reader stays without connections.
const IDLE_TIME: Duration = Duration::from_secs(5);
/// How long a reader may take to take what it is told. Its user can stop it: then it is only in his way.
const TAKE_TIME: Duration = Duration::from_secs(20);
/// The largest message that a reader can make of a client's: JSON writes a byte with six at most.
const READER_LIMIT: usize = 6 * MESSAGE_LIMIT + 4096;

/// Why a reader was ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum ReaderEnded {
    #[error("its socket failed")]
    Socket(#[from] io::Error),
    #[error("what it said is no message")]
    Frame(#[from] FrameError),
    #[error("what it said is nothing that a reader says")]
    Nonsense(#[from] serde_json::Error),
    #[error("it asked for a connection that it does not have, or for two things at once")]
    OutOfTurn,
    #[error("it took nothing in for {} s", TAKE_TIME.as_secs())]
    Silent,
    #[error("what its user passed cannot be closed")]
    Stuck,
    #[error("it ended by itself")]
    Left,
    #[error("it was of no use, and another user needed its place")]
    MadeRoom,
}

/// What a reader is told next.
#[derive(Debug)]
pub(super) enum Outgoing {
    Serve(Handed),
    Answer { connection: ConnectionId, reply: Reply },
}

/// A connection on its way to a reader.
#[derive(Debug)]
pub(super) struct Handed {
    pub(super) connection: ConnectionId,
    /// Who connected; nobody when it is only refused.
    pub(super) caller: Option<Caller>,
    pub(super) refuse: Option<CallError>,
    pub(super) stream: OwnedFd,
}

/// The connections that have not come to their reader. It is told nothing any more, so there are no others
/// later.
pub(super) fn left(in_hand: Option<Handed>, outbox: &mut UnboundedReceiver<Outgoing>) -> Vec<Handed> {
    outbox.close();
    let queued = std::iter::from_fn(|| outbox.try_recv().ok()).filter_map(|outgoing| match outgoing {
        Outgoing::Serve(handed) => Some(handed),
        Outgoing::Answer { .. } => None,
    });
    in_hand.into_iter().chain(queued).collect()
}

impl Readers {
    /// Talks to a reader until it is ended, or is idle. What is being sent to it is in `in_hand`.
    pub(super) async fn converse(
        &self,
        reader: &Rc<Reader>,
        mut lines: Lines,
        outbox: &mut UnboundedReceiver<Outgoing>,
        in_hand: &mut Option<Handed>,
    ) -> Result<(), ReaderEnded> {
        let mut decoder = Decoder::new(READER_LIMIT);
        let mut buffer = vec![0u8; 64 * 1024];
        // How many messages it has not taken in, and until when it has to take in one.
        let mut untaken = 0u64;
        let mut deadline = Instant::now();
        loop {
            while let Some(message) = decoder.next_message()? {
                match serde_json::from_slice(&message)? {
                    FromReader::Taken => {
                        untaken = untaken.checked_sub(1).ok_or(ReaderEnded::OutOfTurn)?;
                        deadline = Instant::now() + TAKE_TIME;
                    }
                    other => self.hear(reader, other)?,
                }
            }
            let is_idle = reader.connections.borrow().is_empty();
            if is_idle && reader.is_forgotten(self) {
                return Ok(());
            }
            let wake = if untaken > 0 { deadline } else { reader.idle_since.get() + IDLE_TIME };
            tokio::select! {
                outgoing = outbox.recv() => {
                    let Some(outgoing) = outgoing else { return Ok(()) };
                    let message = match outgoing {
                        Outgoing::Answer { connection, reply } => ToReader::Answer { connection, reply },
                        Outgoing::Serve(handed) => {
                            reader.unsent.set(reader.unsent.get().saturating_sub(1));
                            let refuse = handed.refuse.clone();
                            let connection = handed.connection;
                            *in_hand = Some(handed);
                            ToReader::Serve { connection, refuse }
                        }
                    };
                    let bytes = encode(&message)?;
                    let stream = in_hand.as_ref().map(|handed| handed.stream.as_fd());
                    let sent = timeout(TAKE_TIME, send_all(&lines.to_child, &bytes, stream.as_slice())).await;
                    sent.map_err(|_| ReaderEnded::Silent)??;
                    // The reader may have closed its copy already: this may be the last.
                    if let Some(handed) = in_hand.take() {
                        self.close(handed.stream);
                    }
                    if untaken == 0 {
                        deadline = Instant::now() + TAKE_TIME;
                    }
                    untaken += 1;
                }
                read = lines.from_child.read(&mut buffer) => match read? {
                    0 => return Err(ReaderEnded::Left),
                    count => decoder.push(&buffer[..count]),
                },
                () = reader.forgotten.notified() => {
                    let is_idle = reader.connections.borrow().is_empty();
                    return if is_idle { Ok(()) } else { Err(ReaderEnded::MadeRoom) };
                }
                () = sleep_until(wake), if untaken > 0 || is_idle => {
                    if untaken > 0 {
                        return Err(ReaderEnded::Silent);
                    }
                    return Ok(());
                }
            }
        }
    }

    fn hear(&self, reader: &Rc<Reader>, message: FromReader) -> Result<(), ReaderEnded> {
        match message {
            FromReader::Taken => {}
            FromReader::Stuck => return Err(ReaderEnded::Stuck),
            FromReader::Closed { connection, dropped } => {
                let closed = reader.connections.borrow_mut().remove(&connection);
                let closed = closed.ok_or(ReaderEnded::OutOfTurn)?;
                if closed.caller.is_some() {
                    reader.served.set(reader.served.get().saturating_sub(1));
                }
                reader.idle_since.set(Instant::now());
                if let Some(why) = dropped {
                    self.metrics().connections_refused.inc();
                    let why = hostler_protocol::text::printable(why.as_bytes());
                    tracing::debug!(uid = reader.user, "a connection was dropped: {why}");
                }
            }
            FromReader::Asked { connection, call } => {
                let caller = {
                    let mut connections = reader.connections.borrow_mut();
                    let asking = connections.get_mut(&connection).filter(|asking| !asking.is_waiting);
                    let asking = asking.ok_or(ReaderEnded::OutOfTurn)?;
                    asking.is_waiting = true;
                    asking.caller.ok_or(ReaderEnded::OutOfTurn)?
                };
                reader.asked_at.set(Instant::now());
                self.answer(reader, connection, caller, *call);
            }
        }
        Ok(())
    }

    fn answer(&self, reader: &Rc<Reader>, connection: ConnectionId, caller: Caller, call: Asked) {
        let engine = self.engine().clone();
        let reader = Rc::clone(reader);
        tokio::task::spawn_local(async move {
            let a_second = engine.config().limits.requests_per_second;
            let wait = reader.rate.borrow_mut().take(Instant::now(), a_second);
            tokio::time::sleep(wait).await;
            let reply: Reply = answer(&engine, caller, call, &reader.pidfd).await;
            if let Some(asked) = reader.connections.borrow_mut().get_mut(&connection) {
                asked.is_waiting = false;
            }
            // It may have ended meanwhile, and its connections with it.
            let _ = reader.outbox.send(Outgoing::Answer { connection, reply });
        });
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use tokio::sync::mpsc::unbounded_channel;

    use super::*;

    #[test]
    fn no_connection_is_lost_that_has_not_come_to_its_reader() {
        let handed = |number| {
            let stream = OwnedFd::from(UnixStream::pair().expect("a pair").0);
            Handed { connection: ConnectionId(number), caller: None, refuse: None, stream }
        };
        let (sender, mut outbox) = unbounded_channel();
        let answer = || Outgoing::Answer { connection: ConnectionId(9), reply: Reply::default() };
        for outgoing in [answer(), Outgoing::Serve(handed(2)), answer(), Outgoing::Serve(handed(3))] {
            sender.send(outgoing).expect("open");
        }
        let all: Vec<u64> =
            left(Some(handed(1)), &mut outbox).into_iter().map(|handed| handed.connection.0).collect();
        assert_eq!(all, [1, 2, 3]);
        // What comes now is not lost in there: whoever hands it over keeps it.
        assert!(sender.send(Outgoing::Serve(handed(4))).is_err());
    }
}
