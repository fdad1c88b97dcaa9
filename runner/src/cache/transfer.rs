//! What is behind [`super::Fetcher`]: asynchronous, and shared by its blocking functions and the mirror.
//!
//! One flight per digest, in this process and among all: who wants a file that is on its way waits for it. `download` is what a flight
//! does.

use std::collections::{HashMap, HashSet};
use std::error::Error as _;
use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use reqwest::Client;
use tokio::sync::OwnedMutexGuard;
use tokio::task::JoinSet;

use crate::lock::LockedFile;

use super::allowance::Allowance;
use super::brought::Brought;
use super::digest::Digest;
use super::fetch::{Counted, FetchOptions, Wanted};
use super::fetch_error::FetchError;
use super::flight::{Held, Pulse};
use super::store::{Cache, StoreError};
use super::upstream::{Fault, Ledger, upstream_of};

/// How often is looked whether another process is done with a file.
const TURN_WAIT: Duration = Duration::from_millis(30);

/// Files that wait to be given to the shared store: a slow one gets no more.
const MOST_GIFTS: usize = 64;

#[derive(Default)]
pub(super) struct Counters {
    upstream: AtomicU64,
    metadata: AtomicU64,
    requests: AtomicU64,
    cache: AtomicU64,
    cache_files: AtomicU64,
    upstream_files: AtomicU64,
}

fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}

/// A download, as long as it lasts.
struct UnderWay<'a> {
    core: &'a Core,
    digest: Digest,
}

impl<'a> UnderWay<'a> {
    fn begin(core: &'a Core, wanted: &Wanted) -> Self {
        let name = wanted.name.rsplit('/').next().unwrap_or("");
        let host = core.ledger().order(&wanted.urls).first().map(|place| upstream_of(&wanted.urls[*place]));
        let host = host.unwrap_or_default();
        let host = host.split_once("://").map_or("", |(_, host)| host);
        let what = format!("{name} from {host}");
        core.under_way.lock().unwrap_or_else(PoisonError::into_inner).push((wanted.digest, what));
        Self { core, digest: wanted.digest }
    }
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        let mut under_way = self.core.under_way.lock().unwrap_or_else(PoisonError::into_inner);
        under_way.retain(|(digest, _)| *digest != self.digest);
    }
}

/// The part that asynchronous tasks share.
pub(super) struct Core {
    pub(super) cache: Arc<Cache>,
    pub(super) client: Client,
    pub(super) options: FetchOptions,
    counters: Counters,
    ledger: Mutex<Ledger>,
    news: Mutex<Vec<String>>,
    /// What the lock has, where there is one.
    locked: Option<HashSet<Digest>>,
    brought: Mutex<Brought>,
    under_way: Mutex<Vec<(Digest, String)>>,
    /// What the shared store is being given, or is to be.
    gifts: Mutex<JoinSet<()>>,
    flights: Mutex<HashMap<Digest, Weak<tokio::sync::Mutex<()>>>>,
}

/// How bringing a file begins.
pub(super) enum Begun {
    Kept(File),
    Flight(OwnedMutexGuard<()>),
}

impl Core {
    pub(super) fn new(cache: Arc<Cache>, client: Client, options: FetchOptions) -> Self {
        let locked = options.supply.lock.as_ref().map(|lock| lock.digests().into_iter().collect());
        Self {
            cache,
            client,
            options,
            locked,
            brought: Mutex::default(),
            under_way: Mutex::default(),
            gifts: Mutex::default(),
            counters: Counters::default(),
            ledger: Mutex::default(),
            news: Mutex::default(),
            flights: Mutex::default(),
        }
    }

    pub(super) fn counted(&self) -> Counted {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counted {
            upstream_bytes: read(&self.counters.upstream),
            metadata_bytes: read(&self.counters.metadata),
            upstream_requests: read(&self.counters.requests),
            cache_bytes: read(&self.counters.cache),
            damaged: self.cache.damaged(),
            upstream_faults: self.ledger().faults(),
            cache_files: read(&self.counters.cache_files),
            upstream_files: read(&self.counters.upstream_files),
            remote: self.options.remote.as_ref().map(|remote| remote.exchanged()).unwrap_or_default(),
        }
    }

    pub(super) fn count_request(&self) {
        add(&self.counters.requests, 1);
    }

    pub(super) fn count_upstream(&self, bytes: u64) {
        add(&self.counters.upstream, bytes);
    }

    pub(super) fn count_metadata(&self, bytes: u64) {
        add(&self.counters.metadata, bytes);
    }

    pub(super) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds an error against the upstream that it is of; `urls` is where else the file can be had.
    pub(super) fn blame(&self, url: &str, urls: &[String], error: &FetchError) {
        let Some(fault) = fault_of(error) else {
            return;
        };
        let mut ledger = self.ledger();
        if let Some(upstream) = ledger.note(url, fault)
            && ledger.has_other(url, urls)
        {
            drop(ledger);
            self.tell(format!("{upstream} is asked last from now on: {fault} ({error})"));
        }
    }

    /// Holds an answer against its upstream that nothing can be done with, which only its reader can tell;
    /// `others` is where else it can be had.
    pub(super) fn distrust(&self, url: &str, others: &[String], why: &str) {
        let mut ledger = self.ledger();
        if let Some(upstream) = ledger.note(url, Fault::Unusable)
            && ledger.has_other(url, others)
        {
            drop(ledger);
            self.tell(format!("{upstream} is asked last from now on: {} ({why})", Fault::Unusable));
        }
    }

    pub(super) fn tell(&self, text: String) {
        self.news.lock().unwrap_or_else(PoisonError::into_inner).push(text);
    }

    /// What is to be told of upstreams, once.
    pub(super) fn news(&self) -> Vec<String> {
        std::mem::take(&mut *self.news.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// One lock per digest, so that two who want the same file fetch it once.
    pub(super) fn flight(&self, digest: Digest) -> Arc<tokio::sync::Mutex<()>> {
        let mut flights = self.flights.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(flight) = flights.get(&digest).and_then(Weak::upgrade) {
            return flight;
        }
        flights.retain(|_, flight| flight.strong_count() > 0);
        let flight = Arc::new(tokio::sync::Mutex::new(()));
        flights.insert(digest, Arc::downgrade(&flight));
        flight
    }

    /// Checks a digest on a thread of its own, where there is anything to check: a kernel's package takes a while
    /// to hash. `None` when the runtime is being stopped.
    pub(super) async fn look_up(
        &self,
        digest: Digest,
        size: Option<u64>,
    ) -> Option<Result<Option<File>, StoreError>> {
        if !self.cache.has(digest) {
            return Some(Ok(None));
        }
        let cache = Arc::clone(&self.cache);
        tokio::task::spawn_blocking(move || cache.get(digest, size)).await.ok()
    }

    /// Notes that a file is asked for.
    pub(super) fn note(&self, wanted: &Wanted) {
        self.brought.lock().unwrap_or_else(PoisonError::into_inner).note(wanted);
    }

    /// Notes that it was had.
    pub(super) fn note_size(&self, digest: Digest, size: u64) {
        self.brought.lock().unwrap_or_else(PoisonError::into_inner).note_size(digest, size);
    }

    pub(super) fn note_unverified(&self, digest: Digest) {
        self.brought.lock().unwrap_or_else(PoisonError::into_inner).note_unverified(digest);
    }

    pub(super) fn brought(&self) -> Vec<LockedFile> {
        let brought = self.brought.lock().unwrap_or_else(PoisonError::into_inner);
        brought.files(&self.options.mirrors)
    }

    /// The file out of the cache, fetched into it where it is missing.
    pub(super) async fn obtain(&self, wanted: &Wanted) -> Result<File, FetchError> {
        self.obtain_within(wanted, None).await
    }

    /// The same; what has to be brought for it is taken from the allowance.
    pub(super) async fn obtain_within(
        &self,
        wanted: &Wanted,
        allowance: Option<&Allowance>,
    ) -> Result<File, FetchError> {
        let (name, digest) = (|| wanted.name.clone(), wanted.digest);
        if self.locked.as_ref().is_some_and(|locked| !locked.contains(&digest)) {
            return Err(FetchError::NotLocked { name: name(), digest });
        }
        self.note(wanted);
        let file = self.bring(wanted, allowance).await?;
        self.note_size(digest, file.metadata().map_or(0, |metadata| metadata.len()));
        Ok(file)
    }

    /// The file where it is there; else the right to bring it, which only one of this process has.
    pub(super) async fn kept_or_flight(&self, wanted: &Wanted) -> Result<Begun, FetchError> {
        if let Some(file) = self.cache.get_known(wanted.digest, wanted.size) {
            self.count_kept(&file);
            return Ok(Begun::Kept(file));
        }
        let flight = self.flight(wanted.digest).lock_owned().await;
        // Whoever had it may just have brought the file.
        Ok(self.kept_file(wanted).await?.map_or(Begun::Flight(flight), Begun::Kept))
    }

    /// The file, which nobody needs to know of afterwards.
    pub(super) async fn bring(
        &self,
        wanted: &Wanted,
        allowance: Option<&Allowance>,
    ) -> Result<File, FetchError> {
        let _flight = match self.kept_or_flight(wanted).await? {
            Begun::Kept(file) => return Ok(file),
            Begun::Flight(flight) => flight,
        };
        if self.options.supply.offline {
            return Err(FetchError::Offline { name: wanted.name.clone() });
        }
        Self::spend(allowance, wanted, wanted.size.unwrap_or(0))?;
        let _turn = self.turn(&wanted.name, wanted.digest).await;
        if let Some(file) = self.kept_file(wanted).await? {
            return Ok(file);
        }
        if let Some(remote) = &self.options.remote
            && let Some(file) = remote.take(&self.cache, wanted, self.options.least_pace).await?
        {
            return Ok(file);
        }
        let under_way = UnderWay::begin(self, wanted);
        let file = self.download(wanted).await?;
        drop(under_way);
        self.count_file();
        self.give(wanted.digest);
        Ok(file)
    }

    /// Takes what a file needs from the allowance.
    pub(super) fn spend(allowance: Option<&Allowance>, wanted: &Wanted, size: u64) -> Result<(), FetchError> {
        match allowance {
            Some(allowance) if !allowance.take(wanted.digest, size) => {
                Err(FetchError::Spent { name: wanted.name.clone(), limit: allowance.limit() })
            }
            _ => Ok(()),
        }
    }

    /// Waits for the turn at a file, which other processes may want as well. It is no matter of safety: where
    /// there are no locks, a file is fetched twice, and so it is when the one that has the turn does not go on,
    /// as one that was stopped.
    pub(super) async fn turn(&self, name: &str, digest: Digest) -> Option<Held> {
        let pulse = self.cache.pulse(digest).ok();
        let felt = || pulse.as_ref().and_then(Pulse::read);
        let (mut last, mut since) = (felt(), Instant::now());
        loop {
            match self.cache.turn(digest) {
                Ok(None) => tokio::time::sleep(TURN_WAIT).await,
                Ok(Some(turn)) => return Some(Held::new(turn, self.cache.pulse(digest))),
                Err(_) => return None,
            }
            let now = felt();
            if now != last {
                (last, since) = (now, Instant::now());
            } else if since.elapsed() >= self.options.patience {
                self.tell(format!(
                    "another process that fetches {name} has not gone on for {}, so it is fetched here as well",
                    humantime::format_duration(self.options.patience)
                ));
                return None;
            }
        }
    }

    /// Has the shared store be given a file that has come, if not too many wait for that already.
    fn give(&self, digest: Digest) {
        let Some(remote) = self.options.remote.clone() else { return };
        let mut gifts = self.gifts.lock().unwrap_or_else(PoisonError::into_inner);
        while gifts.try_join_next().is_some() {}
        if gifts.len() >= MOST_GIFTS {
            return remote.count_ungiven(1);
        }
        let cache = Arc::clone(&self.cache);
        gifts.spawn(async move { remote.give(&cache, digest).await });
    }

    /// Waits until the shared store has been given all, or it is enough; what is left then it is not given.
    pub(super) async fn settle(&self, enough: impl Future<Output = ()>) {
        let mut gifts = std::mem::take(&mut *self.gifts.lock().unwrap_or_else(PoisonError::into_inner));
        let is_all = tokio::select! {
            () = async { while gifts.join_next().await.is_some() {} } => true,
            () = enough => false,
        };
        while gifts.try_join_next().is_some() {}
        if let Some(remote) = self.options.remote.as_ref().filter(|_| !is_all) {
            remote.count_ungiven(gifts.len() as u64);
        }
    }

    /// What is being downloaded, and has been for longest.
    pub(super) fn under_way(&self) -> Option<String> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner).first().map(|(_, what)| what.clone())
    }

    pub(super) async fn kept_file(&self, wanted: &Wanted) -> Result<Option<File>, FetchError> {
        let found = self.look_up(wanted.digest, wanted.size).await;
        let found = found.unwrap_or(Ok(None)).map_err(|source| store_error(wanted, source))?;
        if let Some(file) = &found {
            self.count_kept(file);
        }
        Ok(found)
    }

    pub(super) fn count_file(&self) {
        add(&self.counters.upstream_files, 1);
    }

    pub(super) fn count_kept(&self, file: &File) {
        add(&self.counters.cache_files, 1);
        add(&self.counters.cache, file.metadata().map_or(0, |metadata| metadata.len()));
    }

    pub(super) fn unreachable(&self, error: reqwest::Error, name: String) -> FetchError {
        if error.is_timeout() && !error.is_connect() {
            let idle = self.options.idle_timeout;
            return FetchError::Silent { name, idle };
        }
        if let Some(source) = refused_certificate(&error) {
            return FetchError::Untrusted { name, source };
        }
        FetchError::Connect { name, source: error.without_url() }
    }
}

/// What is wrong with the certificate that an upstream showed, if that is what went wrong.
fn refused_certificate(error: &reqwest::Error) -> Option<rustls::Error> {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = error.source();
    while let Some(error) = cause {
        if let Some(found @ rustls::Error::InvalidCertificate(_)) = error.downcast_ref() {
            return Some(found.clone());
        }
        // An I/O error does not count what it wraps among its causes.
        cause = match error.downcast_ref::<std::io::Error>().and_then(|error| error.get_ref()) {
            Some(wrapped) => Some(wrapped),
            None => error.source(),
        };
    }
    None
}

fn store_error(wanted: &Wanted, source: StoreError) -> FetchError {
    FetchError::Store { name: wanted.name.clone(), source }
}

/// What an upstream did, if the error is of one.
fn fault_of(error: &FetchError) -> Option<Fault> {
    Some(match error {
        FetchError::Status { status: 408 | 425 | 429 | 500.., .. } => Fault::Failing,
        FetchError::Status { .. } => Fault::Missing,
        FetchError::Connect { .. } => Fault::Unreachable,
        FetchError::Untrusted { .. } => Fault::Untrusted,
        FetchError::Silent { .. } => Fault::Silent,
        FetchError::Slow { .. } => Fault::Slow,
        FetchError::Truncated { .. } => Fault::Truncated,
        FetchError::TooLong { .. }
        | FetchError::OtherSize { .. }
        | FetchError::Altered { .. }
        | FetchError::Oversized { .. } => Fault::Lied,
        FetchError::Client { .. }
        | FetchError::Runtime { .. }
        | FetchError::NoUpstream { .. }
        | FetchError::Everywhere { .. }
        | FetchError::Bulky { .. }
        | FetchError::NotLocked { .. }
        | FetchError::NameNotLocked { .. }
        | FetchError::Address { .. }
        | FetchError::Offline { .. }
        | FetchError::Spent { .. }
        | FetchError::Store { .. }
        | FetchError::Stopped { .. }
        | FetchError::BrokenOff { .. }
        | FetchError::Local { .. }
        | FetchError::Changed { .. } => return None,
    })
}
