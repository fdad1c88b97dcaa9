//! A build that is told to stop, in whatever way and stage, ends within five seconds, says so, and leaves
//! nothing.

use std::fs;
use std::process::Command;
use std::time::{Duration, Instant};

use hostler_tests::builds::{Confined, PLAYED_QEMU, Running, own_cache, recipe, stand_ins};
use hostler_tests::failure::OrFail;
use hostler_tests::place::{Place, USER};
use hostler_tests::{program, scenario};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long a CI system may wait before it kills.
const SOON: Duration = Duration::from_secs(5);

fn build(place: &Place, of_root: bool) -> Command {
    let hostler = program::path("hostler");
    let (mut command, cache) = if of_root {
        let mut command = place.command(hostler);
        command.env("SUDO_UID", USER.to_string()).env("SUDO_GID", USER.to_string());
        (command, hostler_tests::builds::shared_cache())
    } else {
        (place.command_of_user(hostler), own_cache(place))
    };
    // A machine that never says anything, so that the build is where it is for as long as one likes.
    let silent = PLAYED_QEMU.replace("echo \"stage played\" >&101", "exec sleep 600");
    let folder = stand_ins(place, &[("qemu-system-x86_64", &silent)]);
    command.env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", folder.display()));
    command.env("HOSTLER_SOCKET", "/nonexistent/hostler.sock");
    command.arg("build").arg(recipe(place, "stopped", "[guest]\nmemory = \"512MiB\"\n"));
    let output = if of_root { place.directory("out") } else { place.directory_of_user("out") };
    command.arg("--output").arg(output).arg("--cache").arg(cache);
    command
}

fn stop(place: &Place, of_root: bool, signal: Signal, stage: &str) {
    let _ = fs::remove_dir_all(place.path("stand-ins"));
    let mut running = Running::start(place, build(place, of_root));
    running.wait_for_stage(stage);
    std::thread::sleep(Duration::from_millis(300));
    let pid = i32::try_from(running.pid()).or_fail("its process id");
    let asked = Instant::now();
    kill(Pid::from_raw(pid), signal).or_fail("sending the signal");
    let status = running.finish(SOON + Duration::from_secs(1));
    let (took, said) = (asked.elapsed(), running.said());
    println!("{signal} in stage {stage}, of root: {of_root}: over after {} ms", took.as_millis());
    assert_eq!(status.code(), Some(128 + signal as i32), "{said}");
    assert!(took < SOON, "{took:?}");
    let told = said.lines().last().or_fail("a last line");
    assert!(
        told.starts_with(&format!(
            "hostler: [cancelled] the build was told to stop; it was in stage {stage}"
        )),
        "{said}"
    );
    assert_eq!(fs::read_dir(place.path("out")).or_fail("the output directory").count(), 0);
    assert!(Confined::all(place).is_empty());
    let _ = fs::remove_dir_all(place.path("cache"));
}

#[test]
fn by_each_signal() {
    scenario::build("stopped", |place| {
        for (signal, stage) in
            [(Signal::SIGINT, "guest"), (Signal::SIGTERM, "compose"), (Signal::SIGHUP, "guest")]
        {
            stop(place, false, signal, stage);
        }
    });
}

#[test]
fn when_root_started_it() {
    scenario::build("stopped-root", |place| stop(place, true, Signal::SIGTERM, "guest"));
}
