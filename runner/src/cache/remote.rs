//! The store that a fleet shares: the same contents, under their digests, on an S3-compatible service.
//!
//! It is asked before upstream and given what upstream gave. Nothing of it is believed: what comes is
//! checked like upstream's, and what is wrong or gone is fetched and put there anew. Nothing depends on it
//! either: one that fails a few times is left alone by this process from then on, and what it is too slow to
//! take it is not given. Deliberately absent: removing anything there, which is the service's own policy.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use object_store::aws::AmazonS3Builder;
use object_store::buffered::BufWriter;
use object_store::path::Path;
use object_store::{BackoffConfig, ClientOptions, ObjectStore, ObjectStoreExt as _, RetryConfig};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::Semaphore;

use super::digest::Digest;
use super::download::UNKNOWN_SIZE_LIMIT;
use super::fetch::Wanted;
use super::fetch_error::FetchError;
use super::store::{Cache, StoreError};
use super::upstream::{LeastPace, Pace};
use super::writer::Writer;

/// For an answer to begin, and between two pieces of it.
const IDLE: Duration = Duration::from_secs(20);
/// After so many failures it is left alone.
const PATIENCE: u32 = 3;
/// Bytes that are sent at a time.
const PART: usize = 8 << 20;
/// For that to be taken, however slow the store is.
const PART_LIMIT: Duration = Duration::from_secs(60);
/// Files that are given at the same time: each has parts in memory.
const GIFTS: usize = 2;

/// A shared store.
pub struct Remote {
    store: Arc<dyn ObjectStore>,
    prefix: Path,
    failures: AtomicU32,
    gifts: Semaphore,
    counted: Counts,
}

#[derive(Default)]
struct Counts {
    given: AtomicU64,
    ungiven: AtomicU64,
    taken: AtomicU64,
    wrong: AtomicU64,
}

/// What was exchanged with a shared store.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Exchanged {
    /// Files that came from it.
    pub taken: u64,
    /// Files that it was given.
    pub given: u64,
    /// Files that it was not given, since it was too slow to take them, or away.
    pub ungiven: u64,
    /// Files of it that were not what their names say.
    pub wrong: u64,
    /// How often it failed.
    pub failures: u64,
}

/// A shared store that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RemoteError {
    /// The address is none.
    #[error("HOSTLER_STORE is {0:?}, which is no address of a store: write s3://bucket/folder")]
    Address(String),
    /// The settings do not suffice.
    #[error("the shared store cannot be used: check AWS_ENDPOINT_URL, AWS_REGION and the keys")]
    Settings(#[source] object_store::Error),
}

/// How a look at the shared store ended.
enum Found {
    File(File),
    Wrong,
    Missing,
}

impl std::fmt::Debug for Remote {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(formatter, "shared store at {}", self.prefix)
    }
}

impl Remote {
    /// The store that the environment asks for: `HOSTLER_STORE`, such as `s3://bucket/folder`, with the
    /// service and the keys in the variables that all S3 clients read. `None` where it asks for none.
    ///
    /// # Errors
    /// It cannot be used.
    pub fn of_environment(
        variable: impl Fn(&str) -> Option<String>,
    ) -> Result<Option<Arc<Self>>, RemoteError> {
        let Some(address) = variable("HOSTLER_STORE").filter(|address| !address.is_empty()) else {
            return Ok(None);
        };
        let wrong = || RemoteError::Address(address.clone());
        let (bucket, prefix) = match address.strip_prefix("s3://").ok_or_else(wrong)?.split_once('/') {
            Some((bucket, prefix)) => (bucket.to_owned(), Path::parse(prefix).map_err(|_| wrong())?),
            None => (address["s3://".len()..].to_owned(), Path::default()),
        };
        if bucket.is_empty() {
            return Err(wrong());
        }
        // Fails only when a provider is already there, which serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let options = ClientOptions::new()
            .with_timeout_disabled()
            .with_connect_timeout(Duration::from_secs(10))
            .with_allow_http(true);
        let retry = RetryConfig {
            max_retries: 2,
            retry_timeout: Duration::from_secs(30),
            backoff: BackoffConfig::default(),
        };
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(bucket)
            .with_client_options(options)
            .with_retry(retry)
            .with_region(variable("AWS_REGION").unwrap_or_else(|| "us-east-1".to_owned()));
        if let Some(endpoint) = variable("AWS_ENDPOINT_URL") {
            builder = builder.with_endpoint(endpoint);
        }
        if let (Some(id), Some(secret)) = (variable("AWS_ACCESS_KEY_ID"), variable("AWS_SECRET_ACCESS_KEY")) {
            builder = builder.with_access_key_id(id).with_secret_access_key(secret);
        }
        if let Some(token) = variable("AWS_SESSION_TOKEN") {
            builder = builder.with_token(token);
        }
        let store = builder.build().map_err(RemoteError::Settings)?;
        Ok(Some(Arc::new(Self {
            store: Arc::new(store),
            prefix,
            failures: AtomicU32::new(0),
            gifts: Semaphore::new(GIFTS),
            counted: Counts::default(),
        })))
    }

    /// What was exchanged so far.
    #[must_use]
    pub fn exchanged(&self) -> Exchanged {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Exchanged {
            taken: read(&self.counted.taken),
            given: read(&self.counted.given),
            ungiven: read(&self.counted.ungiven),
            wrong: read(&self.counted.wrong),
            failures: u64::from(self.failures.load(Ordering::Relaxed)),
        }
    }

    /// Is it left alone from now on?
    #[must_use]
    pub fn is_given_up(&self) -> bool {
        self.failures.load(Ordering::Relaxed) >= PATIENCE
    }

    fn place(&self, digest: Digest) -> Path {
        let name = digest.to_string();
        self.prefix.clone().join("sha256").join(&name[..2]).join(name.as_str())
    }

    /// The file, checked and in the cache, if the shared store has it and is well.
    /// One that sends less than `least` is away.
    pub(super) async fn take(
        &self,
        cache: &Cache,
        wanted: &Wanted,
        least: LeastPace,
    ) -> Result<Option<File>, FetchError> {
        if self.is_given_up() {
            return Ok(None);
        }
        match self.look(cache, wanted, least).await {
            Ok(Found::File(file)) => {
                self.counted.taken.fetch_add(1, Ordering::Relaxed);
                Ok(Some(file))
            }
            Ok(Found::Wrong) => {
                self.counted.wrong.fetch_add(1, Ordering::Relaxed);
                tracing::warn!(file = %wanted.name, "the shared store has something else under its digest");
                Ok(None)
            }
            Ok(Found::Missing) => Ok(None),
            Err(Failed::Away) => {
                self.failures.fetch_add(1, Ordering::Relaxed);
                Ok(None)
            }
            Err(Failed::Cache(source)) => Err(FetchError::Store { name: wanted.name.clone(), source }),
        }
    }

    async fn look(&self, cache: &Cache, wanted: &Wanted, least: LeastPace) -> Result<Found, Failed> {
        let place = self.place(wanted.digest);
        let answer = tokio::time::timeout(IDLE, self.store.get(&place)).await.map_err(|_| Failed::Away)?;
        let mut answer = match answer {
            Ok(answer) => answer.into_stream(),
            Err(object_store::Error::NotFound { .. }) => return Ok(Found::Missing),
            Err(_) => return Err(Failed::Away),
        };
        let mut writer: Writer<'_> = cache.writer()?;
        let mut pace = Pace::new(least, Instant::now());
        loop {
            let piece = tokio::time::timeout(IDLE, next(&mut answer)).await.map_err(|_| Failed::Away)?;
            match piece {
                Some(Ok(bytes)) => {
                    writer.write(&bytes)?;
                    if writer.size() > wanted.size.unwrap_or(UNKNOWN_SIZE_LIMIT) {
                        return Ok(Found::Wrong);
                    }
                    // Upstream has it as well.
                    if pace.is_too_slow(Instant::now(), bytes.len() as u64) {
                        return Err(Failed::Away);
                    }
                }
                Some(Err(_)) => return Err(Failed::Away),
                None => break,
            }
        }
        let size = wanted.size.unwrap_or_else(|| writer.size());
        match writer.commit(wanted.digest, size) {
            Ok(file) => Ok(Found::File(file)),
            Err(StoreError::Mismatch { .. }) => Ok(Found::Wrong),
            Err(error) => Err(error.into()),
        }
    }

    /// Counts files that the shared store was not given.
    pub(super) fn count_ungiven(&self, files: u64) {
        self.counted.ungiven.fetch_add(files, Ordering::Relaxed);
    }

    /// Gives a checked file of the cache to the shared store, when it is its turn. That it fails costs nothing
    /// but a download later.
    pub(super) async fn give(&self, cache: &Cache, digest: Digest) {
        let Ok(_turn) = self.gifts.acquire().await else { return };
        // Opened only now: the queue is to hold no descriptors.
        let file = cache.get_known(digest, None).filter(|_| !self.is_given_up());
        let Some(file) = file else { return self.count_ungiven(1) };
        let mut to = BufWriter::with_capacity(Arc::clone(&self.store), self.place(digest), PART)
            .with_max_concurrency(1);
        if send(tokio::fs::File::from_std(file), &mut to).await.is_ok() {
            self.counted.given.fetch_add(1, Ordering::Relaxed);
            return;
        }
        self.failures.fetch_add(1, Ordering::Relaxed);
        self.count_ungiven(1);
        // The parts that it took are of no use, and it may be too slow for this as well.
        let _ = tokio::time::timeout(IDLE, to.abort()).await;
    }
}

async fn send(mut from: tokio::fs::File, to: &mut BufWriter) -> std::io::Result<()> {
    let mut piece = vec![0; 1 << 18];
    loop {
        let count = from.read(&mut piece).await?;
        if count == 0 {
            return tokio::time::timeout(PART_LIMIT, to.shutdown()).await?;
        }
        tokio::time::timeout(PART_LIMIT, to.write_all(&piece[..count])).await??;
    }
}

/// Why there is no answer.
enum Failed {
    Away,
    Cache(StoreError),
}

impl From<StoreError> for Failed {
    fn from(error: StoreError) -> Self {
        Self::Cache(error)
    }
}

/// The next piece of a stream.
async fn next<S: futures_core::Stream + Unpin>(stream: &mut S) -> Option<S::Item> {
    std::future::poll_fn(|context| std::pin::Pin::new(&mut *stream).poll_next(context)).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_bucket_with_a_folder_or_without() {
        let of = |address: &str| {
            let address = address.to_owned();
            Remote::of_environment(move |name| (name == "HOSTLER_STORE").then(|| address.clone()))
        };
        assert!(of("").expect("none is asked for").is_none());
        let digest = Digest::of(b"x");
        let name = digest.to_string();
        for (address, folder) in [("s3://bucket", ""), ("s3://bucket/a/b", "a/b/")] {
            let remote = of(address).expect("usable").expect("asked for");
            assert_eq!(remote.place(digest).as_ref(), format!("{folder}sha256/{}/{name}", &name[..2]));
        }
        for wrong in ["bucket", "http://bucket/", "s3://", "s3:///a"] {
            assert!(matches!(of(wrong), Err(RemoteError::Address(_))), "{wrong}");
        }
    }
}
