//! Gives workers their work, and gives up on those that hang.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::rc::Rc;
use std::time::{Duration, Instant};

use hostler_protocol::frame::FrameError;
use tokio::sync::Semaphore;

use super::connection::{Connection, NoCopy, Origin};
use super::hung::{Hung, HungThings};
use super::message::{Query, Request, Response, Task};
use crate::kernel::signals::has_ended;
use crate::model::{Proof, Snapshot, Step, StepResult, Wanted};

/// How many workers may have a plan at once: each lease being taken back has one, which mostly waits for
/// the kernel.
const ACTING_LIMIT: usize = 64;
/// How many workers may look at clients' descriptors at once, and how many of these at one user's: looking
/// at a descriptor can take as long as a step may.
const EXAMINING_LIMIT: usize = 32;
const EXAMINING_FOR_USER: usize = 4;
/// How many workers may hang because of one user's descriptors before no more of his are looked at.
const HANGING_LIMIT: usize = 4;
/// How many workers may look at once. Apart from those that act: steps that hang must not keep anybody
/// from looking.
const LOOKING_LIMIT: usize = 4;
/// How many hangs one look survives before it is given up. Each costs the time that a step may take, but
/// only once in a while; see [`HungThings`].
const HANG_LIMIT: usize = 64;

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
    /// None looks at any more of a user's descriptors.
    #[error(
        "{hanging} descriptors of user {user} hang whoever looks at them; end what does not answer (a FUSE server, for example) first"
    )]
    TooManyHang {
        /// Whose they are.
        user: u32,
        /// How many.
        hanging: usize,
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

/// Has workers made and work done.
#[derive(Clone, Debug)]
pub struct Pool {
    inner: Rc<Inner>,
}

#[derive(Debug)]
struct Inner {
    program: PathBuf,
    origin: RefCell<Option<Rc<Origin>>>,
    /// Killed, and not yet gone: a process in uninterruptible sleep takes its time.
    given_up: RefCell<Vec<GivenUp>>,
    hung: RefCell<HungThings>,
    acting: Semaphore,
    looking: Semaphore,
    examining: Semaphore,
    examining_for: RefCell<HashMap<u32, Rc<Semaphore>>>,
}

#[derive(Debug)]
struct GivenUp {
    pidfd: OwnedFd,
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

impl Pool {
    /// A pool whose workers are copies of `program worker`.
    #[must_use]
    pub fn new(program: PathBuf) -> Self {
        Self {
            inner: Rc::new(Inner {
                program,
                origin: RefCell::default(),
                given_up: RefCell::default(),
                hung: RefCell::default(),
                acting: Semaphore::new(ACTING_LIMIT),
                looking: Semaphore::new(LOOKING_LIMIT),
                examining: Semaphore::new(EXAMINING_LIMIT),
                examining_for: RefCell::default(),
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
        let permit = self.inner.looking.acquire().await;
        let _permit = permit.expect("the semaphore is never closed");
        let mut hangs = 0;
        let mut skip = Vec::new();
        for hung in self.inner.hung.borrow_mut().lately(Instant::now()) {
            match hung {
                Hung::Device(device) => query.avoid.push(device),
                Hung::Thing(what) => skip.push(what),
            }
        }
        let note = |hung| self.inner.hung.borrow_mut().note(hung, Instant::now());
        loop {
            let request = Request::Observe { query: query.clone(), skip: skip.clone() };
            match self.call(None, &request, descriptors, silence).await {
                Ok((Response::Seen(snapshot), _)) => return Ok(*snapshot),
                Ok((other, _)) => return Err(nonsense(&other)),
                Err(WorkerError::Hung { device: Some(device), .. }) if hangs < HANG_LIMIT => {
                    hangs += 1;
                    note(Hung::Device(device));
                    query.avoid.push(device);
                }
                // The same thing twice is one that cannot be left out.
                Err(WorkerError::Hung { device: None, doing, .. })
                    if hangs < HANG_LIMIT && !skip.contains(&doing) =>
                {
                    hangs += 1;
                    for what in query.hanging_with(&doing) {
                        note(Hung::Thing(what.clone()));
                        skip.push(what);
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Does steps, one after the other, whatever becomes of each, and tells of each how it went.
    ///
    /// # Errors
    /// When no worker can be had. A step that hangs is no error but a result; another worker does the rest.
    pub async fn act(
        &self,
        tasks: &[Task],
        descriptors: &[BorrowedFd<'_>],
        limit: impl Fn(&Step) -> Duration,
        mut tell: impl FnMut(StepResult),
    ) -> Result<(), WorkerError> {
        let permit = self.inner.acting.acquire().await;
        let _permit = permit.expect("the semaphore is never closed");
        let mut rest = tasks;
        while let Some(first) = rest.first() {
            let mut worker = self.worker().await?;
            let request = Request::Act(rest.to_vec());
            let mut result = worker.ask(&request, descriptors, limit(&first.step)).await;
            while let (Some(task), Ok(())) = (rest.first(), &result) {
                worker.expect(task.step.sentence());
                result = match worker.answer(limit(&task.step)).await {
                    Ok((Response::Acted(acted), _)) => {
                        tell(acted);
                        rest = &rest[1..];
                        Ok(())
                    }
                    Ok((other, _)) => Err(nonsense(&other)),
                    Err(error) => Err(error),
                };
            }
            match result {
                Ok(()) => {}
                Err(error) => {
                    self.give_up(worker, &error, None);
                    let WorkerError::Hung { doing, .. } = error else { return Err(error) };
                    tell(StepResult::Hung { doing });
                    rest = &rest[1..];
                }
            }
        }
        Ok(())
    }

    /// Looks at a descriptor that a client of `user`'s passed to the reader of that pidfd.
    ///
    /// # Errors
    /// When no worker can be had, when looking at it hangs or too much of the user's hangs already, or when
    /// the kernel does not tell.
    pub async fn examine(
        &self,
        user: u32,
        reader: BorrowedFd<'_>,
        number: i32,
        wanted: Wanted,
        silence: Duration,
    ) -> Result<Examined, WorkerError> {
        let of_user = self.examining_for(user);
        let permit = of_user.acquire().await;
        let _permit_of_user = permit.expect("the semaphore is never closed");
        // Those that waited for this turn may be too many by now.
        let hanging = self.hanging_for(user);
        if hanging >= HANGING_LIMIT {
            return Err(WorkerError::TooManyHang { user, hanging });
        }
        let permit = self.inner.examining.acquire().await;
        let _permit = permit.expect("the semaphore is never closed");
        let request = Request::Examine { number, wanted };
        match self.call(Some(user), &request, &[reader], silence).await? {
            (Response::Examined(Ok(proof)), kept) => Ok(Examined { proof, kept: kept.into_iter().next() }),
            (Response::Examined(Err(cause)), _) => Err(WorkerError::Nonsense { cause }),
            (other, _) => Err(nonsense(&other)),
        }
    }

    /// The turns of one user.
    fn examining_for(&self, user: u32) -> Rc<Semaphore> {
        let mut all = self.inner.examining_for.borrow_mut();
        all.retain(|_, semaphore| Rc::strong_count(semaphore) > 1);
        let semaphore = all.entry(user).or_insert_with(|| Rc::new(Semaphore::new(EXAMINING_FOR_USER)));
        Rc::clone(semaphore)
    }

    /// How many workers hang because of a user's descriptors.
    fn hanging_for(&self, user: u32) -> usize {
        let mut given_up = self.inner.given_up.borrow_mut();
        given_up.retain(GivenUp::is_there);
        given_up.iter().filter(|worker| worker.user == Some(user)).count()
    }

    /// One request, and one answer.
    async fn call(
        &self,
        user: Option<u32>,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
        silence: Duration,
    ) -> Result<(Response, Vec<OwnedFd>), WorkerError> {
        let mut worker = self.worker().await?;
        let result = match worker.ask(request, descriptors, silence).await {
            Ok(()) => worker.answer(silence).await,
            Err(error) => Err(error),
        };
        if let Err(error) = &result {
            self.give_up(worker, error, user);
        }
        result
    }

    /// A new worker.
    async fn worker(&self) -> Result<Connection, WorkerError> {
        let origin = self.origin()?;
        match origin.copy().await {
            Ok(worker) => return Ok(worker),
            Err(NoCopy::Here(error)) => return Err(WorkerError::Start(error)),
            // It was killed, for example by whoever was short of memory.
            Err(NoCopy::There) => self.forget(&origin),
        }
        self.origin()?.copy().await.map_err(|error| {
            WorkerError::Start(match error {
                NoCopy::Here(error) => error,
                NoCopy::There => io::Error::other("the process that workers are copies of does not live"),
            })
        })
    }

    fn origin(&self) -> Result<Rc<Origin>, WorkerError> {
        let mut current = self.inner.origin.borrow_mut();
        if let Some(origin) = current.as_ref() {
            return Ok(Rc::clone(origin));
        }
        let origin = Rc::new(Origin::start(&self.inner.program).map_err(WorkerError::Start)?);
        Ok(Rc::clone(current.insert(origin)))
    }

    /// The next worker is another origin's. With its last user this one ends, and with it its copies.
    fn forget(&self, origin: &Rc<Origin>) {
        let mut current = self.inner.origin.borrow_mut();
        // Others may have seen the same, and have another already.
        if current.as_ref().is_some_and(|current| Rc::ptr_eq(current, origin)) {
            *current = None;
        }
    }

    /// Ends a worker and forgets those that have ended meanwhile. Never waits.
    fn give_up(&self, worker: Connection, error: &WorkerError, user: Option<u32>) {
        if matches!(error, WorkerError::Hung { .. }) && !worker.is_born() {
            // It is the origin that does nothing: somebody stopped it.
            self.inner.origin.borrow_mut().take();
        }
        let mut given_up = self.inner.given_up.borrow_mut();
        given_up.extend(worker.kill().map(|pidfd| GivenUp { pidfd, user }));
        given_up.retain(GivenUp::is_there);
    }
}

impl GivenUp {
    fn is_there(&self) -> bool {
        // What cannot be told counts as there: it is a limit on what may hang.
        !has_ended(&self.pidfd).unwrap_or(false)
    }
}

fn nonsense(response: &Response) -> WorkerError {
    WorkerError::Nonsense { cause: format!("{response:?}") }
}
