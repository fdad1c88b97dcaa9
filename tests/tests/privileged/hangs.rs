//! File systems that do not answer: they cost their own lease, and nobody else's.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use hostler_protocol::lease::LeaseState;
use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::OrFail;
use hostler_tests::place::kill;
use hostler_tests::{probe, scenario};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

const SOON: Duration = Duration::from_secs(10);

/// A FUSE file system whose server never answers.
fn silent_fuse(point: &Path) -> OwnedFd {
    let server = File::options().read(true).write(true).open("/dev/fuse").or_fail("opening /dev/fuse");
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", server.as_raw_fd());
    mount(Some("silent"), point, Some("fuse"), MsFlags::empty(), Some(options.as_str())).or_fail("mounting");
    server.into()
}

#[test]
fn a_claim_that_a_silent_file_system_was_mounted_over_costs_nobody_else() {
    scenario::privileged("silent-claim", |place| {
        let stuck = place.directory("stuck");
        let claim = place.directory("claim");
        let _ = place.image("claim/image", 8);
        let daemon = Daemon::start(place, &Settings::default());
        // Its claim lies on the silent file system's mount point; whoever walks there by path hangs.
        let script = "echo $$ >shell; sleep 600";
        let mut first = daemon.run_script("stuck", &stuck, script).spawn().or_fail("starting hostler");
        let _ = probe::pid_from(&stuck.join("shell"));
        let server = silent_fuse(&stuck);
        let script = "device=$(losetup --find --show image); mkdir mnt; mount \"$device\" mnt; echo $$ >shell; sleep 600";
        let mut second = daemon.run_script("build", &claim, script).spawn().or_fail("starting hostler");
        let _ = probe::pid_from(&claim.join("shell"));
        kill(second.id());
        second.wait().or_fail("waiting for hostler");
        daemon.wait_for_end("build", SOON);
        assert_eq!(probe::loops_below(&claim), []);
        assert_eq!(daemon.lease("stuck").or_fail("the other lease").state, LeaseState::Open);
        kill(first.id());
        first.wait().or_fail("waiting for hostler");
        daemon.wait_for_end("stuck", SOON);
        drop(server);
        let _ = umount2(&stuck, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    });
}
