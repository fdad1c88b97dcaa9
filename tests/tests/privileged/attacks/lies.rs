//! Text that users make up: names, sources, paths that end in " (deleted)". It is shown, never believed, and
//! never shown raw.

use std::fs;
use std::os::fd::AsFd;
use std::path::Path;

use hostler_tests::attached::Attached;
use hostler_tests::bystander::Bystander;
use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::OrFail;
use hostler_tests::fuse::Fuse;
use hostler_tests::place::USER;
use hostler_tests::wire::as_user;
use hostler_tests::{probe, program, scenario};
use serde_json::json;

use super::{Attacker, SOON};

#[test]
fn a_backing_file_that_is_renamed_replaced_or_called_deleted_is_what_it_was() {
    scenario::privileged("backing", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let own = place.directory_of_user("own");
        let other = place.directory("other");
        let bystander = Bystander::new(place, &other);
        let mut attacker = Attacker::new(place, &daemon);
        assert!(attacker.claim(&own, false).is_ok());
        // The victim's files get the names of the user's, and the other way round, after they were attached.
        let make = |path: &Path| place.image(path, 4);
        let victims = Attached::new(&other.join("image"));
        let removed = Attached::new(&other.join("removed"));
        let honest = make(&other.join("honest (deleted)"));
        let honest = Attached::by(&honest, &honest);
        let (mine, replaced) = (make(&own.join("mine")), make(&own.join("replaced")));
        let (mine, replaced) = (Attached::by(&mine, &mine), Attached::by(&replaced, &replaced));
        hostler_tests::failure::wait_until("the user's devices to be seen", SOON, || {
            daemon.lease("attack").is_some_and(|lease| lease.resources.len() >= 2)
        });
        fs::rename(other.join("image"), other.join("renamed")).or_fail("renaming");
        fs::remove_file(other.join("removed")).or_fail("removing");
        for name in ["image", "removed (deleted)", "honest (deleted)"] {
            fs::write(own.join(name), "x").or_fail("writing");
        }
        fs::rename(own.join("mine"), own.join("moved (deleted)")).or_fail("renaming");
        fs::remove_file(own.join("replaced")).or_fail("removing");
        let _ = make(&own.join("replaced"));
        attacker.end();
        for device in [&victims, &removed, &honest] {
            device.assert_untouched();
        }
        assert!(!mine.is_there() && !replaced.is_there(), "the user's own devices");
        bystander.assert_untouched();
    });
}

#[test]
fn a_source_that_a_file_system_made_up_is_not_believed() {
    scenario::privileged("source", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let other = place.directory("other");
        let bystander = Bystander::new(place, &other);
        let own = place.directory_of_user("own");
        let mut attacker = Attacker::new(place, &daemon);
        assert!(attacker.claim(&own, false).is_ok());
        let node = format!("/dev/loop{}", bystander.device().number);
        let points = ["one", "two", "three"].map(|name| own.join(name));
        for point in &points {
            fs::create_dir(point).or_fail("making");
        }
        let innocent = place.directory("innocent");
        let sources =
            [node.as_str(), "x - ext4 /dev/root rw\n1 1 7:0 / / rw - ext4 /dev/loop0 rw", "\u{1b}[2J"];
        let all: Vec<Fuse> = points
            .iter()
            .zip(sources)
            .map(|(point, source)| Fuse::named(point, USER, source))
            // The user's, outside of his claim, in the name of a file below it.
            .chain([Fuse::named(&innocent, USER, &own.join("one").to_string_lossy())])
            .collect();
        let others = probe::mounts_below(&innocent);
        hostler_tests::failure::wait_until("the mounts to be seen", SOON, || {
            daemon.lease("attack").is_some_and(|lease| lease.resources.len() >= 3)
        });
        let shown = daemon.ask(&["status"]).succeeded();
        assert!(!shown.contains('\u{1b}'), "{shown:?}");
        attacker.end();
        assert_eq!(probe::mounts_below(&own), []);
        assert_eq!(probe::mounts_below(&innocent), others);
        bystander.assert_untouched();
        drop(all);
    });
}

#[test]
fn names_reach_no_terminal_no_log_and_no_metric_raw() {
    scenario::privileged("names", |place| {
        let daemon = Daemon::start(place, &Settings { metrics: true, ..Settings::default() });
        let mut attacker = Attacker::new(place, &daemon);
        let names = [
            "\u{1b}]0;owned\u{7}\u{1b}[2J",
            "a\r\n2026-01-01T00:00:00Z  INFO lease 1: ended",
            "x\"} 1\nhostler_builds_total{result=\"succeeded\"} 99999\n",
            "\u{202e}gnp.exe\u{9b}31m",
            "\u{0}nul",
        ];
        let owner = attacker.owner.as_ref().or_fail("the owner");
        for name in names {
            let open = json!({ "name": name, "owner": 0 });
            attacker.client.call("OpenLease", &open, &[owner.as_fd()]).or_fail("opening");
        }
        // A directory of such a name, a program, and a target.
        let own = place.directory_of_user("own");
        let wild = own.join("\u{1b}[31mred\nline");
        as_user(USER, || fs::create_dir(&wild)).or_fail("making");
        assert!(attacker.claim(&wild, false).is_ok());
        let told = program::finish(&mut daemon.hostler_of_user(&["why", "\u{1b}[2J"]));
        assert_ne!(told.status, 0);
        let mut said = vec![told.stderr, daemon.ask(&["status"]).succeeded(), daemon.log()];
        said.push(daemon.ask(&["plan"]).succeeded());
        let metrics = program::succeed("curl", ["-s", &format!("http://{}/metrics", daemon.metrics())]);
        assert!(!metrics.contains("99999"), "{metrics}");
        assert!(metrics.contains("hostler_builds_total{result=\"succeeded\"} 0"), "{metrics}");
        for label in metrics.split('"').skip(1).step_by(2) {
            let is_plain = label.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.+:".contains(&byte));
            assert!(is_plain, "{label:?}");
        }
        for text in said {
            let raw = |one: char| one.is_control() && one != '\n' || "\u{202e}\u{9b}".contains(one);
            assert!(!text.contains(raw), "{text:?}");
            assert!(!text.lines().any(|line| line.starts_with("2026-01-01")), "{text:?}");
        }
        attacker.end();
        daemon.wait_until_idle(SOON);
        let log = daemon.log();
        assert!(!log.contains('\u{1b}'), "{log:?}");
    });
}
