//! The readers' other end: one for each user with connections, started when it is needed and ended when it
//! is idle.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::PathBuf;
use std::process::Child;
use std::rc::Rc;
use std::time::Duration;

use hostler_protocol::frame::{Decoder, FrameError, MESSAGE_LIMIT, encode};
use hostler_protocol::message::Reply;
use hostler_protocol::methods::CallError;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout};

use super::answer::answer;
use super::rate::Rate;
use crate::causes::chain;
use crate::descriptors::send_all;
use crate::engine::{Caller, Engine};
use crate::lines::{self, Lines};
use crate::reader::message::{Asked, ConnectionId, FromReader, ToReader};

/// How long a reader stays without connections.
const IDLE_TIME: Duration = Duration::from_secs(5);
/// How long a reader may take to take what it is told. Its user can stop it: then it is only in his way.
const TAKE_TIME: Duration = Duration::from_secs(20);
/// How many readers of one user may be on their way out: those that hang in what was passed to them.
const LEAVING_LIMIT: usize = 4;
/// The largest message that a reader can make of a client's: JSON writes a byte with six at most.
const READER_LIMIT: usize = 6 * MESSAGE_LIMIT + 4096;
/// Who has nothing: whoever cannot be served is told so by its reader.
const NOBODY: u32 = 65_534;

/// Why a reader was ended.
#[derive(Debug, thiserror::Error)]
enum ReaderEnded {
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
}

/// All readers.
#[derive(Clone)]
pub(super) struct Readers {
    shared: Rc<Shared>,
}

struct Shared {
    engine: Engine,
    program: PathBuf,
    by_user: RefCell<HashMap<u32, Rc<Reader>>>,
    /// How many readers of a user have been ended and are not gone.
    leaving: RefCell<HashMap<u32, usize>>,
    next_connection: Cell<u64>,
}

/// What the daemon knows of a reader.
struct Reader {
    user: u32,
    /// Its process, to fetch descriptors from.
    pidfd: OwnedFd,
    outbox: mpsc::UnboundedSender<(ToReader, Option<OwnedFd>)>,
    connections: RefCell<HashMap<ConnectionId, Connection>>,
    /// How many of these are served, not refused.
    served: Cell<usize>,
    rate: RefCell<Rate>,
    idle_since: Cell<Instant>,
}

struct Connection {
    /// Who connected; nobody who is only refused may ask.
    caller: Option<Caller>,
    is_waiting: bool,
}

impl Readers {
    pub(super) fn new(engine: Engine, program: PathBuf) -> Self {
        Self {
            shared: Rc::new(Shared {
                engine,
                program,
                by_user: RefCell::default(),
                leaving: RefCell::default(),
                next_connection: Cell::new(1),
            }),
        }
    }

    /// Hands a connection to its user's reader.
    pub(super) fn serve(&self, caller: Caller, group: u32, stream: OwnedFd) {
        match self.of_user(caller.uid, group) {
            Ok(reader) => self.hand_over(&reader, caller, stream),
            Err(error) => {
                tracing::warn!(uid = caller.uid, "user {} is not served: {error}", caller.uid);
                self.shared.engine.metrics().connections_refused.inc();
                match self.of_user(NOBODY, NOBODY) {
                    Ok(reader) => self.send(&reader, None, Some(error), stream),
                    // What it passed already may hang whoever closes it.
                    Err(_) => drop(std::thread::spawn(move || drop(stream))),
                }
            }
        }
    }

    fn hand_over(&self, reader: &Rc<Reader>, caller: Caller, stream: OwnedFd) {
        let limit = self.shared.engine.config().limits.connections;
        if reader.served.get() < limit {
            reader.served.set(reader.served.get() + 1);
            self.send(reader, Some(caller), None, stream);
        } else {
            self.shared.engine.metrics().connections_refused.inc();
            let refuse = CallError::LimitReached { limit: "connections".to_owned(), value: limit as u64 };
            self.send(reader, None, Some(refuse), stream);
        }
    }

    fn send(&self, reader: &Rc<Reader>, caller: Option<Caller>, refuse: Option<CallError>, stream: OwnedFd) {
        let connection = ConnectionId(self.shared.next_connection.get());
        self.shared.next_connection.set(connection.0 + 1);
        reader.connections.borrow_mut().insert(connection, Connection { caller, is_waiting: false });
        // When it ends right now, the connection ends with it.
        let _ = reader.outbox.send((ToReader::Serve { connection, refuse }, Some(stream)));
    }

    fn of_user(&self, user: u32, group: u32) -> Result<Rc<Reader>, CallError> {
        let running = self.shared.by_user.borrow().get(&user).filter(|reader| !reader.has_ended()).cloned();
        if let Some(reader) = running {
            return Ok(reader);
        }
        let unavailable = |reason: String| CallError::Unavailable { reason };
        if self.shared.leaving.borrow().get(&user).is_some_and(|count| *count >= LEAVING_LIMIT) {
            return Err(unavailable(format!(
                "{LEAVING_LIMIT} processes that served user {user} hang in descriptors that were passed to them; end what does not answer (a FUSE server, for example) first"
            )));
        }
        let limit = self.shared.engine.config().limits.users;
        let count = self.shared.by_user.borrow().keys().filter(|user| counts(**user)).count();
        if counts(user) && count >= limit && !self.let_one_go() {
            return Err(CallError::LimitReached { limit: "users".to_owned(), value: limit as u64 });
        }
        let reader = self.start(user, group).map_err(|error| {
            unavailable(format!("a process to serve user {user} could not be started: {error}"))
        })?;
        self.shared.by_user.borrow_mut().insert(user, Rc::clone(&reader));
        Ok(reader)
    }

    /// Ends the counted reader that has had no connection for the longest; says whether there was one.
    fn let_one_go(&self) -> bool {
        let mut all = self.shared.by_user.borrow_mut();
        let idle =
            all.iter().filter(|(user, reader)| counts(**user) && reader.connections.borrow().is_empty());
        let oldest = idle.min_by_key(|(_, reader)| reader.idle_since.get()).map(|(user, _)| *user);
        // Its task ends it once nobody can send to it.
        oldest.is_some_and(|user| all.remove(&user).is_some())
    }

    fn start(&self, user: u32, group: u32) -> io::Result<Rc<Reader>> {
        let arguments = ["reader", &user.to_string(), &group.to_string()];
        let (mut child, lines) = lines::start(&self.shared.program, &arguments)?;
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).inspect_err(|_| {
            let _ = child.kill();
            let _ = child.wait();
        })?;
        let (outbox, to_send) = mpsc::unbounded_channel();
        let reader = Rc::new(Reader {
            user,
            pidfd,
            outbox,
            connections: RefCell::default(),
            served: Cell::new(0),
            rate: RefCell::new(Rate::new(Instant::now())),
            idle_since: Cell::new(Instant::now()),
        });
        let readers = self.clone();
        let known = Rc::clone(&reader);
        tokio::task::spawn_local(async move {
            let ended = readers.converse(&known, lines, to_send).await;
            if let Err(error) = ended {
                tracing::warn!(uid = user, "the reader of user {user} is ended: {}", chain(&error));
                readers.shared.engine.metrics().connections_refused.inc();
            }
            let is_it = |other: &Rc<Reader>| Rc::ptr_eq(other, &known);
            if readers.shared.by_user.borrow().get(&user).is_some_and(is_it) {
                readers.shared.by_user.borrow_mut().remove(&user);
            }
            readers.see_off(user, child).await;
        });
        Ok(reader)
    }

    /// Waits until a reader that lost its socket is gone, however long it hangs.
    async fn see_off(&self, user: u32, mut child: Child) {
        const LOOKS: [u64; 4] = [1, 10, 100, 1000];
        *self.shared.leaving.borrow_mut().entry(user).or_default() += 1;
        for wait in LOOKS.into_iter().chain(std::iter::repeat(5000)) {
            tokio::time::sleep(Duration::from_millis(wait)).await;
            if !matches!(child.try_wait(), Ok(None)) {
                break;
            }
            if wait >= 100 {
                // It may be gone already.
                let _ = child.kill();
            }
        }
        let mut leaving = self.shared.leaving.borrow_mut();
        if let Some(count) = leaving.get_mut(&user) {
            *count -= 1;
            if *count == 0 {
                leaving.remove(&user);
            }
        }
    }

    async fn converse(
        &self,
        reader: &Rc<Reader>,
        mut lines: Lines,
        mut outbox: mpsc::UnboundedReceiver<(ToReader, Option<OwnedFd>)>,
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
                    let Some((message, stream)) = outgoing else { return Ok(()) };
                    let bytes = encode(&message)?;
                    let descriptors = stream.as_ref().map(AsFd::as_fd);
                    let sent = timeout(TAKE_TIME, send_all(&lines.to_child, &bytes, descriptors.as_slice())).await;
                    sent.map_err(|_| ReaderEnded::Silent)??;
                    if untaken == 0 {
                        deadline = Instant::now() + TAKE_TIME;
                    }
                    untaken += 1;
                }
                read = lines.from_child.read(&mut buffer) => match read? {
                    0 => return Err(ReaderEnded::Left),
                    count => decoder.push(&buffer[..count]),
                },
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
                    self.shared.engine.metrics().connections_refused.inc();
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
                self.answer(reader, connection, caller, *call);
            }
        }
        Ok(())
    }

    fn answer(&self, reader: &Rc<Reader>, connection: ConnectionId, caller: Caller, call: Asked) {
        let engine = self.shared.engine.clone();
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
            let _ = reader.outbox.send((ToReader::Answer { connection, reply }, None));
        });
    }
}

/// Whether a user counts for `[limits] users`: root is never locked out.
fn counts(user: u32) -> bool {
    ![0, NOBODY].contains(&user)
}

impl Reader {
    fn has_ended(&self) -> bool {
        self.outbox.is_closed()
    }

    /// Whether another was started in its place, or none is wanted.
    fn is_forgotten(&self, readers: &Readers) -> bool {
        let all = readers.shared.by_user.borrow();
        !all.get(&self.user).is_some_and(|known| std::ptr::eq(known.as_ref(), self))
    }
}
