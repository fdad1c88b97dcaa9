//! An ordinary user's build under a watchdog, killed in each of its stages, leaves nothing.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::{OrFail, wait_until};
use hostler_tests::image_build::{Confined, PLAYED_QEMU, Running, own_cache, recipe, stand_ins, users_cache};
use hostler_tests::place::Place;
use hostler_tests::scenario;

/// How long it may take until all is gone.
const SOON: Duration = Duration::from_secs(15);

fn build(place: &Place, daemon: &Daemon<'_>, cache: &Path) -> Command {
    let mut command = daemon.hostler_of_user(&["build"]);
    command.arg(recipe(place, "killed", "[guest]\nmemory = \"512MiB\"\n"));
    command.arg("--output").arg(place.directory_of_user("out")).arg("--cache").arg(cache);
    command
}

/// Kills a build, and waits until there is nothing of it.
fn kill(place: &Place, daemon: &Daemon<'_>, mut running: Running, stage: &str) {
    let there: Vec<String> = Confined::all(place)
        .into_iter()
        .map(|one| one.program().to_owned())
        .filter(|program| program != "hostlerd")
        .collect();
    let begun = running.said().lines().rfind(|line| line.ends_with(": start")).map(str::to_owned);
    assert_eq!(begun, Some(format!("hostler: {stage}: start")), "it was in another stage by then");
    let killed = Instant::now();
    running.kill();
    wait_until(format_args!("everything of a build killed in stage {stage} to be gone"), SOON, || {
        Confined::all(place).iter().all(|one| one.program() == "hostlerd")
            && fs::read_dir(place.path("out")).or_fail("the output directory").count() == 0
    });
    let gone = killed.elapsed();
    daemon.wait_until_idle(SOON);
    assert!(place.lease_groups().is_empty(), "{:?}", place.lease_groups());
    println!("killed in stage {stage} with {there:?}: nothing was left after {} ms", gone.as_millis());
}

fn pause() {
    std::thread::sleep(Duration::from_millis(300));
}

fn runs(place: &Place, program: &str, argument: &str) -> bool {
    Confined::all(place).iter().any(|one| one.program() == program && one.mentions(argument))
}

#[test]
fn before_the_guest() {
    scenario::build("before-the-guest", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        // Its first build may have to fill it: the stages below have it warm.
        let mut warm = Running::start(place, build(place, &daemon, &users_cache()));
        warm.wait_for_stage("canary");
        drop(warm);
        daemon.wait_until_idle(SOON);
        // Without a verdict in it, so that the canary is sung.
        let cache = own_cache(place);
        for stage in ["select", "fetch", "canary", "compose"] {
            let mut running = Running::start(place, build(place, &daemon, &cache));
            running.wait_for_stage(stage);
            pause();
            kill(place, &daemon, running, stage);
        }
        let mut running = Running::start(place, build(place, &daemon, &cache));
        running.wait_for("the file system", |_| runs(place, "mke2fs", "disk.raw"));
        kill(place, &daemon, running, "compose");
    });
}

#[test]
fn while_the_guest_works() {
    scenario::build("guest", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let mut running = Running::start(place, build(place, &daemon, &users_cache()));
        running.wait_for("the guest", |said| {
            runs(place, "qemu-system-x86_64", "disk0")
                && said.contains("hostler: guest: ")
                && said.contains("preinst")
        });
        kill(place, &daemon, running, "guest");
    });
}

#[test]
fn after_the_guest() {
    scenario::build("after-the-guest", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        // As slow as for an image of many gigabytes.
        let slow = "#!/bin/sh\ncase $1 in convert) exec sleep 600 ;; esac\nexec qemu-img \"$@\"\n";
        for (stage, programs) in [
            ("convert", &[("qemu-system-x86_64", PLAYED_QEMU), ("qemu-img", slow)][..]),
            ("verify", &[("qemu-system-x86_64", PLAYED_QEMU)]),
        ] {
            let _ = fs::remove_dir_all(place.path("stand-ins"));
            let folder = stand_ins(place, programs);
            let cache = own_cache(place);
            let mut command = build(place, &daemon, &cache);
            command.env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", folder.display()));
            let mut running = Running::start(place, command);
            running.wait_for_stage(stage);
            running.wait_for("its program", |_| runs(place, "sleep", "600"));
            kill(place, &daemon, running, stage);
            fs::remove_dir_all(cache).or_fail("removing the cache");
        }
    });
}
