//! A user who stops, kills and floods the process that reads what he sends.

use std::io::{ErrorKind, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::{OrFail, wait_until};
use hostler_tests::patience::stretched;
use hostler_tests::place::{USER, signal};
use hostler_tests::wire::{Client, as_user};
use hostler_tests::{probe, processes, scenario};
use nix::sys::signal::Signal;
use nix::sys::socket::{setsockopt, sockopt};
use serde_json::json;

use super::SOON;
use super::floods::others_wait;

/// Has the user stop his reader, which he has by now.
fn stop_reader(daemon: &Daemon<'_>) -> u32 {
    assert!(Client::connect_as(USER, &daemon.socket()).is_answered("org.varlink.service.GetInfo"));
    let reader = processes::reader(daemon.pid(), USER).or_fail("the user's reader").pid;
    as_user(USER, || signal(reader, Signal::SIGSTOP));
    wait_until("the stop", SOON, || probe::state(reader) == Some('T'));
    reader
}

/// A socket with data that its peer does not read: closing it waits for that for an hour.
fn unclosable(listener: &TcpListener) -> TcpStream {
    let address = listener.local_addr().or_fail("the port");
    let mut stream = TcpStream::connect(address).or_fail("connecting");
    let linger = nix::libc::linger { l_onoff: 1, l_linger: 3600 };
    setsockopt(&stream, sockopt::Linger, &linger).or_fail("SO_LINGER");
    stream.set_nonblocking(true).or_fail("O_NONBLOCK");
    let full = std::iter::repeat_with(|| stream.write(&[0; 65536])).find_map(Result::err);
    assert_eq!(full.map(|error| error.kind()), Some(ErrorKind::WouldBlock));
    stream
}

#[test]
fn a_connection_that_comes_to_no_reader_is_closed_by_nobody_who_may_not_hang() {
    scenario::privileged("unread", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let listener = TcpListener::bind("127.0.0.1:0").or_fail("a port");
        let reader = stop_reader(&daemon);
        let poison = || {
            let stream = unclosable(&listener);
            let mut client = Client::connect_as(USER, &daemon.socket());
            client.send(&json!({ "method": "x" }), &[stream.as_fd()]).or_fail("passing a socket");
        };
        // What the socket to the reader can hold is in there, and closed by its end; more stays behind.
        for _ in 0..400 {
            drop(Client::connect_as(USER, &daemon.socket()));
        }
        for _ in 0..20 {
            poison();
        }
        let limit = stretched(Duration::from_secs(1));
        assert!(others_wait(&daemon) < limit);
        as_user(USER, || signal(reader, Signal::SIGKILL));
        wait_until("the reader's end", SOON, || probe::state(reader).is_none_or(|state| state == 'Z'));
        for _ in 0..20 {
            let waited = others_wait(&daemon);
            assert!(waited < limit, "{waited:?}");
        }
        // And the user is served again.
        wait_until("an answer", SOON, || {
            Client::connect_as(USER, &daemon.socket()).is_answered("org.varlink.service.GetInfo")
        });
        // It lets go of whoever hangs.
        drop(listener);
    });
}

#[test]
fn connections_to_a_stopped_reader_use_up_no_descriptors() {
    scenario::privileged("stopped-flood", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let _ = stop_reader(&daemon);
        let before = probe::descriptors(daemon.pid());
        // 64 may wait for his reader, and 64 for the one that tells him so.
        let mut most = 0;
        for at in 0..3000 {
            drop(Client::connect_as(USER, &daemon.socket()));
            if at % 100 == 0 {
                most = most.max(probe::descriptors(daemon.pid()));
            }
        }
        println!("{before} descriptors before, {most} at most");
        assert!(most < before + 150, "{before} before, {most} then");
        assert!(others_wait(&daemon) < stretched(Duration::from_secs(1)));
        let mut refused = Client::connect_as(USER, &daemon.socket());
        let answer = refused.receive().or_fail("a refusal");
        let reason = answer["parameters"]["reason"].as_str().unwrap_or_default();
        assert!(reason.contains("does nothing now"), "{answer}");
    });
}

#[test]
fn a_user_who_kills_his_readers_gets_no_more_for_a_while() {
    scenario::privileged("killed-readers", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let mut refusals: Vec<String> = Vec::new();
        let is_refused = |said: &String| said.contains("end too often");
        // A connection that comes before the end of the reader is noticed goes with it, and starts no other.
        for _ in 0..200 {
            if refusals.iter().any(is_refused) {
                break;
            }
            let mut client = Client::connect_as(USER, &daemon.socket());
            let asked = client.send(&json!({ "method": "org.varlink.service.GetInfo" }), &[]);
            let answer = asked.and_then(|()| client.receive()).unwrap_or_default();
            refusals.extend(answer["parameters"]["reason"].as_str().map(str::to_owned));
            if let Some(reader) = processes::reader(daemon.pid(), USER) {
                as_user(USER, || signal(reader.pid, Signal::SIGKILL));
                wait_until("its end", SOON, || probe::state(reader.pid).is_none_or(|state| state == 'Z'));
            }
        }
        assert!(refusals.iter().any(is_refused), "{refusals:?}");
        assert!(others_wait(&daemon) < stretched(Duration::from_secs(1)));
        wait_until("the user to be served again", SOON, || {
            Client::connect_as(USER, &daemon.socket()).is_answered("org.varlink.service.GetInfo")
        });
    });
}
