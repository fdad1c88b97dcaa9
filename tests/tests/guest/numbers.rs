//! What old kernels give again: the number of a mount.

use std::process::Stdio;
use std::time::Duration;

use hostler_tests::bystander::Bystander;
use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::OrFail;
use hostler_tests::place::kill;
use hostler_tests::probe::{self, MountSeen};
use hostler_tests::{program, scenario};

const SOON: Duration = Duration::from_secs(10);

/// The one mount at a directory.
fn mount_at(point: &std::path::Path) -> Option<MountSeen> {
    probe::mounts().into_iter().find(|mount| mount.point == point)
}

#[test]
fn a_mount_that_was_given_the_number_of_a_leases_stays() {
    scenario::guest("numbers", |place| {
        let claim = place.directory("claim");
        let bystander = Bystander::new(place, &place.directory("other"));
        let daemon = Daemon::start(place, &Settings::default());
        // The lease mounts, the watchdog sees it, and the lease unmounts when it is told to.
        let script = r#"
            mkdir mnt; mount -t tmpfs none mnt; echo $$ > mounted
            while [ ! -e go ]; do sleep 0.05; done
            umount mnt; echo $$ > unmounted; sleep 600
        "#;
        let mut run = daemon.run_script("build", &claim, script);
        let mut hostler = run.stdout(Stdio::null()).spawn().or_fail("starting hostler");
        let _ = probe::pid_from(&claim.join("mounted"));
        let leases = mount_at(&claim.join("mnt")).or_fail("the lease's mount");
        let _ = daemon.status();
        std::fs::write(claim.join("go"), "").or_fail("telling the lease");
        let _ = probe::pid_from(&claim.join("unmounted"));
        // The kernel gives the lowest number that is free, and device numbers in the same way.
        let given_again = (0..50).find_map(|attempt| {
            let point = place.directory(format!("innocent-{attempt}"));
            program::succeed("mount", ["-t".as_ref(), "tmpfs".as_ref(), "none".as_ref(), point.as_os_str()]);
            mount_at(&point).filter(|seen| seen.number == leases.number)
        });
        let innocent = given_again.or_fail("a mount with the number of the lease's");
        kill(hostler.id());
        hostler.wait().or_fail("waiting for hostler");
        daemon.wait_for_end("build", SOON);
        assert_eq!(
            mount_at(&innocent.point),
            Some(innocent),
            "a bystander's mount was taken for the lease's"
        );
        bystander.assert_untouched();
        drop(daemon);
        for mount in probe::mounts_below(&place.path("")) {
            if mount.filesystem == "tmpfs" {
                program::succeed("umount", [&mount.point]);
            }
        }
    });
}
