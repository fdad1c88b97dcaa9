//! Clients that misbehave harm nobody else; clients in other languages are understood.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::{Duration, Instant};

use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::{OrFail, wait_until};
use hostler_tests::patience::stretched;
use hostler_tests::place::USER;
use hostler_tests::wire::Client;
use hostler_tests::{probe, program, scenario};
use serde_json::json;

const INFO: &[u8] = b"{\"method\":\"org.varlink.service.GetInfo\"}\0";

/// Fails the test when another client has to wait for a second.
#[track_caller]
fn assert_answers(daemon: &Daemon<'_>) {
    let asked = Instant::now();
    let _ = daemon.status();
    assert!(
        asked.elapsed() < stretched(Duration::from_secs(1)),
        "another client waited {:?}",
        asked.elapsed()
    );
}

/// Whether the daemon hangs up within a time; what it says before is thrown away.
fn hangs_up(stream: &UnixStream, within: Duration) -> bool {
    stream.set_read_timeout(Some(stretched(within))).or_fail("setting a timeout");
    let mut buffer = vec![0u8; 64 * 1024];
    let mut reader = stream;
    loop {
        match reader.read(&mut buffer) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

#[test]
fn what_is_no_message_is_dropped() {
    scenario::privileged("rubbish", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let before = probe::descriptors(daemon.pid());
        let deep =
            format!(r#"{{"method":"org.hostler.Watchdog.Status","parameters":{{"a":{}"#, "[".repeat(30_000));
        let long = format!(r#"{{"method":"{}"}}"#, "x".repeat(64 * 1024 + 1));
        let endless = vec![b'x'; 64 * 1024 + 1];
        let messages: [&[u8]; 9] = [
            b"\0",
            b"GET / HTTP/1.1\r\n\r\n\0",
            b"{}\0",
            b"{\"method\":7}\0",
            b"\xff\xfe\0",
            b"{\"method\":\"x\",\"parameters\":[]}\0",
            &[deep.as_bytes(), b"\0"].concat(),
            &[long.as_bytes(), b"\0"].concat(),
            &endless,
        ];
        for as_root in [true, false] {
            for message in messages {
                let mut client =
                    if as_root { daemon.client() } else { Client::connect_as(USER, &daemon.socket()) };
                // It may hang up before all is sent.
                let _ = client.stream.write_all(message);
                let shown = String::from_utf8_lossy(&message[..message.len().min(40)]);
                assert!(hangs_up(&client.stream, Duration::from_secs(5)), "not dropped: {shown:?}");
            }
        }
        // Well-formed calls of what is not there are answered, and the connection goes on.
        let mut client = daemon.client();
        for (method, error) in [
            ("org.hostler.Watchdog.Nothing", "org.varlink.service.MethodNotFound"),
            ("org.example.Nothing", "org.varlink.service.InterfaceNotFound"),
            ("nothing", "org.varlink.service.MethodNotFound"),
        ] {
            client.send(&json!({ "method": method }), &[]).or_fail("sending");
            assert_eq!(client.receive().or_fail("an answer")["error"], error);
        }
        drop(client);
        assert_answers(&daemon);
        wait_until("as few descriptors as before", Duration::from_secs(5), || {
            probe::descriptors(daemon.pid()) <= before + 1
        });
    });
}

#[test]
fn half_a_message_is_dropped_in_time_and_holds_nobody_up() {
    scenario::privileged("half", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let silent = daemon.client();
        let mut half = daemon.client();
        half.stream.write_all(&INFO[..20]).or_fail("sending half a message");
        let mut slow = daemon.client();
        let begun = Instant::now();
        // A byte now and then does not buy more time.
        while begun.elapsed() < Duration::from_secs(9) {
            if slow.stream.write_all(b" ").is_err() {
                break;
            }
            assert_answers(&daemon);
            std::thread::sleep(Duration::from_millis(300));
        }
        assert!(hangs_up(&half.stream, Duration::from_secs(4)), "half a message is kept for ever");
        assert!(hangs_up(&slow.stream, Duration::from_secs(4)), "a slow message is kept for ever");
        // Nothing at all may take longer: a client that connects early is no enemy.
        assert!(!hangs_up(&silent.stream, Duration::from_millis(100)));
    });
}

#[test]
fn a_flood_of_calls_is_bounded_and_holds_nobody_up() {
    scenario::privileged("flood", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        // A million calls that nobody reads the answers of.
        let flood = daemon.client().stream;
        let chunk = INFO.repeat(1000);
        let mut writer = flood.try_clone().or_fail("another handle of the socket");
        writer.set_write_timeout(Some(stretched(Duration::from_secs(30)))).or_fail("setting a timeout");
        let sender =
            std::thread::spawn(move || (0..1000).take_while(|_| writer.write_all(&chunk).is_ok()).count());
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(2) {
            assert_answers(&daemon);
            std::thread::sleep(Duration::from_millis(50));
        }
        // One that reads is answered to the last call, in order.
        let mut reader = daemon.client();
        let count = 20_000;
        let mut writer = reader.stream.try_clone().or_fail("another handle of the socket");
        let second = std::thread::spawn(move || writer.write_all(&INFO.repeat(count)).is_ok());
        let mut answers = 0;
        let mut buffer = vec![0u8; 64 * 1024];
        while answers < count {
            let length = reader.stream.read(&mut buffer).or_fail("answers");
            assert_ne!(length, 0, "hung up after {answers} answers");
            answers += buffer[..length].iter().filter(|byte| **byte == 0).count();
            if answers % 4000 < 200 {
                assert_answers(&daemon);
            }
        }
        assert_eq!(answers, count);
        assert!(second.join().is_ok_and(|sent| sent));
        let status = fs::read_to_string(format!("/proc/{}/status", daemon.pid())).or_fail("its status");
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).or_fail("its peak memory");
        let peak: u64 = peak.trim().trim_end_matches(" kB").parse().or_fail("its peak memory");
        println!("hostlerd's peak memory under a flood of calls: {} MiB", peak / 1024);
        assert!(peak < 64 * 1024, "{peak} KiB");
        // Whoever does not read is dropped within seconds, so its sender ends.
        let sent = sender.join().unwrap_or(usize::MAX);
        assert!(sent < 1000, "a million calls were taken in without one answer being read");
        drop(flood);
        drop(reader);
    });
}

#[test]
fn descriptors_of_every_kind_are_taken_and_closed() {
    scenario::privileged("descriptors", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let _ = daemon.status();
        let before = probe::descriptors(daemon.pid());
        let (pipe, _writer) = std::io::pipe().or_fail("a pipe");
        let (socket, _other) = UnixStream::pair().or_fail("a socket");
        let odd: Vec<OwnedFd> = vec![
            pipe.into(),
            socket.into(),
            File::open("/proc/self/mountinfo").or_fail("mountinfo").into(),
            File::open("/proc/self/ns/mnt").or_fail("a namespace").into(),
            File::open("/dev/full").or_fail("a device").into(),
            rustix::fs::open("/", rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).or_fail("a path"),
            rustix::fs::memfd_create("odd", rustix::fs::MemfdFlags::CLOEXEC).or_fail("a memfd"),
            daemon.client().stream.into(),
        ];
        let mut client = Client::connect_as(USER, &daemon.socket());
        let calls = [
            ("OpenLease", json!({ "name": "odd", "owner": 0 })),
            ("Adopt", json!({ "lease": 1, "epoch": 1, "process": 0 })),
            ("RegisterLoop", json!({ "lease": 1, "epoch": 1, "device": 0 })),
            ("ClaimDirectory", json!({ "lease": 1, "epoch": 1, "directory": 0, "scratch": true })),
            ("OpenLease", json!({ "name": "odd", "owner": 4_000_000_000u32 })),
        ];
        for descriptor in &odd {
            for (method, parameters) in &calls {
                let answer = client.call(method, parameters, &[descriptor.as_fd()]);
                assert!(answer.is_err(), "{method} took {descriptor:?}");
            }
        }
        let all: Vec<BorrowedFd<'_>> = odd.iter().map(AsFd::as_fd).collect();
        client.call("Status", &json!({}), &all).or_fail("eight descriptors nobody asked for");
        for count in [9, 250] {
            let mut greedy = daemon.client();
            let many: Vec<BorrowedFd<'_>> = all.iter().cycle().take(count).copied().collect();
            // The second batch comes before the first was asked about.
            let _ = greedy.send(&json!({ "method": "org.varlink.service.GetInfo" }), &many);
            assert!(hangs_up(&greedy.stream, Duration::from_secs(5)), "{count} descriptors were taken");
        }
        drop((client, odd));
        wait_until("as few descriptors as before", Duration::from_secs(5), || {
            // Three are of the process that reads what the user sends.
            probe::descriptors(daemon.pid()) <= before + 3
        });
        assert_answers(&daemon);
    });
}

#[test]
fn two_hundred_connections_of_one_user_lock_nobody_else_out() {
    scenario::privileged("connections", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let mut all: Vec<Client> = (0..200).map(|_| Client::connect_as(USER, &daemon.socket())).collect();
        // Whoever is too many is told so.
        let kept = |client: &mut Client| {
            client.stream.write_all(INFO).is_ok()
                && client.receive().is_ok_and(|answer| match answer["error"].as_str() {
                    None => true,
                    Some(error) => {
                        assert_eq!(error, "org.hostler.Watchdog.LimitReached");
                        assert_eq!(answer["parameters"], json!({ "limit": "connections", "value": 64 }));
                        false
                    }
                })
        };
        let count = all.iter_mut().map(kept).filter(|kept| *kept).count();
        assert_eq!(count, 64, "the limit of connections for one user");
        assert_answers(&daemon);
        drop(all);
        wait_until("room for the user again", Duration::from_secs(5), || {
            kept(&mut Client::connect_as(USER, &daemon.socket()))
        });
    });
}

/// Talks to the daemon with the reference implementation for Python.
const PYTHON: &str = r#"
import sys, varlink
with varlink.Client("unix:" + sys.argv[1]) as client:
    info = client.get_interfaces() if hasattr(client, "get_interfaces") else None
    with client.open("org.hostler.Watchdog") as watchdog:
        status = watchdog.Status()
        print("loops", status["loops_in_use"] >= 0, "leases", len(status["leases"]))
        opened = watchdog.OpenLease("from python", None, None)
        print("opened", opened["lease"])
        report = watchdog.CloseLease(opened["lease"], opened["epoch"])["report"]
        print("complete", report["complete"])
        try:
            watchdog.Why("/nowhere")
        except varlink.VarlinkError as error:
            print("error", error.error())
    with client.open("org.varlink.service") as service:
        print("interfaces", sorted(service.GetInfo()["interfaces"]))
        text = service.GetInterfaceDescription("org.hostler.Watchdog")["description"]
        print("description", "method OpenLease" in text)
"#;

#[test]
fn the_python_client_understands_it() {
    scenario::privileged("python", |place| {
        let venv = place.path("venv");
        let made = program::finish(Command::new("python3").args(["-m", "venv"]).arg(&venv));
        assert_eq!(
            made.status, 0,
            "python3 with venv is missing: install Debian's `python3-venv`, or run `make test`: {made:?}"
        );
        let installed = program::finish(Command::new(venv.join("bin/pip")).args([
            "install",
            "--quiet",
            "varlink==31.0.0",
        ]));
        assert_eq!(
            installed.status, 0,
            "pip cannot install `varlink`; it needs a package index: {installed:?}"
        );
        let daemon = Daemon::start(place, &Settings::default());
        let script = place.path("client.py");
        fs::write(&script, PYTHON).or_fail("writing the client");
        let mut python = place.command(venv.join("bin/python"));
        let said = program::finish(python.arg(&script).arg(daemon.socket())).succeeded();
        let lines: Vec<&str> = said.lines().collect();
        assert_eq!(
            lines,
            [
                "loops True leases 0",
                "opened 1",
                "complete True",
                "error org.hostler.Watchdog.NoSuchTarget",
                "interfaces ['org.hostler.Watchdog', 'org.varlink.service']",
                "description True",
            ]
        );
    });
}
