//! Shapes that others call unfreeable: through other namespaces, overlays, swap, FUSE, and processes that
//! do not want to end.

use std::time::Duration;

use hostler_protocol::resource::{Kind, Outcome};
use hostler_tests::failure::{OrFail, wait_until};
use hostler_tests::leak::{Leak, MOUNTED_IMAGE};
use hostler_tests::place::Place;
use hostler_tests::probe::ProcessSeen;
use hostler_tests::{probe, program, scenario};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

const SOON: Duration = Duration::from_secs(10);

/// Since Linux 6.18 the numbers of namespaces do not rise from one processor to the next, and the kernel
/// refuses to bind the file of one with a lower number than its own.
const KEEP_A_NAMESPACE: &str = "until unshare --mount=keeper/ns true 2>/dev/null; do sleep 0.01; done";

fn image(place: &Place) {
    let _ = place.directory("claim");
    let _ = place.image("claim/image", 16);
}

/// Wants a file system of this image mounted in no namespace of the host.
#[track_caller]
fn wants_detached(place: &Place) {
    let image = place.path("claim/image");
    assert!(!probe::loops().iter().any(|device| device.backing == image), "the device is still bound");
}

#[test]
fn through_a_namespace_without_a_process() {
    scenario::privileged("processless", |place| {
        image(place);
        // What keeps a namespace by its file has to be a private mount.
        let keeper = place.directory("claim/keeper");
        let script = format!(
            "{MOUNTED_IMAGE}
            mount -t tmpfs none keeper; mount --make-private keeper; touch keeper/ns
            {KEEP_A_NAMESPACE}
            umount mnt"
        );
        let mut leak = Leak::start(place, &script);
        assert_eq!(probe::mounts_below(&leak.path("mnt")), [], "the host's own copy was unmounted");
        // Nobody is in the namespace, and it still holds the device.
        let tree = leak.why(&leak.node());
        let reasons: Vec<_> = tree.holders.iter().map(|holder| holder.reason).collect();
        assert!(reasons.contains(&hostler_protocol::why::Reason::ForeignNamespace), "{tree:#?}");
        leak.kill_and_want_gone(&[(Kind::Loop, 1)]);
        wants_detached(place);
        assert!(keeper.exists());
    });
}

#[test]
fn a_bystanders_namespace_loses_the_leak_and_keeps_the_rest() {
    scenario::privileged("kept-namespace", |place| {
        image(place);
        let mut leak = Leak::start(place, MOUNTED_IMAGE);
        // Kept by a bystander's file, without any process.
        let keeper = place.directory("keeper");
        mount(Some("none"), &keeper, Some("tmpfs"), MsFlags::empty(), None::<&str>).or_fail("mounting");
        mount(None::<&str>, &keeper, None::<&str>, MsFlags::MS_PRIVATE, None::<&str>).or_fail("private");
        std::fs::write(keeper.join("ns"), "").or_fail("making a file");
        let file = keeper.join("ns");
        let script = format!("cd {}; {KEEP_A_NAMESPACE}", place.path("").display());
        program::succeed("sh", ["-c", script.as_str()]);
        leak.kill_and_want_gone(&[(Kind::Loop, 1), (Kind::Mount, 2)]);
        wants_detached(place);
        let inside = format!("--mount={}", file.display());
        let shown = program::succeed("nsenter", [inside.as_str(), "cat", "/proc/self/mountinfo"]);
        assert!(shown.contains("other/bystander"), "the bystander's copy went too: {shown}");
        assert!(!shown.contains("claim/mnt"), "{shown}");
        umount2(&file, MntFlags::UMOUNT_NOFOLLOW).or_fail("unmounting the namespace's file");
        umount2(&keeper, MntFlags::UMOUNT_NOFOLLOW).or_fail("unmounting the keeper");
    });
}

#[test]
fn an_overlay_stack() {
    scenario::privileged("overlays", |place| {
        image(place);
        let script = format!(
            "{MOUNTED_IMAGE}
            mkdir mnt/lower mnt/upper mnt/work merged above upper2 work2
            mount -t overlay overlay -o lowerdir=$PWD/mnt/lower,upperdir=$PWD/mnt/upper,workdir=$PWD/mnt/work merged
            mkdir merged/sub; mount -t tmpfs none merged/sub
            mount -t tmpfs none above; mkdir above/u above/w
            mount -t overlay overlay -o lowerdir=$PWD/merged,upperdir=$PWD/above/u,workdir=$PWD/above/w above"
        );
        let mut leak = Leak::start(place, &script);
        leak.kill_and_want_gone(&[(Kind::Loop, 1), (Kind::Mount, 5)]);
        wants_detached(place);
    });
}

#[test]
fn read_only_squashfs() {
    scenario::privileged("squashfs", |place| {
        let _ = place.directory("claim");
        let root = place.directory("root");
        std::fs::write(root.join("file"), "x").or_fail("writing a file");
        let image = place.path("claim/image");
        program::succeed(
            "mksquashfs",
            [root.as_os_str(), image.as_os_str(), "-quiet".as_ref(), "-no-progress".as_ref()],
        );
        let mut leak = Leak::start(place, "mkdir mnt; mount -o loop,ro image mnt");
        leak.kill_and_want_gone(&[(Kind::Loop, 1), (Kind::Mount, 1)]);
        wants_detached(place);
    });
}

#[test]
fn below_a_bystanders_mount_that_hides_it() {
    scenario::privileged("shadowed", |place| {
        image(place);
        let others = place.directory("claim/others");
        mount(Some("none"), &others, Some("tmpfs"), MsFlags::empty(), None::<&str>).or_fail("mounting");
        let script = "device=$(losetup --find --show image); mkdir -p a/b; mount \"$device\" a/b";
        let mut leak = Leak::start(place, script);
        let over = leak.path("a");
        mount(Some(&others), &over, None::<&str>, MsFlags::MS_MOVE, None::<&str>).or_fail("moving");
        let number = probe::mount_number(&over);
        leak.kill();
        wait_until("the end of the hidden mount's device", SOON, || {
            let image = place.path("claim/image");
            !probe::loops().iter().any(|device| device.backing == image)
        });
        assert_eq!(probe::mount_number(&over), number, "the bystander's mount on top");
        umount2(&over, MntFlags::UMOUNT_NOFOLLOW).or_fail("unmounting");
        leak.gone();
    });
}

#[test]
fn a_mount_point_of_4000_characters() {
    scenario::privileged("long", |place| {
        image(place);
        let claim = place.path("claim");
        let room = 4000 - claim.as_os_str().len();
        let name = "n".repeat(200);
        let depth = room / 201;
        let script = format!(
            "device=$(losetup --find --show image)
            i=0; while [ $i -lt {depth} ]; do mkdir {name}; cd {name}; i=$((i + 1)); done
            mkdir m; mount \"$device\" m
            cd {}",
            claim.display()
        );
        let mut leak = Leak::start(place, &script);
        let mounts = probe::mounts_below(&claim);
        assert!(mounts[0].point.as_os_str().len() > 3700, "{}", mounts[0].point.display());
        leak.kill_and_want_gone(&[(Kind::Loop, 1), (Kind::Mount, 1)]);
        wants_detached(place);
    });
}

#[test]
fn a_bind_of_a_directory_that_was_deleted() {
    scenario::privileged("deleted", |place| {
        image(place);
        let script = format!(
            "{MOUNTED_IMAGE}; mkdir mnt/gone bound; mount --bind mnt/gone bound; rmdir mnt/gone
            grep -q '//deleted' /proc/self/mountinfo"
        );
        let mut leak = Leak::start(place, &script);
        leak.kill_and_want_gone(&[(Kind::Loop, 1), (Kind::Mount, 2)]);
        wants_detached(place);
    });
}

#[test]
fn a_daemon_that_forked_twice_ignores_sigterm_and_has_no_environment() {
    scenario::privileged("daemon", |place| {
        image(place);
        let script = format!(
            "{MOUNTED_IMAGE}
            (cd mnt && setsid env -i /bin/sh -c 'trap \"\" TERM HUP; (echo $BASHPID >/dev/null; sh -c \"echo \\$PPID\" >../daemon; while :; do /bin/sleep 1; done) &' ) &
            wait; while ! [ -s daemon ]; do sleep 0.05; done"
        );
        let mut leak = Leak::start(place, &script);
        let pid = std::fs::read_to_string(leak.path("daemon")).or_fail("the daemon's number");
        let daemon = ProcessSeen::of(pid.trim().parse().or_fail("a number"));
        assert!(daemon.runs());
        leak.kill_and_want_gone(&[(Kind::Loop, 1), (Kind::Mount, 1)]);
        assert!(!daemon.runs(), "it still runs");
        wants_detached(place);
    });
}

#[test]
fn lazily_unmounted_and_frozen_with_nothing_to_show_it() {
    scenario::privileged("lazy-frozen", |place| {
        image(place);
        let mut leak = Leak::start(place, MOUNTED_IMAGE);
        program::succeed("fsfreeze", ["--freeze".as_ref(), leak.path("mnt").as_os_str()]);
        umount2(&leak.path("mnt"), MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).or_fail("unmounting");
        leak.kill_and_want_gone(&[(Kind::Loop, 1)]);
        wants_detached(place);
    });
}

#[test]
fn a_swapfile_on_a_mount_that_was_detached() {
    scenario::privileged("hidden-swap", |place| {
        let _ = place.directory("claim");
        let _ = place.image("claim/image", 32);
        let script = format!(
            "{MOUNTED_IMAGE}
            dd if=/dev/zero of=mnt/swapfile bs=1M count=4 status=none; chmod 600 mnt/swapfile
            mkswap -q mnt/swapfile; swapon mnt/swapfile; umount --lazy mnt"
        );
        let mut leak = Leak::start(place, &script);
        leak.kill_and_want_gone(&[(Kind::Loop, 1)]);
        wants_detached(place);
    });
}

#[test]
fn a_loop_device_on_a_tmpfs_of_the_lease() {
    scenario::privileged("tmpfs-image", |place| {
        let _ = place.directory("claim");
        let script = "mkdir t; mount -t tmpfs none t; truncate -s 8M t/image; mke2fs -q -F t/image
            device=$(losetup --find --show t/image); mkdir mnt; mount \"$device\" mnt; echo \"$device\" >device";
        let mut leak = Leak::start(place, script);
        let node = std::fs::read_to_string(leak.path("device")).or_fail("the device");
        leak.kill_and_want_gone(&[(Kind::Loop, 1), (Kind::Mount, 2)]);
        let number: u32 = node.trim().trim_start_matches("/dev/loop").parse().or_fail("a number");
        let still = probe::loops().into_iter().find(|device| device.number == number);
        assert!(still.is_none_or(|device| !device.backing.ends_with("t/image")), "still bound");
    });
}

#[test]
fn btrfs_on_two_devices() {
    scenario::privileged("btrfs", |place| {
        let _ = place.directory("claim");
        let script = "truncate -s 128M one two
            first=$(losetup --find --show one); second=$(losetup --find --show two)
            mkfs.btrfs -q -f \"$first\" \"$second\"; mkdir mnt; mount -o device=\"$second\" \"$first\" mnt
            mkdir mnt/inside; mount -t tmpfs none mnt/inside";
        let mut leak = Leak::start(place, script);
        leak.kill_and_want_gone(&[(Kind::Loop, 2), (Kind::Mount, 2)]);
    });
}

#[test]
fn hidden_in_a_namespace_that_only_the_lease_was_in() {
    scenario::privileged("own-namespace", |place| {
        image(place);
        // Mounted only inside; the process there ignores SIGTERM.
        let script = "device=$(losetup --find --show image); mkdir mnt
            unshare --mount sh -c 'mount \"$1\" mnt; echo $$ >../claim/inside; trap \"\" TERM; while :; do sleep 1; done' sh \"$device\" &
            while ! [ -s inside ]; do sleep 0.05; done";
        let mut leak = Leak::start(place, script);
        let pid = std::fs::read_to_string(leak.path("inside")).or_fail("the process inside");
        let inside = ProcessSeen::of(pid.trim().parse().or_fail("a number"));
        leak.kill();
        let lease = leak.gone();
        assert!(!inside.runs());
        let report = lease.report.or_fail("a report");
        assert!(report.resources.iter().all(|it| it.outcome != Outcome::Pinned), "{report:#?}");
        wants_detached(place);
    });
}

#[test]
fn a_process_that_was_stopped() {
    scenario::privileged("stopped", |place| {
        image(place);
        let script = format!("{MOUNTED_IMAGE}; (cd mnt && exec sleep 600) & echo $! >victim; sleep 0.1");
        let mut leak = Leak::start(place, &script);
        let pid: u32 = std::fs::read_to_string(leak.path("victim"))
            .or_fail("the process")
            .trim()
            .parse()
            .or_fail("a number");
        hostler_tests::place::signal(pid, nix::sys::signal::Signal::SIGSTOP);
        let stopped = ProcessSeen::of(pid);
        leak.kill_and_want_gone(&[(Kind::Loop, 1), (Kind::Mount, 1)]);
        assert!(!stopped.runs());
    });
}
