//! The requests behind [`super::Fetcher`]: one file from one of several upstreams into the cache.
//!
//! Asynchronous, and shared by the fetcher's blocking functions and the mirror. One flight per digest:
//! who wants a file that is on its way waits for it.

use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};

use reqwest::header::{
    CONTENT_RANGE, ETAG, HeaderMap, IF_MODIFIED_SINCE, IF_NONE_MATCH, LAST_MODIFIED, RANGE,
};
use reqwest::{Client, Response, StatusCode};

use super::digest::Digest;
use super::fetch::{Counted, FetchOptions, Wanted};
use super::fetch_error::{FetchError, METADATA_LIMIT};
use super::store::{Cache, Remembered, StoreError};
use super::writer::Writer;

#[derive(Default)]
pub(super) struct Counters {
    upstream: AtomicU64,
    metadata: AtomicU64,
    requests: AtomicU64,
    cache: AtomicU64,
}

fn add(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}

/// The answer of an address that has no digest: a signed Release file.
#[derive(Clone, Debug)]
pub struct Metadata {
    /// Its bytes; nothing has vouched for them yet.
    pub bytes: Vec<u8>,
    /// Why it is the remembered answer instead of a new one, where upstream failed.
    pub stale: Option<String>,
    pub(super) url: String,
    pub(super) validators: Option<(Option<String>, Option<String>)>,
}

/// The part that asynchronous tasks share.
pub(super) struct Core {
    pub(super) cache: Arc<Cache>,
    client: Client,
    pub(super) options: FetchOptions,
    counters: Counters,
    flights: Mutex<HashMap<Digest, Weak<tokio::sync::Mutex<()>>>>,
}

impl Core {
    pub(super) fn new(cache: Arc<Cache>, client: Client, options: FetchOptions) -> Self {
        Self { cache, client, options, counters: Counters::default(), flights: Mutex::default() }
    }

    pub(super) fn counted(&self) -> Counted {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counted {
            upstream_bytes: read(&self.counters.upstream),
            metadata_bytes: read(&self.counters.metadata),
            upstream_requests: read(&self.counters.requests),
            cache_bytes: read(&self.counters.cache),
            damaged: self.cache.damaged(),
        }
    }

    /// One lock per digest, so that two who want the same file fetch it once.
    fn flight(&self, digest: Digest) -> Arc<tokio::sync::Mutex<()>> {
        let mut flights = match self.flights.lock() {
            Ok(flights) => flights,
            Err(poisoned) => poisoned.into_inner(),
        };
        if let Some(flight) = flights.get(&digest).and_then(Weak::upgrade) {
            return flight;
        }
        flights.retain(|_, flight| flight.strong_count() > 0);
        let flight = Arc::new(tokio::sync::Mutex::new(()));
        flights.insert(digest, Arc::downgrade(&flight));
        flight
    }

    /// The checked file with `digest`, if the cache has it.
    pub(super) async fn find(&self, digest: Digest, size: u64) -> Option<File> {
        self.look_up(digest, size).await?.ok()?
    }

    /// Checks a digest on a thread of its own: a kernel's package takes a while to hash. `None` when
    /// the runtime is being stopped.
    async fn look_up(&self, digest: Digest, size: u64) -> Option<Result<Option<File>, StoreError>> {
        let cache = Arc::clone(&self.cache);
        tokio::task::spawn_blocking(move || cache.get(digest, size)).await.ok()
    }

    /// The file out of the cache, fetched into it where it is missing.
    pub(super) async fn obtain(&self, wanted: &Wanted) -> Result<File, FetchError> {
        let flight = self.flight(wanted.digest);
        let _turn = flight.lock().await;
        let found = self.look_up(wanted.digest, wanted.size).await;
        let found = found.unwrap_or(Ok(None)).map_err(|source| store_error(wanted, source))?;
        if let Some(file) = found {
            add(&self.counters.cache, wanted.size);
            return Ok(file);
        }
        let mut failure = FetchError::NoUpstream { name: wanted.name.clone() };
        for url in &wanted.urls {
            match self.download(url, wanted).await {
                Ok(file) => return Ok(file),
                Err(error @ FetchError::Store { .. }) => return Err(error),
                Err(error) => failure = error,
            }
        }
        Err(failure)
    }

    async fn download(&self, url: &str, wanted: &Wanted) -> Result<File, FetchError> {
        let mut writer = self.cache.writer().map_err(|source| store_error(wanted, source))?;
        let mut attempt = 1;
        let mut resumed = false;
        loop {
            resumed |= writer.size() > 0;
            match self.transfer(url, wanted, &mut writer).await {
                Ok(()) => match writer.commit(wanted.digest, wanted.size) {
                    Ok(file) => return Ok(file),
                    // The two halves may be of different files: once more, in one piece.
                    Err(StoreError::Mismatch { .. }) if resumed => {
                        resumed = false;
                        writer = self.cache.writer().map_err(|source| store_error(wanted, source))?;
                    }
                    Err(StoreError::Mismatch { found, .. }) => {
                        return Err(FetchError::Altered {
                            name: wanted.name.clone(),
                            wanted: wanted.digest,
                            found,
                        });
                    }
                    Err(source) => return Err(store_error(wanted, source)),
                },
                Err(error) if error.is_transient() && attempt < self.options.attempts => {
                    tokio::time::sleep(self.options.backoff.saturating_mul(1 << (attempt - 1).min(6))).await;
                    attempt += 1;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// One request; appends to what the writer already has where upstream can continue.
    async fn transfer(&self, url: &str, wanted: &Wanted, writer: &mut Writer<'_>) -> Result<(), FetchError> {
        let mut request = self.client.get(url);
        if writer.size() > 0 {
            request = request.header(RANGE, format!("bytes={}-", writer.size()));
        }
        add(&self.counters.requests, 1);
        let mut response = request.send().await.map_err(|error| self.broken(error, wanted, 0))?;
        match response.status() {
            StatusCode::PARTIAL_CONTENT if continues_at(response.headers(), writer.size()) => {}
            StatusCode::OK => writer.restart().map_err(|source| store_error(wanted, source))?,
            status => {
                writer.restart().map_err(|source| store_error(wanted, source))?;
                return Err(FetchError::Status { name: wanted.name.clone(), status: status.as_u16() });
            }
        }
        while let Some(chunk) =
            next_chunk(&mut response).await.map_err(|error| self.broken(error, wanted, writer.size()))?
        {
            let length = chunk.as_ref().len() as u64;
            add(&self.counters.upstream, length);
            if writer.size() + length > wanted.size {
                return Err(FetchError::TooLong { name: wanted.name.clone(), expected: wanted.size });
            }
            writer.write(chunk.as_ref()).map_err(|source| store_error(wanted, source))?;
        }
        if writer.size() < wanted.size {
            return Err(FetchError::Truncated {
                name: wanted.name.clone(),
                received: writer.size(),
                expected: wanted.size,
            });
        }
        Ok(())
    }

    fn broken(&self, error: reqwest::Error, wanted: &Wanted, received: u64) -> FetchError {
        let name = wanted.name.clone();
        if received > 0 && !error.is_timeout() {
            let expected = wanted.size;
            return FetchError::Truncated { name, received, expected };
        }
        self.unreachable(error, name)
    }

    fn unreachable(&self, error: reqwest::Error, name: String) -> FetchError {
        if error.is_timeout() && !error.is_connect() {
            let idle = self.options.idle_timeout;
            return FetchError::Silent { name, idle };
        }
        FetchError::Connect { name, source: error.without_url() }
    }

    pub(super) async fn metadata(&self, name: &str, urls: &[String]) -> Result<Metadata, FetchError> {
        let mut failure = FetchError::NoUpstream { name: name.to_owned() };
        let mut attempt = 1;
        loop {
            for url in urls {
                match self.ask(name, url).await {
                    Ok(answer) => return Ok(answer),
                    Err(error) => failure = error,
                }
            }
            if !failure.is_transient() || attempt >= self.options.attempts {
                break;
            }
            tokio::time::sleep(self.options.backoff.saturating_mul(1 << (attempt - 1).min(6))).await;
            attempt += 1;
        }
        // Only for an upstream that is away: one that answers wrongly must be heard.
        if failure.is_transient() {
            for url in urls {
                if let Some((_, bytes)) = self.kept(url) {
                    return Ok(Metadata {
                        bytes,
                        stale: Some(failure.to_string()),
                        url: url.clone(),
                        validators: None,
                    });
                }
            }
        }
        Err(failure)
    }

    pub(super) fn kept(&self, url: &str) -> Option<(Remembered, Vec<u8>)> {
        let remembered = self.cache.remembered(url)?;
        let digest = remembered.digest.parse().ok()?;
        let mut bytes = Vec::new();
        let mut file = self.cache.get(digest, remembered.size).ok()??;
        file.read_to_end(&mut bytes).ok()?;
        Some((remembered, bytes))
    }

    async fn ask(&self, name: &str, url: &str) -> Result<Metadata, FetchError> {
        let kept = self.kept(url);
        let mut request = self.client.get(url);
        if let Some((remembered, _)) = &kept {
            if let Some(etag) = &remembered.etag {
                request = request.header(IF_NONE_MATCH, etag);
            }
            if let Some(date) = &remembered.last_modified {
                request = request.header(IF_MODIFIED_SINCE, date);
            }
        }
        add(&self.counters.requests, 1);
        let sent = request.send().await;
        let mut response = sent.map_err(|error| self.unreachable(error, name.to_owned()))?;
        if let (StatusCode::NOT_MODIFIED, Some((_, bytes))) = (response.status(), kept) {
            return Ok(Metadata { bytes, stale: None, url: url.to_owned(), validators: None });
        }
        if response.status() != StatusCode::OK {
            return Err(FetchError::Status { name: name.to_owned(), status: response.status().as_u16() });
        }
        let header = |field| {
            let value = response.headers().get(field)?;
            Some(value.to_str().ok()?.to_owned())
        };
        let validators = Some((header(ETAG), header(LAST_MODIFIED)));
        let mut bytes: Vec<u8> = Vec::new();
        while let Some(chunk) =
            next_chunk(&mut response).await.map_err(|error| self.unreachable(error, name.to_owned()))?
        {
            add(&self.counters.metadata, chunk.as_ref().len() as u64);
            bytes.extend_from_slice(chunk.as_ref());
            if bytes.len() > METADATA_LIMIT {
                return Err(FetchError::Oversized { name: name.to_owned() });
            }
        }
        Ok(Metadata { bytes, stale: None, url: url.to_owned(), validators })
    }
}

async fn next_chunk(response: &mut Response) -> Result<Option<impl AsRef<[u8]> + use<>>, reqwest::Error> {
    response.chunk().await
}

fn store_error(wanted: &Wanted, source: StoreError) -> FetchError {
    FetchError::Store { name: wanted.name.clone(), source }
}

/// Does the answer go on exactly where we stopped?
fn continues_at(headers: &HeaderMap, position: u64) -> bool {
    headers
        .get(CONTENT_RANGE)
        .and_then(|value| value.to_str().ok())
        .and_then(|value| value.trim().strip_prefix("bytes "))
        .and_then(|value| value.split_once('-'))
        .is_some_and(|(start, _)| start.trim().parse() == Ok(position))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_answer_that_continues_is_appended() {
        let check = |text: &str, position| {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_RANGE, text.parse().expect("header"));
            continues_at(&headers, position)
        };
        assert!(check("bytes 5-9/10", 5));
        assert!(!check("bytes 4-9/10", 5));
        assert!(!check("bytes */10", 5));
        assert!(!continues_at(&HeaderMap::new(), 0));
    }
}
