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

use hostler_runner::cache::{Cache, Digest, FetchOptions, Fetcher, Remote, Wanted};

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
        let endpoint = format!("http://127.0.0.1:{}", self.port);
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
        Fetcher::new(cache, FetchOptions { remote, ..World::options() }).unwrap()
    }
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
