//! What the tests of the cache start from: an archive of their own behind a server, and a cache.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant, SystemTime};

use hostler_runner::cache::offer::Archives;
use hostler_runner::cache::{Cache, Clients, Digest, FetchError, FetchOptions, Fetcher, Mirror};
use hostler_runner::debian::{self, SelectError, Selection};
use hostler_runner::event::{Event, Silent, Sink};
use hostler_runner::recipe::Recipe;

use super::upstream::{Signer, Upstream, publish};

pub(crate) const BIG: &str = "/debian/pool/big_1+x_amd64.deb";
pub(crate) const WEEK: Duration = Duration::from_secs(7 * 86_400);

/// Keeps warnings.
#[derive(Default)]
pub(crate) struct Warnings(pub(crate) Mutex<Vec<String>>);

impl Sink for Warnings {
    fn event(&self, event: Event) {
        if let Event::Warning(text) = event {
            self.0.lock().unwrap().push(text);
        }
    }
}

pub(crate) struct World {
    pub(crate) upstream: Upstream,
    pub(crate) signer: Signer,
    pub(crate) directory: tempfile::TempDir,
}

impl World {
    pub(crate) fn new() -> Self {
        let world = Self {
            upstream: Upstream::start(),
            signer: Signer::new(),
            directory: tempfile::tempdir().unwrap(),
        };
        publish(&world.upstream, &world.signer, WEEK, SystemTime::now());
        world
    }

    pub(crate) fn options() -> FetchOptions {
        FetchOptions {
            idle_timeout: Duration::from_millis(800),
            attempts: 2,
            backoff: Duration::from_millis(10),
            ..FetchOptions::default()
        }
    }

    pub(crate) fn fetcher(&self) -> Arc<Fetcher> {
        self.fetcher_with(Self::options())
    }

    pub(crate) fn fetcher_with(&self, options: FetchOptions) -> Arc<Fetcher> {
        let cache = Cache::open(self.directory.path()).unwrap();
        Arc::new(Fetcher::new(Arc::new(cache), options).unwrap())
    }

    pub(crate) fn recipe(url: &str, keyring: &Path) -> Recipe {
        let text = format!(
            "kind = \"debian\"\n[image]\nname = \"x\"\nsize = \"1GiB\"\n[debian]\nsource = \"{url}\"\nsuite = \"bookworm\"\narchitecture = \"amd64\"\nkeyring = \"{}\"\npackages = []\n",
            keyring.display()
        );
        Recipe::parse(&text, Path::new("test.toml")).unwrap()
    }

    pub(crate) fn select(&self, fetcher: &Fetcher) -> Result<Selection, SelectError> {
        let recipe = Self::recipe(&self.upstream.url(), &self.signer.keyring());
        debian::select(&recipe, fetcher, Path::new("/"), &Silent)
    }

    /// Content files in the cache, and temporary ones.
    pub(crate) fn kept(&self) -> (Vec<PathBuf>, usize) {
        let mut files = Vec::new();
        for folder in std::fs::read_dir(self.directory.path().join("sha256")).unwrap() {
            files.extend(std::fs::read_dir(folder.unwrap().path()).unwrap().map(|file| file.unwrap().path()));
        }
        (files, std::fs::read_dir(self.directory.path().join("temporary")).unwrap().count())
    }

    pub(crate) fn content(&self, digest: Digest) -> PathBuf {
        let name = digest.to_string();
        self.directory.path().join("sha256").join(&name[..2]).join(name)
    }

    pub(crate) fn apt(&self) -> Vec<u8> {
        self.upstream.state.lock().unwrap().files["/debian/pool/apt_1+x_amd64.deb"].clone()
    }

    /// Downloads that were begun.
    pub(crate) fn parts(&self) -> Vec<PathBuf> {
        let files = std::fs::read_dir(self.directory.path().join("partial")).unwrap();
        files.map(|file| file.unwrap().path()).collect()
    }

    pub(crate) fn fetch_fails(&self) -> FetchError {
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

    pub(crate) fn mirror(&self, fetcher: &Arc<Fetcher>) -> (Mirror, u16) {
        serve(self.select(fetcher).unwrap(), fetcher)
    }
}

pub(crate) fn serve(selection: Selection, fetcher: &Arc<Fetcher>) -> (Mirror, u16) {
    serve_guest(selection, u64::MAX, fetcher)
}

/// A mirror for a guest for which so many bytes may be downloaded.
pub(crate) fn serve_guest(selection: Selection, limit: u64, fetcher: &Arc<Fetcher>) -> (Mirror, u16) {
    let clients = Clients::Guest { limit };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    (Mirror::start(listener, Archives::new(Arc::new(selection)), clients, Arc::clone(fetcher)).unwrap(), port)
}

/// One request: status, headers as text, body.
pub(crate) fn ask(port: u16, method: &str, path: &str, extra: &str) -> (u16, String, Vec<u8>) {
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
