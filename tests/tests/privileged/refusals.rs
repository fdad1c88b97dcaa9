//! What a user may not have taken back, and how the refusal tells what to do instead.

use std::fs::{File, OpenOptions};
use std::os::fd::{AsFd, OwnedFd};

use hostler_tests::bystander::Bystander;
use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::OrFail;
use hostler_tests::place::USER;
use hostler_tests::sleeper::Sleeper;
use hostler_tests::wire::{Client, Opened, Refusal, as_user};
use hostler_tests::{probe, program, scenario};
use serde_json::{Value, json};

#[track_caller]
fn refused(answer: Result<Value, Refusal>, why: &str) {
    let refusal = answer.expect_err("this must be refused");
    assert_eq!(refusal.name, "org.hostler.Watchdog.Refused", "{refusal}");
    let reason = refusal.details["reason"].as_str().unwrap_or_default();
    assert!(reason.contains(why), "{why:?} is not in {reason:?}");
}

fn lease_call(lease: Opened, more: &Value) -> Value {
    let mut call = json!({ "lease": lease.lease, "epoch": lease.epoch });
    if let (Some(call), Some(more)) = (call.as_object_mut(), more.as_object()) {
        call.extend(more.clone());
    }
    call
}

#[test]
fn only_directories_of_ones_own_can_be_claimed() {
    scenario::privileged("claims", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let own = place.directory_of_user("own");
        let owner = Sleeper::start(place, true);
        let mut client = Client::connect_as(USER, &daemon.socket());
        let lease = client.open_lease("claims", &owner.pidfd);
        let open = |path: &std::path::Path| as_user(USER, || File::open(path)).or_fail("opening");

        refused(client.claim(lease, open("/".as_ref()), false), "the root directory cannot be claimed");
        refused(client.claim(lease, open(&place.path("")), false), "claim a directory of your own");
        refused(client.claim(lease, open(&place.path("")), true), "belongs to user 0");
        refused(client.claim(lease, open("/etc/hostname".as_ref()), false), "is of no directory");
        refused(client.claim(lease, open("/dev/null".as_ref()), false), "is of no directory");
        let socket = OwnedFd::from(Client::connect(&daemon.socket()).or_fail("connecting").stream);
        refused(client.claim(lease, &socket, false), "is of no directory");
        let call = lease_call(lease, &json!({ "directory": 3, "scratch": false }));
        refused(client.call("ClaimDirectory", &call, &[]), "no descriptor with index 3");
        assert_eq!(client.claim(lease, open(&own), true), Ok(json!({})));

        // Root may claim another's directory, but not have it removed by mistake.
        let mut root = daemon.client();
        let roots = Sleeper::start(place, false);
        let roots_lease = root.open_lease("root", &roots.pidfd);
        refused(root.claim(roots_lease, File::open("/").or_fail("opening /"), true), "root directory");
        refused(root.claim(roots_lease, open(&own), true), "claim a directory of your own");

        let told = program::finish(
            daemon.hostler_of_user(&["run", "--claim", "/etc", "--", "true"]).current_dir("/"),
        );
        assert_eq!(
            (told.status, told.stderr.as_str()),
            (3, "hostler: refused: /etc belongs to user 0; claim a directory of your own\n")
        );
        let told = program::finish(
            daemon.hostler_of_user(&["run", "--claim", "/nowhere", "--", "true"]).current_dir("/"),
        );
        assert_eq!(told.status, 2, "{told:?}");
        assert!(told.stderr.contains("opening the claimed directory /nowhere"), "{told:?}");
        drop((owner, roots));
        daemon.wait_until_idle(std::time::Duration::from_secs(5));
        assert!(!own.exists(), "the user's own scratch directory");
    });
}

#[test]
fn only_processes_of_ones_own_can_be_adopted_or_own_a_lease() {
    scenario::privileged("adopt", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let owner = Sleeper::start(place, true);
        let own = Sleeper::start(place, true);
        let roots = Sleeper::start(place, false);
        let mut client = Client::connect_as(USER, &daemon.socket());
        let lease = client.open_lease("adopt", &owner.pidfd);
        let call = lease_call(lease, &json!({ "process": 0 }));
        let uid = USER;

        refused(client.call("Adopt", &call, &[roots.pidfd.as_fd()]), &format!("is not one of user {uid}"));
        let file = File::open("/dev/null").or_fail("opening /dev/null");
        refused(client.call("Adopt", &call, &[file.as_fd()]), "is no pidfd");
        let open = json!({ "name": "x", "owner": 0 });
        refused(
            client.call("OpenLease", &open, &[roots.pidfd.as_fd()]),
            &format!("is not one of user {uid}"),
        );
        assert_eq!(client.call("Adopt", &call, &[own.pidfd.as_fd()]), Ok(json!({})));

        let pid = own.pid();
        let seen = probe::ProcessSeen::of(pid);
        assert!(probe::ProcessSeen::of(roots.pid()).runs());
        drop(owner);
        daemon.wait_for_end("adopt", std::time::Duration::from_secs(5));
        assert!(!seen.runs());
        assert!(probe::ProcessSeen::of(roots.pid()).runs());
    });
}

#[test]
fn a_loop_device_must_be_proven_by_the_right_to_write_to_it() {
    scenario::privileged("register", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let bystander = Bystander::new(place, &place.directory("other"));
        let owner = Sleeper::start(place, true);
        let mut client = Client::connect_as(USER, &daemon.socket());
        let lease = client.open_lease("register", &owner.pidfd);
        let call = lease_call(lease, &json!({ "device": 0 }));

        let node = format!("/dev/loop{}", bystander.device().number);
        let read_only = File::open(&node).or_fail("opening the device");
        refused(client.call("RegisterLoop", &call, &[read_only.as_fd()]), "must be opened for writing");
        let null = OpenOptions::new().write(true).open("/dev/null").or_fail("opening /dev/null");
        refused(client.call("RegisterLoop", &call, &[null.as_fd()]), "is of no loop device");
        drop(read_only);

        // Whoever was given a device to write to can have it taken back.
        let image = place.image("given.img", 4);
        let given = hostler_tests::bystander::attach(&image);
        let writable = OpenOptions::new().read(true).write(true).open(given).or_fail("opening the device");
        assert_eq!(client.call("RegisterLoop", &call, &[writable.as_fd()]), Ok(json!({})));
        drop(writable);
        drop(owner);
        daemon.wait_for_end("register", std::time::Duration::from_secs(5));
        assert!(!probe::loops().iter().any(|device| device.backing == image));
        bystander.assert_untouched();
    });
}

#[test]
fn other_peoples_leases_and_stale_rights_are_refused() {
    scenario::privileged("fences", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let owner = Sleeper::start(place, true);
        let roots = Sleeper::start(place, false);
        let mut client = Client::connect_as(USER, &daemon.socket());
        let own = client.open_lease("own", &owner.pidfd);
        let others = daemon.client().open_lease("root's", &roots.pidfd);

        let stale = Opened { epoch: own.epoch + 1, ..own };
        let answer = client.call("CloseLease", &lease_call(stale, &json!({})), &[]).expect_err("stale");
        assert_eq!(answer.name, "org.hostler.Watchdog.StaleEpoch");
        // Another's lease is answered exactly as one that does not exist.
        let answer = client.call("CloseLease", &lease_call(others, &json!({})), &[]).expect_err("another's");
        assert_eq!(
            (answer.name.as_str(), &answer.details),
            ("org.hostler.Watchdog.NoSuchLease", &json!({ "lease": others.lease }))
        );
        let nobodys = Opened { lease: 999, epoch: 1 };
        let answer = client.call("CloseLease", &lease_call(nobodys, &json!({})), &[]).expect_err("nobody's");
        assert_eq!(
            (answer.name.as_str(), &answer.details),
            ("org.hostler.Watchdog.NoSuchLease", &json!({ "lease": 999 }))
        );
        refused(
            client.call("Reclaim", &json!({ "lease": others.lease }), &[]),
            "only root may end another's lease",
        );
        let name = "x".repeat(201);
        refused(client.call("OpenLease", &json!({ "name": name }), &[]), "at most 200 bytes");
        let answer = client.call("CloseLease", &json!({ "lease": 1 }), &[]).expect_err("no epoch");
        assert_eq!(answer.name, "org.varlink.service.InvalidParameter");
        assert!(answer.details.to_string().contains("epoch"), "{answer}");

        let told = program::finish(&mut daemon.hostler_of_user(&["reclaim", "--lease", "2"]));
        assert_eq!(told.status, 3, "{told:?}");
        assert!(told.stderr.contains("an owner closes its own"), "{told:?}");
        let told = program::finish(&mut daemon.hostler_of_user(&[
            "lease",
            "close",
            &format!("{}:{}", own.lease, own.epoch + 1),
        ]));
        assert_eq!(told.status, 3, "{told:?}");
        let told = daemon.ask(&["reclaim", "--lease", &others.lease.to_string()]);
        assert_eq!(told.status, 0, "{told:?}");
        assert!(probe::ProcessSeen::of(roots.pid()).runs(), "an owner is never ended with its lease");
        drop((owner, roots));
        daemon.wait_until_idle(std::time::Duration::from_secs(5));
    });
}

#[test]
fn a_user_cannot_use_up_the_daemon() {
    scenario::privileged("limits", |place| {
        let daemon = Daemon::start(place, &Settings { leases: 20, ..Settings::default() });
        let owner = Sleeper::start(place, true);
        let mut client = Client::connect_as(USER, &daemon.socket());
        let lease = client.open_lease("many claims", &owner.pidfd);
        let answer = (0..100).find_map(|number| {
            let own = place.directory_of_user(format!("own-{number}"));
            let directory = as_user(USER, || File::open(&own)).or_fail("opening");
            client.claim(lease, &directory, false).err()
        });
        let answer = answer.or_fail("an end to claims");
        assert_eq!(
            (answer.name.as_str(), answer.details["limit"].as_str()),
            ("org.hostler.Watchdog.LimitReached", Some("claims"))
        );
        let answer = (0..30).find_map(|_| {
            client.call("OpenLease", &json!({ "name": "many", "owner": 0 }), &[owner.pidfd.as_fd()]).err()
        });
        let answer = answer.or_fail("an end to leases");
        assert_eq!(
            (answer.name.as_str(), answer.details["limit"].as_str()),
            ("org.hostler.Watchdog.LimitReached", Some("leases"))
        );
        // Root is not locked out by it.
        daemon.ask(&["status"]).succeeded();
        let started = std::time::Instant::now();
        drop(owner);
        daemon.wait_until_idle(std::time::Duration::from_secs(30));
        println!("20 leases of one owner ended within {} ms", started.elapsed().as_millis());
    });
}
