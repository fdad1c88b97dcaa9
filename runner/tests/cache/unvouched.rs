//! What nothing vouches for is asked for again as HTTP's rules say, and a lock says that it is unverified.

use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use hostler_runner::cache::{Cache, Digest, FetchError, FetchOptions, Fetcher, Supply};
use hostler_runner::lock::Lock;

use super::upstream::{Fault, Upstream};
use super::world::{Warnings, World};

struct Site {
    upstream: Upstream,
    directory: tempfile::TempDir,
}

impl Site {
    /// The file is there, with these headers.
    fn new(headers: &str) -> Self {
        let site = Self { upstream: Upstream::start(), directory: tempfile::tempdir().unwrap() };
        site.change(b"first");
        site.upstream.state.lock().unwrap().headers.insert("/file".to_owned(), headers.to_owned());
        site
    }

    fn change(&self, bytes: &[u8]) {
        self.upstream.state.lock().unwrap().files.insert("/file".to_owned(), bytes.to_vec());
    }

    fn fetcher(&self, supply: Supply) -> Fetcher {
        let cache = Arc::new(Cache::open(self.directory.path()).unwrap());
        Fetcher::new(cache, FetchOptions { supply, ..World::options() }).unwrap()
    }

    fn fetch_by(&self, fetcher: &Fetcher) -> Result<Vec<u8>, FetchError> {
        let url = format!("http://{}/file", self.upstream.address);
        let (digest, mut file) = fetcher.unvouched("file", &[url])?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        assert_eq!(digest, Digest::of(&bytes));
        Ok(bytes)
    }

    /// What another process gets, how often upstream was asked, and how many bytes it sent.
    fn fetch(&self) -> (Vec<u8>, usize, u64) {
        let fetcher = self.fetcher(Supply::default());
        let bytes = self.fetch_by(&fetcher).unwrap();
        (bytes, self.upstream.take_log().len(), fetcher.counted().upstream_bytes)
    }
}

fn date(ago: Duration) -> String {
    httpdate::fmt_http_date(SystemTime::now() - ago)
}

#[test]
fn a_process_that_fetches_slowly_is_not_taken_for_one_that_was_stopped() {
    let site = Site::new("Cache-Control: max-age=600\r\n");
    let body = vec![7; 2000];
    site.change(&body);
    // Two seconds for the last bytes.
    site.upstream.fault("/file", Fault::Drip(1900));
    let fetch = || {
        let patience = Duration::from_millis(1200);
        let cache = Arc::new(Cache::open(site.directory.path()).unwrap());
        let fetcher = Fetcher::new(cache, FetchOptions { patience, ..World::options() }).unwrap();
        site.fetch_by(&fetcher).unwrap()
    };
    std::thread::scope(|scope| {
        let first = scope.spawn(fetch);
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(fetch(), body);
        assert_eq!(first.join().unwrap(), body);
    });
    assert_eq!(site.upstream.take_log().len(), 1);
}

#[test]
fn how_long_an_answer_holds_is_the_upstreams_word() {
    let day = Duration::from_secs(86_400);
    let modified = |ago| format!("Date: {}\r\nLast-Modified: {}\r\n", date(Duration::ZERO), date(ago));
    for (headers, asked, sent) in [
        // Asked whether it has changed.
        (String::new(), 1, 0),
        ("Cache-Control: no-cache\r\n".to_owned(), 1, 0),
        ("Cache-Control: max-age=600\r\nAge: 601\r\n".to_owned(), 1, 0),
        (format!("Date: {0}\r\nExpires: {0}\r\n", date(day)), 1, 0),
        (modified(Duration::from_secs(1)), 1, 0),
        // Not asked.
        ("Cache-Control: private, max-age=600\r\n".to_owned(), 0, 0),
        (
            format!(
                "Date: {}\r\nExpires: {}\r\n",
                date(Duration::ZERO),
                httpdate::fmt_http_date(SystemTime::now() + day)
            ),
            0,
            0,
        ),
        (modified(100 * day), 0, 0),
        // As if it had never been asked.
        ("Cache-Control: no-store\r\n".to_owned(), 1, 5),
        ("Vary: *\r\nCache-Control: max-age=600\r\n".to_owned(), 1, 5),
    ] {
        let site = Site::new(&headers);
        assert_eq!(site.fetch(), (b"first".to_vec(), 1, 5), "{headers}");
        assert_eq!(site.fetch(), (b"first".to_vec(), asked, sent), "{headers}");
        site.change(b"second");
        let is_old = asked == 0;
        assert_eq!(site.fetch().0, if is_old { &b"first"[..] } else { b"second" }, "{headers}");
    }
}

#[test]
fn a_lock_says_that_it_is_unverified_and_keeps_it() {
    let site = Site::new("");
    let fetcher = site.fetcher(Supply::default());
    site.fetch_by(&fetcher).unwrap();
    let lock = Lock { files: fetcher.brought(), ..Lock::new() };
    let text = lock.text().unwrap();
    assert!(text.contains("verified = false"), "{text}");
    let lock = Lock::parse(&text, Path::new("x.lock")).unwrap();

    site.change(b"other");
    site.upstream.take_log();
    let locked = |lock: &Lock| Supply { lock: Some(Arc::new(lock.clone())), offline: false };
    let again = site.fetcher(locked(&lock));
    assert_eq!(site.fetch_by(&again).unwrap(), b"first");
    assert_eq!(site.upstream.take_log(), Vec::<String>::new());
    assert_eq!(again.brought(), lock.files);
    // On another host, what the lock has is asked for, and what upstream has now is refused.
    let other = Site { directory: tempfile::tempdir().unwrap(), ..site };
    let error = other.fetch_by(&other.fetcher(locked(&lock))).unwrap_err();
    assert!(matches!(error, FetchError::Altered { .. }), "{error}");
    let error = other.fetch_by(&other.fetcher(locked(&Lock::new()))).unwrap_err();
    assert_eq!(error.to_string(), "the lock does not have file: build without --locked to make a new lock");
}

#[test]
fn without_an_upstream_the_kept_answer_is_used_and_that_is_said() {
    let site = Site::new("Cache-Control: no-cache\r\n");
    let offline = Supply { lock: None, offline: true };
    let error = site.fetch_by(&site.fetcher(offline.clone())).unwrap_err();
    assert!(matches!(error, FetchError::Offline { .. }), "{error}");
    site.fetch();
    assert_eq!(site.fetch_by(&site.fetcher(offline)).unwrap(), b"first");
    assert_eq!(site.upstream.take_log(), Vec::<String>::new());

    site.upstream.fault("/file", Fault::Status(503));
    let fetcher = site.fetcher(Supply::default());
    assert_eq!(site.fetch_by(&fetcher).unwrap(), b"first");
    let told = Warnings::default();
    fetcher.tell_news(&told);
    let told = told.0.into_inner().unwrap().join("\n");
    assert!(told.contains("file is the answer that was kept, which may be out of date"), "{told}");
    // One that says that it is gone is believed.
    site.upstream.fault("/file", Fault::Status(410));
    let error = site.fetch_by(&site.fetcher(Supply::default())).unwrap_err();
    assert!(matches!(error, FetchError::Status { status: 410, .. }), "{error}");
}

#[test]
fn half_an_answer_is_none() {
    let site = Site::new("Cache-Control: max-age=600\r\n");
    site.upstream.fault("/file", Fault::Truncated(3));
    assert!(site.fetch_by(&site.fetcher(Supply::default())).is_err());
    site.upstream.heal();
    assert_eq!(site.fetch().0, b"first");
}
