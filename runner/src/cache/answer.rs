//! What a client asks a mirror for, and the answer with a checked file (RFC 9110, RFC 9112). Pure.
//!
//! Deliberately absent: everything that a client of an archive does not do. There are no bodies of requests
//! and no chunks.

use std::fmt::Write as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use super::digest::Digest;
use super::offer::{self, BeyondEnd};

/// The longest head of a request that is read.
pub(super) const LONGEST_HEAD: usize = 16 << 10;
/// The most headers that are read.
const MOST_HEADERS: usize = 64;

/// A request, as far as it matters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Asked {
    /// The address as it came.
    pub(super) address: String,
    /// Its decoded path, if it has one.
    pub(super) path: Option<String>,
    /// Whether the client goes on with the same connection.
    pub(super) keeps: bool,
    /// Neither GET nor HEAD, or with a body.
    pub(super) is_foreign: bool,
    is_head: bool,
    range: Option<String>,
    if_range: Option<String>,
    if_none_match: Option<String>,
    if_modified_since: Option<String>,
}

/// What the bytes that came so far are.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Head {
    /// The beginning of a request.
    Begun,
    /// A request, and how many of the bytes are its.
    Whole(Box<Asked>, usize),
    /// Nothing that can be answered, with the status to say so.
    Wrong(Status),
}

/// The statuses that a mirror answers with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    Ok,
    Partial,
    NotModified,
    BadRequest,
    NotFound,
    Method,
    Beyond,
    TooLong,
    Internal,
    BadGateway,
    Spent,
}

impl Status {
    /// As in a status line.
    fn line(self) -> &'static str {
        match self {
            Self::Ok => "200 OK",
            Self::Partial => "206 Partial Content",
            Self::NotModified => "304 Not Modified",
            Self::BadRequest => "400 Bad Request",
            Self::NotFound => "404 Not Found",
            Self::Method => "405 Method Not Allowed",
            Self::Beyond => "416 Range Not Satisfiable",
            Self::TooLong => "431 Request Header Fields Too Large",
            Self::Internal => "500 Internal Server Error",
            Self::BadGateway => "502 Bad Gateway",
            // apt shows it to whoever reads the guest's console.
            Self::Spent => "507 Insufficient Storage: more than may be downloaded for this build",
        }
    }
}

/// What is known of a file that is to be handed out.
#[derive(Clone, Copy, Debug)]
pub(super) struct Known {
    pub(super) digest: Digest,
    pub(super) size: u64,
    /// In seconds since 1970.
    pub(super) modified: Option<u64>,
}

/// An answer: first the head, then the parts.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) head: String,
    pub(super) parts: Vec<Part>,
}

/// A part of a body.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Part {
    Text(String),
    /// Of the file: first byte and length.
    File(u64, u64),
}

/// Reads the head of a request.
pub(super) fn read(bytes: &[u8]) -> Head {
    let mut headers = [httparse::EMPTY_HEADER; MOST_HEADERS];
    let mut request = httparse::Request::new(&mut headers);
    let length = match request.parse(bytes) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if bytes.len() < LONGEST_HEAD => return Head::Begun,
        Ok(httparse::Status::Partial) | Err(httparse::Error::TooManyHeaders) => {
            return Head::Wrong(Status::TooLong);
        }
        Err(_) => return Head::Wrong(Status::BadRequest),
    };
    let header = |name: &str| {
        let found = request.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name))?;
        Some(std::str::from_utf8(found.value).ok()?.to_owned())
    };
    let says = |name: &str, word: &str| {
        header(name).is_some_and(|value| value.split(',').any(|one| one.trim().eq_ignore_ascii_case(word)))
    };
    let is_head = request.method == Some("HEAD");
    let has_body = header("content-length").is_some_and(|length| length.trim() != "0")
        || header("transfer-encoding").is_some();
    let is_foreign = has_body || !(is_head || request.method == Some("GET"));
    let keeps = request.version == Some(1) && !says("connection", "close");
    let address = request.path.unwrap_or("");
    let asked = Asked {
        address: address.to_owned(),
        path: offer::decode(path_of(address)),
        // The end of a body that is not read cannot be told from the next request.
        keeps: keeps && !is_foreign,
        is_foreign,
        is_head,
        range: header("range"),
        if_range: header("if-range"),
        if_none_match: header("if-none-match"),
        if_modified_since: header("if-modified-since"),
    };
    Head::Whole(Box::new(asked), length)
}

/// The path of an address, which a client that takes this for a proxy names in whole.
fn path_of(address: &str) -> &str {
    let path = address.split(['?', '#']).next().unwrap_or("");
    match path.strip_prefix("http://") {
        Some(rest) => rest.find('/').map_or("/", |start| &rest[start..]),
        None => path,
    }
}

impl Asked {
    /// The answer with a file.
    pub(super) fn answer(&self, known: Known, now: SystemTime) -> Answer {
        let Known { digest, size, modified } = known;
        let tag = format!("\"{digest}\"");
        let modified = modified.map(|seconds| UNIX_EPOCH + Duration::from_secs(seconds));
        let date = modified.map(httpdate::fmt_http_date);
        let mut marks = format!("ETag: {tag}\r\n");
        if let Some(date) = &date {
            let _ = write!(marks, "Last-Modified: {date}\r\n");
        }
        // A tag tells more than a date, which only counts without one (RFC 9110, 13.1.3).
        let unchanged = match &self.if_none_match {
            Some(tags) => tags.contains(&tag),
            None => {
                let since = self.if_modified_since.as_deref();
                let since = since.and_then(|date| httpdate::parse_http_date(date).ok());
                modified.is_some_and(|modified| since.is_some_and(|since| since >= modified))
            }
        };
        if unchanged {
            return self.compose(Status::NotModified, &marks, Vec::new(), now);
        }
        // A part is only of use to a client that has the rest of the same file.
        let same = self.if_range.as_ref().is_none_or(|value| *value == tag || Some(value) == date.as_ref());
        let asked = self.range.as_deref().filter(|_| same);
        marks.push_str("Accept-Ranges: bytes\r\n");
        match offer::ranges(asked, size) {
            Ok(ranges) => match ranges.as_slice() {
                [] => {
                    marks.push_str("Content-Type: application/octet-stream\r\n");
                    self.compose(Status::Ok, &marks, vec![Part::File(0, size)], now)
                }
                [(start, length)] => {
                    let last = start + length - 1;
                    marks.push_str("Content-Type: application/octet-stream\r\n");
                    let _ = write!(marks, "Content-Range: bytes {start}-{last}/{size}\r\n");
                    self.compose(Status::Partial, &marks, vec![Part::File(*start, *length)], now)
                }
                several => {
                    // Nothing that was written by others is in a digest's name.
                    let _ = write!(marks, "Content-Type: multipart/byteranges; boundary={digest}\r\n");
                    let mut parts = Vec::new();
                    for (start, length) in several {
                        let last = start + length - 1;
                        parts.push(Part::Text(format!(
                            "\r\n--{digest}\r\nContent-Type: application/octet-stream\r\nContent-Range: bytes {start}-{last}/{size}\r\n\r\n"
                        )));
                        parts.push(Part::File(*start, *length));
                    }
                    parts.push(Part::Text(format!("\r\n--{digest}--\r\n")));
                    self.compose(Status::Partial, &marks, parts, now)
                }
            },
            Err(BeyondEnd) => {
                let headers = format!("Content-Range: bytes */{size}\r\n");
                self.compose(Status::Beyond, &headers, Vec::new(), now)
            }
        }
    }

    /// An answer with a status only.
    pub(super) fn refuse(&self, status: Status, now: SystemTime) -> Answer {
        self.compose(status, "", Vec::new(), now)
    }

    fn compose(&self, status: Status, headers: &str, mut parts: Vec<Part>, now: SystemTime) -> Answer {
        let length: u64 = parts.iter().map(Part::length).sum();
        if self.is_head {
            parts.clear();
        }
        let mut head = format!("HTTP/1.1 {}\r\nDate: {}\r\n", status.line(), httpdate::fmt_http_date(now));
        head.push_str(headers);
        // The length of what is not sent again is the file's, so it is left out.
        if status != Status::NotModified {
            let _ = write!(head, "Content-Length: {length}\r\n");
        }
        head.push_str(if self.keeps { "\r\n" } else { "Connection: close\r\n\r\n" });
        Answer { head, parts }
    }
}

impl Part {
    fn length(&self) -> u64 {
        match self {
            Self::Text(text) => text.len() as u64,
            Self::File(_, length) => *length,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(head: &str) -> Asked {
        match read(head.as_bytes()) {
            Head::Whole(asked, length) if length == head.len() => *asked,
            other => panic!("{head:?}: {other:?}"),
        }
    }

    fn get(headers: &str) -> Asked {
        ask(&format!("GET /a HTTP/1.1\r\n{headers}\r\n"))
    }

    fn known() -> Known {
        Known { digest: Digest::of(b"x"), size: 1000, modified: Some(1_795_222_382) }
    }

    fn answer(headers: &str) -> Answer {
        get(headers).answer(known(), UNIX_EPOCH)
    }

    #[test]
    fn a_request_is_read_when_it_is_whole() {
        let head = "GET /debian/pool/a%2bb.deb HTTP/1.1\r\nHost: x\r\n\r\n";
        for end in 0..head.len() {
            assert_eq!(read(&head.as_bytes()[..end]), Head::Begun, "{end}");
        }
        let asked = ask(head);
        assert_eq!((asked.path.as_deref(), asked.keeps), (Some("/debian/pool/a+b.deb"), true));
        // What comes after is the next request.
        let Head::Whole(_, length) = read(format!("{head}GET").as_bytes()) else { panic!("whole") };
        assert_eq!(length, head.len());
    }

    #[test]
    fn what_is_no_request_is_told_how() {
        assert_eq!(read(b"\x16\x03\x01\x02\x00\x01"), Head::Wrong(Status::BadRequest));
        assert_eq!(read(b"GET /\x01 HTTP/1.1\r\n"), Head::Wrong(Status::BadRequest));
        assert_eq!(read(&[b'a'; LONGEST_HEAD]), Head::Wrong(Status::TooLong));
        let many = format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(MOST_HEADERS + 1));
        assert_eq!(read(many.as_bytes()), Head::Wrong(Status::TooLong));
        for (foreign, keeps) in
            [("POST / HTTP/1.1\r\n\r\n", false), ("GET / HTTP/1.1\r\nContent-Length: 3\r\n\r\n", false)]
        {
            let asked = ask(foreign);
            assert_eq!((asked.is_foreign, asked.keeps), (true, keeps), "{foreign}");
        }
        assert_eq!(ask("GET /%f HTTP/1.1\r\n\r\n").path, None);
        assert!(!ask("GET / HTTP/1.0\r\n\r\n").keeps);
        assert!(!get("Connection: TE, Close\r\n").keeps);
        let proxied = ask("GET http://mirror.test/a/b?c HTTP/1.1\r\n\r\n");
        assert_eq!(proxied.path.as_deref(), Some("/a/b"));
    }

    #[test]
    fn a_whole_file() {
        let digest = known().digest;
        let Answer { head, parts } = answer("");
        assert_eq!(parts, [Part::File(0, 1000)]);
        assert_eq!(
            head,
            format!(
                "HTTP/1.1 200 OK\r\nDate: Thu, 01 Jan 1970 00:00:00 GMT\r\nETag: \"{digest}\"\r\nLast-Modified: Sat, 21 Nov 2026 00:53:02 GMT\r\nAccept-Ranges: bytes\r\nContent-Type: application/octet-stream\r\nContent-Length: 1000\r\n\r\n"
            )
        );
        let only_head = ask("HEAD /a HTTP/1.1\r\n\r\n").answer(known(), UNIX_EPOCH);
        assert_eq!((only_head.head, only_head.parts), (head, Vec::new()));
    }

    #[test]
    fn several_parts_are_one_body_of_the_length_that_its_head_says() {
        let Answer { head, parts } = answer("Range: bytes=0-9, 500-, -3\r\n");
        assert!(
            head.starts_with("HTTP/1.1 206 ") && head.contains("multipart/byteranges; boundary="),
            "{head}"
        );
        let files: Vec<&Part> = parts.iter().filter(|part| matches!(part, Part::File(..))).collect();
        assert_eq!(files, [&Part::File(0, 10), &Part::File(500, 500), &Part::File(997, 3)]);
        let length: u64 = parts.iter().map(Part::length).sum();
        assert!(head.contains(&format!("Content-Length: {length}\r\n")), "{head}");
        let Part::Text(first) = &parts[0] else { panic!("a text") };
        assert!(first.ends_with("Content-Range: bytes 0-9/1000\r\n\r\n"), "{first}");
    }

    #[test]
    fn conditions() {
        let tag = format!("\"{}\"", known().digest);
        for (headers, status) in [
            (format!("If-None-Match: {tag}\r\n"), "304"),
            ("If-None-Match: \"other\"\r\n".to_owned(), "200"),
            ("If-Modified-Since: Sat, 21 Nov 2026 00:53:02 GMT\r\n".to_owned(), "304"),
            ("If-Modified-Since: Sat, 21 Nov 2026 00:53:01 GMT\r\n".to_owned(), "200"),
            (format!("Range: bytes=1-\r\nIf-Range: {tag}\r\n"), "206"),
            ("Range: bytes=1-\r\nIf-Range: \"other\"\r\n".to_owned(), "200"),
            ("Range: bytes=1000-\r\n".to_owned(), "416"),
        ] {
            let head = answer(&headers).head;
            assert_eq!(head.split(' ').nth(1), Some(status), "{headers}");
        }
        let refused = get("").refuse(Status::NotFound, UNIX_EPOCH);
        assert!(refused.head.contains("Content-Length: 0\r\n") && refused.parts.is_empty());
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic_and_each_answer_is_as_long_as_it_says(
            bytes in "(GET|HEAD|POST|é| |/|%2f|HTTP/1.1|\r\n|Range: bytes=|[0-9]{1,4}|-|,|If-Range: |:){0,30}",
            ranges in "[0-9]{0,4}-[0-9]{0,4}(, ?[0-9]{0,4}-[0-9]{0,4}){0,3}",
            size in 0..2000_u64,
        ) {
            let _ = read(bytes.as_bytes());
            let Answer { head, parts } = get(&format!("Range: bytes={ranges}\r\n")).answer(Known { size, ..known() }, UNIX_EPOCH);
            let length: u64 = parts.iter().map(Part::length).sum();
            let said = format!("Content-Length: {length}\r\n");
            proptest::prop_assert!(head.contains(&said));
            let inside = |part: &Part| match part {
                Part::Text(_) => true,
                Part::File(start, length) => start + length <= size,
            };
            proptest::prop_assert!(parts.iter().all(inside));
        }
    }
}
