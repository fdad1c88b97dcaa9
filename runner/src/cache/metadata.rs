//! Signed Release files and their like: addresses whose answers nothing vouches for until their reader has looked.

use std::io::Read as _;

use reqwest::StatusCode;
use reqwest::header::{ETAG, IF_MODIFIED_SINCE, IF_NONE_MATCH, LAST_MODIFIED};

use crate::causes::in_one_line;

use super::download::next_chunk;
use super::fetch_error::{FetchError, METADATA_LIMIT};
use super::remembered::Remembered;
use super::rounds::Rounds;
use super::transfer::Core;

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

impl Metadata {
    /// Whose answer it is.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }
}

impl Core {
    pub(super) async fn metadata(&self, name: &str, urls: &[String]) -> Result<Metadata, FetchError> {
        if self.options.supply.offline {
            let kept = urls.iter().find_map(|url| Some((url, self.kept(url)?.1)));
            let (url, bytes) = kept.ok_or_else(|| FetchError::Offline { name: name.to_owned() })?;
            return Ok(Metadata { bytes, stale: None, url: url.clone(), validators: None });
        }
        let mut rounds = Rounds::new(self, urls);
        while let Some(url) = rounds.next().await {
            match self.ask(name, url).await {
                Ok(answer) => return Ok(answer),
                Err(error) => rounds.failed(error),
            }
        }
        let failures = rounds.into_failures();
        let kept = failures.away(urls).find_map(|url| Some((url.clone(), self.kept(url)?.1)));
        let failure = failures.into_error(name, urls);
        let Some((url, bytes)) = kept else { return Err(failure) };
        Ok(Metadata { bytes, stale: Some(in_one_line(&failure)), url, validators: None })
    }

    pub(super) fn kept(&self, url: &str) -> Option<(Remembered, Vec<u8>)> {
        // What is remembered may have come along from elsewhere.
        let remembered = self.cache.remembered(url).filter(|one| one.size <= METADATA_LIMIT as u64)?;
        let digest = remembered.digest.parse().ok()?;
        let mut bytes = Vec::new();
        let mut file = self.cache.get(digest, remembered.size).ok()??;
        file.read_to_end(&mut bytes).ok()?;
        Some((remembered, bytes))
    }

    async fn ask(&self, name: &str, url: &str) -> Result<Metadata, FetchError> {
        let kept = self.kept(url);
        let mut request = self.client.get(url);
        // Without TLS, who once stood between could have sent an old file with the newest one's validators:
        // asked with these, an honest upstream would say for months that nothing has changed.
        let is_secure = url.starts_with("https://");
        if let Some((remembered, _)) = kept.as_ref().filter(|_| is_secure) {
            if let Some(etag) = &remembered.etag {
                request = request.header(IF_NONE_MATCH, etag);
            }
            if let Some(date) = &remembered.last_modified {
                request = request.header(IF_MODIFIED_SINCE, date);
            }
        }
        self.count_request();
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
        let validators = Some(if is_secure { (header(ETAG), header(LAST_MODIFIED)) } else { (None, None) });
        let mut bytes: Vec<u8> = Vec::new();
        while let Some(chunk) =
            next_chunk(&mut response).await.map_err(|error| self.unreachable(error, name.to_owned()))?
        {
            self.count_metadata(chunk.as_ref().len() as u64);
            bytes.extend_from_slice(chunk.as_ref());
            if bytes.len() > METADATA_LIMIT {
                return Err(FetchError::Oversized { name: name.to_owned() });
            }
        }
        Ok(Metadata { bytes, stale: None, url: url.to_owned(), validators })
    }
}
