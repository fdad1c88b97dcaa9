//! Hosts where leases get no control group of version 2.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use hostler_protocol::lease::Tracking;
use hostler_tests::bystander::Bystander;
use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::OrFail;
use hostler_tests::place::{Place, kill};
use hostler_tests::probe::{MountSeen, ProcessSeen};
use hostler_tests::{probe, scenario};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// The controllers of version 1 that `hostlerd` makes groups in.
const USABLE: [&str; 3] = ["pids", "freezer", "name=systemd"];
const SOON: Duration = Duration::from_secs(10);

/// Hierarchies that are unmounted in the test's namespace until this is dropped: the place's own
/// groups in them must be reachable again to be removed.
struct Unmounted(Vec<MountSeen>);

impl Unmounted {
    fn new(is_it: impl Fn(&MountSeen) -> bool) -> Self {
        let found: Vec<_> = probe::mounts().into_iter().filter(is_it).collect();
        for mount in &found {
            umount2(&mount.point, MntFlags::MNT_DETACH).or_fail("hiding a hierarchy");
        }
        Self(found)
    }
}

impl Drop for Unmounted {
    fn drop(&mut self) {
        for seen in &self.0 {
            // Version 1 names its controllers in the options, beside flags that are no options here.
            let options = seen.options.split(',').filter(|option| !matches!(*option, "rw" | "ro"));
            let options = options.collect::<Vec<_>>().join(",");
            let options = (seen.filesystem == "cgroup").then_some(options.as_str());
            let kind = seen.filesystem.as_str();
            mount(Some("none"), &seen.point, Some(kind), MsFlags::empty(), options)
                .or_fail("mounting a hierarchy again");
        }
    }
}

/// A file system mounted over a place until this is dropped.
struct Covered(PathBuf);

impl Covered {
    fn new(point: &Path) -> Self {
        mount(Some("none"), point, Some("tmpfs"), MsFlags::empty(), None::<&str>).or_fail("covering");
        Self(point.to_owned())
    }
}

impl Drop for Covered {
    fn drop(&mut self) {
        umount2(&self.0, MntFlags::MNT_DETACH).or_fail("uncovering");
    }
}

fn is_version_1(mount: &MountSeen, controllers: &[&str]) -> bool {
    mount.filesystem == "cgroup" && mount.options.split(',').any(|option| controllers.contains(&option))
}

/// A builder whose daemon leaves its parent after a while; kills it, and wants all of it gone.
fn leak_and_want_it_gone(place: &Place, tracking: Tracking) {
    let claim = place.directory("claim");
    let _ = place.image("claim/image", 8);
    let bystander = Bystander::new(place, &place.directory("other"));
    let daemon = Daemon::start(place, &Settings { term_timeout: "300ms", ..Settings::default() });
    // The sleeps are short, in case the test fails: nobody else would end them.
    let script = r#"
        device=$(losetup --find --show image); mkdir mnt; mount "$device" mnt
        setsid env -i PATH="$PATH" sh -c 'cd mnt; (echo $$ > ../first; exec setsid sh -c "echo \$\$ > ../escaped; exec sleep 50") & sleep 1.2' &
        (trap '' TERM HUP; exec sleep 51) & echo $! > deaf
        sleep 1.5; echo $$ > shell; sleep 52
    "#;
    let mut run = daemon.run_script("build", &claim, script);
    let mut hostler = run.stdout(Stdio::null()).stderr(Stdio::null()).spawn().or_fail("starting hostler");
    let all: Vec<ProcessSeen> =
        ["escaped", "deaf", "shell"].iter().map(|name| probe::pid_from(&claim.join(name))).collect();
    assert_eq!(daemon.lease("build").map(|lease| lease.tracking), Some(tracking));
    kill(hostler.id());
    hostler.wait().or_fail("waiting for hostler");
    daemon.wait_for_end("build", SOON);
    assert!(all.iter().all(|process| !process.runs()), "{all:?}");
    assert_eq!(probe::mounts_below(&claim), []);
    assert_eq!(probe::loops_below(&claim), []);
    bystander.assert_untouched();
}

#[test]
fn version_1_alone_is_enough() {
    scenario::privileged("version-1", |place| {
        let has_version_1 = probe::mounts().iter().any(|mount| is_version_1(mount, &USABLE));
        let tracking = if has_version_1 { Tracking::Cgroup } else { Tracking::Descent };
        let _hidden = Unmounted::new(|mount| mount.filesystem == "cgroup2");
        leak_and_want_it_gone(place, tracking);
    });
}

#[test]
fn without_control_groups_processes_are_followed_by_descent() {
    scenario::privileged("descent", |place| {
        let _hidden = Unmounted::new(|mount| mount.filesystem == "cgroup2" || is_version_1(mount, &USABLE));
        leak_and_want_it_gone(place, Tracking::Descent);
    });
}

#[test]
fn control_groups_that_are_listed_and_cannot_be_reached_are_no_obstacle() {
    scenario::privileged("covered", |place| {
        let version_2 = probe::mounts().into_iter().find(|mount| mount.filesystem == "cgroup2");
        let _covered = Covered::new(&version_2.or_fail("a mount of cgroup2").point);
        // The next best hierarchy serves where there is one.
        let has_version_1 = probe::mounts().iter().any(|mount| is_version_1(mount, &USABLE));
        leak_and_want_it_gone(place, if has_version_1 { Tracking::Cgroup } else { Tracking::Descent });
    });
}
