//! An archive of the test's own: packages, a signed Release file, and an HTTP server that can be told
//! to misbehave.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime};

use hostler_runner::cache::Digest;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// How the server answers for a path.
#[derive(Clone, Debug)]
pub(crate) enum Fault {
    /// With this status.
    Status(u16),
    /// With one byte changed.
    Flipped,
    /// With the promised length, and a connection that ends after some bytes.
    Truncated(usize),
    /// As before, but only the first time.
    TruncatedOnce(usize),
    /// With some bytes and then nothing, while the connection stays.
    Stuck(usize),
    /// With so many bytes at once, and then one every 20 ms.
    Drip(usize),
    /// With another, shorter file.
    Other,
    /// With the right bytes, but the whole file whatever part is asked for.
    Rangeless,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) files: HashMap<String, Vec<u8>>,
    pub(crate) faults: HashMap<String, Fault>,
    /// Further headers of a path's answers, each with its end of line.
    pub(crate) headers: HashMap<String, String>,
    /// Requested addresses, with the range where there is one.
    pub(crate) log: Vec<String>,
}

/// The server.
pub(crate) struct Upstream {
    pub(crate) address: SocketAddr,
    pub(crate) state: Arc<Mutex<State>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Upstream {
    pub(crate) fn start() -> Self {
        Self::start_as(None)
    }

    /// One that is spoken to with TLS, with this chain of certificates and key, as files.
    pub(crate) fn start_secure(certificates: &Path, key: &Path) -> Self {
        let chain = CertificateDer::pem_file_iter(certificates).unwrap().map(Result::unwrap).collect();
        let key = PrivateKeyDer::from_pem_file(key).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let configuration = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .unwrap();
        Self::start_as(Some(Arc::new(configuration)))
    }

    fn start_as(secure: Option<Arc<rustls::ServerConfig>>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let state: Arc<Mutex<State>> = Arc::default();
        let stop = Arc::new(AtomicBool::new(false));
        let (shared, stopped) = (Arc::clone(&state), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            for connection in listener.incoming() {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let (shared, stopped) = (Arc::clone(&shared), Arc::clone(&stopped));
                let session = secure.clone().map(|with| rustls::ServerConnection::new(with).unwrap());
                // A client that goes away in the middle is what some tests are about.
                std::thread::spawn(move || {
                    let stream = connection?;
                    match session {
                        Some(session) => answer(rustls::StreamOwned::new(session, stream), &shared, &stopped),
                        None => answer(stream, &shared, &stopped),
                    }
                });
            }
        });
        Self { address, state, stop, thread: Some(thread) }
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}/debian", self.address)
    }

    pub(crate) fn fault(&self, path: &str, fault: Fault) {
        self.state.lock().unwrap().faults.insert(path.to_owned(), fault);
    }

    pub(crate) fn heal(&self) {
        self.state.lock().unwrap().faults.clear();
    }

    pub(crate) fn take_log(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().unwrap().log)
    }
}

impl Drop for Upstream {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        drop(TcpStream::connect(self.address));
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn answer(mut stream: impl Read + Write, state: &Mutex<State>, stop: &AtomicBool) -> std::io::Result<()> {
    let mut reader = BufReader::new(&mut stream);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let address = line.split(' ').nth(1).unwrap_or("").to_owned();
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':') {
            headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
        }
    }
    let range = headers.get("range").cloned();
    // A proxy is asked with the whole address.
    let path = address.strip_prefix("http://archive.test").unwrap_or(&address).to_owned();
    let (file, fault, more) = {
        let mut state = state.lock().unwrap();
        state.log.push(range.as_ref().map_or(address.clone(), |range| format!("{address} {range}")));
        let fault = state.faults.get(&path).cloned();
        if let Some(Fault::TruncatedOnce(_)) = fault {
            state.faults.remove(&path);
        }
        let more = state.headers.get(&path).cloned().unwrap_or_default();
        (state.files.get(&path).cloned(), fault, more)
    };
    let Some(mut body) = file else {
        return write!(stream, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    };
    if let Some(Fault::Status(status)) = fault {
        return write!(stream, "HTTP/1.1 {status} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    }
    let tag = format!("\"{}\"", Digest::of(&body));
    if headers.get("if-none-match") == Some(&tag) {
        return write!(stream, "HTTP/1.1 304 Not Modified\r\nETag: {tag}\r\n{more}Connection: close\r\n\r\n");
    }
    let start = (!matches!(fault, Some(Fault::Rangeless | Fault::Other)))
        .then_some(range)
        .flatten()
        .and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok())
        .filter(|start| *start < body.len());
    let total = body.len();
    let mut sent = usize::MAX;
    match fault {
        Some(Fault::Flipped) => body[total / 2] ^= 1,
        Some(Fault::Other) => body = b"<html>please log in</html>".to_vec(),
        Some(
            Fault::Truncated(count) | Fault::TruncatedOnce(count) | Fault::Stuck(count) | Fault::Drip(count),
        ) => sent = count,
        Some(Fault::Rangeless | Fault::Status(_)) | None => {}
    }
    let (status, extra) = match start {
        Some(start) => {
            body.drain(..start);
            ("206 Partial Content", format!("Content-Range: bytes {start}-{}/{total}\r\n", total - 1))
        }
        None => ("200 OK", String::new()),
    };
    write!(
        stream,
        "HTTP/1.1 {status}\r\nContent-Length: {}\r\nETag: {tag}\r\n{extra}{more}Connection: close\r\n\r\n",
        body.len()
    )?;
    stream.write_all(&body[..sent.min(body.len())])?;
    stream.flush()?;
    match fault {
        Some(Fault::Stuck(_)) => {
            for _ in 0..600 {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        Some(Fault::Drip(count)) => {
            for byte in body.iter().skip(count) {
                if stop.load(Ordering::Relaxed) {
                    break;
                }
                stream.write_all(&[*byte])?;
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        _ => {}
    }
    Ok(())
}

/// A key pair in a directory of its own; ends its agent when dropped.
pub(crate) struct Signer {
    home: tempfile::TempDir,
}

impl Signer {
    pub(crate) fn new() -> Self {
        let signer = Self { home: tempfile::tempdir().unwrap() };
        signer.gpg(&["--quick-gen-key", "archive@hostler.test", "ed25519", "sign", "never"], None);
        signer
    }

    fn gpg(&self, arguments: &[&str], input: Option<&Path>) -> Vec<u8> {
        let mut command = Command::new("gpg");
        command.arg("--homedir").arg(self.home.path());
        command.args(["--batch", "--quiet", "--pinentry-mode", "loopback", "--passphrase", ""]);
        command.args(arguments).args(input);
        let output = command.output().expect("gpg must be installed: apt-get install gnupg");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    pub(crate) fn keyring(&self) -> PathBuf {
        let path = self.home.path().join("archive.gpg");
        std::fs::write(&path, self.gpg(&["--export"], None)).unwrap();
        path
    }

    /// The same in the form of a text.
    pub(crate) fn armored_keyring(&self) -> PathBuf {
        let path = self.home.path().join("archive.asc");
        std::fs::write(&path, self.gpg(&["--armor", "--export"], None)).unwrap();
        path
    }

    pub(crate) fn sign(&self, text: &str) -> Vec<u8> {
        let path = self.home.path().join("Release");
        std::fs::write(&path, text).unwrap();
        self.gpg(&["--output", "-", "--clearsign"], Some(&path))
    }

    /// The signature alone.
    pub(crate) fn sign_apart(&self, text: &str) -> Vec<u8> {
        let path = self.home.path().join("Release");
        std::fs::write(&path, text).unwrap();
        self.gpg(&["--output", "-", "--detach-sign"], Some(&path))
    }
}

impl Drop for Signer {
    fn drop(&mut self) {
        let mut command = Command::new("gpgconf");
        command.arg("--homedir").arg(self.home.path());
        drop(command.args(["--kill", "all"]).output());
    }
}

/// A package with one file.
pub(crate) fn deb(name: &str, extra: &str, contents: &[u8]) -> Vec<u8> {
    let tar = |path: &str, bytes: &[u8]| {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, path, bytes).unwrap();
        builder.into_inner().unwrap()
    };
    let control = format!("Package: {name}\nVersion: 1\nArchitecture: amd64\n{extra}");
    let mut builder = ar::Builder::new(Vec::new());
    for (member, bytes) in [
        ("debian-binary", b"2.0\n".to_vec()),
        ("control.tar", tar("control", control.as_bytes())),
        ("data.tar", tar("contents", contents)),
    ] {
        let header = ar::Header::new(member.as_bytes().to_vec(), bytes.len() as u64);
        builder.append(&header, bytes.as_slice()).unwrap();
    }
    builder.into_inner().unwrap()
}

/// Puts an archive with the packages `apt` and `big` on the server.
pub(crate) fn publish(upstream: &Upstream, signer: &Signer, valid_for: Duration, valid_from: SystemTime) {
    publish_as("Test", upstream, signer, valid_for, valid_from);
}

/// The same, with an origin that the archive claims to be of.
pub(crate) fn publish_as(
    origin: &str,
    upstream: &Upstream,
    signer: &Signer,
    valid_for: Duration,
    valid_from: SystemTime,
) {
    let mut index = String::new();
    let mut files = HashMap::new();
    let noise: Vec<u8> =
        (0..400_000_u32).flat_map(|number| number.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    for (name, extra, contents) in
        [("apt", "Essential: yes\nDepends: big\n", &b"apt"[..]), ("big", "", noise.as_slice())]
    {
        let bytes = deb(name, extra, contents);
        let path = format!("pool/{name}_1+x_amd64.deb");
        index.push_str(&format!(
            "Package: {name}\nVersion: 1\nArchitecture: amd64\n{extra}Filename: {path}\nSize: {}\nSHA256: {}\n\n",
            bytes.len(),
            Digest::of(&bytes)
        ));
        files.insert(format!("/debian/{path}"), bytes);
    }
    let index = index.into_bytes();
    let digest = Digest::of(&index);
    // Which builds do not read.
    let translation = Digest::of(b"x");
    let date = |time: SystemTime| {
        let text = humantime::format_rfc3339_seconds(time).to_string();
        let months = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"];
        let month = months[text[5..7].parse::<usize>().unwrap() - 1];
        format!("Mon, {} {month} {} {} UTC", &text[8..10], &text[..4], &text[11..19])
    };
    let release = format!(
        "Origin: {origin}\nSuite: bookworm\nCodename: bookworm\nDate: {}\nValid-Until: {}\nAcquire-By-Hash: yes\nArchitectures: amd64\nComponents: main\nSHA256:\n {digest} {} main/binary-amd64/Packages\n {} 0 main/i18n/Translation-en\n {translation} 1 main/i18n/Translation-en.xz\n",
        date(valid_from),
        date(valid_from + valid_for),
        index.len(),
        Digest::of(b"")
    );
    let dists = "/debian/dists/bookworm";
    files.insert(format!("{dists}/InRelease"), signer.sign(&release));
    files.insert(format!("{dists}/Release.gpg"), signer.sign_apart(&release));
    files.insert(format!("{dists}/main/i18n/by-hash/SHA256/{translation}"), b"x".to_vec());
    files.insert(format!("{dists}/Release"), release.into_bytes());
    files.insert(format!("/debian/dists/bookworm/main/binary-amd64/by-hash/SHA256/{digest}"), index);
    files.insert("/debian/dists/bookworm/main/i18n/Translation-en".to_owned(), Vec::new());
    upstream.state.lock().unwrap().files = files;
}
