//! Mounts and loop devices of every shape that builders make.

use std::ffi::OsString;
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::process::Stdio;
use std::time::Duration;

use hostler_protocol::resource::{Kind, Outcome};
use hostler_tests::bystander::Bystander;
use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::OrFail;
use hostler_tests::place::{Place, kill};
use hostler_tests::{probe, program, scenario};
use nix::mount::{MsFlags, mount};

const SOON: Duration = Duration::from_secs(10);

/// Runs a script that waits to be killed, kills `hostler`, and wants all of it gone.
#[track_caller]
fn leak_and_want_it_gone(place: &Place, mounts: usize, loops: usize, script: &str) {
    leak_and_want(place, (mounts, 0), loops, script);
}

/// The same, with so many mounts below the claim and so many copies of them elsewhere.
#[track_caller]
fn leak_and_want(place: &Place, (mounts, copies): (usize, usize), loops: usize, script: &str) {
    let claim = place.directory("claim");
    let bystander = Bystander::new(place, &place.directory("other"));
    let daemon = Daemon::start(place, &Settings::default());
    let script = format!("{script}\necho $$ > shell; sleep 600");
    let mut hostler =
        daemon.run_script("build", &claim, &script).stdout(Stdio::null()).spawn().or_fail("starting hostler");
    let shell = probe::pid_from(&claim.join("shell"));
    let before = probe::mounts_below(&claim);
    assert_eq!(before.len(), mounts, "{before:?}");
    assert_eq!(probe::loops_below(&claim).len(), loops);
    let devices = probe::loops();
    let own: Vec<_> = devices.into_iter().filter(|device| device.backing.starts_with(&claim)).collect();

    kill(hostler.id());
    hostler.wait().or_fail("waiting for hostler");
    let (lease, _) = daemon.wait_for_end("build", SOON);
    assert_eq!(probe::mounts_below(&claim), []);
    assert!(own.iter().all(|device| !probe::loops().contains(device)), "{own:?}");
    assert!(!shell.runs());
    let report = lease.report.or_fail("a report");
    let count = |kind| {
        let ours = report.resources.iter().filter(|one| one.kind == kind);
        ours.filter(|one| one.outcome == Outcome::Reclaimed).count()
    };
    assert_eq!(count(Kind::Mount), mounts + copies, "{report:?}");
    bystander.assert_untouched();
}

#[test]
fn stacked_nested_and_bound_mounts_go_from_the_top() {
    scenario::privileged("stacked", |place| {
        let _ = place.directory("claim");
        let _ = place.image("claim/image", 8);
        leak_and_want_it_gone(
            place,
            9,
            1,
            r#"
            device=$(losetup --find --show image)
            mkdir one two; mount "$device" one
            mount -t tmpfs none one; mount "$device" one; mount -t tmpfs none one
            mkdir one/deep; mount -t tmpfs none one/deep; mkdir one/deep/er; mount "$device" one/deep/er
            mkdir one/deep/er/part; mount --bind one/deep/er/part two
            mount --bind . one/deep/er/part
            mount -t tmpfs none one/deep/er/part
            "#,
        );
    });
}

#[test]
fn a_mount_that_hides_others_goes_first() {
    scenario::privileged("hidden", |place| {
        let _ = place.directory("claim");
        let _ = place.image("claim/image", 8);
        leak_and_want_it_gone(
            place,
            4,
            1,
            r#"
            device=$(losetup --find --show image)
            mkdir -p a/b/c a/d; mount "$device" a/b/c; mount -t tmpfs none a/d
            sleep 0.3
            mount -t tmpfs none a; mount --bind . a
            "#,
        );
    });
}

#[test]
fn names_may_hold_any_byte() {
    scenario::privileged("names", |place| {
        let claim = place.directory("claim");
        let awkward: [&[u8]; 6] = [
            b"a space",
            b"a\nnew line",
            b"back\\slash\\040",
            b"not\xff\xfeutf8",
            b"tab\there # $(x)",
            b"\xe2\x80\xae",
        ];
        for (index, name) in awkward.iter().enumerate() {
            let directory = claim.join(OsString::from_vec(name.to_vec()));
            fs::create_dir(&directory).or_fail("making a directory");
            let image = directory.join(OsString::from_vec([name, b".img".as_slice()].concat()));
            hostler_tests::place::make_image(&image, 2);
            fs::create_dir(directory.join("mnt")).or_fail("making a mount point");
            fs::write(claim.join(format!("name-{index}")), name).or_fail("writing a name");
        }
        leak_and_want_it_gone(
            place,
            12,
            6,
            r#"
            for directory in */; do
                directory=${directory%/}
                device=$(losetup --find --show "$directory/$directory.img")
                mount "$device" "$directory/mnt"
                mount --bind "$directory/mnt/lost+found" "$directory"
            done
            "#,
        );
        // What people are shown has no byte that a terminal would act on.
        assert!(!fs::read(place.path("hostlerd.log")).or_fail("the log").contains(&0xff));
    });
}

#[test]
fn an_image_in_a_mounted_image_goes_before_it() {
    scenario::privileged("matryoshka", |place| {
        let _ = place.directory("claim");
        let _ = place.image("claim/image", 24);
        let _ = place.image("claim/inner.img", 8);
        let _ = place.image("claim/innermost.img", 2);
        leak_and_want_it_gone(
            place,
            3,
            3,
            r#"
            outer=$(losetup --find --show image); mkdir mnt; mount "$outer" mnt
            cp inner.img mnt; inner=$(losetup --find --show mnt/inner.img)
            mkdir mnt/inner; mount "$inner" mnt/inner
            cp innermost.img mnt/inner; innermost=$(losetup --find --show mnt/inner/innermost.img)
            mkdir mnt/inner/most; mount "$innermost" mnt/inner/most
            "#,
        );
    });
}

#[test]
fn a_recursive_bind_of_shared_mounts_is_undone_without_touching_them() {
    scenario::privileged("shared", |place| {
        // As systemd sets a host up. A bind of a shared mount is its peer: what is unmounted below
        // the one would be unmounted below the other, too.
        let host = place.directory("host");
        let _ = place.directory("claim");
        mount(Some("none"), &host, Some("tmpfs"), MsFlags::empty(), None::<&str>).or_fail("mounting");
        let below = place.directory("host/pts");
        mount(Some("none"), &below, Some("tmpfs"), MsFlags::empty(), None::<&str>).or_fail("mounting");
        let all = MsFlags::MS_REC | MsFlags::MS_SHARED;
        mount(None::<&str>, "/", None::<&str>, all, None::<&str>).or_fail("making mounts shared");
        let numbers = [probe::mount_number(&host), probe::mount_number(&below)];
        leak_and_want_it_gone(
            place,
            3,
            0,
            "mkdir mnt; mount -t tmpfs none mnt; mkdir mnt/dev; mount --rbind ../host mnt/dev",
        );
        assert_eq!(
            [probe::mount_number(&host), probe::mount_number(&below)],
            numbers,
            "the host's own mounts"
        );
        for point in [&below, &host] {
            program::succeed("umount", [point]);
        }
    });
}

#[test]
fn what_a_lease_mounted_on_a_peer_of_the_hosts_goes_from_the_host_too() {
    scenario::privileged("propagated", |place| {
        let host = place.directory("host");
        let _ = place.directory("claim");
        mount(Some("none"), &host, Some("tmpfs"), MsFlags::empty(), None::<&str>).or_fail("mounting");
        let point = place.directory("host/point");
        let all = MsFlags::MS_REC | MsFlags::MS_SHARED;
        mount(None::<&str>, "/", None::<&str>, all, None::<&str>).or_fail("making mounts shared");
        let number = probe::mount_number(&host);
        let script =
            "mkdir mnt; mount --bind ../host mnt; mount -t tmpfs none mnt/point; mountpoint -q ../host/point";
        // The copy that the kernel made of the lease's mount is told as taken back, too.
        leak_and_want(place, (2, 1), 0, script);
        assert_eq!(probe::mount_number(&point), number, "the copy that came by propagation is left");
        program::succeed("umount", [&host]);
    });
}
