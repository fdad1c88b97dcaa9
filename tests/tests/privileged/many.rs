//! Many builders at once.

use std::fs;
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use hostler_tests::bystander::Bystander;
use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::{OrFail, wait_until};
use hostler_tests::place::kill;
use hostler_tests::{probe, program, scenario};

const COUNT: usize = 40;

#[test]
fn forty_builders_killed_at_once_are_all_taken_back() {
    scenario::privileged("many", |place| {
        let bystander = Bystander::new(place, &place.directory("other"));
        let daemon = Daemon::start(place, &Settings::default());
        let template = place.image("template.img", 2);
        // One lease first: what the daemon keeps for later, such as an idle worker, is there then.
        let first = place.directory("first");
        assert_eq!(program::finish(&mut daemon.run_script("first", &first, "exit 0")).status, 0);
        let before = probe::descriptors(daemon.pid());

        let claims: Vec<_> = (0..COUNT).map(|index| place.directory(format!("claims/{index}"))).collect();
        let mut hostlers: Vec<Child> = Vec::new();
        for (index, claim) in claims.iter().enumerate() {
            fs::copy(&template, claim.join("image")).or_fail("copying an image");
            let script = r#"
                device=$(losetup --find --show image); mkdir mnt; mount "$device" mnt
                (cd mnt; exec sleep 600) & echo $$ > shell; sleep 601
            "#;
            let mut run = daemon.run_script(&format!("build-{index}"), claim, script);
            let hostler = run.stdout(Stdio::null()).stderr(Stdio::null()).spawn();
            hostlers.push(hostler.or_fail("starting hostler"));
        }
        for claim in &claims {
            let _ = probe::pid_from(&claim.join("shell"));
        }
        let root = place.path("claims");
        assert_eq!(probe::mounts_below(&root).len(), COUNT);
        assert_eq!(probe::loops_below(&root).len(), COUNT);
        let status = daemon.status();
        assert!(status.loops_in_use >= COUNT as u64, "{}", status.loops_in_use);
        assert!(
            status.loops_limit.is_none_or(|limit| limit >= status.loops_in_use),
            "{:?}",
            status.loops_limit
        );

        let killed = Instant::now();
        for hostler in &mut hostlers {
            kill(hostler.id());
            hostler.wait().or_fail("waiting for hostler");
        }
        daemon.wait_until_idle(Duration::from_secs(30));
        println!("{COUNT} killed builders were taken back within {} ms", killed.elapsed().as_millis());
        assert_eq!(probe::mounts_below(&root), []);
        assert_eq!(probe::loops_below(&root), []);
        wait_until("as few descriptors as before", Duration::from_secs(5), || {
            probe::descriptors(daemon.pid()) <= before
        });
        bystander.assert_untouched();
    });
}
