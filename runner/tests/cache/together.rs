//! Many clients of several processes that want one large file: upstream is asked once, and nobody holds
//! the file in memory.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use hostler_runner::cache::offer::{Offer, Offered};
use hostler_runner::cache::{Cache, Clients, Digest, FetchOptions, Fetcher, Hasher, Mirror, Wanted};

const BLOCK: usize = 1 << 20;

/// Of how many MiB the file for many is. 1 GiB: `make test-cache`.
fn mebibytes() -> u64 {
    std::env::var("HOSTLER_TESTS_MEBIBYTES").map_or(192, |text| text.parse().unwrap())
}

/// Of how many MiB the file that no memory holds is. 10.1 GiB: `make test-cache`.
fn huge_mebibytes() -> u64 {
    std::env::var("HOSTLER_TESTS_HUGE_MEBIBYTES").map_or(320, |text| text.parse().unwrap())
}

/// The content that repeats, with its place at both ends of each block.
struct Block(Vec<u8>);

impl Block {
    fn new() -> Self {
        let words = (0..BLOCK as u64 / 8).map(|place| place.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        Self(words.flat_map(u64::to_le_bytes).collect())
    }

    fn number(&mut self, number: u64) -> &[u8] {
        self.0[..8].copy_from_slice(&number.to_le_bytes());
        self.0[BLOCK - 8..].copy_from_slice(&(!number).to_le_bytes());
        &self.0
    }
}

fn digest(mebibytes: u64) -> Digest {
    let (mut hasher, mut block) = (Hasher::default(), Block::new());
    (0..mebibytes).for_each(|number| hasher.update(block.number(number)));
    hasher.finish()
}

struct One(Wanted);

impl Offer for One {
    fn find(&self, path: &str) -> Option<Offered> {
        (path == "/large").then(|| Offered { wanted: self.0.clone(), local: None, modified: None })
    }
}

/// What the child does: serves the file on a port that it tells, until its input ends.
fn serve(directory: &Path) {
    let variable = |name: &str| std::env::var(name).unwrap();
    let wanted = Wanted {
        name: "large".to_owned(),
        urls: vec![variable("HOSTLER_TEST_URL")],
        size: Some(variable("HOSTLER_TEST_SIZE").parse().unwrap()),
        digest: variable("HOSTLER_TEST_DIGEST").parse().unwrap(),
    };
    let cache = Arc::new(Cache::open(directory).unwrap());
    let fetcher = Arc::new(Fetcher::new(cache, FetchOptions::default()).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    println!("port {}", listener.local_addr().unwrap().port());
    let mirror = Mirror::start(listener, One(wanted), Clients::Anyone, fetcher).unwrap();
    std::io::stdin().read_to_end(&mut Vec::new()).unwrap();
    assert_eq!(mirror.stop().failures, []);
    // Nobody reads what a test's end would print.
    std::process::exit(0);
}

/// A process that serves; it ends when this is dropped.
struct Server {
    child: Child,
    port: u16,
}

impl Server {
    fn start(directory: &Path, address: SocketAddr, size: u64, digest: Digest) -> Self {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "--nocapture", "together::many_processes_with_many_clients_ask_upstream_once"])
            .env("HOSTLER_TEST_SERVES", directory)
            .env("HOSTLER_TEST_URL", format!("http://{address}/large"))
            .env("HOSTLER_TEST_SIZE", size.to_string())
            .env("HOSTLER_TEST_DIGEST", digest.to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let port = lines
            .map(Result::unwrap)
            .find_map(|line| line.split_once("port ")?.1.parse().ok())
            .expect("the child tells its port");
        Self { child, port }
    }

    /// The most memory that it ever had, in MiB.
    fn peak(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
    }

    fn finish(mut self) {
        drop(self.child.stdin.take());
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // One that has ended is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Sends the file to whoever asks, and counts the requests.
fn upstream(mebibytes: u64) -> (SocketAddr, Arc<AtomicU64>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let requests = Arc::new(AtomicU64::new(0));
    let counted = Arc::clone(&requests);
    // It ends with the test's process.
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            counted.fetch_add(1, Ordering::Relaxed);
            std::thread::spawn(move || -> std::io::Result<()> {
                let mut reader = BufReader::new(stream.try_clone()?);
                let mut line = String::new();
                while reader.read_line(&mut line)? > 2 {
                    line.clear();
                }
                let size = mebibytes * BLOCK as u64;
                write!(stream, "HTTP/1.1 200 OK\r\nContent-Length: {size}\r\nConnection: close\r\n\r\n")?;
                let mut block = Block::new();
                (0..mebibytes).try_for_each(|number| stream.write_all(block.number(number)))
            });
        }
    });
    (address, requests)
}

/// Reads the file and checks every byte.
fn client(port: u16, mebibytes: u64) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(300))).unwrap();
    write!(stream, "GET /large HTTP/1.1\r\nHost: mirror.test\r\nConnection: close\r\n\r\n").unwrap();
    let mut reader = BufReader::with_capacity(BLOCK, stream);
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert!(line.starts_with("HTTP/1.1 200"), "{line}");
    while reader.read_line(&mut line).unwrap() > 2 {}
    let (mut found, mut block) = (vec![0; BLOCK], Block::new());
    for number in 0..mebibytes {
        reader.read_exact(&mut found).unwrap();
        assert!(found == block.number(number), "block {number} is wrong");
    }
    assert_eq!(reader.read(&mut found).unwrap(), 0);
}

#[test]
fn many_processes_with_many_clients_ask_upstream_once() {
    if let Some(directory) = std::env::var_os("HOSTLER_TEST_SERVES") {
        return serve(Path::new(&directory));
    }
    let mebibytes = mebibytes();
    let (address, requests) = upstream(mebibytes);
    let directory = tempfile::tempdir().unwrap();
    let (size, digest) = (mebibytes * BLOCK as u64, digest(mebibytes));
    let servers: Vec<Server> =
        (0..2).map(|_| Server::start(directory.path(), address, size, digest)).collect();
    std::thread::scope(|scope| {
        for server in &servers {
            for _ in 0..4 {
                scope.spawn(|| client(server.port, mebibytes));
            }
        }
    });
    assert_eq!(requests.load(Ordering::Relaxed), 1);
    let peaks: Vec<u64> = servers.iter().map(Server::peak).collect();
    println!("{mebibytes} MiB to 8 clients of 2 processes, which had at most {peaks:?} MiB of memory");
    // Far below the file, and the same for a file of any size.
    assert!(peaks.iter().all(|peak| *peak < 64), "{peaks:?} MiB");
    servers.into_iter().for_each(Server::finish);
}

#[test]
fn a_huge_file_goes_through_in_flat_memory() {
    let mebibytes = huge_mebibytes();
    let (address, requests) = upstream(mebibytes);
    let directory = tempfile::tempdir().unwrap();
    let server = Server::start(directory.path(), address, mebibytes * BLOCK as u64, digest(mebibytes));
    client(server.port, mebibytes);
    let peak = server.peak();
    println!("{mebibytes} MiB through a process that had at most {peak} MiB of memory");
    assert_eq!(requests.load(Ordering::Relaxed), 1);
    assert!(peak < 64, "{peak} MiB");
    server.finish();
}
