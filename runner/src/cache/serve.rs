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

use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::causes::in_one_line;
use crate::debian::Selection;

use super::answer::{Answer, Asked, Known, Status};
use super::connection::{self, Answers};
use super::digest::Digest;
use super::fetch::Fetcher;
use super::offer::{Archives, Offer, Offered};
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

/// A request that could not be answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// The path that the guest asked for; the guest's text, so clean it before showing.
    pub path: String,
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
    /// What was handed out, by its path.
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
    /// Serves what `selection` names on `listener`, until stopped.
    ///
    /// # Errors
    /// The listener cannot be used.
    pub fn start(
        listener: TcpListener,
        selection: Arc<Selection>,
        fetcher: Arc<Fetcher>,
    ) -> Result<Self, MirrorError> {
        Self::offering(listener, Archives::new(selection), fetcher)
    }

    /// Serves what is offered on `listener`, until stopped.
    ///
    /// # Errors
    /// The listener cannot be used.
    pub fn offering(
        listener: TcpListener,
        offer: impl Offer + 'static,
        fetcher: Arc<Fetcher>,
    ) -> Result<Self, MirrorError> {
        let shared = Arc::new(Shared {
            offer: Box::new(offer),
            core: fetcher.core(),
            requests: AtomicU64::new(0),
            served: AtomicU64::new(0),
            failures: Mutex::default(),
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

    fn note(&self, path: &str, upstream_status: Option<u16>, reason: String) {
        let mut failures = self.failures();
        if failures.len() < FAILURES_LIMIT {
            failures.push(Failure { path: path.chars().take(300).collect(), upstream_status, reason });
        }
    }

    /// The checked file behind an address, or the status to answer with.
    async fn open(&self, path: &str) -> Result<Opened, Status> {
        let Some(Offered { wanted, local, modified }) = self.offer.find(path) else {
            self.note(path, None, "the verified indices do not name it".to_owned());
            return Err(Status::NotFound);
        };
        let refused =
            self.refused().get(&wanted.digest).filter(|refused| refused.holds(Instant::now())).cloned();
        if let Some(refused) = refused {
            self.note(path, Some(refused.status), refused.reason);
            return Err(Status::BadGateway);
        }
        let obtained = match local {
            Some(local) => self.core.take_in(&wanted, local).await,
            None => self.core.obtain(&wanted).await,
        };
        match obtained {
            Ok(file) => {
                self.handed().insert(path.to_owned(), wanted.digest);
                Ok(Opened { file, digest: wanted.digest, modified })
            }
            Err(error) => {
                let reason = in_one_line(&error);
                if let Some(status) = error.status().filter(|status| *status < 500) {
                    let refused = Refused { status, reason: reason.clone(), since: Instant::now() };
                    self.refused().insert(wanted.digest, refused);
                }
                self.note(path, error.status(), reason);
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
            self.note(&asked.address, None, "the address is malformed".to_owned());
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
                self.note(path, None, format!("cannot read it from the cache: {error}"));
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
