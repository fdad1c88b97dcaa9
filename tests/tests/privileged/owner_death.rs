//! What an owner leaves is taken back: when it is killed, and when it ends in order.

use std::process::Stdio;
use std::time::{Duration, Instant};

use hostler_protocol::lease::LeaseState;
use hostler_protocol::resource::{Kind, Outcome};
use hostler_tests::bystander::Bystander;
use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::{OrFail, wait_until};
use hostler_tests::place::{kill, wait_for_end};
use hostler_tests::{oracle, probe, program, scenario};

/// Mounts an image, binds the host's pseudo file systems into it, and leaves a process with its
/// current directory inside and a daemon that did all it could to get away.
const BUILD: &str = r#"
    device=$(losetup --find --show image)
    mkdir mnt; mount "$device" mnt
    mkdir mnt/dev mnt/proc mnt/sys
    mount --bind /dev mnt/dev
    mount --bind /proc mnt/proc
    mount --rbind /sys mnt/sys
    (cd mnt && exec sleep 600) & echo $! > inside
    setsid env -i PATH="$PATH" sh -c '(cd mnt && exec setsid sh -c "echo \$\$ > ../escaped; exec sleep 601") >/dev/null 2>&1 &'
    while [ ! -s escaped ]; do sleep 0.01; done
    echo $$ > shell
"#;

#[test]
fn a_killed_builder_leaves_nothing() {
    scenario::privileged("killed", |place| {
        let claim = place.directory("claim");
        let image = place.image("claim/image", 8);
        let bystander = Bystander::new(place, &place.directory("other"));
        let daemon = Daemon::start(place, &Settings::default());

        let script = format!("{BUILD}\nsleep 602");
        let mut run = daemon.run_script("build", &claim, &script);
        let mut hostler = run.stdout(Stdio::null()).spawn().or_fail("starting hostler");
        let shell = probe::pid_from(&claim.join("shell"));
        let inside = probe::pid_from(&claim.join("inside"));
        let escaped = probe::pid_from(&claim.join("escaped"));
        let device = probe::loop_of(&image);
        assert!(probe::mounts_below(&claim).len() >= 4, "{:?}", probe::mounts_below(&claim));

        let killed = Instant::now();
        kill(hostler.id());
        hostler.wait().or_fail("waiting for hostler");
        let all = [shell, inside, escaped];
        let limit = Duration::from_secs(10);
        wait_until("everything to be gone", limit, || {
            probe::mounts_below(&claim).is_empty()
                && probe::loops_below(&claim).is_empty()
                && all.iter().all(|process| !process.runs())
        });
        let gone = killed.elapsed();
        let (lease, _) = daemon.wait_for_end("build", limit);
        println!(
            "a killed builder's processes, mounts and loop device were gone {} ms after its death",
            gone.as_millis()
        );

        let report = lease.report.or_fail("a report");
        assert!(report.complete);
        let count = |kind| report.resources.iter().filter(|resource| resource.kind == kind).count();
        assert_eq!(count(Kind::Loop), 1, "{report:?}");
        assert!(count(Kind::Mount) >= 4, "{report:?}");
        assert!(count(Kind::Process) >= 3, "{report:?}");
        assert!(report.resources.iter().all(|resource| resource.outcome == Outcome::Reclaimed), "{report:?}");
        oracle::assert_free(device.number, &image);
        assert!(place.lease_groups().is_empty(), "{:?}", place.lease_groups());
        bystander.assert_untouched();
    });
}

#[test]
fn a_builder_that_ends_in_order_is_told_what_it_left() {
    scenario::privileged("ordered", |place| {
        let claim = place.directory("claim");
        let image = place.image("claim/image", 8);
        let bystander = Bystander::new(place, &place.directory("other"));
        let daemon = Daemon::start(place, &Settings::default());

        let ended = program::finish(&mut daemon.run_script("build", &claim, &format!("{BUILD}\nexit 7")));
        assert_eq!(ended.status, 7, "{ended:?}");
        assert!(
            ended.stderr.starts_with("hostler: took back what the command left: 2 processes, "),
            "{ended:?}"
        );
        assert!(ended.stderr.contains(" mounts, 1 loop device"), "{ended:?}");
        // It has all been taken back when hostler returns, not some time later.
        assert_eq!(probe::mounts_below(&claim), []);
        assert!(!probe::loops().iter().any(|device| device.backing == image));
        assert_eq!(daemon.lease("build").map(|lease| lease.state), Some(LeaseState::Ended));
        bystander.assert_untouched();
    });
}

#[test]
fn a_builder_that_leaves_nothing_is_not_talked_about() {
    scenario::privileged("tidy", |place| {
        let claim = place.directory("claim");
        let bystander = Bystander::new(place, &place.directory("other"));
        let daemon = Daemon::start(place, &Settings::default());
        let script = "echo out; echo err >&2; exit 0";
        let ended = program::finish(&mut daemon.run_script("tidy", &claim, script));
        assert_eq!((ended.status, ended.stdout.as_str(), ended.stderr.as_str()), (0, "out\n", "err\n"));
        bystander.assert_untouched();
    });
}

#[test]
fn processes_that_ignore_or_cannot_hear_sigterm_end_too() {
    scenario::privileged("stubborn", |place| {
        let claim = place.directory("claim");
        let bystander = Bystander::new(place, &place.directory("other"));
        let daemon = Daemon::start(place, &Settings { term_timeout: "300ms", ..Settings::default() });
        // The stopped one has a session of its own: in the script's process group it would make the
        // kernel send SIGHUP to all of that group once hostler is gone (orphaned process groups,
        // `credentials(7)`), and nobody would be left to be asked.
        let script = r#"
            (trap '' TERM HUP INT; echo $$ >/dev/null; sh -c 'echo $PPID > deaf'; while :; do sleep 0.1; done) &
            setsid sh -c 'echo $$ > stopped; exec sleep 600' &
            while [ ! -s stopped ]; do sleep 0.01; done; kill -STOP "$(cat stopped)"
            sh -c 'trap "echo yes > asked; exit 0" TERM; echo $$ > polite; while :; do sleep 0.05; done' &
            while [ ! -s deaf ] || [ ! -s polite ]; do sleep 0.01; done
            echo $$ > shell
            sleep 601
        "#;
        let mut hostler = daemon.run_script("stubborn", &claim, script).spawn().or_fail("starting hostler");
        let all = ["deaf", "stopped", "polite", "shell"].map(|name| probe::pid_from(&claim.join(name)));
        wait_until("the stop", Duration::from_secs(5), || probe::state(all[1].pid) == Some('T'));

        let killed = Instant::now();
        kill(hostler.id());
        hostler.wait().or_fail("waiting for hostler");
        wait_for_end(&all, Duration::from_secs(5));
        let took = killed.elapsed();
        println!(
            "a deaf and a stopped process were gone after {} ms (term_timeout 300 ms)",
            took.as_millis()
        );
        assert!(took >= Duration::from_millis(290), "SIGKILL came before the time was over: {took:?}");
        // Whoever listens is asked first.
        assert_eq!(
            std::fs::read_to_string(claim.join("asked")).or_fail("the polite process's note"),
            "yes\n"
        );
        daemon.wait_for_end("stubborn", Duration::from_secs(5));
        bystander.assert_untouched();
    });
}
