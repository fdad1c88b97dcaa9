//! The readers' other end: one for each user with connections, started when it is needed and ended when it
//! is idle.
//!
//! A connection that its user's reader cannot have, since there may be none, or it does nothing, or it has
//! ended, is refused by nobody's reader. None is ever closed here: see [`crate::closing`].

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Child;
use std::rc::Rc;
use std::time::Duration;

use hostler_protocol::methods::CallError;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

use super::conversation::{Handed, Outgoing, ReaderEnded, left};
use super::rate::Rate;
use crate::causes::chain;
use crate::closing::Closer;
use crate::engine::{Caller, Engine};
use crate::lines;
use crate::metrics::Metrics;
use crate::reader::message::ConnectionId;

/// How many readers of one user may be on their way out: those that hang in what was passed to them.
const LEAVING_LIMIT: usize = 4;
/// How many connections may wait here for a reader to take them. One that lives takes each before the next
/// comes; one that its user has stopped takes none.
const UNSENT_LIMIT: usize = 64;
/// How many refused connections a reader may have besides those that it serves. Each ends as soon as it has
/// said so.
const REFUSED_LIMIT: usize = 1024;
/// How many readers of one user are started at once, and after that one in each [`START_TIME`]: he may end
/// them as he likes, and starting a program takes the daemon's own time.
const START_BURST: u32 = 8;
const START_TIME: Duration = Duration::from_secs(1);
/// How often the log is told that somebody is not served: whoever is not can ask again at once.
const TELL_BURST: u32 = 20;
const TELL_TIME: Duration = Duration::from_secs(1);
/// Who has nothing: whoever cannot be served is told so by its reader.
const NOBODY: u32 = 65_534;

/// All readers.
#[derive(Clone)]
pub(super) struct Readers {
    shared: Rc<Shared>,
}

struct Shared {
    engine: Engine,
    program: PathBuf,
    closer: Closer,
    by_user: RefCell<HashMap<u32, Rc<Reader>>>,
    /// How many readers of a user have been ended and are not gone.
    leaving: RefCell<HashMap<u32, usize>>,
    /// How often a user's readers were started.
    starts: RefCell<HashMap<u32, Rate>>,
    /// How often the log was told that somebody is not served.
    told: RefCell<Rate>,
    next_connection: Cell<u64>,
}

/// What the daemon knows of a reader.
pub(super) struct Reader {
    pub(super) user: u32,
    group: u32,
    /// Its process, to fetch descriptors from.
    pub(super) pidfd: OwnedFd,
    pub(super) outbox: mpsc::UnboundedSender<Outgoing>,
    pub(super) connections: RefCell<HashMap<ConnectionId, Connection>>,
    /// How many of these are served, not refused.
    pub(super) served: Cell<usize>,
    /// How many of these are still in the outbox.
    pub(super) unsent: Cell<usize>,
    pub(super) rate: RefCell<Rate>,
    pub(super) idle_since: Cell<Instant>,
    /// When it last asked for something.
    pub(super) asked_at: Cell<Instant>,
    /// It is to end.
    pub(super) forgotten: Notify,
}

pub(super) struct Connection {
    /// Who connected; nobody who is only refused may ask.
    pub(super) caller: Option<Caller>,
    pub(super) is_waiting: bool,
}

impl Readers {
    pub(super) fn new(engine: Engine, program: PathBuf) -> Self {
        Self {
            shared: Rc::new(Shared {
                engine,
                program,
                closer: Closer::default(),
                by_user: RefCell::default(),
                leaving: RefCell::default(),
                starts: RefCell::default(),
                told: RefCell::new(Rate::new(Instant::now())),
                next_connection: Cell::new(1),
            }),
        }
    }

    pub(super) fn engine(&self) -> &Engine {
        &self.shared.engine
    }

    pub(super) fn metrics(&self) -> &Metrics {
        self.shared.engine.metrics()
    }

    /// Closes what a client may have passed something over.
    pub(super) fn close(&self, stream: OwnedFd) {
        self.shared.closer.close(stream);
    }

    /// Hands a connection to its user's reader.
    pub(super) fn serve(&self, caller: Caller, group: u32, stream: OwnedFd) {
        let user = caller.uid;
        match self.of_user(user, group) {
            Ok(reader) if reader.has_room(self) => self.hand_over(&reader, caller, stream),
            Ok(_) => {
                let reason = format!("the process that serves user {user} does nothing now; was it stopped?");
                self.refuse(CallError::Unavailable { reason }, stream);
            }
            Err(error) => {
                if self.shared.told.borrow_mut().try_take(Instant::now(), TELL_TIME, TELL_BURST) {
                    tracing::warn!(uid = user, "user {user} is not served: {error}");
                }
                self.refuse(error, stream);
            }
        }
    }

    fn hand_over(&self, reader: &Rc<Reader>, caller: Caller, stream: OwnedFd) {
        let limit = self.shared.engine.config().limits.connections;
        if reader.served.get() < limit {
            reader.served.set(reader.served.get() + 1);
            self.send(reader, Some(caller), None, stream);
        } else {
            self.metrics().connections_refused.inc();
            let refuse = CallError::LimitReached { limit: "connections".to_owned(), value: limit as u64 };
            self.send(reader, None, Some(refuse), stream);
        }
    }

    /// Has nobody's reader say why a connection is not served.
    fn refuse(&self, error: CallError, stream: OwnedFd) {
        self.metrics().connections_refused.inc();
        match self.of_user(NOBODY, NOBODY) {
            Ok(reader) if reader.has_room(self) => self.send(&reader, None, Some(error), stream),
            Ok(_) | Err(_) => self.close(stream),
        }
    }

    fn send(&self, reader: &Rc<Reader>, caller: Option<Caller>, refuse: Option<CallError>, stream: OwnedFd) {
        let connection = ConnectionId(self.shared.next_connection.get());
        self.shared.next_connection.set(connection.0 + 1);
        reader.connections.borrow_mut().insert(connection, Connection { caller, is_waiting: false });
        reader.unsent.set(reader.unsent.get() + 1);
        let sent = reader.outbox.send(Outgoing::Serve(Handed { connection, caller, refuse, stream }));
        if let Err(mpsc::error::SendError(Outgoing::Serve(handed))) = sent {
            self.close(handed.stream);
        }
    }

    /// The reader has ended: whoever has not come to it is served by the next one, or told why not.
    fn pass_on(&self, reader: &Reader, ended: &Result<(), ReaderEnded>, left: Vec<Handed>) {
        for Handed { caller, refuse, stream, .. } in left {
            match (ended, caller) {
                (Ok(()), Some(caller)) => self.serve(caller, reader.group, stream),
                (_, _) if reader.user == NOBODY => self.close(stream),
                (Err(error), Some(_)) => {
                    let reason = format!("the process that served user {} was ended: {error}", reader.user);
                    self.refuse(CallError::Unavailable { reason }, stream);
                }
                (_, None) => match refuse {
                    Some(error) => self.refuse(error, stream),
                    None => self.close(stream),
                },
            }
        }
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
        if counts(user) && !self.may_start(user) {
            return Err(unavailable(format!(
                "the processes that serve user {user} end too often; try again in a second"
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

    /// Counts a start of a user's reader, unless there were too many.
    fn may_start(&self, user: u32) -> bool {
        let now = Instant::now();
        let mut starts = self.shared.starts.borrow_mut();
        starts.retain(|_, rate| !rate.is_full(now));
        starts.entry(user).or_insert_with(|| Rate::new(now)).try_take(now, START_TIME, START_BURST)
    }

    /// Ends a counted reader to make room for another user's: the one that has had no connection for the
    /// longest, else of those whose users have no lease, and wait for nothing, the one that has asked for
    /// nothing for the longest. Says whether there was one.
    fn let_one_go(&self) -> bool {
        let is_in_use = |reader: &Reader| {
            reader.connections.borrow().values().any(|connection| connection.is_waiting)
                || self.shared.engine.has_lease(reader.user)
        };
        let found = {
            let all = self.shared.by_user.borrow();
            let counted = || all.values().filter(|reader| counts(reader.user));
            let idle = counted().filter(|reader| reader.connections.borrow().is_empty());
            let idle = idle.min_by_key(|reader| reader.idle_since.get());
            let useless = || counted().filter(|reader| !is_in_use(reader));
            idle.or_else(|| useless().min_by_key(|reader| reader.asked_at.get())).map(|reader| reader.user)
        };
        let Some(user) = found else { return false };
        if let Some(reader) = self.shared.by_user.borrow_mut().remove(&user) {
            reader.forgotten.notify_one();
        }
        true
    }

    fn start(&self, user: u32, group: u32) -> io::Result<Rc<Reader>> {
        let arguments = ["reader", &user.to_string(), &group.to_string()];
        let (mut child, lines) = lines::start(&self.shared.program, &arguments)?;
        let pidfd = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).inspect_err(|_| {
            let _ = child.kill();
            let _ = child.wait();
        })?;
        let (outbox, mut to_send) = mpsc::unbounded_channel();
        let now = Instant::now();
        let reader = Rc::new(Reader {
            user,
            group,
            pidfd,
            outbox,
            connections: RefCell::default(),
            served: Cell::new(0),
            unsent: Cell::new(0),
            rate: RefCell::new(Rate::new(now)),
            idle_since: Cell::new(now),
            asked_at: Cell::new(now),
            forgotten: Notify::new(),
        });
        let readers = self.clone();
        let known = Rc::clone(&reader);
        tokio::task::spawn_local(async move {
            let mut in_hand = None;
            let ended = readers.converse(&known, lines, &mut to_send, &mut in_hand).await;
            if let Err(error) = &ended {
                tracing::warn!(uid = user, "the reader of user {user} is ended: {}", chain(error));
                readers.metrics().connections_refused.inc();
            }
            let is_it = |other: &Rc<Reader>| Rc::ptr_eq(other, &known);
            if readers.shared.by_user.borrow().get(&user).is_some_and(is_it) {
                readers.shared.by_user.borrow_mut().remove(&user);
            }
            readers.pass_on(&known, &ended, left(in_hand, &mut to_send));
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
}

/// Whether a user counts for `[limits] users`: root is never locked out.
fn counts(user: u32) -> bool {
    ![0, NOBODY].contains(&user)
}

impl Reader {
    fn has_ended(&self) -> bool {
        self.outbox.is_closed()
    }

    /// Whether it may be told of another connection.
    fn has_room(&self, readers: &Readers) -> bool {
        let most = readers.shared.engine.config().limits.connections.saturating_add(REFUSED_LIMIT);
        self.unsent.get() < UNSENT_LIMIT && self.connections.borrow().len() < most
    }

    /// Whether another was started in its place, or none is wanted.
    pub(super) fn is_forgotten(&self, readers: &Readers) -> bool {
        let all = readers.shared.by_user.borrow();
        !all.get(&self.user).is_some_and(|known| std::ptr::eq(known.as_ref(), self))
    }
}
