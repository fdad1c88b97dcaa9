//! The store that a fleet shares, on a real S3-compatible server: what one host fetched no other fetches,
//! and nothing that goes wrong with it goes wrong with a build.
//!
//! The server is `moto` from PyPI, in a virtual environment below cargo's target directory, so that only
//! the first run installs it. It has no relation to the client's library.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use hostler_runner::cache::{Cache, Digest, FetchOptions, Fetcher, LeastPace, Remote, Wanted};
use hostler_runner::cancel::Cancel;
use hostler_runner::event::{Silent, Stage};
use hostler_runner::stop::Stop;

use super::upstream::Upstream;
use super::world::World;

/// The server's program.
fn moto() -> PathBuf {
    let venv = Path::new(env!("CARGO_TARGET_TMPDIR")).join("moto");
    let program = venv.join("bin/moto_server");
    if !program.exists() {
        let run = |command: &mut Command| {
            let output = command.output().expect("python3 with venv: apt-get install python3-venv");
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        };
        run(Command::new("python3").args(["-m", "venv"]).arg(&venv));
        let packages = ["moto==5.2.5", "flask", "flask-cors", "py-partiql-parser"];
        run(Command::new(venv.join("bin/pip")).args(["install", "--quiet"]).args(packages));
    }
    program
}

/// A server with a bucket; it ends when this is dropped.
struct Store {
    child: Child,
    port: u16,
}

impl Store {
    fn start() -> Self {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let child = Command::new(moto())
            .args(["--host", "127.0.0.1", "--port", &port.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let store = Self { child, port };
        let deadline = Instant::now() + Duration::from_secs(60);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            assert!(Instant::now() < deadline, "the server does not come up");
            std::thread::sleep(Duration::from_millis(50));
        }
        assert_eq!(store.ask("PUT", "/fleet", b""), 200);
        store
    }

    fn ask(&self, method: &str, path: &str, body: &[u8]) -> u16 {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let length = body.len();
        write!(
            stream,
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nAuthorization: AWS4-HMAC-SHA256 Credential=k/20260101/us-east-1/s3/aws4_request\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        stream.write_all(body).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        String::from_utf8_lossy(&answer).split(' ').nth(1).unwrap().parse().unwrap()
    }

    /// Another host of the fleet, with a cache of its own.
    fn host(&self, directory: &Path) -> Fetcher {
        host(self.port, directory, World::options())
    }
}

/// A host whose shared store is behind this port.
fn host(port: u16, directory: &Path, options: FetchOptions) -> Fetcher {
    let endpoint = format!("http://127.0.0.1:{port}");
    let variable = |name: &str| {
        Some(match name {
            "HOSTLER_STORE" => "s3://fleet/contents".to_owned(),
            "AWS_ENDPOINT_URL" => endpoint.clone(),
            "AWS_ACCESS_KEY_ID" | "AWS_SECRET_ACCESS_KEY" => "test".to_owned(),
            _ => return None,
        })
    };
    let remote = Remote::of_environment(variable).unwrap();
    let cache = Arc::new(Cache::open(directory).unwrap());
    Fetcher::new(cache, FetchOptions { remote, ..options }).unwrap()
}

impl Drop for Store {
    fn drop(&mut self) {
        // One that has ended is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn what_one_host_fetched_no_other_fetches_and_a_poisoned_lost_or_absent_store_is_harmless() {
    let upstream = Upstream::start();
    // More than one part of an upload.
    let body: Vec<u8> = (0..3_000_000_u32).flat_map(u32::to_le_bytes).collect();
    upstream.state.lock().unwrap().files.insert("/large".to_owned(), body.clone());
    let wanted = Wanted {
        name: "large".to_owned(),
        urls: vec![format!("http://{}/large", upstream.address)],
        size: Some(body.len() as u64),
        digest: Digest::of(&body),
    };
    let mut store = Store::start();
    // Fetches on a new host; how often upstream was asked, and what was exchanged with the store.
    let fetch = |store: &Store| {
        let directory = tempfile::tempdir().unwrap();
        let fetcher = store.host(directory.path());
        assert!(fetcher.fetch(&wanted).unwrap() == body, "wrong bytes");
        fetcher.settle(Duration::from_secs(60));
        let exchanged = fetcher.counted().remote;
        (upstream.take_log().len(), exchanged.taken, exchanged.given, exchanged.wrong)
    };
    assert_eq!(fetch(&store), (1, 0, 1, 0));
    assert_eq!(fetch(&store), (0, 1, 0, 0));

    let name = wanted.digest.to_string();
    let path = format!("/fleet/contents/sha256/{}/{name}", &name[..2]);
    for poison in [b"poison".to_vec(), vec![0; body.len()], vec![7; body.len() + 9]] {
        assert_eq!(store.ask("PUT", &path, &poison), 200);
        assert_eq!(fetch(&store), (1, 0, 1, 1), "{} bytes", poison.len());
        assert_eq!(fetch(&store), (0, 1, 0, 0), "it was not put right");
    }
    assert_eq!(store.ask("DELETE", &path, b""), 204);
    assert_eq!(fetch(&store), (1, 0, 1, 0));

    // The whole service goes away.
    store.child.kill().unwrap();
    store.child.wait().unwrap();
    let directory = tempfile::tempdir().unwrap();
    let fetcher = store.host(directory.path());
    assert!(fetcher.fetch(&wanted).unwrap() == body);
    fetcher.settle(Duration::from_secs(60));
    assert!(fetcher.counted().remote.failures > 0);
    assert_eq!(upstream.take_log().len(), 1);
}

/// A server that takes what it is sent and answers that with nothing; asked for a file, it sends this and
/// then so many bytes, one every 20 ms.
fn hanging(answer: &'static str, drips: usize) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    // It ends with the test's process.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            std::thread::spawn(move || -> std::io::Result<()> {
                let mut stream = stream?;
                let mut bytes = [0; 4096];
                while stream.read(&mut bytes)? > 0 {
                    if bytes.starts_with(b"GET") {
                        stream.write_all(answer.as_bytes())?;
                        for byte in b"x".repeat(drips) {
                            stream.write_all(&[byte])?;
                            std::thread::sleep(Duration::from_millis(20));
                        }
                    }
                }
                Ok(())
            });
        }
    });
    port
}

fn files(upstream: &Upstream, count: u32) -> Vec<Wanted> {
    let file = |number: u32| {
        let body = number.to_le_bytes().repeat(9000);
        let name = format!("/{number}");
        let wanted = Wanted {
            urls: vec![format!("http://{}{name}", upstream.address)],
            size: Some(body.len() as u64),
            digest: Digest::of(&body),
            name: name.clone(),
        };
        upstream.state.lock().unwrap().files.insert(name, body);
        wanted
    };
    (0..count).map(file).collect()
}

#[test]
fn a_store_that_takes_nothing_holds_nobody_and_nothing_piles_up() {
    let upstream = Upstream::start();
    let wanted = files(&upstream, 100);
    let port = hanging("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", 0);
    let directory = tempfile::tempdir().unwrap();
    let fetcher = host(port, directory.path(), World::options());
    let begun = Instant::now();
    fetcher.fetch_all(wanted, Stage::Fetch, &Silent).unwrap();
    // The queue has an end.
    let ungiven = fetcher.counted().remote.ungiven;
    assert_eq!(ungiven, 100 - 64);
    assert_eq!(fetcher.settle(Duration::from_secs(1)), 100);
    assert!(begun.elapsed() < Duration::from_secs(25), "it was waited for");
    assert_eq!((fetcher.counted().remote.given, upstream.take_log().len()), (0, 100));

    // A wish to stop is heard at once.
    let cancel = Arc::new(Cancel::new().unwrap());
    let other = tempfile::tempdir().unwrap();
    let stop = Stop::new(Arc::clone(&cancel));
    let fetcher = host(port, other.path(), FetchOptions { stop, ..World::options() });
    fetcher.fetch_all(files(&upstream, 4), Stage::Fetch, &Silent).unwrap();
    let begun = Instant::now();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_millis(300));
            cancel.cancel();
        });
        assert_eq!(fetcher.settle(Duration::from_secs(60)), 4);
    });
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[test]
fn a_store_that_drips_is_left_alone() {
    let upstream = Upstream::start();
    let wanted = files(&upstream, 4);
    let port = hanging(
        "HTTP/1.1 200 OK\r\nContent-Length: 36000\r\nLast-Modified: Mon, 06 Jan 2020 10:00:00 GMT\r\nETag: \"x\"\r\n\r\n",
        3000,
    );
    let directory = tempfile::tempdir().unwrap();
    let least_pace = LeastPace { bytes: 64 << 10, within: Duration::from_millis(400) };
    let fetcher = host(port, directory.path(), FetchOptions { least_pace, parallel: 1, ..World::options() });
    let begun = Instant::now();
    fetcher.fetch_all(wanted, Stage::Fetch, &Silent).unwrap();
    assert!(begun.elapsed() < Duration::from_secs(20), "it was waited for");
    // Three times is enough.
    assert_eq!((fetcher.counted().remote.failures, upstream.take_log().len()), (3, 4));
}
