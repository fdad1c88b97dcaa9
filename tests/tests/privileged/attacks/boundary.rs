//! Whoever takes over what reads his messages has won nothing, and whoever hangs it hangs himself only.

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::{OrFail, wait_until};
use hostler_tests::fuse::Fuse;
use hostler_tests::patience::stretched;
use hostler_tests::place::{USER, signal};
use hostler_tests::processes::{self, status_of};
use hostler_tests::wire::{Client, as_user};
use hostler_tests::{probe, scenario};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::worker::Worker;

const SOON: Duration = Duration::from_secs(10);

/// `CAP_SYS_ADMIN` and its like, as `status` writes the sets.
fn capabilities(pid: u32, set: &str) -> u64 {
    u64::from_str_radix(&status_of(pid, set), 16).or_fail("a set of capabilities")
}

#[test]
fn what_reads_a_users_messages_is_that_users_and_may_do_nothing_else() {
    scenario::privileged("reader", |place| {
        let daemon = Daemon::start(place, &Settings { metrics: true, ..Settings::default() });
        let _client = Client::connect_as(USER, &daemon.socket());
        let find = |user| processes::reader(daemon.pid(), user);
        wait_until("the user's reader", SOON, || {
            find(USER).is_some_and(|reader| status_of(reader.pid, "Threads") == "2")
        });
        let reader = find(USER).or_fail("the user's reader");
        wait_until("its filter", SOON, || status_of(reader.pid, "Seccomp_filters") == "2");
        let user = USER.to_string();
        for name in ["Uid", "Gid"] {
            assert_eq!(status_of(reader.pid, name), [user.as_str(); 4].join(" "), "{name}");
        }
        assert_eq!(status_of(reader.pid, "Groups"), "");
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(capabilities(reader.pid, set), 0, "{set}");
        }
        assert_eq!(status_of(reader.pid, "NoNewPrivs"), "1");
        assert_eq!(status_of(reader.pid, "Seccomp"), "2");

        // Root's own reader is root without root's rights.
        let _root = daemon.client();
        wait_until("root's reader", SOON, || {
            find(0).is_some_and(|reader| status_of(reader.pid, "Seccomp_filters") == "2")
        });
        let roots = find(0).or_fail("root's reader");
        assert_eq!((capabilities(roots.pid, "CapEff"), capabilities(roots.pid, "CapPrm")), (0, 0));

        let is_server = |child: &processes::Child| child.arguments == ["metrics-server"];
        let server = || processes::children(daemon.pid()).into_iter().find(is_server);
        wait_until("the metrics' server", SOON, || {
            server().is_some_and(|server| status_of(server.pid, "Seccomp_filters") == "2")
        });
        let server = server().or_fail("the metrics' server");
        assert_eq!(status_of(server.pid, "Uid"), "65534 65534 65534 65534");
        assert_eq!((capabilities(server.pid, "CapEff"), capabilities(server.pid, "CapPrm")), (0, 0));

        let _ = daemon.status();
        // The daemon and its workers' origin have what they need, and no more.
        let worker = processes::children(daemon.pid())
            .into_iter()
            .find(|child| child.arguments == ["worker"])
            .or_fail("the workers' origin");
        let (all, workers) = (capabilities(daemon.pid(), "CapPrm"), capabilities(worker.pid, "CapPrm"));
        let net_admin = 1 << 12;
        let (sys_module, setuid, sys_admin) = (1 << 16, 1 << 7, 1 << 21);
        assert_eq!(all & (net_admin | sys_module), 0, "{all:x}");
        assert_eq!(capabilities(daemon.pid(), "CapBnd") & (net_admin | sys_module), 0);
        assert_eq!((workers & setuid, workers & sys_admin), (0, sys_admin), "{workers:x}");
        assert_eq!(all & workers, workers, "a worker has what the daemon has not");
        for (pid, filters) in [(daemon.pid(), "1"), (worker.pid, "2")] {
            assert_eq!(status_of(pid, "NoNewPrivs"), "1");
            assert_eq!(status_of(pid, "Seccomp_filters"), filters);
        }
    });
}

#[test]
fn an_origin_of_workers_that_is_killed_or_stopped_is_replaced() {
    scenario::privileged("origin", |place| {
        let daemon = Daemon::start(place, &Settings { step_timeout: "1s", ..Settings::default() });
        let find = || {
            let is_it = |child: &processes::Child| child.arguments == ["worker"];
            processes::children(daemon.pid()).into_iter().find(is_it).or_fail("the workers' origin").pid
        };
        let _ = daemon.status();
        for signal_sent in [Signal::SIGKILL, Signal::SIGSTOP] {
            let before = find();
            signal(before, signal_sent);
            wait_until("another origin", SOON, || {
                // The first look may be the one that finds it out.
                daemon.hostler(&["status"]).output().is_ok_and(|shown| shown.status.success())
                    && find() != before
            });
        }
    });
}

#[test]
fn a_worker_has_the_rights_of_its_origin_and_cannot_copy_itself() {
    scenario::privileged("worker-rights", |place| {
        let workers = Worker::start(place);
        let origin = workers.child.id();
        let waiting = workers.waiting();
        let find = || processes::children(origin).into_iter().next();
        wait_until("a worker", SOON, || {
            find().is_some_and(|worker| status_of(worker.pid, "Seccomp_filters") == "2")
        });
        let worker = find().or_fail("a worker");
        assert_eq!(status_of(origin, "Seccomp_filters"), "1");
        assert_eq!(capabilities(worker.pid, "CapPrm"), capabilities(origin, "CapPrm"));
        drop(waiting);
        wait_until("the worker's end", SOON, || find().is_none());
    });
}

#[test]
fn a_reader_that_its_user_stops_or_kills_is_only_in_his_own_way() {
    scenario::privileged("stopped-reader", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let status = json!({ "method": "org.hostler.Watchdog.Status" });
        let ask = |client: &mut Client| {
            client.send(&status, &[]).is_ok()
                && client.receive().is_ok_and(|answer| answer["error"].is_null())
        };
        assert!(ask(&mut Client::connect_as(USER, &daemon.socket())));
        let find = || processes::reader(daemon.pid(), USER);
        let reader = find().or_fail("the user's reader");
        // It is his, so he may.
        as_user(USER, || signal(reader.pid, Signal::SIGSTOP));
        // All its threads have to come to a stop.
        wait_until("the stop", SOON, || probe::state(reader.pid) == Some('T'));
        for _ in 0..20 {
            drop(Client::connect_as(USER, &daemon.socket()));
            assert!(ask(&mut daemon.client()), "another user is not served");
        }
        as_user(USER, || signal(reader.pid, Signal::SIGKILL));
        wait_until("another reader", SOON, || {
            find().is_none_or(|other| other.pid != reader.pid)
                && ask(&mut Client::connect_as(USER, &daemon.socket()))
        });
    });
}

#[test]
fn a_port_that_is_written_to_badly_goes_on_and_its_server_comes_back() {
    scenario::privileged("metrics-server", |place| {
        let daemon = Daemon::start(place, &Settings { metrics: true, ..Settings::default() });
        let connect = || TcpStream::connect(daemon.metrics());
        let scrape = || {
            let mut stream = connect().ok()?;
            stream.set_read_timeout(Some(stretched(SOON))).ok()?;
            stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").ok()?;
            let mut text = String::new();
            stream.read_to_string(&mut text).ok()?;
            text.contains("hostler_loop_devices_in_use").then_some(())
        };
        wait_until("metrics", SOON, || scrape().is_some());
        let silent: Vec<_> = (0..300).filter_map(|_| connect().ok()).collect();
        for rubbish in [
            &b"\0\0\0\0"[..],
            b"GET",
            &[b'x'; 100_000],
            b"POST /metrics HTTP/1.1\r\nContent-Length: 99999999999999999999\r\n\r\n",
        ] {
            if let Ok(mut stream) = connect() {
                let _ = stream.write_all(rubbish);
            }
        }
        assert!(scrape().is_some(), "300 silent connections hold a scrape up");
        drop(silent);
        let is_server = |child: &processes::Child| child.arguments == ["metrics-server"];
        let server = processes::children(daemon.pid()).into_iter().find(is_server).or_fail("the server");
        signal(server.pid, Signal::SIGKILL);
        wait_until("metrics again", SOON, || scrape().is_some());
        let _ = daemon.status();
    });
}

#[test]
fn a_socket_that_another_user_connected_is_worth_nothing() {
    scenario::privileged("passed-socket", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        // Root connected, as a set-user-ID program might, and whoever started it got hold of the socket.
        let roots = daemon.client();
        let stream = &roots.stream;
        let call = format!(
            "{}\0",
            json!({ "method": "org.hostler.Watchdog.Reclaim", "parameters": { "lease": 1 } })
        );
        as_user(USER, || {
            let mut writer = stream;
            writer.write_all(call.as_bytes()).or_fail("sending over root's socket");
        });
        let mut answer = Vec::new();
        let _ = (&mut &*stream).read_to_end(&mut answer);
        assert_eq!(String::from_utf8_lossy(&answer), "", "root's socket was believed");
        // Nor another user's, and not half way through either.
        let mut others = Client::connect_as(USER, &daemon.socket());
        assert!(others.call("Status", &json!({}), &[]).is_ok(), "root may speak for others");
        let stream = &others.stream;
        as_user(USER + 1, || {
            let mut writer = stream;
            writer.write_all(b"{\"method\":\"org.varlink.service.GetInfo\"}\0").or_fail("sending");
        });
        assert!(others.receive().is_err());
    });
}

/// A file whose closing hangs.
pub(super) struct Unclosable {
    pub(super) file: File,
    fuse: Fuse,
}

impl Unclosable {
    pub(super) fn new(point: &Path) -> Self {
        let fuse = Fuse::answering(point);
        Self { file: File::open(point.join("file")).or_fail("opening a file on FUSE"), fuse }
    }
}

impl Drop for Unclosable {
    fn drop(&mut self) {
        // Else this process would hang as well.
        self.fuse.abort();
    }
}

#[test]
fn a_descriptor_whose_closing_hangs_hangs_neither_the_daemon_nor_others() {
    scenario::privileged_within("hung-close", Duration::from_secs(120), |place| {
        let daemon = Daemon::start(place, &Settings { step_timeout: "2s", ..Settings::default() });
        let unclosable = Unclosable::new(&place.directory("fuse"));
        let open = json!({ "name": "hung", "owner": 0 });
        let refused = |passed: BorrowedFd<'_>| {
            let mut client = Client::connect_as(USER, &daemon.socket());
            client.call("OpenLease", &open, &[passed]).expect_err("it is no pidfd").to_string()
        };
        let mut longest = Duration::ZERO;
        let mut refusals = Vec::new();
        for _ in 0..8 {
            refusals.push(refused(unclosable.file.as_fd()));
            let asked = Instant::now();
            // The daemon's own answer, for which it does not look at the host.
            let none = daemon.client().call("CloseLease", &json!({ "lease": 999, "epoch": 1 }), &[]);
            assert!(none.is_err_and(|error| error.name.ends_with("NoSuchLease")));
            longest = longest.max(asked.elapsed());
            // Not for ever: each that hangs is a process.
            if refusals.iter().any(|said| said.contains("end what does not answer")) {
                break;
            }
        }
        println!("another user waited {} ms at most", longest.as_millis());
        assert!(longest < stretched(Duration::from_secs(1)), "another user waited {longest:?}");
        assert!(refusals[0].contains("looking at that descriptor did not end"), "{refusals:?}");
        assert!(refusals.iter().any(|said| said.contains("end what does not answer")), "{refusals:?}");
        let hanging = processes::children(daemon.pid()).len();
        assert!(hanging < 12, "{hanging} processes hang because of one user");
        drop(unclosable);
        let (pipe, _writer) = std::io::pipe().or_fail("a pipe");
        wait_until("the user to be served again", SOON, || refused(pipe.as_fd()).contains("is no pidfd"));
    });
}
