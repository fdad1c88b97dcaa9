//! One file from one of several upstreams into the cache.
//!
//! What one upstream began another goes on with, from the byte at which the first failed. Whose part was
//! wrong, nobody can tell afterwards: a file in several pieces that is not what it should be is asked for
//! once more in one piece, and then it is clear who lies.

use std::collections::BTreeMap;
use std::fs::File;
use std::time::Instant;

use reqwest::header::{CONTENT_RANGE, HeaderMap, RANGE};
use reqwest::{Response, StatusCode};

use super::failures::together;
use super::fetch::Wanted;
use super::fetch_error::FetchError;
use super::store::StoreError;
use super::transfer::Core;
use super::upstream::{Pace, upstream_of};
use super::writer::Writer;

/// For a file whose size nobody tells: no image or disc is larger, and an upstream that never stops
/// would fill the disk.
pub(super) const UNKNOWN_SIZE_LIMIT: u64 = 64 << 30;

/// What an address is still good for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hope {
    /// It may work the next time.
    Some,
    /// It may work if it is asked for the whole file.
    Whole,
    None,
}

impl Core {
    /// Fetches a file that the cache does not have.
    pub(super) async fn download(&self, wanted: &Wanted) -> Result<File, FetchError> {
        let failed = |source| FetchError::Store { name: wanted.name.clone(), source };
        let begin = || {
            let begin = || self.cache.resume(wanted.digest, wanted.size).map_err(failed);
            // What there is of it is hashed, which takes a while.
            if self.cache.part_size(wanted.digest).is_some() {
                tokio::task::block_in_place(begin)
            } else {
                begin()
            }
        };
        let mut writer = begin()?;
        let mut hopes = vec![Hope::Some; wanted.urls.len()];
        let mut failures: BTreeMap<String, FetchError> = BTreeMap::new();
        for round in 0..self.options.attempts.max(1) {
            if round > 0 {
                let wait = self.options.backoff.saturating_mul(1 << (round - 1).min(6));
                tokio::time::sleep(wait).await;
            }
            let order = self.ledger().order(&wanted.urls);
            for place in order {
                let url = &wanted.urls[place];
                loop {
                    match hopes[place] {
                        Hope::None => break,
                        Hope::Whole => writer.restart().map_err(failed)?,
                        Hope::Some => {}
                    }
                    let error = match self.transfer(url, wanted, &mut writer).await {
                        Ok(()) => {
                            let in_pieces = writer.pieces() > 1;
                            let size = wanted.size.unwrap_or_else(|| writer.size());
                            match writer.commit(wanted.digest, size) {
                                Ok(file) => return Ok(file),
                                Err(StoreError::Mismatch { found, .. }) => {
                                    writer = begin()?;
                                    if in_pieces && hopes[place] == Hope::Some {
                                        hopes[place] = Hope::Whole;
                                        continue;
                                    }
                                    FetchError::Altered {
                                        name: wanted.name.clone(),
                                        wanted: wanted.digest,
                                        found,
                                    }
                                }
                                Err(source) => return Err(failed(source)),
                            }
                        }
                        Err(error) => error,
                    };
                    if matches!(error, FetchError::Store { .. }) {
                        return Err(error);
                    }
                    hopes[place] = if error.is_transient() { Hope::Some } else { Hope::None };
                    // An index is asked for under its digest first, which not every mirror offers.
                    let elsewhere = |other: usize| {
                        hopes[other] != Hope::None && upstream_of(&wanted.urls[other]) == upstream_of(url)
                    };
                    let may_have_it =
                        error.status() == Some(404) && (place + 1..wanted.urls.len()).any(elsewhere);
                    if !may_have_it {
                        self.blame(url, &wanted.urls, &error);
                    }
                    failures.insert(upstream_of(url), error);
                    break;
                }
            }
            if hopes.iter().all(|hope| *hope == Hope::None) {
                break;
            }
        }
        Err(together(&wanted.name, failures.into_iter().collect()))
    }

    /// One request; appends to what the writer already has where upstream can continue.
    async fn transfer(&self, url: &str, wanted: &Wanted, writer: &mut Writer<'_>) -> Result<(), FetchError> {
        let failed = |source| FetchError::Store { name: wanted.name.clone(), source };
        if writer.size() > 0 && Some(writer.size()) == wanted.size {
            // Somebody was stopped after the last byte.
            return Ok(());
        }
        let mut request = self.client.get(url);
        if writer.size() > 0 {
            request = request.header(RANGE, format!("bytes={}-", writer.size()));
        }
        self.count_request();
        let mut response = request.send().await.map_err(|error| self.broken(error, wanted, 0))?;
        match response.status() {
            StatusCode::PARTIAL_CONTENT if continues(response.headers(), writer.size(), wanted.size) => {}
            StatusCode::OK => {
                writer.restart().map_err(failed)?;
                if let (Some(offered), Some(expected)) = (response.content_length(), wanted.size)
                    && offered != expected
                {
                    return Err(FetchError::OtherSize { name: wanted.name.clone(), offered, expected });
                }
            }
            status => {
                // What was to be continued cannot be: the next try is for the whole.
                if matches!(status.as_u16(), 206 | 416) {
                    writer.restart().map_err(failed)?;
                }
                return Err(FetchError::Status { name: wanted.name.clone(), status: status.as_u16() });
            }
        }
        writer.begin();
        let limit = wanted.size.unwrap_or(UNKNOWN_SIZE_LIMIT);
        let mut pace = Pace::new(self.options.least_pace, Instant::now());
        while let Some(chunk) =
            next_chunk(&mut response).await.map_err(|error| self.broken(error, wanted, writer.size()))?
        {
            let length = chunk.as_ref().len() as u64;
            self.count_upstream(length);
            if writer.size() + length > limit {
                return Err(FetchError::TooLong { name: wanted.name.clone(), expected: limit });
            }
            writer.write(chunk.as_ref()).map_err(failed)?;
            let is_done = Some(writer.size()) == wanted.size;
            if !is_done
                && pace.is_too_slow(Instant::now(), length)
                && self.ledger().has_other(url, &wanted.urls)
            {
                return Err(FetchError::Slow { name: wanted.name.clone(), least: self.options.least_pace });
            }
        }
        match wanted.size {
            Some(expected) if writer.size() < expected => {
                Err(FetchError::Truncated { name: wanted.name.clone(), received: writer.size(), expected })
            }
            _ => Ok(()),
        }
    }

    fn broken(&self, error: reqwest::Error, wanted: &Wanted, received: u64) -> FetchError {
        let name = wanted.name.clone();
        match wanted.size {
            Some(expected) if received > 0 && !error.is_timeout() => {
                FetchError::Truncated { name, received, expected }
            }
            _ => self.unreachable(error, name),
        }
    }
}

pub(super) async fn next_chunk(
    response: &mut Response,
) -> Result<Option<impl AsRef<[u8]> + use<>>, reqwest::Error> {
    response.chunk().await
}

/// Does the answer go on exactly where we stopped, in a file of the right size?
fn continues(headers: &HeaderMap, position: u64, size: Option<u64>) -> bool {
    let parse = |value: &str| {
        let (range, total) = value.trim().strip_prefix("bytes ")?.split_once('/')?;
        let start: u64 = range.split_once('-')?.0.trim().parse().ok()?;
        let total: Option<u64> = total.trim().parse().ok();
        Some(start == position && (total.is_none() || size.is_none() || total == size))
    };
    let value = headers.get(CONTENT_RANGE).and_then(|value| value.to_str().ok());
    value.and_then(parse).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_an_answer_that_continues_is_appended() {
        let check = |text: &str, position| {
            let mut headers = HeaderMap::new();
            headers.insert(CONTENT_RANGE, text.parse().expect("header"));
            continues(&headers, position, Some(10))
        };
        assert!(check("bytes 5-9/10", 5));
        assert!(check("bytes 5-9/*", 5));
        assert!(!check("bytes 4-9/10", 5));
        assert!(!check("bytes 5-9/11", 5));
        assert!(!check("bytes */10", 5));
        assert!(!continues(&HeaderMap::new(), 0, None));
    }
}
