//! What only looks like a leak: what was there before, and what has a leak's name now.

use std::fs;
use std::process::Stdio;
use std::time::Duration;

use hostler_protocol::resource::{Kind, Outcome};
use hostler_tests::bystander::Bystander;
use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::OrFail;
use hostler_tests::place::kill;
use hostler_tests::{probe, program, scenario};

const SOON: Duration = Duration::from_secs(10);

#[test]
fn what_lay_in_a_directory_before_it_was_claimed_stays() {
    scenario::privileged("before", |place| {
        let claim = place.directory("claim");
        let _ = place.image("claim/image", 8);
        let bystander = Bystander::new(place, &claim);
        let daemon = Daemon::start(place, &Settings::default());
        let script = r#"
            device=$(losetup --find --show image); mkdir mnt; mount "$device" mnt
            mount -t tmpfs none bystander/lost+found
            exit 0
        "#;
        let ended = program::finish(&mut daemon.run_script("build", &claim, script));
        assert_eq!(ended.stderr, "hostler: took back what the command left: 2 mounts, 1 loop device\n");
        let left: Vec<_> = probe::mounts_below(&claim).into_iter().map(|mount| mount.point).collect();
        assert_eq!(left, [bystander.point()]);
        assert_eq!(probe::loops_below(&claim), [bystander.device().clone()]);
        bystander.assert_untouched();
    });
}

#[test]
fn what_was_there_before_stays_also_when_mounts_change_while_the_claim_is_made() {
    scenario::privileged("race", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let noisy = place.directory("noisy");
        let quiet = place.directory("quiet");
        let bystander = Bystander::new(place, &quiet);
        // A lease with a claim makes the daemon look at each change; another place's mounts change
        // all the time.
        let mut run =
            daemon.run_script("noise", &noisy, "mkdir m; while :; do mount -t tmpfs none m; umount m; done");
        let mut noise = run.stdout(Stdio::null()).stderr(Stdio::null()).spawn().or_fail("starting noise");
        std::thread::sleep(Duration::from_millis(200));
        for _ in 0..12 {
            let ended = program::finish(&mut daemon.run_script("short", &quiet, "exit 0"));
            assert_eq!((ended.status, ended.stderr.as_str()), (0, ""));
            bystander.assert_untouched();
        }
        kill(noise.id());
        noise.wait().or_fail("waiting for noise");
        daemon.wait_for_end("noise", SOON);
        bystander.assert_untouched();
    });
}

#[test]
fn a_device_that_was_bound_to_another_file_meanwhile_stays_bound() {
    scenario::privileged("rebound", |place| {
        let bystander = Bystander::new(place, &place.directory("other"));
        let daemon = Daemon::start(place, &Settings { grace: "1s", ..Settings::default() });
        let other = place.image("innocent.img", 4);
        // Another test may be given the number in the moment between detaching and attaching.
        let rebound = (0..10).find_map(|attempt| {
            let name = format!("build-{attempt}");
            let claim = place.directory(&name);
            let image = place.image(claim.join("image"), 4);
            let script = "losetup --find image; echo $$ > shell; sleep 600";
            let mut run = daemon.run_script(&name, &claim, script);
            let mut hostler = run.stdout(Stdio::null()).spawn().or_fail("starting hostler");
            let _ = probe::pid_from(&claim.join("shell"));
            let device = probe::loop_of(&image);
            let node = format!("/dev/loop{}", device.number);
            kill(hostler.id());
            hostler.wait().or_fail("waiting for hostler");
            program::succeed("losetup", ["-d", &node]);
            let attached =
                program::finish(std::process::Command::new("losetup").arg(&node).arg(&other)).status == 0;
            let now = probe::loops().into_iter().find(|seen| seen.number == device.number);
            let (lease, _) = daemon.wait_for_end(&name, SOON);
            attached.then(|| (now.or_fail("the device, bound again"), device, lease))
        });
        let (now, before, lease) = rebound.or_fail("a device bound again under the same number");
        assert_ne!(now.sequence, before.sequence);
        let report = lease.report.or_fail("a report");
        let outcomes: Vec<_> = report.resources.iter().filter(|one| one.kind == Kind::Loop).collect();
        assert!(outcomes.iter().all(|one| one.outcome != Outcome::Reclaimed), "{outcomes:?}");
        assert_eq!(probe::loop_of(&other), now, "the new binding was touched");
        program::succeed("losetup", ["-d", &format!("/dev/loop{}", now.number)]);
        bystander.assert_untouched();
    });
}

#[test]
fn a_removed_image_and_a_renamed_directory_are_found_all_the_same() {
    scenario::privileged("renamed", |place| {
        let claim = place.directory("claim");
        let image = place.image("claim/image", 8);
        let bystander = Bystander::new(place, &place.directory("other"));
        let mut daemon = Daemon::start(place, &Settings::default());
        for restarted in [false, true] {
            let _ = fs::remove_dir_all(&claim);
            fs::create_dir(&claim).or_fail("making the directory again");
            hostler_tests::place::make_image(&image, 8);
            let script = r#"
                device=$(losetup --find --show image); mkdir mnt; mount "$device" mnt
                mkdir mnt/deep; mount -t tmpfs none mnt/deep
                sleep 0.3; rm image
                echo $$ > shell; sleep 600
            "#;
            let mut run = daemon.run_script("build", &claim, script);
            let mut hostler = run.stdout(Stdio::null()).spawn().or_fail("starting hostler");
            let shell = probe::pid_from(&claim.join("shell"));
            let device = probe::loops_below(&claim);
            assert_eq!(device.len(), 1, "{device:?}");
            assert!(device[0].backing.to_string_lossy().ends_with("image (deleted)"), "{device:?}");
            let moved = place.path("moved");
            fs::rename(&claim, &moved).or_fail("renaming the directory");
            assert_eq!(probe::mounts_below(&moved).len(), 2);
            if restarted {
                daemon.kill();
                daemon.start_again();
            }
            kill(hostler.id());
            hostler.wait().or_fail("waiting for hostler");
            daemon.wait_until_idle(SOON);
            assert_eq!(probe::mounts_below(&moved), []);
            assert!(!probe::loops().contains(&device[0]), "restarted: {restarted}");
            assert!(!shell.runs());
            fs::remove_dir_all(&moved).or_fail("removing the directory");
        }
        bystander.assert_untouched();
    });
}

#[test]
fn a_host_loop_of_a_file_that_only_looks_claimed_stays() {
    scenario::privileged("lookalike", |place| {
        let claim = place.directory("claim");
        let _ = place.image("claim/image", 4);
        // The same name beside it, and a name that begins like it.
        let beside = place.directory("claim-2");
        let lookalike = place.image(beside.join("image"), 4);
        let outside = place.image("outside.img", 4);
        std::os::unix::fs::symlink(&outside, claim.join("link.img")).or_fail("making a link");
        let daemon = Daemon::start(place, &Settings::default());
        let script =
            r#"losetup --find image; losetup --find ../claim-2/image; losetup --find link.img; exit 0"#;
        let ended = program::finish(&mut daemon.run_script("build", &claim, script));
        assert_eq!(ended.stderr, "hostler: took back what the command left: 1 loop device\n");
        assert_eq!(probe::loops_below(&claim), []);
        for image in [&lookalike, &outside] {
            let device = probe::loop_of(image);
            program::succeed("losetup", ["-d", &format!("/dev/loop{}", device.number)]);
        }
    });
}
