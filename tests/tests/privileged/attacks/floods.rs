//! A client that floods, stalls, or passes all it can: run as an ordinary user.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::{OrFail, wait_until};
use hostler_tests::patience::stretched;
use hostler_tests::place::USER;
use hostler_tests::sleeper::Sleeper;
use hostler_tests::wire::{Client, as_user};
use hostler_tests::{probe, scenario};
use rustix::fs::{MemfdFlags, Mode, OFlags, memfd_create, open};
use serde_json::json;

use super::boundary::Unclosable;
use super::{Attacker, SOON};

/// How long another user waits for an answer for which the daemon need not look at the host.
#[track_caller]
pub(super) fn others_wait(daemon: &Daemon<'_>) -> Duration {
    let asked = Instant::now();
    let none = daemon.client().call("CloseLease", &json!({ "lease": 999, "epoch": 1 }), &[]);
    assert!(none.is_err_and(|error| error.name.ends_with("NoSuchLease")));
    asked.elapsed()
}

#[test]
fn a_thousand_half_open_connections_lock_nobody_out() {
    scenario::privileged("half-open", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let before = probe::descriptors(daemon.pid());
        let mut all: Vec<Client> = (0..1000).map(|_| Client::connect_as(USER, &daemon.socket())).collect();
        for (at, client) in all.iter_mut().enumerate() {
            let half = [&b"{"[..], b"{\"method\":\"org.hostler", b"\xff"][at % 3];
            // Most were told already that they are too many.
            as_user(USER, || drop(client.stream.write_all(half)));
        }
        let waited = others_wait(&daemon);
        println!("beside 1,000 half-open connections another user waited {} ms", waited.as_millis());
        assert!(waited < stretched(Duration::from_secs(1)), "{waited:?}");
        wait_until("the daemon to have none of the user's connections", SOON, || {
            probe::descriptors(daemon.pid()) < before + 8
        });
        // Half a message has ten seconds.
        wait_until("an end of all half messages", Duration::from_secs(20), || {
            Client::connect_as(USER, &daemon.socket()).is_answered("org.hostler.Watchdog.Status")
        });
    });
}

#[test]
fn a_user_that_asks_more_often_than_he_may_waits_and_nobody_else_does() {
    scenario::privileged("rate", |place| {
        let more = "requests_per_second = 20\n".to_owned();
        let daemon = Daemon::start(place, &Settings { limits: more, ..Settings::default() });
        let mut client = Client::connect_as(USER, &daemon.socket());
        let close = json!({ "lease": 999, "epoch": 1 });
        let begun = Instant::now();
        let mut longest = Duration::ZERO;
        for at in 0..80 {
            assert!(client.call("CloseLease", &close, &[]).is_err());
            if at % 20 == 0 {
                longest = longest.max(others_wait(&daemon));
            }
        }
        // 20 at once, and the other 60 at 20 a second.
        let took = begun.elapsed();
        assert!(took > Duration::from_millis(2800), "80 requests took {took:?}");
        assert!(longest < stretched(Duration::from_millis(900)), "{longest:?}");
    });
}

#[test]
fn descriptors_that_hang_whoever_looks_at_them_are_their_own_users_wait() {
    scenario::privileged("hanging-looks", |place| {
        let limits = "requests_per_second = 1000\n".to_owned();
        let settings = Settings { limits, step_timeout: "3s", ..Settings::default() };
        let daemon = Daemon::start(place, &settings);
        // Before there is anything that a new process could hang in closing.
        let owner = Sleeper::start(place, false);
        let unclosable = Unclosable::new(&place.directory("fuse"));
        // More at once than there are turns for all users together.
        let open = json!({ "method": "org.hostler.Watchdog.OpenLease", "parameters": { "name": "hung", "owner": 0 } });
        let mut all: Vec<Client> = (0..40).map(|_| Client::connect_as(USER, &daemon.socket())).collect();
        for client in &mut all {
            client.send(&open, &[unclosable.file.as_fd()]).or_fail("sending");
        }
        std::thread::sleep(Duration::from_millis(500));
        let asked = Instant::now();
        let _ = daemon.client().open_lease("other", &owner);
        let waited = asked.elapsed();
        println!("beside 40 descriptors that hang another user waited {} ms", waited.as_millis());
        assert!(waited < stretched(Duration::from_millis(1500)), "{waited:?}");
        // Each of the user's is refused in the end.
        for client in &mut all {
            let answer = client.receive().or_fail("an answer");
            assert_eq!(answer["error"], "org.hostler.Watchdog.Refused", "{answer}");
        }
        // Nobody looks at more than a few of them.
        assert!(asked.elapsed() < stretched(Duration::from_secs(9)), "{:?}", asked.elapsed());
        println!("the last was refused after {} ms", asked.elapsed().as_millis());
        drop((unclosable, owner));
        daemon.wait_until_idle(SOON);
    });
}

#[test]
fn limits_are_each_users_own() {
    scenario::privileged("user-limits", |place| {
        let limits = "resources = 3\nusers = 2\n".to_owned();
        let daemon = Daemon::start(place, &Settings { limits, ..Settings::default() });
        let mut attacker = Attacker::new(place, &daemon);
        let processes: Vec<Sleeper> = (0..4).map(|_| Sleeper::start(place, true)).collect();
        let adopt = attacker.about_lease("process");
        let mut answers =
            processes.iter().map(|process| attacker.client.call("Adopt", &adopt, &[process.as_fd()]));
        assert!(answers.by_ref().take(3).all(|answer| answer.is_ok()));
        let error = answers.next().or_fail("a fourth answer").expect_err("one too many");
        assert_eq!(error.details, json!({ "limit": "resources", "value": 3 }));
        drop(processes);
        // Two users are connected; root has a reader only while it asks.
        let mut other = Client::connect_as(USER + 1, &daemon.socket());
        let leased = other.call("OpenLease", &json!({ "name": "other" }), &[]).or_fail("a lease");
        let mut third = Client::connect_as(USER + 2, &daemon.socket());
        third.send(&json!({ "method": "org.varlink.service.GetInfo" }), &[]).or_fail("sending");
        let answer = third.receive().or_fail("an answer");
        assert_eq!(answer["parameters"], json!({ "limit": "users", "value": 2 }));
        let close = json!({ "lease": leased["lease"], "epoch": leased["epoch"] });
        other.call("CloseLease", &close, &[]).or_fail("closing the lease");
        // Whoever has no lease makes room, though he stays connected.
        wait_until("room for a third user", SOON, || {
            Client::connect_as(USER + 2, &daemon.socket()).is_answered("org.hostler.Watchdog.Status")
        });
        assert!(other.receive().is_err(), "that one hung up");
        attacker.end();
    });
}

#[test]
fn descriptors_of_every_kind_are_refused_and_none_stays() {
    scenario::privileged("odd-descriptors", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let mut attacker = Attacker::new(place, &daemon);
        let own = place.directory_of_user("own");
        let (pipe, _writer) = std::io::pipe().or_fail("a pipe");
        let (socket, _other) = std::os::unix::net::UnixStream::pair().or_fail("a socket");
        let lingering = std::net::TcpListener::bind("127.0.0.1:0").or_fail("a port");
        let epoll = rustix::event::epoll::create(rustix::event::epoll::CreateFlags::CLOEXEC).or_fail("epoll");
        let by_path = |path: &str, flags: OFlags| open(path, flags, Mode::empty()).or_fail(path);
        let odd: Vec<OwnedFd> = vec![
            pipe.into(),
            socket.into(),
            lingering.into(),
            epoll,
            memfd_create("odd", MemfdFlags::CLOEXEC).or_fail("a memfd"),
            rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).or_fail("an eventfd"),
            by_path("/proc/self/ns/mnt", OFlags::RDONLY),
            by_path("/proc/self/ns/user", OFlags::RDONLY),
            by_path("/proc/self/root", OFlags::PATH),
            by_path("/proc/self/mem", OFlags::RDONLY),
            by_path("/proc/self/fd", OFlags::RDONLY | OFlags::DIRECTORY),
            by_path("/dev/full", OFlags::RDWR),
            by_path("/dev/loop-control", OFlags::PATH),
            by_path("/dev/fuse", OFlags::RDWR),
            by_path("/sys/kernel", OFlags::RDONLY | OFlags::DIRECTORY),
        ];
        let lease = attacker.lease;
        for descriptor in &odd {
            let passed = [descriptor.as_fd()];
            let mut wanted = |method: &str, parameters: &serde_json::Value| {
                let answer = attacker.client.call(method, parameters, &passed);
                let error = answer.expect_err("it is nothing of the user's");
                assert_eq!(error.name, "org.hostler.Watchdog.Refused", "{method} of {descriptor:?}: {error}");
            };
            wanted("OpenLease", &json!({ "name": "odd", "owner": 0 }));
            for (method, field) in [("Adopt", "process"), ("RegisterLoop", "device")] {
                wanted(method, &json!({ "lease": lease.lease, "epoch": lease.epoch, field: 0 }));
            }
            for scratch in [true, false] {
                let claim =
                    json!({ "lease": lease.lease, "epoch": lease.epoch, "directory": 0, "scratch": scratch });
                wanted("ClaimDirectory", &claim);
            }
        }
        // A directory needs no right to be read: that it is the user's is enough.
        let own_path = as_user(USER, || open(&own, OFlags::PATH | OFlags::DIRECTORY, Mode::empty()));
        let own_path = own_path.or_fail("opening the user's directory");
        assert_eq!(attacker.client.claim(lease, own_path, true), Ok(json!({})));
        attacker.end();
        assert!(!own.exists());
        wait_until("the daemon to have nothing of the user's", SOON, || {
            let links = std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).or_fail("its descriptors");
            let targets: Vec<_> =
                links.flatten().filter_map(|link| std::fs::read_link(link.path()).ok()).collect();
            !targets.iter().any(|target| {
                let target = target.to_string_lossy();
                ["memfd:odd", "/dev/full", "/dev/fuse", "/sys/kernel"].iter().any(|odd| target.contains(odd))
            })
        });
    });
}
