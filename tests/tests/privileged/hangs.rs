//! File systems that do not answer: they cost their own lease, and nobody else's.

use std::process::Stdio;
use std::time::Duration;

use hostler_protocol::lease::LeaseState;
use hostler_tests::attached::Attached;
use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::{OrFail, wait_until};
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

#[test]
fn nothing_of_nobodys_is_taken_back_while_a_look_misses_something() {
    scenario::privileged_within("missed", Duration::from_secs(150), |place| {
        let ci = place.directory("ci");
        let rule = format!("[[policy]]\nname = \"stale loops\"\nkind = \"loop\"\nbacking_under = {ci:?}");
        let more = format!(
            "[sweep]\ninterval = \"1s\"\n{rule}\nmin_age = \"1s\"\nobservations = 2\naction = \"reclaim\"\n"
        );
        let daemon = Daemon::start(place, &Settings { step_timeout: "1s", more, ..Settings::default() });
        // A living build's claim on a file system that does not answer: what is in there is not known.
        let silent = place.directory("silent");
        let fuse = Fuse::answering(&silent);
        let mut build = daemon.hostler(&["run", "--name", "silent", "--claim"]);
        build.arg(&silent).args([
            "--",
            "sh",
            "-c",
            "mount -t tmpfs none \"$1/below\"; echo $$ >\"$2\"; sleep 600",
        ]);
        let mut build = {
            let told = place.path("shell");
            let build = build.arg("sh").arg(&silent).arg(&told).stdout(Stdio::null()).spawn();
            let build = build.or_fail("starting hostler");
            let _ = probe::pid_from(&told);
            build
        };
        fuse.fall_silent();
        let is_missed = || daemon.status().gaps.iter().any(|gap| gap.contains("did not answer"));
        wait_until("the claim to be a gap", SOON, is_missed);

        let leaked = Attached::new(&ci.join("leaked.img"));
        let told = || {
            let others = daemon.status().others;
            others.iter().any(|one| one.name == leaked.node() && one.detail.contains("did not answer"))
        };
        wait_until("the rule to say why it waits", SOON, told);
        // Sweeps enough for it to have been taken back twice over.
        std::thread::sleep(Duration::from_secs(5));
        leaked.assert_untouched();
        let refused = daemon.ask(&["reclaim", &leaked.node()]);
        assert_eq!(refused.status, 1, "{refused:?}");
        assert!(refused.stdout.contains("not tried: "), "{refused:?}");
        leaked.assert_untouched();

        drop(fuse);
        kill(build.id());
        build.wait().or_fail("waiting for hostler");
        // What hung is tried again only once in a while.
        wait_until("the rule to go on", Duration::from_secs(90), || !leaked.is_there());
    });
}
