//! The cache against an upstream that misbehaves: what is wrong is named, never served and never kept.
//!
//! Needs gnupg, to sign an archive of the test's own, and gpgv. Everything else is local.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod connections;
mod full;
mod host_sources;
mod kills;
mod locked;
mod mirrors;
mod secure;
mod shared;
mod together;
mod unvouched;
mod upstream;
mod upstreams;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use hostler_runner::cache::{Cache, Digest, FetchError, FetchOptions, Fetcher, Mirror, Proxies};
use hostler_runner::debian::release::ReleaseError;
use hostler_runner::debian::signature::{Distrust, SignatureError};
use hostler_runner::debian::{self, SelectError, Selection};
use hostler_runner::event::{Event, Silent, Sink};
use hostler_runner::recipe::Recipe;
use hostler_runner::stop::{Stop, Stopped};

use upstream::{Fault, Signer, Upstream, publish, publish_as};

const BIG: &str = "/debian/pool/big_1+x_amd64.deb";
const WEEK: Duration = Duration::from_secs(7 * 86_400);

/// Keeps warnings.
#[derive(Default)]
struct Warnings(Mutex<Vec<String>>);

impl Sink for Warnings {
    fn event(&self, event: Event) {
        if let Event::Warning(text) = event {
            self.0.lock().unwrap().push(text);
        }
    }
}

struct World {
    upstream: Upstream,
    signer: Signer,
    directory: tempfile::TempDir,
}

impl World {
    fn new() -> Self {
        let world = Self {
            upstream: Upstream::start(),
            signer: Signer::new(),
            directory: tempfile::tempdir().unwrap(),
        };
        publish(&world.upstream, &world.signer, WEEK, SystemTime::now());
        world
    }

    fn options() -> FetchOptions {
        FetchOptions {
            idle_timeout: Duration::from_millis(800),
            attempts: 2,
            backoff: Duration::from_millis(10),
            ..FetchOptions::default()
        }
    }

    fn fetcher(&self) -> Arc<Fetcher> {
        self.fetcher_with(Self::options())
    }

    fn fetcher_with(&self, options: FetchOptions) -> Arc<Fetcher> {
        let cache = Cache::open(self.directory.path()).unwrap();
        Arc::new(Fetcher::new(Arc::new(cache), options).unwrap())
    }

    fn recipe(url: &str, keyring: &Path) -> Recipe {
        let text = format!(
            "kind = \"debian\"\n[image]\nname = \"x\"\nsize = \"1GiB\"\n[debian]\nsource = \"{url}\"\nsuite = \"bookworm\"\narchitecture = \"amd64\"\nkeyring = \"{}\"\npackages = []\n",
            keyring.display()
        );
        Recipe::parse(&text, Path::new("test.toml")).unwrap()
    }

    fn select(&self, fetcher: &Fetcher) -> Result<Selection, SelectError> {
        let recipe = Self::recipe(&self.upstream.url(), &self.signer.keyring());
        debian::select(&recipe, fetcher, Path::new("/"), &Silent)
    }

    /// Content files in the cache, and temporary ones.
    fn kept(&self) -> (Vec<PathBuf>, usize) {
        let mut files = Vec::new();
        for folder in std::fs::read_dir(self.directory.path().join("sha256")).unwrap() {
            files.extend(std::fs::read_dir(folder.unwrap().path()).unwrap().map(|file| file.unwrap().path()));
        }
        (files, std::fs::read_dir(self.directory.path().join("temporary")).unwrap().count())
    }

    fn content(&self, digest: Digest) -> PathBuf {
        let name = digest.to_string();
        self.directory.path().join("sha256").join(&name[..2]).join(name)
    }

    fn apt(&self) -> Vec<u8> {
        self.upstream.state.lock().unwrap().files["/debian/pool/apt_1+x_amd64.deb"].clone()
    }

    /// Downloads that were begun.
    fn parts(&self) -> Vec<PathBuf> {
        let files = std::fs::read_dir(self.directory.path().join("partial")).unwrap();
        files.map(|file| file.unwrap().path()).collect()
    }

    fn fetch_fails(&self) -> FetchError {
        let fetcher = self.fetcher();
        let selection = self.select(&fetcher).unwrap();
        let error = debian::fetch(&selection, &fetcher, &Silent).unwrap_err();
        let digest = selection.packages.iter().find(|package| package.name == "big").unwrap().file.digest;
        let (files, temporary) = self.kept();
        assert!(!files.iter().any(|file| file.ends_with(digest.to_string())), "something wrong was kept");
        // Downloads that were broken off end a moment later.
        let deadline = Instant::now() + Duration::from_secs(5);
        let mut left = temporary;
        while left > 0 && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
            left = self.kept().1;
        }
        assert_eq!(left, 0, "a temporary file was left");
        error
    }

    fn mirror(&self, fetcher: &Arc<Fetcher>) -> (Mirror, u16) {
        serve(self.select(fetcher).unwrap(), fetcher)
    }
}

fn serve(selection: Selection, fetcher: &Arc<Fetcher>) -> (Mirror, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (Mirror::start(listener, Arc::new(selection), Arc::clone(fetcher)).unwrap(), port)
}

/// One request: status, headers as text, body.
fn ask(port: u16, method: &str, path: &str, extra: &str) -> (u16, String, Vec<u8>) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    write!(stream, "{method} {path} HTTP/1.1\r\nHost: mirror.test\r\n{extra}Connection: close\r\n\r\n")
        .unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n").unwrap();
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap().to_ascii_lowercase();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    (status, head, bytes[end + 4..].to_vec())
}

fn head_date(head: &str) -> String {
    let line = head.lines().find_map(|line| line.strip_prefix("last-modified: ")).unwrap();
    // The names of days and months were made small with the rest of the headers.
    let date = humantime_of(line);
    assert!(date.ends_with("GMT"));
    date
}

/// The date with the letters that it had.
fn humantime_of(small: &str) -> String {
    let words = small.split(' ').map(|word| match word {
        "gmt" => "GMT".to_owned(),
        _ => word[..1].to_ascii_uppercase() + &word[1..],
    });
    words.collect::<Vec<_>>().join(" ")
}

#[test]
fn the_mirror_serves_what_is_named_in_whole_and_in_part() {
    let world = World::new();
    let fetcher = world.fetcher();
    let (mirror, port) = world.mirror(&fetcher);
    let original = world.upstream.state.lock().unwrap().files[BIG].clone();

    let (status, _, body) = ask(port, "GET", "/debian/pool/big_1%2bx_amd64.deb", "");
    assert_eq!((status, body == original), (200, true));
    let (status, head, body) = ask(port, "HEAD", BIG, "");
    assert_eq!((status, body.len()), (200, 0));
    assert!(head.contains(&format!("content-length: {}", original.len())), "{head}");
    let (status, head, body) = ask(port, "GET", BIG, "Range: bytes=10-19\r\n");
    assert_eq!((status, body.as_slice()), (206, &original[10..20]));
    assert!(head.contains("content-range: bytes 10-19/"), "{head}");
    let (status, _, body) = ask(port, "GET", BIG, "Range: bytes=10-19\r\nIf-Range: \"other\"\r\n");
    assert_eq!((status, body.len()), (200, original.len()));
    assert_eq!(ask(port, "GET", BIG, "Range: bytes=99999999-\r\n").0, 416);
    // Empty indices are common, and a client that resumes asks for their end.
    let empty = "/debian/dists/bookworm/main/i18n/Translation-en";
    let (status, head, body) = ask(port, "GET", empty, "");
    assert_eq!((status, body.len()), (200, 0));
    assert!(head.contains("content-length: 0"), "{head}");
    assert_eq!(ask(port, "GET", empty, "Range: bytes=0-\r\n").0, 416);
    let (status, _, body) = ask(port, "GET", "/debian/dists/bookworm/InRelease", "");
    assert_eq!((status, body.starts_with(b"-----BEGIN PGP SIGNED MESSAGE-----")), (200, true));
    assert_eq!(ask(port, "GET", "/debian/dists/bookworm/main/binary-amd64/Packages", "").0, 200);
    // What apt asks when it has the file: has it changed since?
    let date = head_date(&ask(port, "HEAD", "/debian/dists/bookworm/InRelease", "").1);
    for (since, status) in [
        (format!("If-Modified-Since: {date}\r\n"), 304),
        ("If-Modified-Since: Mon, 06 Jan 2020 10:00:00 GMT\r\n".to_owned(), 200),
        (format!("If-Modified-Since: {date}\r\nIf-None-Match: \"other\"\r\n"), 200),
        (format!("Range: bytes=5-\r\nIf-Range: {date}\r\n"), 206),
    ] {
        assert_eq!(ask(port, "GET", "/debian/dists/bookworm/InRelease", &since).0, status, "{since}");
    }

    world.upstream.take_log();
    for path in [
        "/debian/pool/other.deb",
        "/etc/passwd",
        "/debian/../../etc/passwd",
        "/debian/dists/bookworm/Release",
    ] {
        assert_eq!(ask(port, "GET", path, "").0, 404, "{path}");
    }
    assert_eq!(ask(port, "POST", BIG, "").0, 405);
    assert_eq!(world.upstream.take_log(), Vec::<String>::new(), "upstream was asked for what it cannot have");

    let report = mirror.stop();
    assert_eq!(report.failures.len(), 4);
    assert_eq!(report.failures[0].path, "/debian/pool/other.deb");
    assert_eq!(report.failures[0].upstream_status, None);
    assert!(report.served_bytes >= 2 * original.len() as u64 + 10);
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err(), "the mirror still listens");
}

#[test]
fn many_who_want_one_file_fetch_it_once() {
    let world = World::new();
    let fetcher = world.fetcher();
    let (_mirror, port) = world.mirror(&fetcher);
    world.upstream.take_log();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| assert_eq!(ask(port, "GET", BIG, "").0, 200));
        }
    });
    assert_eq!(world.upstream.take_log(), [BIG]);
}

#[test]
fn a_flipped_byte_is_named_and_never_served() {
    let world = World::new();
    world.upstream.fault(BIG, Fault::Flipped);
    let error = world.fetch_fails();
    assert!(matches!(error, FetchError::Altered { .. }), "{error}");
    assert!(error.to_string().starts_with("upstream sent an altered pool/big_1+x_amd64.deb"), "{error}");

    let fetcher = world.fetcher();
    let (mirror, port) = world.mirror(&fetcher);
    let (status, _, body) = ask(port, "GET", BIG, "");
    assert_eq!((status, body.len()), (502, 0));
    let report = mirror.stop();
    assert_eq!(report.failures[0].path, BIG);
    assert!(report.failures[0].reason.contains("altered"), "{:?}", report.failures);
}

#[test]
fn a_truncated_file_is_named_and_a_short_break_is_continued() {
    let world = World::new();
    world.upstream.fault(BIG, Fault::Truncated(1000));
    let error = world.fetch_fails();
    assert!(matches!(error, FetchError::Truncated { .. }), "{error}");

    world.upstream.fault(BIG, Fault::TruncatedOnce(1000));
    world.upstream.take_log();
    let fetcher = world.fetcher();
    debian::fetch(&world.select(&fetcher).unwrap(), &fetcher, &Silent).unwrap();
    assert!(world.upstream.take_log().contains(&format!("{BIG} bytes=1000-")));
}

#[test]
fn an_upstream_that_hangs_is_named() {
    let world = World::new();
    world.upstream.fault(BIG, Fault::Stuck(1000));
    let error = world.fetch_fails();
    assert!(matches!(error, FetchError::Silent { .. }), "{error}");
}

#[test]
fn a_missing_file_is_named_with_its_status_and_asked_for_once() {
    let world = World::new();
    world.upstream.fault(BIG, Fault::Status(404));
    let error = world.fetch_fails();
    assert!(error.to_string().starts_with("upstream answered 404 for pool/big_1+x_amd64.deb"), "{error}");

    let fetcher = world.fetcher();
    let (mirror, port) = world.mirror(&fetcher);
    world.upstream.take_log();
    assert_eq!(ask(port, "GET", BIG, "").0, 502);
    assert_eq!(ask(port, "GET", BIG, "").0, 502);
    assert_eq!(world.upstream.take_log(), [BIG]);
    assert_eq!(mirror.report().failures[0].upstream_status, Some(404));
}

#[test]
fn an_altered_release_file_is_not_believed() {
    let world = World::new();
    world.upstream.fault("/debian/dists/bookworm/InRelease", Fault::Flipped);
    let error = world.select(&world.fetcher()).err().unwrap();
    let SelectError::Signature { source: SignatureError::Distrusted(distrust), .. } = &error else {
        panic!("{error:?}");
    };
    assert!(matches!(distrust, Distrust::Bad(_) | Distrust::Unsigned), "{distrust}");
    assert_eq!(world.kept().0, Vec::<PathBuf>::new());
    world.upstream.heal();
    world.select(&world.fetcher()).unwrap();
}

#[test]
fn text_around_the_signed_part_is_not_believed() {
    let world = World::new();
    let path = "/debian/dists/bookworm/InRelease".to_owned();
    {
        let mut state = world.upstream.state.lock().unwrap();
        let signed = state.files[&path].clone();
        let mut bytes = b"Codename: evil\nDate: Sat, 21 Nov 2026 00:53:02 UTC\nSHA256:\n\n".to_vec();
        bytes.extend(signed);
        state.files.insert(path, bytes);
    }
    let result = world.select(&world.fetcher());
    assert!(result.is_err() || result.unwrap().repositories[0].suites[0].release.codename == "bookworm");
}

#[test]
fn another_signer_is_not_believed() {
    let world = World::new();
    let stranger = Signer::new();
    let recipe = World::recipe(&world.upstream.url(), &stranger.keyring());
    let error = debian::select(&recipe, &world.fetcher(), Path::new("/"), &Silent).err().unwrap();
    assert!(
        matches!(
            error,
            SelectError::Signature { source: SignatureError::Distrusted(Distrust::UnknownSigner(_)), .. }
        ),
        "{error:?}"
    );
}

#[test]
fn a_replayed_release_file_does_not_win() {
    let world = World::new();
    let newer = world.select(&world.fetcher()).unwrap();
    let earlier = SystemTime::now() - Duration::from_secs(86_400);
    publish(&world.upstream, &world.signer, WEEK, earlier);
    let replayed = world.select(&world.fetcher()).unwrap();
    let date = |selection: &Selection| selection.repositories[0].suites[0].release.date;
    assert_eq!(date(&replayed), date(&newer));
    // Nor one from when the suite's name was of another release; the first of equal fields counts.
    publish_as("Test\nCodename: bullseye", &world.upstream, &world.signer, WEEK, earlier);
    assert_eq!(date(&world.select(&world.fetcher()).unwrap()), date(&newer));
}

#[test]
fn a_mirror_whose_release_file_is_of_no_use_is_passed_over() {
    let world = World::new();
    let other = Upstream::start();
    let file = "/debian/dists/bookworm/InRelease";
    let bad = |with: &dyn Fn()| {
        other.heal();
        publish(&other, &world.signer, WEEK, SystemTime::now());
        with();
        let mirrors = vec![format!("http://{}", other.address)];
        let fetcher = world.fetcher_with(FetchOptions { mirrors, ..World::options() });
        let recipe = World::recipe(&world.upstream.url(), &world.signer.keyring());
        let told = Warnings::default();
        debian::select(&recipe, &fetcher, Path::new("/"), &told).unwrap();
        let told = told.0.into_inner().unwrap().join("\n");
        assert!(told.contains("its answer cannot be used"), "{told}");
        told
    };
    assert!(bad(&|| other.fault(file, Fault::Other)).contains("not one text with a signature"));
    assert!(bad(&|| other.fault(file, Fault::Flipped)).contains("cannot trust"));
    let old = SystemTime::now() - 2 * WEEK;
    assert!(bad(&|| publish(&other, &world.signer, WEEK, old)).contains("it was valid until"));
    // Where all are like that, the first is heard.
    world.upstream.fault(file, Fault::Other);
    let error = world.select(&world.fetcher()).err().unwrap();
    assert!(matches!(error, SelectError::Signature { .. }), "{error:?}");
}

#[test]
fn a_keyring_may_be_armored() {
    let world = World::new();
    let recipe = World::recipe(&world.upstream.url(), &world.signer.armored_keyring());
    debian::select(&recipe, &world.fetcher(), Path::new("/"), &Silent).unwrap();
}

#[test]
fn downloads_end_at_their_deadline() {
    let world = World::new();
    world.upstream.fault(BIG, Fault::Stuck(1000));
    // Not what a busy host takes longer for.
    let selection = world.select(&world.fetcher()).unwrap();
    let stop = Stop::default().within(Duration::from_secs(1));
    let idle_timeout = Duration::from_secs(60);
    let fetcher = world.fetcher_with(FetchOptions { stop, idle_timeout, ..World::options() });
    let started = Instant::now();
    let error = debian::fetch(&selection, &fetcher, &Silent).unwrap_err();
    assert_eq!(Stopped::cause_of(&error), Some(Stopped::Late), "{error}");
    assert!(started.elapsed() < Duration::from_secs(20));
}

#[test]
fn a_release_file_that_ran_out_is_refused() {
    let world = World::new();
    publish(&world.upstream, &world.signer, WEEK, SystemTime::now() - 2 * WEEK);
    let error = world.select(&world.fetcher()).err().unwrap();
    assert!(matches!(error, SelectError::Release { source: ReleaseError::Expired(_), .. }), "{error:?}");
}

#[test]
fn a_byte_flipped_on_disk_is_found_and_fetched_again() {
    let world = World::new();
    let fetcher = world.fetcher();
    let selection = world.select(&fetcher).unwrap();
    debian::fetch(&selection, &fetcher, &Silent).unwrap();
    let digest =
        selection.packages.iter().find(|package| package.name == "big").unwrap().file.digest.to_string();
    let path = world.directory.path().join("sha256").join(&digest[..2]).join(&digest);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[1234] ^= 1;
    std::fs::write(&path, &bytes).unwrap();

    let fetcher = world.fetcher();
    let (mirror, port) = world.mirror(&fetcher);
    let original = world.upstream.state.lock().unwrap().files[BIG].clone();
    assert!(ask(port, "GET", BIG, "").2 == original);
    assert_eq!(mirror.stop().failures, []);
    assert_eq!(fetcher.counted().damaged, 1);
    assert!(std::fs::read(&path).unwrap() == original);

    // The same while a build fetches: said, and put right.
    std::fs::write(&path, &bytes).unwrap();
    let warnings = Warnings::default();
    let fetcher = world.fetcher();
    debian::fetch(&world.select(&fetcher).unwrap(), &fetcher, &warnings).unwrap();
    assert_eq!(warnings.0.lock().unwrap().len(), 1);
    assert!(std::fs::read(&path).unwrap() == original);
}

#[test]
fn a_second_run_asks_for_no_byte_of_a_package_or_index() {
    let world = World::new();
    let fetcher = world.fetcher();
    debian::fetch(&world.select(&fetcher).unwrap(), &fetcher, &Silent).unwrap();
    world.upstream.take_log();

    let fetcher = world.fetcher();
    debian::fetch(&world.select(&fetcher).unwrap(), &fetcher, &Silent).unwrap();
    assert_eq!(world.upstream.take_log(), ["/debian/dists/bookworm/InRelease"]);
    let counted = fetcher.counted();
    assert_eq!((counted.upstream_bytes, counted.upstream_requests), (0, 1));
    // Over plain HTTP the Release file comes whole: "not modified" would be said of validators, which whoever
    // once stood between may have given to an old one.
    assert!(counted.metadata_bytes > 0);
    assert!(counted.cache_bytes > 1_000_000);
}

#[test]
fn a_cache_goes_on_without_its_upstream() {
    let world = World::new();
    let fetcher = world.fetcher();
    debian::fetch(&world.select(&fetcher).unwrap(), &fetcher, &Silent).unwrap();
    world.upstream.fault("/debian/dists/bookworm/InRelease", Fault::Status(503));
    let fetcher = world.fetcher();
    debian::fetch(&world.select(&fetcher).unwrap(), &fetcher, &Silent).unwrap();
    assert_eq!(fetcher.counted().upstream_bytes, 0);
}

#[test]
fn a_proxy_is_asked_with_the_whole_address() {
    let world = World::new();
    let proxies = Proxies { http: Some(format!("http://{}", world.upstream.address)), ..Proxies::default() };
    let fetcher = world.fetcher_with(FetchOptions { proxies, ..World::options() });
    let recipe = World::recipe("http://archive.test/debian", &world.signer.keyring());
    let selection = debian::select(&recipe, &fetcher, Path::new("/"), &Silent).unwrap();
    debian::fetch(&selection, &fetcher, &Silent).unwrap();
    assert!(world.upstream.take_log().contains(&format!("http://archive.test{BIG}")));
}

/// Plays both parts: the parent starts this test once more as the one to be killed.
#[test]
fn a_killed_download_leaves_nothing_or_what_the_next_one_goes_on_with() {
    if let Some(directory) = std::env::var_os("HOSTLER_TEST_KILLED_CACHE") {
        let url = std::env::var("HOSTLER_TEST_KILLED_URL").unwrap();
        let keyring = std::env::var_os("HOSTLER_TEST_KILLED_KEYRING").unwrap();
        let cache = Arc::new(Cache::open(Path::new(&directory)).unwrap());
        let fetcher = Fetcher::new(cache, FetchOptions::default()).unwrap();
        let recipe = World::recipe(&url, Path::new(&keyring));
        let selection = debian::select(&recipe, &fetcher, Path::new("/"), &Silent).unwrap();
        drop(debian::fetch(&selection, &fetcher, &Silent));
        return;
    }
    let world = World::new();
    let fetch = || {
        world.upstream.heal();
        world.upstream.take_log();
        let fetcher = world.fetcher();
        assert_eq!(world.kept().1, 0);
        debian::fetch(&world.select(&fetcher).unwrap(), &fetcher, &Silent).unwrap();
        let digest = Digest::of(&world.upstream.state.lock().unwrap().files[BIG]);
        std::fs::remove_file(world.content(digest)).unwrap();
        assert_eq!(world.parts().len(), 0);
        assert_eq!(fetcher.counted().upstream_faults, 0);
        world.upstream.take_log().into_iter().filter(|asked| asked.starts_with(BIG)).collect::<Vec<_>>()
    };
    // Little is not worth keeping.
    kill_at(&world, 200_000);
    assert_eq!(fetch(), [BIG]);
    kill_at(&world, 1_300_000);
    assert_eq!(fetch(), [format!("{BIG} bytes=1300000-")]);
    // What is wrong on the disk is found when the whole is checked, and no upstream is blamed.
    kill_at(&world, 1_300_000);
    let part = world.parts().remove(0);
    let mut bytes = std::fs::read(&part).unwrap();
    bytes[7] ^= 1;
    std::fs::write(&part, bytes).unwrap();
    assert_eq!(fetch(), [format!("{BIG} bytes=1300000-"), BIG.to_owned()]);
    // It was killed after the last byte.
    let whole = world.upstream.state.lock().unwrap().files[BIG].clone();
    std::fs::write(world.directory.path().join("partial").join(Digest::of(&whole).to_string()), whole)
        .unwrap();
    assert_eq!(fetch(), Vec::<String>::new());
}

/// Starts a process that downloads, and kills it when it has so many bytes.
fn kill_at(world: &World, bytes: usize) {
    world.upstream.fault(BIG, Fault::Stuck(bytes));
    drop(Cache::open(world.directory.path()).unwrap());
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "a_killed_download_leaves_nothing_or_what_the_next_one_goes_on_with"])
        .env("HOSTLER_TEST_KILLED_CACHE", world.directory.path())
        .env("HOSTLER_TEST_KILLED_URL", world.upstream.url())
        .env("HOSTLER_TEST_KILLED_KEYRING", world.signer.keyring())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let is_there = || {
        let sizes = world.parts().into_iter().filter_map(|path| Some(path.metadata().ok()?.len()));
        sizes.max() == Some(bytes as u64)
    };
    let deadline = Instant::now() + Duration::from_secs(30);
    while !is_there() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    let was_there = is_there();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(was_there, "the download never came so far");
}

#[test]
fn a_download_that_failed_for_lack_of_an_upstream_is_gone_on_with() {
    let world = World::new();
    world.upstream.fault(BIG, Fault::Truncated(1_500_000));
    let fetcher = world.fetcher_with(FetchOptions { attempts: 1, ..World::options() });
    let error = debian::fetch(&world.select(&fetcher).unwrap(), &fetcher, &Silent).unwrap_err();
    assert!(matches!(error, FetchError::Truncated { .. }), "{error}");
    world.upstream.heal();
    world.upstream.take_log();
    let fetcher = world.fetcher();
    debian::fetch(&world.select(&fetcher).unwrap(), &fetcher, &Silent).unwrap();
    assert!(world.upstream.take_log().contains(&format!("{BIG} bytes=1500000-")));
    assert_eq!(world.parts().len(), 0);
}
