//! What clients of the mirror do with a connection, and what they cannot do.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::{Duration, Instant};

use super::world::{BIG, World, ask};

fn connect(port: u16) -> TcpStream {
    let stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

fn read_all(stream: &mut TcpStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).unwrap();
    bytes
}

fn count(bytes: &[u8], what: &[u8]) -> usize {
    bytes.windows(what.len()).filter(|window| *window == what).count()
}

#[test]
fn requests_that_come_at_once_or_in_crumbs_are_answered_in_their_order() {
    let world = World::new();
    let fetcher = world.fetcher();
    let (mirror, port) = world.mirror(&fetcher);
    let original = world.upstream.state.lock().unwrap().files[BIG].clone();
    // apt sends several without waiting.
    let mut stream = connect(port);
    let get = |path: &str, extra: &str| format!("GET {path} HTTP/1.1\r\nHost: x\r\n{extra}\r\n");
    let many = [
        get("/debian/pool/apt_1+x_amd64.deb", ""),
        get("/nothing", ""),
        get(BIG, ""),
        get(BIG, "Range: bytes=5-9\r\nConnection: close\r\n"),
    ];
    stream.write_all(many.concat().as_bytes()).unwrap();
    let bytes = read_all(&mut stream);
    assert_eq!(count(&bytes, b"HTTP/1.1 200 OK\r\n"), 2);
    assert_eq!(count(&bytes, b"HTTP/1.1 404 Not Found\r\n"), 1);
    assert_eq!(count(&bytes, &original), 1);
    assert!(bytes.ends_with(&[b"\r\n\r\n", &original[5..10]].concat()));
    // Others send a byte at a time.
    let mut stream = connect(port);
    stream.set_nodelay(true).unwrap();
    for byte in get(BIG, "Connection: close\r\n").bytes() {
        stream.write_all(&[byte]).unwrap();
    }
    assert!(read_all(&mut stream).ends_with(&original));
    let report = mirror.stop();
    assert_eq!((report.requests, report.failures.len()), (5, 1));
    assert_eq!(report.served_bytes, world.apt().len() as u64 + 2 * original.len() as u64 + 5);
}

#[test]
fn several_parts_of_a_file_come_in_one_answer() {
    let world = World::new();
    let fetcher = world.fetcher();
    let (_mirror, port) = world.mirror(&fetcher);
    let original = world.upstream.state.lock().unwrap().files[BIG].clone();
    let (status, head, body) = ask(port, "GET", BIG, "Range: bytes=0-99,1000-1999,-7\r\n");
    assert_eq!(status, 206);
    let boundary = head.split("boundary=").nth(1).unwrap().lines().next().unwrap();
    assert!(head.contains(&format!("content-length: {}\r\n", body.len())), "{head}");
    let separator = format!("\r\n--{boundary}");
    let mut parts = Vec::new();
    let mut rest = body.as_slice();
    while let Some(start) = rest.windows(separator.len()).position(|window| window == separator.as_bytes()) {
        parts.push(&rest[..start]);
        rest = &rest[start + separator.len()..];
    }
    assert_eq!(rest, b"--\r\n");
    let ends = [&original[..100], &original[1000..2000], &original[original.len() - 7..]];
    assert_eq!(parts.len(), 4);
    for (part, end) in parts[1..].iter().zip(ends) {
        let head = part.windows(4).position(|window| window == b"\r\n\r\n").unwrap();
        assert!(part[head + 4..] == *end);
    }
}

#[test]
fn what_is_no_request_is_refused_and_the_others_are_answered_meanwhile() {
    let world = World::new();
    let fetcher = world.fetcher();
    let (mirror, port) = world.mirror(&fetcher);
    let idle: Vec<TcpStream> = (0..100).map(|_| connect(port)).collect();
    // One that begins and says no more, one that never reads.
    let mut begun = connect(port);
    begun.write_all(b"GET /debian").unwrap();
    let mut deaf = connect(port);
    deaf.write_all(format!("GET {BIG} HTTP/1.1\r\n\r\n").repeat(50).as_bytes()).unwrap();
    for (rubbish, status) in [
        (b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03".to_vec(), "400"),
        (b"a".repeat(40_000), "431"),
        (b"POST / HTTP/1.1\r\nContent-Length: 40\r\n\r\nGET /secret HTTP/1.1\r\n".to_vec(), "405"),
        (b"GET http://other.test HTTP/1.1\r\nConnection: close\r\n\r\n".to_vec(), "404"),
    ] {
        let mut stream = connect(port);
        stream.write_all(&rubbish).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let said = String::from_utf8_lossy(&read_all(&mut stream)).into_owned();
        assert!(said.starts_with(&format!("HTTP/1.1 {status} ")), "{said}");
        assert_eq!(count(said.as_bytes(), b"HTTP/1.1"), 1, "{said}");
    }
    assert_eq!(ask(port, "GET", BIG, "").0, 200);
    // None of them keeps the mirror from stopping.
    let began = Instant::now();
    drop(mirror.stop());
    assert!(began.elapsed() < Duration::from_secs(10));
    drop((idle, begun, deaf));
}
