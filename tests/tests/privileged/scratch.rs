//! Scratch directories are removed with all they hold, and with nothing else.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::process::Stdio;
use std::time::Duration;

use hostler_protocol::lease::LeaseState;
use hostler_protocol::resource::{Kind, Outcome};
use hostler_tests::bystander::Bystander;
use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::OrFail;
use hostler_tests::place::{USER, kill};
use hostler_tests::{probe, program, scenario};

const SOON: Duration = Duration::from_secs(10);

#[test]
fn a_scratch_directory_goes_and_what_its_links_lead_to_stays() {
    scenario::privileged("links", |place| {
        let outside = place.directory("outside");
        fs::create_dir(outside.join("kept")).or_fail("making a directory");
        fs::write(outside.join("file"), "kept").or_fail("writing a file");
        let bystander = Bystander::new(place, &outside);
        let scratch = place.directory("scratch");
        symlink(&outside, scratch.join("to-outside")).or_fail("making a link");
        symlink("/", scratch.join("to-root")).or_fail("making a link");
        symlink("..", scratch.join("up")).or_fail("making a link");
        symlink("nowhere", scratch.join("dangling")).or_fail("making a link");
        fs::hard_link(outside.join("file"), scratch.join("hard")).or_fail("making a link");
        let _ = place.image("scratch/image", 8);
        let daemon = Daemon::start(place, &Settings::default());
        let script = r#"
            device=$(losetup --find --show image); mkdir mnt; mount "$device" mnt; mkdir mnt/inside
            mkdir -p read/only; echo x > read/only/file; chmod 400 read/only/file; chmod 500 read/only read
            mkfifo fifo; (cd "$PWD"; exec sleep 600) &
            exit 3
        "#;
        let mut run = daemon.hostler(&["run", "--name", "scratch", "--scratch"]);
        run.arg(&scratch).args(["--", "/bin/sh", "-eu", "-c", script]).current_dir(&scratch);
        let ended = program::finish(&mut run);
        assert_eq!(ended.status, 3, "{ended:?}");
        assert_eq!(
            ended.stderr,
            "hostler: took back what the command left: 1 process, 1 mount, 1 loop device, 1 directory\n"
        );
        assert!(!scratch.exists());
        let file = fs::metadata(outside.join("file")).or_fail("the file outside");
        assert_eq!(file.nlink(), 1);
        assert_eq!(fs::read_to_string(outside.join("file")).or_fail("the file outside"), "kept");
        assert!(outside.join("kept").is_dir());
        bystander.assert_untouched();
    });
}

#[test]
fn a_users_scratch_directory_goes_after_a_kill() {
    scenario::privileged("users", |place| {
        let scratch = place.directory_of_user("scratch");
        let daemon = Daemon::start(place, &Settings::default());
        let script = r#"
            mkdir -m 0 locked; i=0; path=deep
            while [ $i -lt 300 ]; do path=$path/d; i=$((i+1)); done; mkdir -p "$path"; echo x > "$path/file"
            echo $$ > shell; sleep 600
        "#;
        let mut run = daemon.hostler_of_user(&["run", "--name", "user", "--scratch"]);
        run.arg(&scratch).args(["--", "/bin/sh", "-eu", "-c", script]).current_dir(&scratch);
        let mut hostler = run.stdout(Stdio::null()).spawn().or_fail("starting hostler");
        let shell = probe::pid_from(&scratch.join("shell"));
        kill(hostler.id());
        hostler.wait().or_fail("waiting for hostler");
        let (lease, _) = daemon.wait_for_end("user", SOON);
        assert!(!scratch.exists() && !shell.runs());
        assert_eq!(lease.uid, USER);
        let report = lease.report.or_fail("a report");
        let directory = report.resources.iter().find(|one| one.kind == Kind::Directory);
        assert_eq!(directory.map(|one| one.outcome), Some(Outcome::Reclaimed), "{report:?}");
    });
}

#[test]
fn a_scratch_directory_with_a_bystanders_mount_is_kept() {
    scenario::privileged("occupied", |place| {
        let scratch = place.directory("scratch");
        fs::write(scratch.join("file"), "kept").or_fail("writing a file");
        let bystander = Bystander::new(place, &scratch);
        let inside = bystander.point().join("data");
        fs::write(&inside, "the bystander's").or_fail("writing the bystander's file");
        let daemon = Daemon::start(place, &Settings::default());
        let mut run = daemon.hostler(&["run", "--name", "occupied", "--scratch"]);
        run.arg(&scratch).args(["--", "/bin/true"]);
        let ended = program::finish(&mut run);
        assert_eq!(ended.status, 0);
        let told = format!(
            "hostler: directory {} is still there: mounted below it, and not the lease's: {}; the watchdog keeps trying\n",
            scratch.display(),
            bystander.point().display()
        );
        assert_eq!(ended.stderr, told);
        let (lease, _) = daemon.wait_for_state("occupied", LeaseState::Pinned, SOON);
        let report = lease.report.or_fail("a report");
        let directory = report.resources.iter().find(|one| one.kind == Kind::Directory);
        assert_eq!(directory.map(|one| one.outcome), Some(Outcome::Pinned), "{report:?}");
        assert_eq!(fs::read_to_string(&inside).or_fail("the bystander's file"), "the bystander's");
        assert_eq!(fs::read_to_string(scratch.join("file")).or_fail("the other file"), "kept");
        bystander.assert_untouched();
        // Once the bystander has gone by itself, the directory goes as well.
        let held = bystander.device().clone();
        drop(bystander);
        daemon.wait_for_end("occupied", SOON);
        assert!(!scratch.exists());
        assert!(!probe::loops().contains(&held));
    });
}

#[test]
fn a_scratch_directory_that_another_took_the_place_of_is_left() {
    scenario::privileged("swapped", |place| {
        let scratch = place.directory("scratch");
        let daemon = Daemon::start(place, &Settings { grace: "500ms", ..Settings::default() });
        let mut run = daemon.hostler(&["run", "--name", "swapped", "--scratch"]);
        run.arg(&scratch).args(["--", "/bin/sh", "-c", "echo $$ > shell; sleep 600"]).current_dir(&scratch);
        let mut hostler = run.stdout(Stdio::null()).spawn().or_fail("starting hostler");
        let _ = probe::pid_from(&scratch.join("shell"));
        kill(hostler.id());
        hostler.wait().or_fail("waiting for hostler");
        fs::rename(&scratch, place.path("moved")).or_fail("renaming");
        fs::create_dir(&scratch).or_fail("taking its place");
        fs::write(scratch.join("precious"), "").or_fail("writing a file");
        fs::set_permissions(&scratch, fs::Permissions::from_mode(0o700)).or_fail("setting permissions");
        daemon.wait_for_end("swapped", SOON);
        assert!(scratch.join("precious").exists(), "a directory of the same name was emptied");
        assert!(!place.path("moved").exists(), "the scratch directory itself is left");
    });
}
