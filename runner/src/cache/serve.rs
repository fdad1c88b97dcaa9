//! The mirror that a guest sees: an archive over plain HTTP, in which every byte is verified.
//!
//! A file that is not in the cache yet is fetched when the guest asks, and only once however many
//! ask; its first byte goes to the guest after its last one was checked. What the verified indices do
//! not name does not exist. Runs on the fetcher's own threads; the listener may be bound in another
//! network namespace. Deliberately absent: TLS and authentication (the only client is the guest, over a
//! link of its own).

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::causes::in_one_line;

use super::allowance::Allowance;
use super::answer::{Answer, Asked, Known, Status};
use super::connection::{self, Answers};
use super::digest::Digest;
use super::fetch::{Fetcher, Wanted};
use super::fetch_error::FetchError;
use super::offer::{Local, Offer, Offered};
use super::transfer::Core;

/// A guest can ask for any number of wrong addresses; the report needs only the first.
const FAILURES_LIMIT: usize = 200;

/// How long upstream is not asked again for what it said it does not have.
const REFUSAL_HOLDS: Duration = Duration::from_secs(60);

/// For answers under way when the mirror is stopped.
const STOP_LIMIT: Duration = Duration::from_secs(3);

/// Why there is no mirror.
#[derive(Debug, thiserror::Error)]
pub enum MirrorError {
    /// The listener cannot be used.
    #[error("cannot serve the mirror on its socket: was it bound to a local address?")]
    Listener {
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// The fetcher is being dropped.
    #[error("the downloads that the mirror depends on have been stopped: keep them until the guest is done")]
    Stopped,
}

/// Who a mirror is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clients {
    /// A build's guest: so many bytes are brought into the cache for it, and what it was handed is reported.
    Guest {
        /// Bytes.
        limit: u64,
    },
    /// Whoever asks.
    Anyone,
}

/// Why a request could not be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// No index names such a file.
    Unnamed,
    /// The file cannot be had.
    Unavailable,
    /// The guest has had all that may be downloaded for it.
    Limit,
    /// It is a file beside the recipe, and cannot be read or is not what its index says.
    Beside,
}

/// A request that could not be answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The path that the guest asked for; the guest's text, so clean it before showing.
    pub path: String,
    /// Why.
    pub refusal: Refusal,
    /// What upstream answered, where it was asked and did.
    pub upstream_status: Option<u16>,
    /// What went wrong, with its causes.
    pub reason: String,
}

/// What the mirror did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MirrorReport {
    /// Requests.
    pub requests: u64,
    /// Bytes of contents handed to the guest.
    pub served_bytes: u64,
    /// The first requests that failed.
    pub failures: Vec<Failure>,
    /// What a guest was handed, by its path.
    pub served: BTreeMap<String, Digest>,
}

/// A running mirror. Dropped, it stops at once.
pub struct Mirror {
    shared: Arc<Shared>,
    fetcher: Arc<Fetcher>,
    stop: Option<watch::Sender<()>>,
    server: Option<JoinHandle<()>>,
}

struct Shared {
    offer: Box<dyn Offer>,
    core: Arc<Core>,
    requests: AtomicU64,
    served: AtomicU64,
    failures: Mutex<Vec<Failure>>,
    /// Where the client is a guest.
    allowance: Option<Allowance>,
    /// Bounded by what is offered.
    handed: Mutex<BTreeMap<String, Digest>>,
    /// What upstream refused lately, so that it is asked once.
    refused: Mutex<HashMap<Digest, Refused>>,
}

#[derive(Clone)]
struct Refused {
    status: u16,
    reason: String,
    since: Instant,
}

impl Refused {
    fn holds(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.since) < REFUSAL_HOLDS
    }
}

impl Mirror {
    /// Serves what is offered on `listener`, until stopped.
    ///
    /// # Errors
    /// The listener cannot be used.
    pub fn start(
        listener: TcpListener,
        offer: impl Offer + 'static,
        clients: Clients,
        fetcher: Arc<Fetcher>,
    ) -> Result<Self, MirrorError> {
        let allowance = match clients {
            Clients::Guest { limit } => Some(Allowance::new(limit)),
            Clients::Anyone => None,
        };
        let shared = Arc::new(Shared {
            offer: Box::new(offer),
            core: fetcher.core(),
            requests: AtomicU64::new(0),
            served: AtomicU64::new(0),
            failures: Mutex::default(),
            allowance,
            handed: Mutex::default(),
            refused: Mutex::default(),
        });
        let runtime = fetcher.handle().ok_or(MirrorError::Stopped)?;
        let failed = |source| MirrorError::Listener { source };
        listener.set_nonblocking(true).map_err(failed)?;
        let inside = runtime.enter();
        let listener = tokio::net::TcpListener::from_std(listener).map_err(failed)?;
        drop(inside);
        let (stop, stopped) = watch::channel(());
        let server = runtime.spawn(connection::serve(listener, Arc::clone(&shared), stopped));
        Ok(Self { shared, fetcher, stop: Some(stop), server: Some(server) })
    }

    /// What it did so far.
    #[must_use]
    pub fn report(&self) -> MirrorReport {
        MirrorReport {
            requests: self.shared.requests.load(Ordering::Relaxed),
            served_bytes: self.shared.served.load(Ordering::Relaxed),
            failures: self.shared.failures().clone(),
            served: self.shared.handed().clone(),
        }
    }

    /// Takes no more connections, gives answers under way three seconds, and reports.
    #[must_use]
    pub fn stop(mut self) -> MirrorReport {
        drop(self.stop.take());
        if let Some(mut server) = self.server.take() {
            // Without a runtime there is nothing left to stop.
            let _ = self.fetcher.run(async {
                let ended = tokio::time::timeout(STOP_LIMIT, &mut server).await.is_ok();
                if !ended {
                    server.abort();
                }
            });
        }
        self.report()
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        if let Some(server) = self.server.take() {
            server.abort();
        }
    }
}

impl Shared {
    fn failures(&self) -> MutexGuard<'_, Vec<Failure>> {
        self.failures.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handed(&self) -> MutexGuard<'_, BTreeMap<String, Digest>> {
        self.handed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refused(&self) -> MutexGuard<'_, HashMap<Digest, Refused>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self, path: &str, refusal: Refusal, upstream_status: Option<u16>, reason: String) {
        let mut failures = self.failures();
        // Addresses that nothing names are told of, and must not keep what may end a build from being so.
        let limit = match refusal {
            Refusal::Unnamed => FAILURES_LIMIT / 2,
            Refusal::Unavailable | Refusal::Limit | Refusal::Beside => FAILURES_LIMIT,
        };
        if failures.len() < limit {
            let path = path.chars().take(300).collect();
            failures.push(Failure { path, refusal, upstream_status, reason });
        }
    }

    async fn obtain(&self, wanted: &Wanted, local: Option<Local>) -> Result<File, FetchError> {
        match (&self.allowance, local) {
            (allowance, Some(local)) => self.core.take_in(wanted, local, allowance.as_ref()).await,
            (Some(allowance), None) => self.core.obtain_within(wanted, Some(allowance)).await,
            // A server that runs for months does not remember all that it ever handed out.
            (None, None) => self.core.bring(wanted, None).await,
        }
    }

    /// The checked file behind an address, or the status to answer with.
    async fn open(&self, path: &str) -> Result<Opened, Status> {
        let Some(Offered { wanted, local, modified }) = self.offer.find(path) else {
            let reason = "the verified indices do not name it".to_owned();
            self.note(path, Refusal::Unnamed, None, reason);
            return Err(Status::NotFound);
        };
        let refused =
            self.refused().get(&wanted.digest).filter(|refused| refused.holds(Instant::now())).cloned();
        if let Some(refused) = refused {
            self.note(path, Refusal::Unavailable, Some(refused.status), refused.reason);
            return Err(Status::BadGateway);
        }
        match self.obtain(&wanted, local).await {
            Ok(file) => {
                if self.allowance.is_some() {
                    self.handed().insert(path.to_owned(), wanted.digest);
                }
                Ok(Opened { file, digest: wanted.digest, modified })
            }
            Err(error @ FetchError::Spent { .. }) => {
                self.note(path, Refusal::Limit, None, in_one_line(&error));
                Err(Status::Spent)
            }
            Err(error @ (FetchError::Local { .. } | FetchError::Changed { .. })) => {
                self.note(path, Refusal::Beside, None, in_one_line(&error));
                Err(Status::BadGateway)
            }
            Err(error) => {
                let reason = in_one_line(&error);
                if let Some(status) = error.refusal() {
                    let refused = Refused { status, reason: reason.clone(), since: Instant::now() };
                    self.refused().insert(wanted.digest, refused);
                }
                self.note(path, Refusal::Unavailable, error.status(), reason);
                Err(Status::BadGateway)
            }
        }
    }
}

/// A checked file that is to be handed out.
struct Opened {
    file: File,
    digest: Digest,
    /// In seconds since 1970.
    modified: Option<u64>,
}

impl Answers for Shared {
    async fn answer(&self, asked: &Asked) -> (Answer, Option<File>) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        let refuse = |status| (asked.refuse(status, SystemTime::now()), None);
        if asked.is_foreign {
            return refuse(Status::Method);
        }
        let Some(path) = &asked.path else {
            self.note(&asked.address, Refusal::Unnamed, None, "the address is malformed".to_owned());
            return refuse(Status::BadRequest);
        };
        let Opened { file, digest, modified } = match self.open(path).await {
            Ok(opened) => opened,
            Err(status) => return refuse(status),
        };
        match file.metadata() {
            Ok(metadata) => {
                let known = Known { digest, size: metadata.len(), modified };
                (asked.answer(known, SystemTime::now()), Some(file))
            }
            Err(error) => {
                let reason = format!("cannot read it from the cache: {error}");
                self.note(path, Refusal::Unavailable, None, reason);
                refuse(Status::Internal)
            }
        }
    }

    fn count(&self, bytes: u64) {
        self.served.fetch_add(bytes, Ordering::Relaxed);
    }

    fn refuse(&self, _: Status) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }
}
