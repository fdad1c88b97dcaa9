//! Leases that are opened and closed by hooks, and leases that end by themselves.

use std::fs;
use std::os::fd::AsFd;
use std::process::Stdio;
use std::time::Duration;

use hostler_protocol::lease::LeaseState;
use hostler_tests::bystander::{Bystander, attach};
use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::{OrFail, wait_until};
use hostler_tests::place::{kill, signal};
use hostler_tests::probe::ProcessSeen;
use hostler_tests::{probe, program, scenario};
use nix::sys::signal::Signal;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::json;

const SOON: Duration = Duration::from_secs(10);

#[test]
fn a_hook_opens_a_lease_and_another_closes_it() {
    scenario::privileged("hooks", |place| {
        let claim = place.directory("claim");
        let bystander = Bystander::new(place, &place.directory("other"));
        let daemon = Daemon::start(place, &Settings::default());
        let mut job = place.command("sleep").arg("600").spawn().or_fail("starting a job");
        let owner = job.id().to_string();
        let claimed = claim.to_string_lossy().into_owned();
        let opened = daemon.ask(&["lease", "open", "--name", "job", "--owner", &owner, "--claim", &claimed]);
        let token = opened.succeeded();
        let token = token.trim();
        // Nothing of the job's own processes does this; the claim alone makes it the lease's.
        let image = place.image("claim/image", 4);
        let node = attach(&image);
        let point = place.directory("claim/mnt");
        program::succeed("mount", [node.as_ref(), point.as_os_str()]);
        let listed = daemon.ask(&["lease", "list"]).succeeded();
        assert!(listed.contains("job") && listed.contains("open"), "{listed}");

        let closed = daemon.ask(&["lease", "close", token]);
        let said = closed.clone().succeeded();
        assert!(said.contains(&format!("mount {}: reclaimed\n", point.display())), "{said}");
        assert!(said.contains(&format!("loop {node}: reclaimed\n")), "{said}");
        assert_eq!(probe::mounts_below(&claim), []);
        assert!(ProcessSeen::of(job.id()).runs(), "the owner itself was ended");
        let again = daemon.ask(&["lease", "close", token]);
        assert_eq!(again.status, 3, "{again:?}");
        assert!(again.stderr.contains("there is no lease 1 of yours"), "{again:?}");
        kill(job.id());
        job.wait().or_fail("waiting for the job");
        bystander.assert_untouched();
    });
}

#[test]
fn a_close_that_could_not_take_all_back_is_1() {
    scenario::privileged("stuck", |place| {
        let claim = place.directory("claim");
        let daemon = Daemon::start(place, &Settings::default());
        let mut job = place.command("sleep").arg("600").spawn().or_fail("starting a job");
        let owner = job.id().to_string();
        let claimed = claim.to_string_lossy().into_owned();
        let token = daemon.ask(&["lease", "open", "--owner", &owner, "--claim", &claimed]).succeeded();
        let point = place.directory("claim/mnt");
        program::succeed("mount", ["-t", "tmpfs", "none", &*point.to_string_lossy()]);
        let held = fs::File::create(point.join("open")).or_fail("holding the mount");
        let closed = daemon.ask(&["lease", "close", token.trim()]);
        assert_eq!(closed.status, 1, "{closed:?}");
        let told = format!("mount {}: pinned (held by process {} (", point.display(), std::process::id());
        assert!(closed.stdout.contains(&told), "{closed:?}");
        let shown = daemon.ask(&["status"]).succeeded();
        assert!(shown.contains("PINNED"), "{shown}");
        drop(held);
        daemon.wait_for_end("job", SOON);
        kill(job.id());
        job.wait().or_fail("waiting for the job");
    });
}

#[test]
fn a_lease_ends_at_its_deadline_though_its_owner_lives() {
    scenario::privileged("deadline", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let sleeper = || place.command("sleep").arg("600").spawn().or_fail("starting a process");
        let (mut owner, mut member) = (sleeper(), sleeper());
        // Until then it is a shell that is about to enter the test's own control groups.
        wait_until("the member to be itself", SOON, || {
            fs::read(format!("/proc/{}/comm", member.id())).is_ok_and(|name| name == b"sleep\n")
        });
        let pidfd = |child| pidfd_open(Pid::from_child(child), PidfdFlags::empty()).or_fail("a pidfd");
        let mut client = daemon.client();
        let open = json!({ "name": "short", "owner": 0, "deadline_seconds": 1 });
        let opened = client.call("OpenLease", &open, &[pidfd(&owner).as_fd()]).or_fail("opening a lease");
        let adopt = json!({ "lease": opened["lease"], "epoch": opened["epoch"], "process": 0 });
        client.call("Adopt", &adopt, &[pidfd(&member).as_fd()]).or_fail("adopting");
        let seen = ProcessSeen::of(member.id());
        let (_, took) = daemon.wait_for_end("short", SOON);
        assert!(took > Duration::from_millis(500), "it ended before its deadline: {took:?}");
        assert!(!seen.runs());
        assert!(ProcessSeen::of(owner.id()).runs());
        for child in [&mut owner, &mut member] {
            kill(child.id());
            child.wait().or_fail("waiting for a process");
        }
    });
}

#[test]
fn who_asks_for_it_now_does_not_wait_for_the_grace() {
    scenario::privileged("hurry", |place| {
        let claim = place.directory("claim");
        let daemon = Daemon::start(place, &Settings { grace: "10min", ..Settings::default() });
        let script = "mkdir mnt; mount -t tmpfs none mnt; echo $$ > shell; sleep 600";
        let mut run = daemon.run_script("patient", &claim, script);
        let mut hostler = run.stdout(Stdio::null()).stderr(Stdio::null()).spawn().or_fail("starting hostler");
        let _ = probe::pid_from(&claim.join("shell"));
        kill(hostler.id());
        hostler.wait().or_fail("waiting for hostler");
        let (lease, _) = daemon.wait_for_state("patient", LeaseState::Closing, SOON);
        assert_eq!(probe::mounts_below(&claim).len(), 1, "taken back before the grace was over");
        daemon.ask(&["reclaim", "--lease", &lease.lease.to_string()]).succeeded();
        daemon.wait_for_end("patient", SOON);
        assert_eq!(probe::mounts_below(&claim), []);
    });
}

#[test]
fn what_a_dead_owner_left_stays_for_the_grace_also_over_a_restart() {
    scenario::privileged("grace", |place| {
        let claim = place.directory("claim");
        let mut daemon = Daemon::start(place, &Settings { grace: "1500ms", ..Settings::default() });
        let script = "mkdir mnt; mount -t tmpfs none mnt; echo $$ > shell; sleep 600";
        let mut run = daemon.run_script("patient", &claim, script);
        let mut hostler = run.stdout(Stdio::null()).stderr(Stdio::null()).spawn().or_fail("starting hostler");
        let _ = probe::pid_from(&claim.join("shell"));
        kill(hostler.id());
        hostler.wait().or_fail("waiting for hostler");
        std::thread::sleep(Duration::from_millis(300));
        daemon.kill();
        daemon.start_again();
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(probe::mounts_below(&claim).len(), 1, "taken back before the grace was over");
        daemon.wait_until_idle(SOON);
        assert_eq!(probe::mounts_below(&claim), []);
    });
}

#[test]
fn a_claim_without_a_file_handle_is_found_again_after_a_restart_or_told_about() {
    scenario::privileged("overlay", |place| {
        // An overlay has no file handles by default, as in a container.
        for name in ["lower", "upper", "work", "merged"] {
            let _ = place.directory(name);
        }
        let options = format!(
            "lowerdir={},upperdir={},workdir={}",
            place.path("lower").display(),
            place.path("upper").display(),
            place.path("work").display()
        );
        let merged = place.path("merged");
        program::succeed("mount", ["-t", "overlay", "-o", &options, "none", &*merged.to_string_lossy()]);
        let scratch = place.directory("merged/scratch");
        let mut daemon = Daemon::start(place, &Settings::default());
        let mut run = daemon.hostler(&["run", "--name", "overlay", "--scratch"]);
        run.arg(&scratch).args(["--", "/bin/sh", "-eu", "-c"]);
        run.arg("mkdir mnt; mount -t tmpfs none mnt; sleep 0.3; echo $$ > shell; sleep 600");
        run.current_dir(&scratch).stdout(Stdio::null()).stderr(Stdio::null());
        let mut hostler = run.spawn().or_fail("starting hostler");
        let shell = probe::pid_from(&scratch.join("shell"));
        daemon.kill();
        daemon.start_again();
        kill(hostler.id());
        hostler.wait().or_fail("waiting for hostler");
        hostler_tests::place::wait_for_end(&[shell], SOON);
        if probe::mounts_are_numbered_once() {
            daemon.wait_for_end("overlay", SOON);
            assert!(probe::mounts_below(&scratch).is_empty() && !scratch.exists());
            drop(daemon);
        } else {
            // It can be told from no other, so it is left, and told about.
            wait_until("the directory to be told about", SOON, || {
                daemon.ask(&["status"]).succeeded().contains("could not be read")
            });
            std::thread::sleep(Duration::from_millis(700));
            let lease = daemon.lease("overlay").or_fail("the lease");
            assert_ne!(lease.state, LeaseState::Ended, "{lease:?}");
            drop(daemon);
            assert_eq!(
                probe::mounts_below(&scratch).len(),
                1,
                "a mount that cannot be told from others went"
            );
            program::succeed("umount", [scratch.join("mnt")]);
        }
        program::succeed("umount", [&merged]);
    });
}

#[test]
fn what_was_stuck_and_is_its_leases_no_more_keeps_the_lease_until_it_is_gone() {
    scenario::privileged("unsettled", |place| {
        let claim = place.directory("claim");
        let daemon = Daemon::start(place, &Settings::default());
        hostler_tests::place::make_image(&claim.join("image"), 4);
        let script = "losetup --find image; echo $$ > shell; sleep 600";
        let mut run = daemon.run_script("build", &claim, script);
        let mut hostler = run.stdout(Stdio::null()).spawn().or_fail("starting hostler");
        let _ = probe::pid_from(&claim.join("shell"));
        let device = probe::loop_of(&claim.join("image"));
        let node = format!("/dev/loop{}", device.number);
        let open = fs::File::open(&node).or_fail("opening the device");
        kill(hostler.id());
        hostler.wait().or_fail("waiting for hostler");
        daemon.wait_for_state("build", LeaseState::Pinned, SOON);

        // Protected from now on, so nobody takes it back; and it is there, so nobody says that it is gone.
        let more = format!("[protect]\nbacking_under = [{claim:?}]\n");
        daemon.configure(&Settings { more, ..Settings::default() });
        signal(daemon.pid(), Signal::SIGHUP);
        let reread = || daemon.log().contains("the configuration was read again");
        wait_until("the daemon to read its configuration", SOON, reread);
        let report = || daemon.lease("build").and_then(|lease| lease.report);
        let is_told = || {
            report().is_some_and(|report| {
                report.resources.iter().any(|one| one.name == node && one.detail.contains("[protect]"))
            })
        };
        wait_until("the report to say why", SOON, is_told);
        std::thread::sleep(Duration::from_secs(2));
        let lease = daemon.lease("build").or_fail("the lease");
        assert_eq!(lease.state, LeaseState::Pinned);
        assert!(!lease.report.or_fail("a report").complete);
        assert!(probe::loops().contains(&device));
        // The kernel was told before to let go of it once nobody has it open.
        drop(open);
        let (lease, _) = daemon.wait_for_end("build", SOON);
        assert!(lease.report.or_fail("a report").complete);
    });
}
