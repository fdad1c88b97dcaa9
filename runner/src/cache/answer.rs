//! What a client asks a mirror for, and the answer with a checked file (RFC 9110).

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, UNIX_EPOCH};

use axum::body::Body;
use axum::http::header::{
    ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, ETAG, HeaderName, IF_MODIFIED_SINCE,
    IF_NONE_MATCH, IF_RANGE, LAST_MODIFIED, RANGE,
};
use axum::http::{HeaderMap, Method, Request, Response, StatusCode};
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf, Take};
use tokio_util::io::ReaderStream;

use super::digest::Digest;
use super::offer::{self, BeyondEnd};

/// Bytes that are read at a time.
const PIECE: usize = 1 << 18;

/// A checked file that is to be handed out.
pub(super) struct Opened {
    pub(super) file: File,
    pub(super) digest: Digest,
    /// In seconds since 1970.
    pub(super) modified: Option<u64>,
}

/// A request, as far as it matters.
pub(super) struct Asked {
    /// The decoded path.
    pub(super) path: String,
    only_head: bool,
    headers: HeaderMap,
}

/// A request that is none.
pub(super) enum Unreadable {
    Method,
    Address,
}

impl Asked {
    pub(super) fn read(request: &Request<Body>) -> Result<Self, Unreadable> {
        let only_head = *request.method() == Method::HEAD;
        if !only_head && *request.method() != Method::GET {
            return Err(Unreadable::Method);
        }
        let path = offer::decode(request.uri().path()).ok_or(Unreadable::Address)?;
        Ok(Self { path, only_head, headers: request.headers().clone() })
    }

    fn header(&self, name: HeaderName) -> Option<&str> {
        self.headers.get(name)?.to_str().ok()
    }

    /// The answer. `count` hears of the bytes that are handed out.
    pub(super) fn answer(
        &self,
        opened: Opened,
        count: impl Fn(u64) + Send + Unpin + 'static,
    ) -> io::Result<Response<Body>> {
        let Opened { mut file, digest, modified } = opened;
        let size = file.metadata()?.len();
        let tag = format!("\"{digest}\"");
        let modified = modified.map(|seconds| UNIX_EPOCH + Duration::from_secs(seconds));
        let date = modified.map(httpdate::fmt_http_date);
        let marked = |status| {
            let mut response = bare(status);
            insert(&mut response, ETAG, &tag);
            if let Some(date) = &date {
                insert(&mut response, LAST_MODIFIED, date);
            }
            response
        };
        // A tag tells more than a date, which only counts without one (RFC 9110, 13.1.3).
        let unchanged = match self.header(IF_NONE_MATCH) {
            Some(tags) => tags.contains(&tag),
            None => {
                let since =
                    self.header(IF_MODIFIED_SINCE).and_then(|date| httpdate::parse_http_date(date).ok());
                modified.is_some_and(|modified| since.is_some_and(|since| since >= modified))
            }
        };
        if unchanged {
            return Ok(marked(StatusCode::NOT_MODIFIED));
        }
        // A part is only of use to a client that has the rest of the same file.
        let same = self.header(IF_RANGE).is_none_or(|value| value == tag || Some(value) == date.as_deref());
        let part = match offer::range(self.header(RANGE).filter(|_| same), size) {
            Ok(part) => part,
            Err(BeyondEnd) => {
                let mut response = bare(StatusCode::RANGE_NOT_SATISFIABLE);
                insert(&mut response, CONTENT_RANGE, &format!("bytes */{size}"));
                return Ok(response);
            }
        };
        let (start, length) = part.unwrap_or((0, size));
        let mut response = marked(StatusCode::OK);
        if !self.only_head {
            file.seek(SeekFrom::Start(start))?;
            let counted = Counted { inner: tokio::fs::File::from_std(file).take(length), count };
            *response.body_mut() = Body::from_stream(ReaderStream::with_capacity(counted, PIECE));
        }
        if part.is_some() {
            *response.status_mut() = StatusCode::PARTIAL_CONTENT;
            let last = start + length - 1;
            insert(&mut response, CONTENT_RANGE, &format!("bytes {start}-{last}/{size}"));
        }
        insert(&mut response, CONTENT_LENGTH, &length.to_string());
        insert(&mut response, CONTENT_TYPE, "application/octet-stream");
        insert(&mut response, ACCEPT_RANGES, "bytes");
        Ok(response)
    }
}

/// An answer with a status only.
pub(super) fn bare(status: StatusCode) -> Response<Body> {
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    response
}

fn insert(response: &mut Response<Body>, name: HeaderName, value: &str) {
    if let Ok(value) = value.parse() {
        response.headers_mut().insert(name, value);
    }
}

/// Counts what is handed out.
struct Counted<C> {
    inner: Take<tokio::fs::File>,
    count: C,
}

impl<C: Fn(u64) + Unpin> AsyncRead for Counted<C> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let result = Pin::new(&mut self.inner).poll_read(context, buffer);
        let count = buffer.filled().len() - before;
        (self.count)(count as u64);
        result
    }
}
