//! What a guest's mirror hands out.

use std::net::{TcpListener, TcpStream};

use hostler_runner::beside::Beside;
use hostler_runner::cache::offer::{Local, Offer, Offered};
use hostler_runner::cache::{Clients, Digest, Mirror, Refusal, Wanted};

use super::world::{BIG, World, ask, serve_guest};

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
fn a_guest_cannot_fill_the_hosts_disk_with_what_the_archive_has() {
    let world = World::new();
    let fetcher = world.fetcher();
    let selection = world.select(&fetcher).unwrap();
    let small = "/debian/pool/apt_1+x_amd64.deb";
    let index = "/debian/dists/bookworm/main/binary-amd64/Packages";
    let big = world.upstream.state.lock().unwrap().files[BIG].len() as u64;
    world.upstream.take_log();
    let (mirror, port) = serve_guest(selection, big, &fetcher);
    // What is there already costs nothing, and what was paid for costs nothing again.
    assert_eq!(ask(port, "GET", index, "").0, 200);
    assert_eq!(ask(port, "GET", BIG, "").0, 200);
    assert_eq!(ask(port, "GET", BIG, "").0, 200);
    // Nor does asking for what nothing names keep anybody from hearing of it.
    for at in 0..250 {
        assert_eq!(ask(port, "GET", &format!("/debian/pool/none-{at}"), "").0, 404);
    }
    let (status, head, body) = ask(port, "GET", small, "");
    assert_eq!((status, body.len()), (507, 0));
    assert!(head.contains("more than may be downloaded for this build"), "{head}");
    assert_eq!(world.upstream.take_log(), [BIG]);
    let failures = mirror.stop().failures;
    assert!(failures.len() < 200, "{}", failures.len());
    let last = failures.last().expect("failures");
    assert_eq!(last.refusal, Refusal::Limit);
    assert!(last.reason.contains("raise [image] size"), "{}", last.reason);
    // Another guest has an allowance of its own.
    let (_other, port) = serve_guest(world.select(&fetcher).unwrap(), big, &fetcher);
    assert_eq!(ask(port, "GET", small, "").0, 200);
}

struct Tree(Local, Digest);

impl Offer for Tree {
    fn find(&self, path: &str) -> Option<Offered> {
        // As a tree's own list of images, which tells no sizes.
        let wanted = Wanted { name: path.to_owned(), urls: Vec::new(), size: None, digest: self.1 };
        (path == "/image").then(|| Offered { wanted, local: Some(self.0.clone()), modified: None })
    }
}

#[test]
fn what_lies_on_this_host_is_taken_into_the_cache_within_the_same_limit() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("image"), [7; 1000]).unwrap();
    let beside = Beside::of(&folder.path().join("recipe.toml")).unwrap();
    let world = World::new();
    for (limit, status) in [(999, 507), (1000, 200)] {
        let tree = Tree(Local { folder: beside.clone(), path: "image".into() }, Digest::of(&[7; 1000]));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let _mirror = Mirror::start(listener, tree, Clients::Guest { limit }, world.fetcher()).unwrap();
        assert_eq!(ask(port, "GET", "/image", "").0, status, "{limit}");
    }
}
