//! Readers: what parses what a user sends has that user's rights, and no more.
//!
//! The daemon accepts a connection, asks the kernel who connected, and hands the connection to a process
//! that is only that user's: this same program, started as `hostlerd reader UID GID`, which gives up root
//! before it reads a byte. It reads messages, answers what only needs reading, and has the daemon do the
//! rest. Whoever takes a reader over can say what its user could have said anyway.
//!
//! A client may pass descriptors whose closing hangs (a file of a file system that does not answer). They
//! are looked at by a worker and closed by a thread of the reader's own: such a user is left without a
//! reader, and nobody else is.

pub mod calls;
mod connection;
pub mod message;

use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream as BlockingStream;
use std::rc::Rc;
use std::sync::mpsc::{SyncSender, sync_channel};

use hostler_protocol::frame::{Decoder, FrameError, REPLY_LIMIT, encode};
use hostler_protocol::message::Reply;
use tokio::io::{AsyncWriteExt, Interest};
use tokio::net::UnixStream;
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, oneshot};

use crate::causes::chain;
use crate::confine::{self, ConfineError};
use crate::descriptors::receive;
use crate::lines;
use connection::{Around, Dropped, converse, say};
use message::{Asked, ConnectionId, FromReader, ToReader};

/// How many messages with descriptors may wait to be closed before the reader is given up.
const CLOSING_LIMIT: usize = 1024;

/// Why a reader stopped.
#[derive(Debug, thiserror::Error)]
pub enum ReaderFailure {
    /// It has too many rights.
    #[error(transparent)]
    Confine(#[from] ConfineError),
    /// The socket to the daemon.
    #[error("the reader's socket failed; it is started by hostlerd only, never by hand")]
    Socket(#[from] io::Error),
    /// What came over it is no message.
    #[error("the daemon sent what is no message")]
    Frame(#[from] FrameError),
    /// What came over it is nothing that the daemon says.
    #[error("the daemon sent what is no request")]
    Request(#[from] serde_json::Error),
}

/// Serves the connections that come over standard input, as user `uid`, until the daemon closes it. What the
/// daemon is told goes to standard output.
///
/// # Errors
/// When it cannot give up root, and when the daemon cannot be talked to.
pub fn serve(uid: u32, gid: u32) -> Result<(), ReaderFailure> {
    confine::become_user(uid, gid)?;
    let (daemon, pipe) = lines::own()?;
    daemon.set_nonblocking(true)?;
    let (closing, to_close) = sync_channel::<Vec<OwnedFd>>(CLOSING_LIMIT);
    std::thread::Builder::new().name("closing".to_owned()).spawn(move || {
        while let Ok(descriptors) = to_close.recv() {
            drop(descriptors);
        }
    })?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
    let local = tokio::task::LocalSet::new();
    let (daemon, pipe) = {
        let _entered = runtime.enter();
        (UnixStream::from_std(daemon)?, pipe::Sender::from_owned_fd(pipe)?)
    };
    // Nothing that a user wrote has been read so far.
    confine::seal_reader()?;
    local.block_on(&runtime, run(uid, daemon, pipe, closing))
}

async fn run(
    user: u32,
    daemon: UnixStream,
    mut pipe: pipe::Sender,
    closing: SyncSender<Vec<OwnedFd>>,
) -> Result<(), ReaderFailure> {
    let (to_daemon, mut outbox) = mpsc::unbounded_channel();
    tokio::task::spawn_local(async move {
        while let Some(message) = outbox.recv().await {
            let Ok(bytes) = encode(&message) else { continue };
            if pipe.write_all(&bytes).await.is_err() {
                return;
            }
        }
    });
    let reader = Reader { user, to_daemon, waiting: Rc::default(), closing };
    let mut decoder = Decoder::new(REPLY_LIMIT);
    let mut buffer = vec![0u8; 64 * 1024];
    let mut passed = Vec::new();
    let mut connections = VecDeque::new();
    loop {
        while let Some(message) = decoder.next_message()? {
            reader.take(serde_json::from_slice(&message)?, &mut connections)?;
            reader.tell(FromReader::Taken);
        }
        let read = daemon.async_io(Interest::READABLE, || receive(daemon.as_fd(), &mut buffer, &mut passed));
        let count = read.await?;
        if count == 0 {
            return Ok(());
        }
        connections.append(&mut passed.drain(..).collect());
        decoder.push(&buffer[..count]);
    }
}

#[derive(Clone)]
struct Reader {
    user: u32,
    to_daemon: mpsc::UnboundedSender<FromReader>,
    /// The connections whose calls the daemon answers.
    waiting: Rc<RefCell<HashMap<ConnectionId, oneshot::Sender<Reply>>>>,
    closing: SyncSender<Vec<OwnedFd>>,
}

impl Reader {
    fn tell(&self, message: FromReader) {
        // The writing task only ends with the process.
        let _ = self.to_daemon.send(message);
    }

    fn take(&self, message: ToReader, connections: &mut VecDeque<OwnedFd>) -> io::Result<()> {
        match message {
            ToReader::Answer { connection, reply } => {
                if let Some(waiting) = self.waiting.borrow_mut().remove(&connection) {
                    // Its client may have gone.
                    let _ = waiting.send(reply);
                }
            }
            ToReader::Serve { connection, refuse } => {
                let missing = || io::Error::new(io::ErrorKind::InvalidData, "a connection is missing");
                let stream = BlockingStream::from(connections.pop_front().ok_or_else(missing)?);
                stream.set_nonblocking(true)?;
                let stream = UnixStream::from_std(stream)?;
                let reader = self.clone();
                tokio::task::spawn_local(async move {
                    let served = match refuse {
                        Some(error) => say(&stream, &calls::error_reply(&error)).await,
                        None => {
                            let around = Connected { reader: &reader, connection };
                            converse(&stream, reader.user, &around).await
                        }
                    };
                    // What was sent and not read may hold descriptors: it is closed like them.
                    reader.dispose(stream.into_std().map(|stream| vec![stream.into()]).unwrap_or_default());
                    let dropped = match served {
                        Ok(()) | Err(Dropped::Idle) => None,
                        Err(error) => Some(chain(&error)),
                    };
                    reader.tell(FromReader::Closed { connection, dropped });
                });
            }
        }
        Ok(())
    }

    fn dispose(&self, descriptors: Vec<OwnedFd>) {
        if let Err(full) = self.closing.try_send(descriptors) {
            // Closing them here would stop everything; the daemon ends this process instead.
            self.tell(FromReader::Stuck);
            std::mem::forget(full);
        }
    }
}

struct Connected<'reader> {
    reader: &'reader Reader,
    connection: ConnectionId,
}

impl Around for Connected<'_> {
    async fn ask(&self, call: Box<Asked>) -> Option<Reply> {
        let (answer, answered) = oneshot::channel();
        self.reader.waiting.borrow_mut().insert(self.connection, answer);
        self.reader.tell(FromReader::Asked { connection: self.connection, call });
        answered.await.ok()
    }

    fn dispose(&self, descriptors: Vec<OwnedFd>) {
        self.reader.dispose(descriptors);
    }
}
