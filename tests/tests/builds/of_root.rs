//! A build that root starts: nothing that reads what the network or a guest sends has any of root's
//! rights, and SIGKILL of root's process leaves nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use hostler_tests::builds::{
    Confined, PLAYED_QEMU, Running, own_cache, recipe, shared_cache, stand_ins, unfinished,
};
use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::{OrFail, wait_until};
use hostler_tests::place::{Place, USER};
use hostler_tests::{probe, program, scenario};

/// How long it may take until all is gone.
const SOON: Duration = Duration::from_secs(15);

/// The number of the user that builds for root: `hostler` where there is one, else who called sudo.
fn build_user() -> u32 {
    let hostler = nix::unistd::User::from_name("hostler").ok().flatten();
    hostler.map_or(USER, |user| user.uid.as_raw())
}

fn build(place: &Place, mut command: Command) -> Command {
    command
        .arg("build")
        .arg(recipe(place, "of-root", ""))
        .arg("--output")
        .arg(place.directory("out"))
        .arg("--cache")
        .arg(shared_cache())
        .env("SUDO_UID", USER.to_string())
        .env("SUDO_GID", USER.to_string())
        .env("ROOTS_SECRET", "token");
    command
}

/// Everything that root's build ran but root's own process and the watchdog, as it was last seen.
fn watch_until_the_guest_works(place: &Place, running: &mut Running) -> BTreeMap<(String, u32), Confined> {
    let mut seen: BTreeMap<(String, u32), Confined> = BTreeMap::new();
    let begun = Instant::now();
    let mut working: Option<Instant> = None;
    // A while longer, so that qemu is past its own start.
    while working.is_none_or(|since| since.elapsed() < Duration::from_secs(4)) {
        assert!(begun.elapsed() < Duration::from_secs(150), "no guest: {seen:#?}\n{}", running.said());
        for one in Confined::all(place) {
            if one.process.pid == running.pid() || one.program() == "hostlerd" {
                continue;
            }
            if one.program().starts_with("qemu-system") && one.mentions("disk0") && working.is_none() {
                working = Some(Instant::now());
            }
            seen.insert((one.program().to_owned(), one.process.pid), one);
        }
        running.wait_for("more", |_| true);
    }
    seen
}

fn check(place: &Place, daemon: Option<&Daemon<'_>>) {
    let user = build_user();
    let command = match daemon {
        Some(daemon) => daemon.hostler(&[]),
        None => {
            let mut command = place.command(program::path("hostler"));
            command.env("HOSTLER_SOCKET", "/nonexistent/hostler.sock");
            command
        }
    };
    let sockets_before = sockets(place);
    let mut running = Running::start(place, build(place, command));
    let seen = watch_until_the_guest_works(place, &mut running);
    let own = |kind: &str| fs::read_link(format!("/proc/self/ns/{kind}")).or_fail("a namespace");

    let programs: Vec<&str> = seen.keys().map(|(program, _)| program.as_str()).collect();
    println!("seen: {programs:?}");
    for needed in ["hostler", "mke2fs", "qemu-system-x86_64"] {
        assert!(programs.contains(&needed), "{needed} was not seen among {programs:?}");
    }
    let root = Confined::all(place).into_iter().find(|one| one.process.pid == running.pid());
    assert_eq!(root.or_fail("root's process").field("Uid").split('\t').next(), Some("0"));
    for one in seen.values() {
        if one.mentions("__vm") {
            // On its way to being qemu: for a moment it has the rights of a user namespace that it has
            // just made, and nothing is in it.
            assert!(one.field("Uid").starts_with(&format!("{user}\t")), "{:?}", one.command);
            continue;
        }
        one.assert_ordinary(user);
        // The machines, and not the look at its version.
        if one.program().starts_with("qemu-system") && one.mentions("-sandbox") {
            assert_eq!(one.field("Seccomp"), "2", "{:?}", one.command);
            assert_ne!(one.network, own("net"), "{:?}", one.command);
            assert_ne!(one.users, own("user"), "{:?}", one.command);
        }
    }
    // What it starts is called the same for a moment.
    let is_it = |one: &&Confined| one.mentions("__unprivileged") && one.process.runs();
    let builder = seen.values().find(is_it).or_fail("the building process");
    let environment = fs::read(format!("/proc/{}/environ", builder.process.pid)).or_fail("its environment");
    assert!(!String::from_utf8_lossy(&environment).contains("ROOTS_SECRET"));

    let all: Vec<probe::ProcessSeen> = seen.values().map(|one| one.process).collect();
    let cache = shared_cache().join(user.to_string());
    let killed = Instant::now();
    running.kill();
    wait_until("everything to be gone", SOON, || {
        all.iter().all(|process| !process.runs())
            && Confined::all(place).iter().all(|one| one.program() == "hostlerd")
    });
    println!("every process was gone {} ms after the kill", killed.elapsed().as_millis());
    wait_until("the scratch directory to be gone", SOON, || !has_scratch_of(&cache, builder.process));
    assert_eq!(fs::read_dir(place.path("out")).or_fail("the output directory").count(), 0);
    assert!(sockets(place).is_subset(&sockets_before), "{:?}", sockets(place));
    println!("nothing was left {} ms after the kill", killed.elapsed().as_millis());
}

/// Scratch directories that nobody holds any more: other tests' builds work in the same cache.
fn has_scratch_of(cache: &Path, builder: probe::ProcessSeen) -> bool {
    assert!(!builder.runs());
    unfinished(cache).iter().any(|scratch| {
        let Ok(directory) = fs::File::open(scratch) else { return false };
        rustix::fs::flock(&directory, rustix::fs::FlockOperation::NonBlockingLockShared).is_ok()
    })
}

/// The paths of unix sockets below the place.
fn sockets(place: &Place) -> BTreeSet<String> {
    let own = place.path("").to_string_lossy().into_owned();
    let table = fs::read_to_string("/proc/net/unix").or_fail("the table of sockets");
    let paths = table.lines().filter_map(|line| line.split_whitespace().last());
    paths.filter(|path| path.starts_with(&own)).map(str::to_owned).collect()
}

#[test]
fn runs_without_roots_rights_and_a_kill_leaves_nothing() {
    scenario::build("of-root", |place| check(place, None));
}

#[test]
fn runs_without_roots_rights_and_a_kill_leaves_nothing_with_a_watchdog() {
    scenario::build("of-root-watched", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        check(place, Some(&daemon));
        daemon.wait_until_idle(SOON);
        assert!(place.lease_groups().is_empty(), "{:?}", place.lease_groups());
    });
}

/// The host as if nobody had ever installed the watchdog: without its user, who would build otherwise.
fn without_hostlers_user(place: &Place) {
    let text = fs::read_to_string("/etc/passwd").or_fail("reading the host's users");
    let others: String =
        text.lines().filter(|line| !line.starts_with("hostler:")).map(|line| format!("{line}\n")).collect();
    let file = place.path("passwd");
    fs::write(&file, others).or_fail("writing the other users");
    let bind = nix::mount::MsFlags::MS_BIND;
    // Only in this test's mount namespace.
    nix::mount::mount(Some(&file), "/etc/passwd", None::<&str>, bind, None::<&str>).or_fail("hiding a user");
}

#[test]
fn the_result_is_roots_own_copy_and_nothing_survives_the_build() {
    scenario::build("copied", |place| {
        without_hostlers_user(place);
        // What a subverted machine might leave behind, out of the reach of whoever ends it.
        let escaping = PLAYED_QEMU.replace("sleep 0.5\n", "setsid -f sleep 601\nsleep 0.5\n");
        assert_ne!(escaping, PLAYED_QEMU);
        let folder = stand_ins(place, &[("qemu-system-x86_64", &escaping)]);
        let base = place.directory("roots-cache");
        fs::rename(own_cache(place), base.join(USER.to_string())).or_fail("a filled cache");
        let output = place.directory_of_user("out");
        let recipe = recipe(place, "copied", "[verify]\nboot = false\n");
        let mut command = place.command(program::path("hostler"));
        command
            .arg("--json")
            .arg("build")
            .arg(&recipe)
            .arg("--output")
            .arg(&output)
            .arg("--cache")
            .arg(&base);
        command.env("HOSTLER_SOCKET", "/nonexistent/hostler.sock");
        command.env("SUDO_UID", USER.to_string()).env("SUDO_GID", USER.to_string());
        command.env("PATH", format!("{}:/usr/sbin:/usr/bin:/sbin:/bin", folder.display()));
        let mut running = Running::start(place, command);
        running.wait_for("what escapes", |_| {
            Confined::all(place).iter().any(|one| one.program() == "sleep" && one.mentions("601"))
        });
        let status = running.finish(Duration::from_secs(100));
        let (said, there) = (running.said(), Confined::all(place));
        assert_eq!(status.code(), Some(0), "{said}");
        assert_eq!(there, [], "something of the build is still there when root's process has ended");
        let image = output.join("copied.qcow2");
        assert!(said.contains(&format!("\"path\":\"{}\"", image.display())), "{said}");
        let mut names: Vec<String> = Vec::new();
        for entry in fs::read_dir(&output).or_fail("the output directory") {
            let entry = entry.or_fail("an entry");
            let data = entry.metadata().or_fail("its data");
            let name = entry.file_name().to_string_lossy().into_owned();
            assert_eq!((data.uid(), data.nlink(), data.mode() & 0o7777), (0, 1, 0o644), "{name}");
            names.push(name);
        }
        names.sort();
        let made = ["console.log", "packages.json", "provenance.json", "qcow2", "sha256", "spdx.json"];
        assert_eq!(names, made.map(|ending| format!("copied.{ending}")));
        let mut check = Command::new("sha256sum");
        program::finish(check.args(["--check", "copied.sha256"]).current_dir(&output)).succeeded();
        assert_eq!(unfinished(&base.join(USER.to_string())), Vec::<PathBuf>::new());
    });
}

#[test]
fn each_user_that_builds_for_root_has_a_cache_of_its_own() {
    scenario::privileged("caches", |place| {
        without_hostlers_user(place);
        let base = place.path("roots-cache");
        for user in [USER, USER + 1] {
            let mut command = place.command(program::path("hostler"));
            command.args(["doctor", "--limit", "1s", "--cache"]).arg(&base);
            command.env("HOSTLER_SOCKET", "/nonexistent/hostler.sock");
            command.env("SUDO_UID", user.to_string()).env("SUDO_GID", user.to_string());
            let told = program::finish(&mut command);
            assert_eq!(told.status, 0, "{told:?}");
            let own = base.join(user.to_string());
            assert!(told.stdout.contains(&format!(" free in {}", own.display())), "{told:?}");
            assert_eq!(fs::metadata(&own).or_fail("the user's cache").uid(), user);
            assert_eq!(fs::metadata(own.join("sha256")).or_fail("a directory in it").uid(), user);
        }
        assert_eq!(fs::metadata(&base).or_fail("root's cache").uid(), 0);
        // One that belongs to the first is of no use to the second, who is told what to do.
        let mut command = place.command(program::path("hostler"));
        command.args(["doctor", "--limit", "1s", "--cache"]).arg(base.join(USER.to_string()));
        command.env("SUDO_UID", (USER + 1).to_string()).env("SUDO_GID", (USER + 1).to_string());
        let told = program::finish(&mut command);
        assert_eq!(told.status, 1, "{told:?}");
        assert!(told.stderr.contains("chown 0:0") && told.stderr.contains("--cache"), "{told:?}");
    });
}
