//! An ordinary user's build under a watchdog, killed at moments that nobody chose. `make test-kills` tries more.

use std::collections::BTreeMap;
use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hostler_tests::builds::{Confined, Running, users_cache};
use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::{OrFail, wait_until};
use hostler_tests::place::{Place, kill};
use hostler_tests::random::{Numbers, count};
use hostler_tests::scenario;

/// How long a whole build may take, and how long it may take until all of a killed one is gone.
const LIMIT: Duration = Duration::from_secs(300);
const SOON: Duration = Duration::from_secs(20);

/// A build with all stages of the kind but those that make its machine, which is made once.
fn build(place: &Place, daemon: &Daemon<'_>) -> Command {
    let recipe = place.path("moments.toml");
    let text = "kind = \"builder\"\n[image]\nname = \"moments\"\nsize = \"1GiB\"\n[debian]\nsource = \"host-apt\"\n\
        suite = \"bookworm\"\narchitecture = \"amd64\"\npackages = [\"e2fsprogs\", \"mount\"]\n\
        [builder]\nartifacts = [\"disk.img\"]\n[guest]\nmemory = \"512MiB\"\n\
        run = [\"truncate --size=64M /artifacts/disk.img && mkfs.ext4 -q /artifacts/disk.img\"]\n";
    fs::write(&recipe, text).or_fail("the recipe");
    let mut command = daemon.hostler_of_user(&["build"]);
    command.arg(recipe).arg("--output").arg(place.directory_of_user("out"));
    command.arg("--cache").arg(users_cache());
    command
}

/// Somebody else's qemu.
fn others_qemu(place: &Place) -> Child {
    let mut qemu = place.command("qemu-system-x86_64");
    qemu.args(["-machine", "none", "-display", "none", "-nodefaults", "-S"]);
    qemu.stdin(Stdio::null()).spawn().or_fail("starting qemu")
}

#[test]
fn killed_at_any_moment_it_leaves_nothing_and_others_go_on() {
    let points = count("HOSTLER_TESTS_BUILD_KILLS", 2);
    let limit = LIMIT + Duration::from_secs(60 + 90 * points as u64);
    scenario::privileged_within("moments", limit, |place| {
        let mut numbers = Numbers::new();
        let daemon = Daemon::start(place, &Settings::default());
        // The first may have to make the machine; the second tells how long one takes.
        let mut whole = Duration::ZERO;
        for _ in 0..2 {
            let begun = Instant::now();
            let mut running = Running::start(place, build(place, &daemon));
            assert!(running.finish(LIMIT).success(), "{}", running.said());
            whole = begun.elapsed();
        }
        fs::remove_dir_all(place.path("out")).or_fail("removing what was built");
        let mut bystander = others_qemu(place);
        let mut slowest = Duration::ZERO;
        let mut stages = BTreeMap::<String, u32>::new();
        for point in 0..points {
            let mut running = Running::start(place, build(place, &daemon));
            let moment = Duration::from_micros(numbers.below(whole.as_micros() as u64));
            std::thread::sleep(moment);
            let said = running.said();
            let stage = said.lines().rev().find_map(|line| line.strip_prefix("hostler: ")?.split(':').next());
            *stages.entry(stage.unwrap_or("nothing said").to_owned()).or_default() += 1;
            running.kill();
            let killed = Instant::now();
            wait_until(
                format_args!("all of a build killed after {moment:?} (point {point}) to be gone"),
                SOON,
                || {
                    let others =
                        |one: &Confined| one.program() == "hostlerd" || one.process.pid == bystander.id();
                    Confined::all(place).iter().all(others)
                },
            );
            daemon.wait_until_idle(SOON);
            slowest = slowest.max(killed.elapsed());
            assert!(place.lease_groups().is_empty(), "point {point}: {:?}", place.lease_groups());
            let left: Vec<_> =
                fs::read_dir(place.path("out")).map(|all| all.flatten().collect()).unwrap_or_default();
            // One that was killed at its very end has its results.
            let unfinished: Vec<_> =
                left.iter().filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b".")).collect();
            assert!(unfinished.is_empty(), "point {point}: {unfinished:?}");
            let ended = bystander.try_wait().or_fail("looking at somebody else's qemu");
            assert!(ended.is_none(), "point {point}: somebody else's qemu is gone: {ended:?}");
        }
        kill(bystander.id());
        bystander.wait().or_fail("waiting for somebody else's qemu");
        println!(
            "killed at {points} moments of a build of {whole:?} ({stages:?}): nothing was left after {slowest:?} at most"
        );
    });
}
