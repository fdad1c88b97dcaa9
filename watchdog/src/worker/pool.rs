//! The daemon's side: starts workers, talks to them, gives up on those that hang.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as BlockingStream;
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::time::Duration;

use hostler_protocol::frame::{Decoder, FrameError, REPLY_LIMIT, encode};
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::sync::Semaphore;
use tokio::time::{Instant, timeout};

use super::message::{Query, Request, Response};
use crate::descriptors::{receive, send_all};
use crate::model::{Proof, Snapshot, Step, StepResult, Wanted};

/// How many workers may do steps at once: each lease being taken back has one, which mostly waits for
/// the kernel.
const ACTING_LIMIT: usize = 64;
/// How many workers may look at clients' descriptors at once.
const EXAMINING_LIMIT: usize = 32;
/// How many workers may look at once. Apart from those that act: steps that hang must not keep anybody
/// from looking.
const LOOKING_LIMIT: usize = 4;
/// How many idle workers are kept, so that the next reclaim need not wait for one to start.
const IDLE_LIMIT: usize = 1;
/// How many hangs one look survives before it is given up. Each costs the time that a step may take, but
/// only once in a while; see [`HUNG_KEPT`].
const HANG_LIMIT: usize = 64;
/// For how long what hung a look is left out of others before it is tried again. Each time that it hangs
/// again doubles it, up to [`HUNG_KEPT_LONGEST`]: who makes many things hang may not keep all looks busy.
const HUNG_KEPT: Duration = Duration::from_secs(30);
const HUNG_KEPT_LONGEST: Duration = Duration::from_secs(16 * 60);

/// Why a worker gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    /// It could not be started.
    #[error("starting a worker process failed")]
    Start(#[source] io::Error),
    /// Its socket failed.
    #[error("talking to a worker process failed")]
    Socket(#[source] io::Error),
    /// It ended without an answer.
    #[error("a worker process ended while {doing}")]
    Ended {
        /// Its last word.
        doing: String,
    },
    /// It was silent for too long, and was given up.
    #[error("{doing} did not end within {seconds} s; the worker process was given up")]
    Hung {
        /// Its last word.
        doing: String,
        /// The loop device it last touched.
        device: Option<u32>,
        /// How long it was waited for.
        seconds: u64,
    },
    /// It said what is no answer.
    #[error("a worker process said what is no answer: {cause}")]
    Nonsense {
        /// What was wrong with it.
        cause: String,
    },
}

impl From<FrameError> for WorkerError {
    fn from(error: FrameError) -> Self {
        Self::Nonsense { cause: error.to_string() }
    }
}

/// Starts and keeps workers.
#[derive(Clone, Debug)]
pub struct Pool {
    inner: Rc<Inner>,
}

#[derive(Debug)]
struct Inner {
    program: std::path::PathBuf,
    idle: RefCell<Vec<Worker>>,
    /// Killed, and not yet gone: a process in uninterruptible sleep takes its time.
    given_up: RefCell<Vec<GivenUp>>,
    /// What hung a look not long ago: the next ones need not find out again.
    hung: RefCell<HashMap<Hung, Kept>>,
    acting: Semaphore,
    looking: Semaphore,
    examining: Semaphore,
}

#[derive(Debug)]
struct GivenUp {
    child: Child,
    /// Whose descriptor it was looking at.
    user: Option<u32>,
}

/// What a client's descriptor is of, and what is kept of it where it has no file handle.
#[derive(Debug)]
pub struct Examined {
    /// What it is of.
    pub proof: Proof,
    /// The directory's, opened anew so that closing it does not hang.
    pub kept: Option<OwnedFd>,
}

/// Something that hung a look.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Hung {
    /// A loop device.
    Device(u32),
    /// Anything else, in the words in which a worker announced it.
    Thing(String),
}

/// Since when, and for how long, something is left out of looks.
#[derive(Clone, Copy, Debug)]
struct Kept {
    since: Instant,
    span: Duration,
}

#[derive(Debug)]
struct Worker {
    child: Child,
    socket: UnixStream,
}

impl Pool {
    /// A pool whose workers run `program worker`.
    #[must_use]
    pub fn new(program: std::path::PathBuf) -> Self {
        Self {
            inner: Rc::new(Inner {
                program,
                idle: RefCell::default(),
                given_up: RefCell::default(),
                hung: RefCell::default(),
                acting: Semaphore::new(ACTING_LIMIT),
                looking: Semaphore::new(LOOKING_LIMIT),
                examining: Semaphore::new(EXAMINING_LIMIT),
            }),
        }
    }

    /// Looks at the host. What hangs, a loop device or whatever can be left out, is left out of the
    /// next try, which then reports it as a gap.
    ///
    /// # Errors
    /// When no worker can be had, or too many things hang.
    pub async fn observe(
        &self,
        mut query: Query,
        descriptors: &[BorrowedFd<'_>],
        silence: Duration,
    ) -> Result<Snapshot, WorkerError> {
        let mut hangs = 0;
        let mut skip = Vec::new();
        for hung in self.inner.hung_lately() {
            match hung {
                Hung::Device(device) => query.avoid.push(device),
                Hung::Thing(what) => skip.push(what),
            }
        }
        loop {
            let request = Request::Observe { query: query.clone(), skip: skip.clone() };
            match self.call(&request, descriptors, silence).await {
                Ok(Response::Seen(snapshot)) => return Ok(*snapshot),
                Ok(other) => return Err(WorkerError::Nonsense { cause: format!("{other:?}") }),
                Err(WorkerError::Hung { device: Some(device), .. }) if hangs < HANG_LIMIT => {
                    hangs += 1;
                    self.inner.note_hung(Hung::Device(device));
                    query.avoid.push(device);
                }
                // The same thing twice is one that cannot be left out.
                Err(WorkerError::Hung { device: None, doing, .. })
                    if hangs < HANG_LIMIT && !skip.contains(&doing) =>
                {
                    hangs += 1;
                    self.inner.note_hung(Hung::Thing(doing.clone()));
                    skip.push(doing);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Does one step.
    ///
    /// # Errors
    /// When no worker can be had. A step that hangs is no error but a result.
    pub async fn act(
        &self,
        step: &Step,
        claim: Option<super::ClaimQuery>,
        descriptors: &[BorrowedFd<'_>],
        limit: Duration,
    ) -> Result<StepResult, WorkerError> {
        match self.call(&Request::Act { step: step.clone(), claim }, descriptors, limit).await {
            Ok(Response::Acted(result)) => Ok(result),
            Ok(other) => Err(WorkerError::Nonsense { cause: format!("{other:?}") }),
            Err(WorkerError::Hung { doing, .. }) => Ok(StepResult::Hung { doing }),
            Err(error) => Err(error),
        }
    }

    /// Looks at a descriptor that a client of `user`'s passed to the reader of that pidfd.
    ///
    /// # Errors
    /// When no worker can be had, when looking at it hangs, or when the kernel does not tell.
    pub async fn examine(
        &self,
        user: u32,
        reader: BorrowedFd<'_>,
        number: i32,
        wanted: Wanted,
        silence: Duration,
    ) -> Result<Examined, WorkerError> {
        let request = Request::Examine { number, wanted };
        let (response, kept) = self.call_for(Some(user), &request, &[reader], silence).await?;
        match response {
            Response::Examined(Ok(proof)) => Ok(Examined { proof, kept: kept.into_iter().next() }),
            Response::Examined(Err(cause)) => Err(WorkerError::Nonsense { cause }),
            other => Err(WorkerError::Nonsense { cause: format!("{other:?}") }),
        }
    }

    /// How many workers hang because of a user's descriptors.
    #[must_use]
    pub fn hanging_for(&self, user: u32) -> usize {
        let mut given_up = self.inner.given_up.borrow_mut();
        given_up.retain_mut(GivenUp::is_there);
        given_up.iter().filter(|worker| worker.user == Some(user)).count()
    }

    async fn call(
        &self,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
        silence: Duration,
    ) -> Result<Response, WorkerError> {
        Ok(self.call_for(None, request, descriptors, silence).await?.0)
    }

    async fn call_for(
        &self,
        user: Option<u32>,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
        silence: Duration,
    ) -> Result<(Response, Vec<OwnedFd>), WorkerError> {
        let permits = match request {
            Request::Observe { .. } => &self.inner.looking,
            Request::Act { .. } => &self.inner.acting,
            Request::Examine { .. } => &self.inner.examining,
        };
        let permit = permits.acquire().await;
        let _permit = permit.expect("the semaphore is never closed");
        let mut worker = self.take()?;
        let result = worker.converse(request, descriptors, silence).await;
        if result.is_ok() && self.inner.idle.borrow().len() < IDLE_LIMIT {
            self.inner.idle.borrow_mut().push(worker);
        } else {
            self.give_up(worker, user);
        }
        result
    }

    /// An idle worker that still lives, else a new one.
    fn take(&self) -> Result<Worker, WorkerError> {
        while let Some(mut worker) = self.inner.idle.borrow_mut().pop() {
            if matches!(worker.child.try_wait(), Ok(None)) {
                return Ok(worker);
            }
        }
        Worker::start(&self.inner.program)
    }

    /// Ends a worker and collects those that have ended meanwhile. Never waits.
    fn give_up(&self, mut worker: Worker, user: Option<u32>) {
        // An error means that it has ended already.
        let _ = worker.child.kill();
        let mut given_up = self.inner.given_up.borrow_mut();
        given_up.push(GivenUp { child: worker.child, user });
        given_up.retain_mut(GivenUp::is_there);
    }
}

impl GivenUp {
    fn is_there(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(Some(_)) | Err(_))
    }
}

impl Inner {
    fn note_hung(&self, hung: Hung) {
        let mut all = self.hung.borrow_mut();
        let span = match all.get(&hung) {
            // Several looks at once found it out.
            Some(kept) if kept.since.elapsed() < kept.span => return,
            Some(kept) => (kept.span * 2).min(HUNG_KEPT_LONGEST),
            None => HUNG_KEPT,
        };
        all.insert(hung, Kept { since: Instant::now(), span });
    }

    fn hung_lately(&self) -> Vec<Hung> {
        let mut all = self.hung.borrow_mut();
        // Remembered for as long again, so that it counts when it hangs at the next attempt.
        all.retain(|_, kept| kept.since.elapsed() < kept.span * 2);
        let is_left_out = |kept: &Kept| kept.since.elapsed() < kept.span;
        all.iter().filter(|(_, kept)| is_left_out(kept)).map(|(hung, _)| hung.clone()).collect()
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let workers = self.idle.get_mut().drain(..).map(|worker| worker.child);
        for mut child in workers.chain(self.given_up.get_mut().drain(..).map(|worker| worker.child)) {
            let _ = child.kill();
            let _ = child.try_wait();
        }
    }
}

impl Worker {
    fn start(program: &std::path::Path) -> Result<Self, WorkerError> {
        let (ours, theirs) = BlockingStream::pair().map_err(WorkerError::Start)?;
        let child = Command::new(program)
            .arg("worker")
            .env_clear()
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .spawn()
            .map_err(WorkerError::Start)?;
        ours.set_nonblocking(true).map_err(WorkerError::Socket)?;
        let socket = UnixStream::from_std(ours).map_err(WorkerError::Socket)?;
        Ok(Self { child, socket })
    }

    async fn converse(
        &mut self,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
        silence: Duration,
    ) -> Result<(Response, Vec<OwnedFd>), WorkerError> {
        let bytes = encode(request).map_err(|error| WorkerError::Nonsense { cause: error.to_string() })?;
        let mut doing = "starting".to_owned();
        let mut touched = None;
        let mut passed = Vec::new();
        let mut decoder = Decoder::new(REPLY_LIMIT);
        let mut buffer = vec![0u8; 64 * 1024];
        let hung = |doing: &str, device| WorkerError::Hung {
            doing: doing.to_owned(),
            device,
            seconds: silence.as_secs(),
        };
        match timeout(silence, send_all(&self.socket, &bytes, descriptors)).await {
            Ok(written) => written.map_err(WorkerError::Socket)?,
            Err(_) => return Err(hung(&doing, touched)),
        }
        loop {
            while let Some(message) = decoder.next_message()? {
                let response = serde_json::from_slice(&message)
                    .map_err(|error| WorkerError::Nonsense { cause: error.to_string() })?;
                match response {
                    Response::Touching { device, what } => {
                        doing = match device {
                            Some(number) => format!("asking /dev/loop{number}"),
                            None => what,
                        };
                        touched = device;
                    }
                    done @ (Response::Seen(_) | Response::Acted(_) | Response::Examined(_)) => {
                        return Ok((done, passed));
                    }
                }
            }
            let read = timeout(silence, self.read(&mut buffer, &mut passed)).await;
            match read {
                Ok(Ok(0)) => return Err(WorkerError::Ended { doing }),
                Ok(Ok(count)) => decoder.push(&buffer[..count]),
                Ok(Err(error)) => return Err(WorkerError::Socket(error)),
                Err(_) => return Err(hung(&doing, touched)),
            }
        }
    }

    async fn read(&self, buffer: &mut [u8], passed: &mut Vec<OwnedFd>) -> io::Result<usize> {
        self.socket.async_io(Interest::READABLE, || receive(self.socket.as_fd(), buffer, passed)).await
    }
}
