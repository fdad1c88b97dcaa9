//! Brings files from upstream into the cache.
//!
//! A file is named by the digest that signed metadata gives for it, so it is the same file wherever it
//! comes from; several upstreams take turns, in the middle of a file where it must be. What is truncated, too long or has another digest is never kept. The functions block and
//! may be called from any thread, also from within an asynchronous runtime: the fetcher has a small
//! runtime of its own. Deliberately absent: what the digests ought to be, and printing.

use std::fs::File;
use std::io::Read;
use std::sync::Arc;
use std::time::{Duration, Instant};

use reqwest::{Client, ClientBuilder};
use tokio::runtime::{Handle, Runtime};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::causes::in_one_line;
use crate::event::{Event, Sink, Stage};
use crate::lock::{Lock, LockedFile};
use crate::stop::{Stop, Stopped};

use super::digest::Digest;
use super::fetch_error::{FetchError, INDEX_LIMIT};
use super::metadata::Metadata;
use super::proxy::Proxies;
use super::remembered::Remembered;
use super::remote::{Exchanged, Remote};
use super::store::{Cache, StoreError};
use super::transfer::Core;
use super::upstream::{LeastPace, Rate, last_part};

/// How downloads are done.
#[derive(Clone, Debug)]
pub struct FetchOptions {
    /// Proxies.
    pub proxies: Proxies,
    /// For a connection to stand.
    pub connect_timeout: Duration,
    /// Without a byte.
    pub idle_timeout: Duration,
    /// What an upstream has to send at least, where there is another.
    pub least_pace: LeastPace,
    /// Rounds through the upstreams.
    pub attempts: u32,
    /// Wait before the second round; doubled for each further one.
    pub backoff: Duration,
    /// For another process that fetches the same file and does not show that it lives: then it is fetched here
    /// as well.
    pub patience: Duration,
    /// Downloads at the same time.
    pub parallel: usize,
    /// When the functions that block give up, whatever they wait for.
    pub stop: Stop,
    /// What may be brought at all.
    pub supply: Supply,
    /// Roots of mirrors that are asked before all others, each with archives in folders named as upstream's.
    pub mirrors: Vec<String>,
    /// The store that a fleet shares, where there is one: asked before upstream, and given what came from there.
    pub remote: Option<Arc<Remote>>,
}

/// What may be brought at all. The default is anything, from anywhere.
#[derive(Clone, Debug, Default)]
pub struct Supply {
    /// Nothing but what this lock has.
    pub lock: Option<Arc<Lock>>,
    /// Nothing but what the cache has.
    pub offline: bool,
}

impl Default for FetchOptions {
    fn default() -> Self {
        Self {
            proxies: Proxies::default(),
            connect_timeout: Duration::from_secs(15),
            idle_timeout: Duration::from_secs(30),
            least_pace: LeastPace { bytes: 256 << 10, within: Duration::from_secs(10) },
            attempts: 4,
            backoff: Duration::from_millis(500),
            // Longer than a busy host leaves one that lives without a processor.
            patience: Duration::from_secs(60),
            parallel: 6,
            stop: Stop::default(),
            supply: Supply::default(),
            mirrors: Vec::new(),
            remote: None,
        }
    }
}

/// A file to fetch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// How messages call it, such as its path under the archive's root.
    pub name: String,
    /// Where it can be had: tried in turn, but for upstreams that did wrong, which come last.
    pub urls: Vec<String>,
    /// Bytes it has, where that is known.
    pub size: Option<u64>,
    /// Its digest.
    pub digest: Digest,
}

/// What was transferred since the fetcher was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Bytes of packages and indices from upstream.
    pub upstream_bytes: u64,
    /// Bytes of signed Release files from upstream.
    pub metadata_bytes: u64,
    /// Requests to upstream, of every kind.
    pub upstream_requests: u64,
    /// Bytes of files that the cache already had.
    pub cache_bytes: u64,
    /// Files that the cache already had.
    pub cache_files: u64,
    /// Files that were downloaded.
    pub upstream_files: u64,
    /// What was exchanged with the store that a fleet shares.
    pub remote: Exchanged,
    /// Damaged files found in the cache and removed.
    pub damaged: u64,
    /// What upstreams did wrong: lies, breaks, refusals.
    pub upstream_faults: u64,
}

/// Fetches files into a cache.
pub struct Fetcher {
    core: Arc<Core>,
    runtime: Option<Runtime>,
}

impl Drop for Fetcher {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            // The plain drop would panic inside another runtime.
            runtime.shutdown_background();
        }
    }
}

impl Fetcher {
    /// Prepares downloads into `cache`.
    ///
    /// # Errors
    /// A proxy's address is unusable, or threads cannot be started.
    pub fn new(cache: Arc<Cache>, options: FetchOptions) -> Result<Self, FetchError> {
        // Fails only when a provider is already there, which serves as well.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let prepared = || -> Result<ClientBuilder, FetchError> {
            let builder = Client::builder()
                .no_proxy()
                .user_agent(concat!("hostler/", env!("CARGO_PKG_VERSION")))
                .connect_timeout(options.connect_timeout)
                .read_timeout(options.idle_timeout);
            Ok(options.proxies.for_client()?.into_iter().fold(builder, ClientBuilder::proxy))
        };
        // The CAs are the host's, or those of SSL_CERT_FILE and SSL_CERT_DIR. A host that has none trusts no
        // certificate, and can have everything that comes over plain HTTP.
        let client = prepared()?.build().or_else(|_| {
            prepared()?.tls_certs_only([]).build().map_err(|source| FetchError::Client { source })
        })?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .thread_name("hostler-fetch")
            .enable_all()
            .build()
            .map_err(|source| FetchError::Runtime { source })?;
        Ok(Self { core: Arc::new(Core::new(cache, client, options)), runtime: Some(runtime) })
    }

    /// The cache behind.
    #[must_use]
    pub fn cache(&self) -> &Arc<Cache> {
        &self.core.cache
    }

    /// When it gives up; so should whoever uses it for what belongs together.
    #[must_use]
    pub fn stop(&self) -> &Stop {
        &self.core.options.stop
    }

    /// What was transferred so far.
    #[must_use]
    pub fn counted(&self) -> Counted {
        self.core.counted()
    }

    pub(super) fn core(&self) -> Arc<Core> {
        Arc::clone(&self.core)
    }

    pub(super) fn handle(&self) -> Option<Handle> {
        self.runtime.as_ref().map(|runtime| runtime.handle().clone())
    }

    /// Runs `future` on the own runtime, from a thread that belongs to no other.
    pub(super) fn run<F: Future + Send>(&self, future: F) -> Option<F::Output>
    where
        F::Output: Send,
    {
        let runtime = self.runtime.as_ref()?;
        std::thread::scope(|scope| scope.spawn(|| runtime.block_on(future)).join().ok())
    }

    /// Runs a download of `name` to its end, or until it is time to give up.
    fn block_on<T: Send>(
        &self,
        name: &str,
        future: impl Future<Output = Result<T, FetchError>> + Send,
    ) -> Result<T, FetchError> {
        let result = self.run(async {
            tokio::select! {
                result = future => result,
                source = given_up(self.stop()) => {
                    Err(FetchError::Stopped { name: name.to_owned(), source })
                }
            }
        });
        result.unwrap_or_else(|| Err(FetchError::BrokenOff { name: name.to_owned() }))
    }

    /// Brings all of `wanted` into the cache, several at a time, and tells of progress in bytes.
    ///
    /// # Errors
    /// The first file that cannot be had; the others in flight are broken off.
    pub fn fetch_all(&self, wanted: Vec<Wanted>, stage: Stage, sink: &dyn Sink) -> Result<(), FetchError> {
        let total: u64 = wanted.iter().filter_map(|one| one.size).sum();
        // In their order, whichever is done first.
        wanted.iter().for_each(|one| self.core.note(one));
        let future = async {
            let gate = Arc::new(Semaphore::new(self.core.options.parallel.max(1)));
            let before = self.core.counted();
            let mut tasks = JoinSet::new();
            for one in wanted {
                let core = Arc::clone(&self.core);
                let gate = Arc::clone(&gate);
                tasks.spawn(async move {
                    let _permit = gate.acquire_owned().await;
                    core.obtain(&one).await.map(|_| one.name)
                });
            }
            let mut last = String::new();
            let mut pace = Rate::new(Instant::now(), before.upstream_bytes);
            let mut tick = tokio::time::interval(Duration::from_millis(250));
            loop {
                tokio::select! {
                    finished = tasks.join_next() => match finished {
                        None => return Ok(()),
                        Some(Ok(Ok(name))) => last = name,
                        Some(Ok(Err(error))) => return Err(error),
                        Some(Err(_)) => return Err(FetchError::BrokenOff { name: last }),
                    },
                    _ = tick.tick() => {
                        self.tell_news(sink);
                        let now = self.core.counted();
                        let done = (now.upstream_bytes + now.cache_bytes)
                            .saturating_sub(before.upstream_bytes + before.cache_bytes);
                        let rate = pace.rate(Instant::now(), now.upstream_bytes);
                        let doing = self.core.under_way().map_or_else(
                            || last.rsplit('/').next().unwrap_or("").to_owned(),
                            |under_way| format!("{under_way}, {}/s", bytesize::ByteSize(rate)),
                        );
                        sink.event(Event::Progress { stage, doing, bytes: done.min(total), total: Some(total) });
                    }
                }
            }
        };
        let result = self.block_on("the packages", future);
        self.tell_news(sink);
        result
    }

    /// Waits until the shared store has been given what it lacked, for so long at most and until it is told to
    /// stop. How many files it was not given.
    pub fn settle(&self, limit: Duration) -> u64 {
        let enough = async {
            tokio::select! {
                () = tokio::time::sleep(limit) => {}
                _ = given_up(self.stop()) => {}
            }
        };
        // Without a runtime there is nothing under way.
        let _ = self.run(self.core.settle(enough));
        self.counted().remote.ungiven
    }

    /// Says which upstreams were dropped since this was said last.
    pub fn tell_news(&self, sink: &dyn Sink) {
        for text in self.core.news() {
            sink.event(Event::Warning(text));
        }
    }

    /// Brings one file into the cache and opens it.
    ///
    /// # Errors
    /// It cannot be had.
    pub fn open(&self, wanted: &Wanted) -> Result<File, FetchError> {
        self.block_on(&wanted.name, self.core.obtain(wanted))
    }

    /// Brings one file into the cache and returns its bytes.
    ///
    /// # Errors
    /// It cannot be had or read, or is too large to be an index.
    pub fn fetch(&self, wanted: &Wanted) -> Result<Vec<u8>, FetchError> {
        let fits = |size: u64| match size {
            ..=INDEX_LIMIT => Ok(()),
            _ => Err(FetchError::Bulky { name: wanted.name.clone(), size }),
        };
        // Before it is downloaded, where that is told.
        wanted.size.map_or(Ok(()), fits)?;
        let mut file = self.open(wanted)?;
        fits(file.metadata().map_or(0, |metadata| metadata.len()))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).map_err(|source| FetchError::Store {
            name: wanted.name.clone(),
            source: StoreError::Read { path: self.core.cache.root().to_owned(), source },
        })?;
        Ok(bytes)
    }

    /// Brings what nothing vouches for: whatever the first of `urls` that answers has, out of the cache as long
    /// as HTTP's rules allow. Its digest, and the file.
    ///
    /// # Errors
    /// It cannot be had, or is not in the lock that is kept to.
    pub fn unvouched(&self, name: &str, urls: &[String]) -> Result<(Digest, File), FetchError> {
        self.block_on(name, self.core.unvouched(name, urls))
    }

    /// What was brought so far, from upstream or out of the cache, in the order in which it was asked for.
    #[must_use]
    pub fn brought(&self) -> Vec<LockedFile> {
        self.core.brought()
    }

    /// Notes a file that was brought in another way.
    pub fn note_brought(&self, wanted: &Wanted) {
        self.core.note(wanted);
        self.core.note_size(wanted.digest, wanted.size.unwrap_or(0));
    }

    /// The roots of equal archives, together with where the mirrors would have them.
    #[must_use]
    pub fn with_mirrors(&self, roots: Vec<String>) -> Vec<String> {
        let folder = roots.first().map_or("", |root| last_part(root)).to_owned();
        let mirrors = &self.core.options.mirrors;
        if folder.is_empty() {
            return roots;
        }
        mirrors
            .iter()
            .map(|mirror| format!("{}/{folder}", mirror.trim_end_matches('/')))
            .chain(roots)
            .collect()
    }

    /// The lock that this keeps to.
    #[must_use]
    pub fn lock(&self) -> Option<&Lock> {
        self.core.options.supply.lock.as_deref()
    }

    /// Asks for a file that nothing vouches for yet, unless upstream says that it has not changed
    /// since [`Fetcher::keep`]. Where upstream cannot be reached, the kept answer is returned.
    ///
    /// # Errors
    /// It cannot be had.
    pub fn metadata(&self, name: &str, urls: &[String]) -> Result<Metadata, FetchError> {
        self.block_on(name, self.core.metadata(name, urls))
    }

    /// The same, from whichever of `urls` has an answer that passes `check`: one that is not of who it should
    /// be (a portal's page, an altered file, an old one) says nothing about the others. `is_theirs` tells
    /// whether an upstream is to blame for an error; another one ends the search.
    ///
    /// # Errors
    /// The first of an upstream's, where none has a better answer.
    pub fn usable_metadata<T, E: From<FetchError> + std::error::Error>(
        &self,
        name: &str,
        urls: &[String],
        mut check: impl FnMut(&Metadata) -> Result<T, E>,
        is_theirs: impl Fn(&E) -> bool,
    ) -> Result<(Metadata, T), E> {
        let mut left = urls.to_vec();
        let mut first = None;
        loop {
            let answer = match self.metadata(name, &left) {
                Ok(answer) => answer,
                Err(error @ (FetchError::Stopped { .. } | FetchError::BrokenOff { .. })) => {
                    return Err(error.into());
                }
                Err(error) => return Err(first.unwrap_or_else(|| error.into())),
            };
            let error = match check(&answer) {
                Ok(checked) => return Ok((answer, checked)),
                Err(error) if is_theirs(&error) => error,
                Err(error) => return Err(error),
            };
            left.retain(|url| *url != answer.url);
            self.core.distrust(&answer.url, &left, &in_one_line(&error));
            let error = first.take().unwrap_or(error);
            if left.is_empty() {
                return Err(error);
            }
            first = Some(error);
        }
    }

    /// The answer last kept for `identity`, whichever mirror it came from.
    #[must_use]
    pub fn previous(&self, identity: &str) -> Option<Vec<u8>> {
        self.core.kept(identity).map(|(_, bytes)| bytes)
    }

    /// Keeps an answer that turned out to be trustworthy, for its address and for `identity`: what it is,
    /// whichever mirror it comes from.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn keep(&self, metadata: &Metadata, identity: &str) -> Result<Digest, StoreError> {
        let digest = self.core.cache.put(&metadata.bytes)?;
        let size = metadata.bytes.len() as u64;
        let answer = |(etag, last_modified)| Remembered {
            digest: digest.to_string(),
            size,
            etag,
            last_modified,
            policy: None,
        };
        if let Some(validators) = metadata.validators.clone() {
            self.core.cache.remember(&metadata.url, &answer(validators))?;
        }
        // Validators are the host's; what it is is not.
        self.core.cache.remember(identity, &answer((None, None)))?;
        Ok(digest)
    }
}

/// Waits until it is time to give up.
async fn given_up(stop: &Stop) -> Stopped {
    let mut tick = tokio::time::interval(Duration::from_millis(50));
    loop {
        tick.tick().await;
        if let Err(stopped) = stop.check() {
            return stopped;
        }
    }
}
