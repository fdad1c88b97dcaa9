//! File systems that do not answer: they cost their own lease, and nobody else's.

use std::process::Stdio;
use std::time::Duration;

use hostler_protocol::lease::LeaseState;
use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::OrFail;
use hostler_tests::fuse::Fuse;
use hostler_tests::leak::MOUNTED_IMAGE;
use hostler_tests::place::kill;
use hostler_tests::{probe, scenario};

const SOON: Duration = Duration::from_secs(15);

#[test]
fn a_claim_on_a_file_system_that_fell_silent_costs_nobody_else() {
    scenario::privileged_within("silent-claim", Duration::from_secs(150), |place| {
        let point = place.directory("fuse");
        let claim = place.directory("claim");
        let _ = place.image("claim/image", 8);
        let fuse = Fuse::answering(&point);
        let settings = Settings { step_timeout: "2s", ..Settings::default() };
        let daemon = Daemon::start(place, &settings);
        let told = place.path("stuck");
        let below = point.join("below");
        let script =
            format!("mount -t tmpfs none {}; echo $$ >{}; sleep 600", below.display(), told.display());
        let mut stuck = daemon
            .hostler(&["run", "--name", "stuck", "--claim"])
            .arg(&point)
            .args(["--", "sh", "-c", &script])
            .stdout(Stdio::null())
            .spawn()
            .or_fail("starting hostler");
        let _ = probe::pid_from(&told);
        // From now on whoever walks to what is mounted below that claim waits for ever.
        fuse.fall_silent();

        let script = format!("{MOUNTED_IMAGE}; echo $$ >shell; sleep 600");
        let mut build = daemon.run_script("build", &claim, &script).spawn().or_fail("starting hostler");
        let _ = probe::pid_from(&claim.join("shell"));
        kill(build.id());
        build.wait().or_fail("waiting for hostler");
        daemon.wait_for_end("build", SOON);
        assert_eq!(probe::mounts_below(&claim), []);
        assert_eq!(probe::loops_below(&claim), []);

        // Its own lease is kept, and says why; and goes once the file system has gone.
        let status = daemon.status();
        let is_told = |gap: &String| gap.contains("fuse") && gap.contains("did not answer");
        assert!(status.gaps.iter().any(is_told), "{:?}", status.gaps);
        kill(stuck.id());
        stuck.wait().or_fail("waiting for hostler");
        let (lease, _) = daemon.wait_for_state("stuck", LeaseState::Pinned, SOON);
        assert!(!lease.report.or_fail("a report").complete);
        drop(fuse);
        daemon.wait_for_end("stuck", Duration::from_secs(90));
    });
}
