//! The mirror that a guest sees: an archive over plain HTTP, in which every byte is verified.
//!
//! A file that is not in the cache yet is fetched when the guest asks, and only once however many
//! ask; its first byte goes to the guest after its last one was checked. What the verified indices do
//! not name does not exist. Runs on the fetcher's own threads; the listener may be bound in another
//! network namespace. Deliberately absent: TLS and authentication (the only client is the guest, over a
//! link of its own), and a limit on connections.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::net::TcpListener;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::header::{
    ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, IF_NONE_MATCH, IF_RANGE, RANGE,
};
use axum::http::{HeaderMap, Method, Request, Response, StatusCode};
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf, Take};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_util::io::ReaderStream;

use crate::debian::Selection;

use super::digest::Digest;
use super::fetch::Fetcher;
use super::fetch_error::FetchError;
use super::offer::{self, BeyondEnd, Offer, Offered};
use super::transfer::Core;

/// A guest can ask for any number of wrong addresses; the report needs only the first.
const FAILURES_LIMIT: usize = 200;

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
}

/// A running mirror. Dropped, it stops at once.
pub struct Mirror {
    shared: Arc<Shared>,
    fetcher: Arc<Fetcher>,
    stop: Option<oneshot::Sender<()>>,
    server: Option<JoinHandle<()>>,
}

struct Shared {
    offer: Offer,
    core: Arc<Core>,
    requests: AtomicU64,
    served: AtomicU64,
    failures: Mutex<Vec<Failure>>,
    /// What upstream refused, so that it is asked once.
    refused: Mutex<HashMap<Digest, Refused>>,
}

#[derive(Clone)]
struct Refused {
    status: u16,
    reason: String,
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
        let shared = Arc::new(Shared {
            offer: Offer::new(selection),
            core: fetcher.core(),
            requests: AtomicU64::new(0),
            served: AtomicU64::new(0),
            failures: Mutex::default(),
            refused: Mutex::default(),
        });
        let runtime = fetcher.handle().ok_or(MirrorError::Stopped)?;
        let failed = |source| MirrorError::Listener { source };
        listener.set_nonblocking(true).map_err(failed)?;
        let inside = runtime.enter();
        let listener = tokio::net::TcpListener::from_std(listener).map_err(failed)?;
        drop(inside);
        let router = Router::new().fallback(answer).with_state(Arc::clone(&shared));
        let (stop, stopped) = oneshot::channel();
        let server = runtime.spawn(async move {
            let serving = axum::serve(listener, router).with_graceful_shutdown(async {
                // An owner that is gone wants it stopped too.
                let _ = stopped.await;
            });
            // It only ever ends by being stopped: accepting is tried again after an error.
            let _ = serving.await;
        });
        Ok(Self { shared, fetcher, stop: Some(stop), server: Some(server) })
    }

    /// What it did so far.
    #[must_use]
    pub fn report(&self) -> MirrorReport {
        MirrorReport {
            requests: self.shared.requests.load(Ordering::Relaxed),
            served_bytes: self.shared.served.load(Ordering::Relaxed),
            failures: self.shared.failures().clone(),
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
    async fn open(&self, path: &str) -> Result<(File, Digest), StatusCode> {
        let Some(offered) = self.offer.find(path) else {
            self.note(path, None, "the verified indices do not name it".to_owned());
            return Err(StatusCode::NOT_FOUND);
        };
        let wanted = match offered {
            Offered::File(wanted) => wanted,
            Offered::Signed { digest, size } => {
                return match self.core.find(digest, Some(size)).await {
                    Some(file) => Ok((file, digest)),
                    None => {
                        let reason = "the signed Release file was lost from the cache: build again";
                        self.note(path, None, reason.to_owned());
                        Err(StatusCode::INTERNAL_SERVER_ERROR)
                    }
                };
            }
        };
        let refused = self.refused().get(&wanted.digest).cloned();
        if let Some(refused) = refused {
            self.note(path, Some(refused.status), refused.reason);
            return Err(StatusCode::BAD_GATEWAY);
        }
        match self.core.obtain(&wanted).await {
            Ok(file) => Ok((file, wanted.digest)),
            Err(error) => {
                let reason = with_causes(&error);
                if let Some(status) = error.status().filter(|status| *status < 500) {
                    let reason = reason.clone();
                    self.refused().insert(wanted.digest, Refused { status, reason });
                }
                self.note(path, error.status(), reason);
                Err(StatusCode::BAD_GATEWAY)
            }
        }
    }
}

fn with_causes(error: &FetchError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

async fn answer(State(shared): State<Arc<Shared>>, request: Request<Body>) -> Response<Body> {
    shared.requests.fetch_add(1, Ordering::Relaxed);
    let is_head = *request.method() == Method::HEAD;
    if !is_head && *request.method() != Method::GET {
        return bare(StatusCode::METHOD_NOT_ALLOWED);
    }
    let path = request.uri().path();
    let Some(path) = offer::decode(path) else {
        shared.note(path, None, "the address is malformed".to_owned());
        return bare(StatusCode::BAD_REQUEST);
    };
    let (mut file, digest) = match shared.open(&path).await {
        Ok(found) => found,
        Err(status) => return bare(status),
    };
    let size = match file.metadata() {
        Ok(metadata) => metadata.len(),
        Err(error) => {
            shared.note(&path, None, format!("cannot read it from the cache: {error}"));
            return bare(StatusCode::INTERNAL_SERVER_ERROR);
        }
    };
    let tag = format!("\"{digest}\"");
    let headers = request.headers();
    let text = |name| header(headers, name);
    if text(IF_NONE_MATCH).is_some_and(|value| value.contains(&tag)) {
        return bare(StatusCode::NOT_MODIFIED);
    }
    // A part is only of use to a client that has the rest of the same file.
    let same = text(IF_RANGE).is_none_or(|value| value == tag);
    let part = match offer::range(text(RANGE).filter(|_| same), size) {
        Ok(part) => part,
        Err(BeyondEnd) => {
            let mut response = bare(StatusCode::RANGE_NOT_SATISFIABLE);
            insert(&mut response, CONTENT_RANGE, &format!("bytes */{size}"));
            return response;
        }
    };
    let (start, length) = part.unwrap_or((0, size));
    let body = if is_head {
        Body::empty()
    } else {
        if let Err(error) = file.seek(SeekFrom::Start(start)) {
            shared.note(&path, None, format!("cannot read it from the cache: {error}"));
            return bare(StatusCode::INTERNAL_SERVER_ERROR);
        }
        let counted =
            Counted { inner: tokio::fs::File::from_std(file).take(length), shared: Arc::clone(&shared) };
        Body::from_stream(ReaderStream::with_capacity(counted, 1 << 17))
    };
    let mut response = Response::new(body);
    if part.is_some() {
        *response.status_mut() = StatusCode::PARTIAL_CONTENT;
        let last = start + length - 1;
        insert(&mut response, CONTENT_RANGE, &format!("bytes {start}-{last}/{size}"));
    }
    insert(&mut response, CONTENT_LENGTH, &length.to_string());
    insert(&mut response, CONTENT_TYPE, "application/octet-stream");
    insert(&mut response, ACCEPT_RANGES, "bytes");
    insert(&mut response, ETAG, &tag);
    response
}

fn header(headers: &HeaderMap, name: axum::http::HeaderName) -> Option<&str> {
    headers.get(name)?.to_str().ok()
}

fn bare(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    response
}

fn insert(response: &mut Response<Body>, name: axum::http::HeaderName, value: &str) {
    if let Ok(value) = value.parse() {
        response.headers_mut().insert(name, value);
    }
}

/// Counts what is handed out.
struct Counted {
    inner: Take<tokio::fs::File>,
    shared: Arc<Shared>,
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let result = Pin::new(&mut self.inner).poll_read(context, buffer);
        let count = buffer.filled().len() - before;
        self.shared.served.fetch_add(count as u64, Ordering::Relaxed);
        result
    }
}
