//! What the cache hands out on loopback, against nginx, apt-cacher-ng and squid with the same files.
//!
//! nginx is also the upstream of the others, and what the cold fetch is held against. Hostler serves a
//! mirror of it, in which every file is checked; the others check nothing.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::report::{Goal, Row, Sample, Section};
use crate::failure::{OrFail, wait_until};
use crate::place::{Place, USER};
use crate::program;

/// How much is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// MiB of the large file.
    pub large: usize,
    /// How many small files of 16 KiB.
    pub small: usize,
    /// How often each is measured.
    pub rounds: usize,
}

const CLIENTS: usize = 4;
const SMALL: usize = 16 << 10;

/// A server; it ends when this is dropped.
struct Server {
    child: Child,
    port: u16,
    /// Whether it is asked as a proxy, with the whole address.
    upstream: Option<u16>,
}

impl Drop for Server {
    fn drop(&mut self) {
        // One that has ended is as good. It is asked first, as it may have children.
        let _ = nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(self.child.id().cast_signed()),
            nix::sys::signal::Signal::SIGTERM,
        );
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.child.try_wait().is_ok_and(|ended| ended.is_none()) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    fn start(mut command: Command, port: u16, upstream: Option<u16>) -> Self {
        let name = command.get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().or_fail(format_args!("starting {name}: run tests/setup.sh bench"));
        let server = Self { child, port, upstream };
        wait_until(format_args!("the port of {name}"), Duration::from_secs(10), || {
            TcpStream::connect(("127.0.0.1", port)).is_ok()
        });
        server
    }

    /// Fetches all paths, each client its part over one connection; the bytes that came.
    fn fetch(&self, paths: &[String]) -> usize {
        self.fetch_into(paths, None)
    }

    /// The same; what comes is kept in a folder, where there is one.
    fn fetch_into(&self, paths: &[String], folder: Option<&Path>) -> usize {
        let part = paths.len().div_ceil(CLIENTS).max(1);
        std::thread::scope(|scope| {
            let clients: Vec<_> =
                paths.chunks(part).map(|paths| scope.spawn(move || self.client(paths, folder))).collect();
            clients.into_iter().map(|client| client.join().ok().or_fail("a client")).sum()
        })
    }

    fn client(&self, paths: &[String], folder: Option<&Path>) -> usize {
        let connect = || {
            let stream = TcpStream::connect(("127.0.0.1", self.port)).or_fail("connecting");
            stream.set_read_timeout(Some(Duration::from_secs(60))).or_fail("a limit");
            stream.set_nodelay(true).or_fail("an option");
            stream
        };
        let mut stream = connect();
        let mut buffer = vec![0; 1 << 18];
        let mut all = 0;
        for path in paths {
            let address = self.upstream.map_or(path.clone(), |port| format!("http://127.0.0.1:{port}{path}"));
            let request = format!("GET {address} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n");
            // A server may end a kept connection before it answers.
            let answered = (0..3).find_map(|_| {
                let asked = stream.write_all(request.as_bytes()).ok();
                let mut kept = folder.map(|folder| {
                    let name = path.rsplit('/').next().or_fail("a name");
                    fs::File::create(folder.join(name)).or_fail("making a file")
                });
                let length = asked.and_then(|()| body(&mut stream, &mut buffer, kept.as_mut()));
                if length.is_none() {
                    stream = connect();
                }
                length
            });
            all += answered.or_fail(format_args!("an answer of port {} for {address}", self.port));
        }
        all
    }
}

/// Reads one answer, and keeps its body where there is a file for it; the bytes of that. `None` when there is none.
fn body(stream: &mut TcpStream, buffer: &mut [u8], mut kept: Option<&mut fs::File>) -> Option<usize> {
    let mut filled = 0;
    let end = loop {
        let count = stream.read(&mut buffer[filled..]).ok().filter(|count| *count > 0)?;
        filled += count;
        if let Some(end) = buffer[..filled].windows(4).position(|window| window == b"\r\n\r\n") {
            break end + 4;
        }
    };
    let head = String::from_utf8_lossy(&buffer[..end]).to_ascii_lowercase();
    assert!(head.starts_with("http/1.1 200"), "{head}");
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse().ok());
    let length: usize = length.or_fail("a length");
    let mut keep = |bytes: &[u8]| {
        if let Some(kept) = &mut kept {
            kept.write_all(bytes).or_fail("keeping a body");
        }
    };
    keep(&buffer[end..filled]);
    let mut came = filled - end;
    while came < length {
        let count = stream.read(buffer).or_fail("reading a body");
        assert!(count > 0, "the server hung up in the middle");
        keep(&buffer[..count]);
        came += count;
    }
    Some(length)
}

/// One that is free, and below those that the kernel gives away: apt-cacher-ng takes no others.
fn free_port() -> u16 {
    let start = 20_000 + u16::try_from(std::process::id() % 5000).unwrap_or(0);
    let is_free = |port: &u16| TcpListener::bind(("127.0.0.1", *port)).is_ok();
    (start..32_000).find(is_free).or_fail("a free port")
}

/// Writes the files, with what makes a release tree of them.
fn make_tree(root: &Path, size: Size) -> (String, Vec<String>) {
    let write = |path: &str, bytes: &[u8]| {
        let place = root.join(path);
        fs::create_dir_all(place.parent().or_fail("a folder")).or_fail("making a folder");
        fs::write(place, bytes).or_fail("writing a file");
    };
    let noise: Vec<u8> =
        (0..1_u32 << 18).flat_map(|word| word.wrapping_mul(2_654_435_761).to_le_bytes()).collect();
    write("tree/pool/large_1_all.deb", &noise.repeat(size.large));
    let names: Vec<String> = (0..size.small).map(|number| format!("pool/small{number}_1_all.deb")).collect();
    for (name, start) in names.iter().zip((0..).step_by(4)) {
        write(&format!("tree/{name}"), &noise[start % SMALL..][..SMALL]);
    }
    write("tree/repodata/primary.xml", b"<metadata/>");
    let digest = |path: &str| -> String {
        let said = program::succeed("sha256sum", [root.join("tree").join(path)]);
        said.split(' ').next().or_fail("a digest").to_owned()
    };
    let primary = digest("repodata/primary.xml");
    let repomd = format!(
        "<repomd><data type=\"primary\"><checksum type=\"sha256\">{primary}</checksum><location href=\"repodata/primary.xml\"/><size>11</size></data></repomd>"
    );
    write("tree/repodata/repomd.xml", repomd.as_bytes());
    let mut info = "[checksums]\n".to_owned();
    for name in names.iter().map(String::as_str).chain(["pool/large_1_all.deb"]) {
        info.push_str(&format!("{name} = sha256:{}\n", digest(name)));
    }
    write("tree/.treeinfo", info.as_bytes());
    let paths = names.iter().map(|name| format!("/tree/{name}")).collect();
    ("/tree/pool/large_1_all.deb".to_owned(), paths)
}

fn nginx(place: &Place, files: &Path) -> Server {
    let (port, home) = (free_port(), place.directory("nginx"));
    let configuration = home.join("nginx.conf");
    let text = format!(
        "daemon off; worker_processes 2; user root; pid {0}/pid; error_log {0}/error.log;\nevents {{}}\nhttp {{ access_log off; sendfile on; tcp_nopush on; keepalive_requests 100000; client_body_temp_path {0}/b; proxy_temp_path {0}/p; fastcgi_temp_path {0}/f; uwsgi_temp_path {0}/u; scgi_temp_path {0}/s;\nserver {{ listen 127.0.0.1:{port}; root {1}; }} }}\n",
        home.display(),
        files.display()
    );
    fs::write(&configuration, text).or_fail("writing nginx's configuration");
    let mut command = place.command("nginx");
    command.arg("-p").arg(&home).arg("-c").arg(&configuration);
    Server::start(command, port, None)
}

fn apt_cacher(place: &Place, upstream: u16) -> Server {
    let port = free_port();
    let (cache, logs) = (place.directory_of_user("acng-cache"), place.directory_of_user("acng-logs"));
    // Its own has a file that only its own user may read.
    let configuration = place.directory_of_user("acng-configuration");
    fs::write(configuration.join("acng.conf"), "").or_fail("writing apt-cacher-ng's configuration");
    let mut command = place.command_of_user("/usr/sbin/apt-cacher-ng");
    command.arg("-c").arg(&configuration);
    command.args(["ForeGround=1".to_owned(), format!("Port={port}"), "BindAddress=127.0.0.1".to_owned()]);
    command.arg(format!("CacheDir={}", cache.display())).arg(format!("LogDir={}", logs.display()));
    command.args(["SocketPath=", "PidFile=", "VerboseLog=0", "AllowUserPorts=0"]);
    Server::start(command, port, Some(upstream))
}

fn squid(place: &Place, upstream: u16) -> Server {
    let (port, home) = (free_port(), place.directory_of_user("squid"));
    let configuration = home.join("squid.conf");
    let text = format!(
        "http_port 127.0.0.1:{port}\nhttp_access allow all\ncache_dir aufs {0}/cache 2000 16 256\nmaximum_object_size 2 GB\ncache_mem 64 MB\npid_filename {0}/pid\ncache_log {0}/cache.log\naccess_log none\ncoredump_dir {0}\npinger_enable off\nrefresh_pattern . 1440 100% 1440 override-expire ignore-reload\nshutdown_lifetime 1 seconds\n",
        home.display()
    );
    fs::write(&configuration, text).or_fail("writing squid's configuration");
    let command = || {
        let mut command = place.command_of_user("/usr/sbin/squid");
        command.arg("-N").arg("-f").arg(&configuration);
        command
    };
    let made = command().arg("-z").stdout(Stdio::null()).stderr(Stdio::null()).status();
    assert!(made.or_fail("starting squid: run tests/setup.sh bench").success(), "squid made no cache");
    Server::start(command(), port, Some(upstream))
}

/// Measures.
///
/// # Panics
/// When anything does not go as it should.
#[must_use]
pub fn measure(place: &Place, size: Size) -> Section {
    let files = place.directory("files");
    fs::set_permissions(place.root(), fs::Permissions::from_mode(0o755)).or_fail("opening the place");
    let (large, small) = make_tree(&files, size);
    let nginx = nginx(place, &files);

    // Cold: one sync, which fetches, checks and keeps all, against a download that keeps it without looking at it.
    let mirror = place.directory("mirror");
    chown(&mirror, Some(USER), Some(USER)).or_fail("giving the mirror to its user");
    let everything: Vec<String> = small.iter().cloned().chain([large.clone()]).collect();
    let total = nginx.fetch(&everything);
    let folder = place.directory("kept");
    // What was written for the measurement is on the disk before it begins.
    program::succeed("sync", [Path::new("--file-system"), &folder]);
    let begun = Instant::now();
    assert_eq!(nginx.fetch_into(&everything, Some(&folder)), total);
    program::succeed("sync", [Path::new("--file-system"), &folder]);
    let bare = begun.elapsed();
    let mut sync = place.command(program::path("hostler"));
    sync.args(["mirror", "sync", "rpm", "--name", "tree", "--images", "--parallel", "4", "--source"]);
    sync.arg(format!("http://127.0.0.1:{}/tree", nginx.port)).arg("--into").arg(&mirror);
    let begun = Instant::now();
    let synced = sync.output().or_fail("syncing");
    let cold = begun.elapsed();
    assert!(synced.status.success(), "{}", String::from_utf8_lossy(&synced.stderr));

    let port = free_port();
    let mut serve = place.command(program::path("hostler"));
    serve.args(["mirror", "serve", "--listen", &format!("127.0.0.1:{port}")]).arg(&mirror);
    let hostler = Server::start(serve, port, None);
    let (apt_cacher, squid) = (apt_cacher(place, nginx.port), squid(place, nginx.port));
    let servers =
        [("Hostler", &hostler), ("nginx", &nginx), ("apt-cacher-ng", &apt_cacher), ("squid", &squid)];
    let mut samples: [[Sample; 2]; 4] = Default::default();
    let larges = vec![large; CLIENTS];
    for (_, server) in servers {
        assert_eq!(server.fetch(&everything), total);
    }
    for round in 0..size.rounds {
        for turn in 0..servers.len() {
            let which = (round + turn) % servers.len();
            for (paths, sample) in [&larges, &small].into_iter().zip(&mut samples[which]) {
                let begun = Instant::now();
                servers[which].1.fetch(paths);
                sample.push(begun.elapsed());
            }
        }
    }
    let mut rows = Vec::new();
    let what =
        [format!("{CLIENTS} clients, {} MiB each", size.large), format!("{} files of 16 KiB", size.small)];
    for (kind, what) in what.iter().enumerate() {
        for (which, goal) in [(1, Goal::AtMost(1.0)), (2, Goal::None), (3, Goal::None)] {
            let (own, other) = (samples[0][kind].median(), samples[which][kind].median());
            rows.push(Row::times(what, own, servers[which].0, other, goal));
        }
    }
    let status = fs::read_to_string(format!("/proc/{}/status", hostler.child.id())).or_fail("its memory");
    let peak =
        status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.split_whitespace().next()?.parse().ok());
    let peak: f64 = peak.or_fail("its peak");
    rows.push(Row::number("the server's memory, at most", peak / 1024.0, "MiB", Goal::Number(64.0)));
    rows.push(Row::times(
        "a cold sync of all, checked and on the disk",
        cold,
        "download to the disk, unchecked",
        bare,
        Goal::AtMost(1.03),
    ));
    Section {
        title: "The cache on loopback".to_owned(),
        how: format!(
            "Files that each server has already, over {CLIENTS} kept connections. Medians of {} rounds, all servers by \
             turns. Hostler has checked every byte it serves since it was last changed; the others check nothing.",
            size.rounds
        ),
        rows,
        notes: Vec::new(),
    }
}
