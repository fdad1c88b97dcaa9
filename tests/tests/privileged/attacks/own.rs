//! The daemon's own socket and state: mounted over, full, read-only, altered.

use std::fs;
use std::path::Path;
use std::process::Stdio;

use hostler_tests::bystander::Bystander;
use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::{OrFail, wait_until};
use hostler_tests::leak::MOUNTED_IMAGE;
use hostler_tests::place::{Place, kill};
use hostler_tests::{probe, program, scenario};
use nix::mount::{MsFlags, mount};

use super::SOON;

/// Starts a build that mounts an image in a claim of its own, and waits until it has.
fn build(daemon: &Daemon<'_>, place: &Place, name: &str) -> std::process::Child {
    let claim = place.directory(name);
    let _ = place.image(claim.join("image"), 4);
    let script = format!("{MOUNTED_IMAGE}; echo $$ >shell; sleep 600");
    let run = daemon.run_script(name, &claim, &script).stdout(Stdio::null()).spawn();
    let _ = probe::pid_from(&claim.join("shell"));
    run.or_fail("starting hostler")
}

fn end(mut build: std::process::Child) {
    kill(build.id());
    build.wait().or_fail("waiting for hostler");
}

#[test]
fn a_mount_over_its_state_or_socket_neither_loses_nor_stops_anything() {
    scenario::privileged("mounted-over", |place| {
        let bystander = Bystander::new(place, &place.directory("other"));
        let mut daemon = Daemon::start(place, &Settings::default());
        let first = build(&daemon, place, "first");
        let over = |point: &Path, file: bool| {
            let source = if file { place.path("hostlerd.toml") } else { place.directory("empty") };
            mount(Some(&source), point, None::<&str>, MsFlags::MS_BIND, None::<&str>).or_fail("binding");
        };
        over(&place.path("state"), false);
        over(&daemon.socket(), true);
        let bytes = probe::loops_below(&place.path("first")).len();
        assert_eq!(bytes, 1);
        end(first);
        wait_until("what is leaked to be taken back", SOON, || {
            probe::loops_below(&place.path("first")).is_empty()
        });
        // A journal that grew too large is put in the old one's place where that is, not where its path leads.
        assert!(fs::read_dir(place.path("empty")).or_fail("reading").next().is_none());
        program::succeed("umount", [place.path("state").as_os_str()]);
        program::succeed("umount", [daemon.socket().as_os_str()]);
        let second = build(&daemon, place, "second");
        daemon.kill();
        daemon.start_again();
        assert!(daemon.lease("second").is_some(), "the journal was lost");
        end(second);
        daemon.wait_until_idle(SOON);
        bystander.assert_untouched();
    });
}

#[test]
fn a_full_state_directory_is_told_of_and_loses_nothing_that_is_in_memory() {
    scenario::privileged("full", |place| {
        let bystander = Bystander::new(place, &place.directory("other"));
        let state = place.directory("state");
        let options = Some("size=256k");
        mount(Some("state"), &state, Some("tmpfs"), MsFlags::empty(), options).or_fail("mounting");
        let mut daemon = Daemon::start(place, &Settings { metrics: true, ..Settings::default() });
        let before = build(&daemon, place, "before");
        let filler = state.join("filler");
        // It takes what there is.
        assert!(fs::write(&filler, vec![0u8; 1024 * 1024]).is_err());
        let meanwhile = build(&daemon, place, "meanwhile");
        end(before);
        daemon.wait_for_end("before", SOON);
        assert_eq!(probe::loops_below(&place.path("before")), []);
        assert!(daemon.lease("meanwhile").is_some());
        let log = daemon.log();
        assert!(log.contains("a restart now would forget what just happened"), "{log}");
        assert!(log.contains("No space left on device") && log.contains("[state] directory"), "{log}");
        let metrics = program::succeed("curl", ["-s", &format!("http://{}/metrics", daemon.metrics())]);
        let failures = metrics.lines().find_map(|line| line.strip_prefix("hostler_journal_failures_total "));
        assert!(failures.and_then(|count| count.parse::<f64>().ok()) > Some(0.0), "{failures:?}");
        fs::remove_file(&filler).or_fail("making room");
        // By itself, without anything that happens.
        wait_until("the journal to be whole again", SOON, || {
            daemon.log().contains("the journal can be written again")
        });
        daemon.kill();
        daemon.start_again();
        let names: Vec<_> = daemon.status().leases.into_iter().map(|lease| lease.name).collect();
        assert_eq!(names, ["meanwhile"], "a lease was lost");
        end(meanwhile);
        daemon.wait_until_idle(SOON);
        assert_eq!(probe::loops_below(&place.path("meanwhile")), []);
        bystander.assert_untouched();
        daemon.stop();
        program::succeed("umount", [state.as_os_str()]);
    });
}

#[test]
fn a_full_disk_keeps_it_neither_from_starting_nor_from_taking_back() {
    scenario::privileged("full-start", |place| {
        let state = place.directory("state");
        let options = Some("size=256k");
        mount(Some("state"), &state, Some("tmpfs"), MsFlags::empty(), options).or_fail("mounting");
        let mut daemon = Daemon::start(place, &Settings::default());
        let first = build(&daemon, place, "first");
        let second = build(&daemon, place, "second");
        daemon.kill();
        // A line that was torn, and no room to keep the file aside, or to write another.
        let journal = state.join("journal");
        let mut bytes = fs::read(&journal).or_fail("reading the journal");
        bytes.extend(b"1 00000000 {");
        fs::write(&journal, &bytes).or_fail("tearing a line");
        let filler = state.join("filler");
        assert!(fs::write(&filler, vec![0u8; 1024 * 1024]).is_err());
        end(first);
        daemon.start_again();
        daemon.wait_for_end("first", SOON);
        assert_eq!(probe::loops_below(&place.path("first")), []);
        assert!(daemon.lease("second").is_some());
        let log = daemon.log();
        assert!(log.contains("is taken up") && log.contains("No space left on device"), "{log}");
        assert_eq!(fs::read(&journal).or_fail("the journal as it was"), bytes);
        fs::remove_file(&filler).or_fail("making room");
        wait_until("the journal to be whole again", SOON, || {
            daemon.log().contains("the journal can be written again")
        });
        assert_eq!(fs::read(state.join("journal.damaged")).or_fail("the file aside"), bytes);
        daemon.kill();
        daemon.start_again();
        let names: Vec<_> = daemon.status().leases.into_iter().map(|lease| lease.name).collect();
        assert_eq!(names, ["second"]);
        end(second);
        daemon.wait_until_idle(SOON);
        daemon.stop();
        program::succeed("umount", [state.as_os_str()]);
    });
}

#[test]
fn with_a_read_only_state_directory_it_does_not_start_and_says_why() {
    scenario::privileged("read-only", |place| {
        let mut daemon = Daemon::start(place, &Settings::default());
        let running = build(&daemon, place, "running");
        daemon.kill();
        let state = place.path("state");
        mount(Some(&state), &state, None::<&str>, MsFlags::MS_BIND, None::<&str>).or_fail("binding");
        let change = |flags: MsFlags| {
            let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | flags;
            mount(None::<&str>, &state, None::<&str>, flags, None::<&str>).or_fail("remounting");
        };
        change(MsFlags::MS_RDONLY);
        let mut command = place.command(program::path("hostlerd"));
        command.arg("--config").arg(place.path("hostlerd.toml")).arg("--own-mount-namespace");
        let told = program::finish(&mut command);
        assert_eq!(told.status, 5, "{told:?}");
        assert!(told.stderr.contains("Read-only file system"), "{told:?}");
        assert!(told.stderr.contains("[state] directory"), "{told:?}");
        program::succeed("umount", [state.as_os_str()]);
        daemon.start_again();
        assert!(daemon.lease("running").is_some());
        end(running);
        daemon.wait_until_idle(SOON);
        assert_eq!(probe::loops_below(&place.path("running")), []);
    });
}

#[test]
fn an_altered_journal_is_kept_aside_and_told_of_and_its_other_lines_count() {
    scenario::privileged("altered", |place| {
        let bystander = Bystander::new(place, &place.directory("other"));
        let mut daemon = Daemon::start(place, &Settings::default());
        let (one, other) = (build(&daemon, place, "one"), build(&daemon, place, "other-build"));
        daemon.kill();
        let journal = place.path("state/journal");
        let text = fs::read_to_string(&journal).or_fail("reading the journal");
        // Somebody makes a lease his, and adds one; the disk tears the last line.
        let altered = text.replace("\"name\":\"one\"", "\"name\":\"eno\"");
        assert_ne!(altered, text);
        let altered = altered.trim_end();
        let torn = format!("{altered}\n2 00000000 {{\"entry\":\"ended\",\"lease\":2}}\n1 12345678 {{\"entr");
        fs::write(&journal, &torn).or_fail("altering the journal");
        daemon.start_again();
        let log = daemon.log();
        assert!(log.contains("of the journal is damaged; the file is kept as"), "{log}");
        assert_eq!(fs::read_to_string(place.path("state/journal.damaged")).or_fail("the file aside"), torn);
        let names: Vec<_> = daemon.status().leases.into_iter().map(|lease| lease.name).collect();
        assert!(names.contains(&"other-build".to_owned()), "{names:?}");
        assert!(!names.contains(&"eno".to_owned()), "{names:?}");
        end(one);
        end(other);
        daemon.wait_until_idle(SOON);
        assert_eq!(probe::loops_below(&place.path("other-build")), []);
        bystander.assert_untouched();
        // What the lost lines were about is nobody's now, so it stays; the test frees it.
        place.empty();
    });
}
