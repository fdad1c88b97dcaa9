//! Another process binds the same device to something else at full speed while the worker's code
//! detaches it: nothing but what was meant is ever detached.
//!
//! A few hundred attempts here; `make test-churn` makes 100,000.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use hostler_tests::failure::OrFail;
use hostler_tests::scenario;
use hostler_watchdog::kernel::{Acted, loops};
use hostler_watchdog::model::LoopIdentity;

const ATTEMPTS: u32 = 300;

#[test]
fn nothing_but_what_was_meant_is_detached() {
    let wanted = std::env::var("HOSTLER_TESTS_CHURN").ok();
    let wanted = wanted.map_or(ATTEMPTS, |text| text.parse().or_fail("HOSTLER_TESTS_CHURN"));
    // A few milliseconds each, and many times that while others work.
    let limit = Duration::from_secs(50) + Duration::from_millis(u64::from(wanted) * 30);
    scenario::privileged_within("churn", limit + Duration::from_secs(20), |place| {
        let (ours, theirs) = (place.image("ours", 2), place.image("theirs", 2));
        // A device of the test's own, which nobody gets by asking for a free one.
        let number = 40_000 + std::process::id() % 20_000;
        let mut churner = place
            .command("python3")
            .args(["-c", include_str!("churn.py"), &number.to_string()])
            .args([&ours, &theirs])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .or_fail("starting python3");
        let mut said = BufReader::new(churner.stdout.take().or_fail("its output")).lines();
        assert_eq!(said.next().or_fail("a line").or_fail("reading").as_str(), "ready");

        use std::os::unix::fs::MetadataExt;
        let inode = std::fs::metadata(&ours).or_fail("the image").ino();
        let (mut attempts, mut done, mut replaced) = (0, 0, 0);
        let started = Instant::now();
        while attempts < wanted && started.elapsed() < limit {
            let Some(identity) = seen(number).filter(|seen| seen.backing.inode == inode) else { continue };
            attempts += 1;
            // Now and then long enough for the device to be bound anew meanwhile, which is the point.
            std::thread::sleep(Duration::from_micros(u64::from(attempts % 5) * 150));
            match loops::detach(&identity, &[]) {
                Ok(Acted::Done) => done += 1,
                Ok(Acted::Replaced) => replaced += 1,
                Ok(Acted::Gone) | Err(_) => {}
            }
        }
        let took = started.elapsed();
        churner.stdin.take().or_fail("its input").write_all(b"end\n").or_fail("telling it to end");
        let counts = said.next().or_fail("the counts").or_fail("reading");
        churner.wait().or_fail("waiting for python3");
        println!(
            "{attempts} attempts in {:.1} s: {done} detached, {replaced} were something else by then; bindings and foreign detaches: {counts}",
            took.as_secs_f64()
        );
        assert_eq!(attempts, wanted, "not within {limit:?}");
        assert!(done > 0 && replaced > 0, "{done} detached, {replaced} replaced: nothing was tried");
        assert!(counts.ends_with(" 0"), "foreign detaches: {counts}");
        assert!(!Path::new(&format!("/sys/block/loop{number}")).exists(), "the test's device is left");
    });
}

fn seen(number: u32) -> Option<LoopIdentity> {
    let mut device = loops::one(Path::new("/sys"), number).ok().flatten()?;
    loops::ask(&mut device).ok()?;
    device.identity()
}
