//! Content that nothing vouches for: an address without a digest.
//!
//! It is kept by HTTP's own rules (RFC 9111, as `http_cache_semantics` has them) and marked in locks as
//! unverified. A build that keeps to a lock has the lock's digest instead, and takes nothing else.

use std::fs::File;
use std::time::SystemTime;

use http_cache_semantics::{AfterResponse, BeforeRequest, CacheOptions, CachePolicy};
use reqwest::StatusCode;

use crate::causes::in_one_line;

use super::digest::Digest;
use super::download::{UNKNOWN_SIZE_LIMIT, next_chunk};
use super::fetch::Wanted;
use super::fetch_error::FetchError;
use super::remembered::Remembered;
use super::rounds::Rounds;
use super::transfer::Core;

/// An answer that is kept, with the rules that it came with.
struct Kept {
    policy: CachePolicy,
    answer: Answered,
}

/// What an address answered.
struct Answered {
    digest: Digest,
    size: u64,
    file: File,
}

impl Core {
    /// What the first of `urls` that answers has; out of the cache as long as HTTP's rules allow.
    pub(super) async fn unvouched(&self, name: &str, urls: &[String]) -> Result<(Digest, File), FetchError> {
        if let Some(lock) = &self.options.supply.lock {
            let entry = lock.files.iter().find(|file| file.name == name && !file.verified);
            let entry = entry.ok_or_else(|| FetchError::NameNotLocked { name: name.to_owned() })?;
            let wanted = Wanted {
                name: name.to_owned(),
                urls: urls.to_vec(),
                size: Some(entry.size),
                digest: entry.sha256,
            };
            self.note_unverified(entry.sha256);
            return Ok((entry.sha256, self.obtain(&wanted).await?));
        }
        let Answered { digest, size, file } = self.answered(name, urls).await?;
        self.note(&Wanted { name: name.to_owned(), urls: urls.to_vec(), size: Some(size), digest });
        self.note_size(digest, size);
        self.note_unverified(digest);
        Ok((digest, file))
    }

    async fn answered(&self, name: &str, urls: &[String]) -> Result<Answered, FetchError> {
        // One request at a time for what is one thing, in this process and among all.
        let key = Digest::of(urls.join(" ").as_bytes());
        let flight = self.flight(key);
        let _flight = flight.lock().await;
        let _turn = self.turn(name, key).await;
        if self.options.supply.offline {
            for url in urls {
                if let Some(kept) = self.kept_answer(url).await {
                    return Ok(kept.answer);
                }
            }
            return Err(FetchError::Offline { name: name.to_owned() });
        }
        let mut rounds = Rounds::new(self, urls);
        while let Some(url) = rounds.next().await {
            match self.ask_for_unvouched(name, url).await {
                Ok(answered) => return Ok(answered),
                Err(error) => rounds.failed(error),
            }
        }
        let failures = rounds.into_failures();
        let away: Vec<String> = failures.away(urls).cloned().collect();
        let failure = failures.into_error(name, urls);
        for url in &away {
            if let Some(kept) = self.kept_answer(url).await {
                self.tell(format!(
                    "{name} is the answer that was kept, which may be out of date: {}",
                    in_one_line(&failure)
                ));
                return Ok(kept.answer);
            }
        }
        Err(failure)
    }

    async fn kept_answer(&self, url: &str) -> Option<Kept> {
        let remembered = self.cache.remembered(url)?;
        let policy = serde_json::from_value(remembered.policy?).ok()?;
        let digest = remembered.digest.parse().ok()?;
        let file = self.look_up(digest, Some(remembered.size)).await?.ok()??;
        Some(Kept { policy, answer: Answered { digest, size: remembered.size, file } })
    }

    async fn ask_for_unvouched(&self, name: &str, url: &str) -> Result<Answered, FetchError> {
        let mut kept = self.kept_answer(url).await;
        let mut is_fresh = false;
        let request = http::Request::get(url)
            .body(())
            .map_err(|_| FetchError::Address { name: name.to_owned(), address: url.to_owned() })?;
        let mut sent = self.client.get(url);
        if let Some(Kept { policy, .. }) = &kept {
            match policy.before_request(&request, SystemTime::now()) {
                BeforeRequest::Fresh(_) => is_fresh = true,
                BeforeRequest::Stale { request, .. } => sent = sent.headers(request.headers),
            }
        }
        if let Some(kept) = kept.take_if(|_| is_fresh) {
            self.count_kept(&kept.answer.file);
            return Ok(kept.answer);
        }
        self.count_request();
        let response = sent.send().await.map_err(|error| self.unreachable(error, name.to_owned()))?;
        let mut head = http::Response::new(());
        *head.status_mut() = response.status();
        *head.headers_mut() = response.headers().clone();
        let now = SystemTime::now();
        if let (StatusCode::NOT_MODIFIED, Some(kept)) = (response.status(), kept) {
            let policy = match kept.policy.after_response(&request, &head, now) {
                AfterResponse::NotModified(policy, _) | AfterResponse::Modified(policy, _) => policy,
            };
            self.remember_answer(name, url, &policy, &kept.answer)?;
            return Ok(kept.answer);
        }
        if response.status() != StatusCode::OK {
            return Err(FetchError::Status { name: name.to_owned(), status: response.status().as_u16() });
        }
        let answered = self.keep_body(name, response).await?;
        // One user's builds, not a proxy for many.
        let options = CacheOptions { shared: false, ..CacheOptions::default() };
        let policy = CachePolicy::new_options(&request, &head, now, options);
        self.remember_answer(name, url, &policy, &answered)?;
        Ok(answered)
    }

    async fn keep_body(&self, name: &str, mut response: reqwest::Response) -> Result<Answered, FetchError> {
        let failed = |source| FetchError::Store { name: name.to_owned(), source };
        let mut writer = self.cache.writer().map_err(failed)?;
        loop {
            let chunk = next_chunk(&mut response).await;
            let Some(chunk) = chunk.map_err(|error| self.unreachable(error, name.to_owned()))? else { break };
            let length = chunk.as_ref().len() as u64;
            self.count_upstream(length);
            if writer.size() + length > UNKNOWN_SIZE_LIMIT {
                return Err(FetchError::TooLong { name: name.to_owned(), expected: UNKNOWN_SIZE_LIMIT });
            }
            writer.write(chunk.as_ref()).map_err(failed)?;
        }
        let (digest, size) = (writer.digest(), writer.size());
        let file = writer.commit(digest, size).map_err(failed)?;
        self.count_file();
        Ok(Answered { digest, size, file })
    }

    fn remember_answer(
        &self,
        name: &str,
        url: &str,
        policy: &CachePolicy,
        answered: &Answered,
    ) -> Result<(), FetchError> {
        // The bytes stay for this build and its lock, but the address does not lead to them again.
        if !policy.is_storable() {
            return Ok(());
        }
        let remembered = Remembered {
            digest: answered.digest.to_string(),
            size: answered.size,
            etag: None,
            last_modified: None,
            policy: serde_json::to_value(policy).ok(),
        };
        let kept = self.cache.remember(url, &remembered);
        kept.map_err(|source| FetchError::Store { name: name.to_owned(), source })
    }
}
