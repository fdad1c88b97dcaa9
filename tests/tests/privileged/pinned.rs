//! What bystanders hold is left, told about, and taken back once they are gone.

use std::process::{Child, Stdio};
use std::time::Duration;

use hostler_protocol::lease::LeaseState;
use hostler_protocol::methods::{Explanation, HostStatus};
use hostler_protocol::resource::{Kind, Outcome, Verdict};
use hostler_protocol::why::{Held, Reason};
use hostler_tests::bystander::Bystander;
use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::{OrFail, wait_until};
use hostler_tests::place::{Place, kill};
use hostler_tests::probe::ProcessSeen;
use hostler_tests::{probe, program, scenario};

const SOON: Duration = Duration::from_secs(10);

/// Mounts the image on `mnt`, and waits to be killed.
const MOUNT: &str = r#"
    device=$(losetup --find --show image)
    mkdir mnt; mount "$device" mnt
    echo $$ > shell
    sleep 600
"#;

/// Ends a process that a test started.
struct Visitor(Child);

impl Visitor {
    fn end(mut self) {
        kill(self.0.id());
        self.0.wait().or_fail("waiting for a process of the test");
    }
}

fn start_build(daemon: &Daemon<'_>, place: &Place) -> Child {
    let claim = place.path("claim");
    let mut run = daemon.run_script("build", &claim, MOUNT);
    let child = run.stdout(Stdio::null()).stderr(Stdio::null()).spawn().or_fail("starting hostler");
    let _ = probe::pid_from(&claim.join("shell"));
    child
}

fn kill_and_wait(mut child: Child) {
    kill(child.id());
    child.wait().or_fail("waiting for hostler");
}

#[test]
fn a_bystander_standing_in_a_leaked_mount_pins_it() {
    scenario::privileged("cwd", |place| {
        let claim = place.directory("claim");
        let image = place.image("claim/image", 8);
        let bystander = Bystander::new(place, &place.directory("other"));
        let daemon = Daemon::start(place, &Settings::default());
        let hostler = start_build(&daemon, place);
        let mount = probe::mount_number(&claim.join("mnt"));
        let device = probe::loop_of(&image);
        // Somebody looks around in the mount: not of the lease, and not to be touched.
        let visitor = place.command("sleep").arg("600").current_dir(claim.join("mnt")).spawn();
        let visitor = Visitor(visitor.or_fail("starting the visitor"));
        let visitor_seen = ProcessSeen::of(visitor.0.id());
        kill_and_wait(hostler);

        let (lease, _) = daemon.wait_for_state("build", LeaseState::Pinned, SOON);
        let report = lease.report.or_fail("a report");
        assert!(!report.complete);
        let of = |kind| report.resources.iter().find(move |resource| resource.kind == kind);
        let pinned = of(Kind::Mount).or_fail("the mount in the report");
        assert_eq!(
            (pinned.outcome, pinned.reasons.as_slice()),
            (Outcome::Pinned, [Reason::CwdOrRoot].as_slice())
        );
        assert!(pinned.detail.contains(&format!("process {}", visitor_seen.pid)), "{pinned:?}");
        let pinned = of(Kind::Loop).or_fail("the loop device in the report");
        assert_eq!(
            (pinned.outcome, pinned.reasons.as_slice()),
            (Outcome::Pinned, [Reason::Mounted].as_slice())
        );
        assert!(visitor_seen.runs());
        assert_eq!(probe::mount_number(&claim.join("mnt")), mount);
        assert_eq!(probe::loop_of(&image), device);

        visitor.end();
        let (_, took) = daemon.wait_for_end("build", SOON);
        println!("a pinned mount was taken back {} ms after its holder had ended", took.as_millis());
        assert_eq!(probe::mounts_below(&claim), []);
        assert_eq!(probe::loops_below(&claim), []);
        bystander.assert_untouched();
    });
}

#[test]
fn a_copy_of_the_mount_in_an_innocent_builders_namespace_goes_too() {
    scenario::privileged("namespace", |place| {
        let claim = place.directory("claim");
        let image = place.image("claim/image", 8);
        let bystander = Bystander::new(place, &place.directory("other"));
        let daemon = Daemon::start(place, &Settings::default());
        let hostler = start_build(&daemon, place);
        // An innocent builder that makes itself a namespace while the leak exists: it copies all mounts.
        let copier = place.command("unshare").args(["--mount", "sleep", "600"]).spawn();
        let copier = Visitor(copier.or_fail("starting the copier"));
        let pid = copier.0.id();
        wait_until("a namespace of its own", SOON, || {
            let namespace = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/mnt")).ok();
            let own = namespace("thread-self");
            namespace(&pid.to_string()).is_some_and(|other| Some(other) != own)
        });
        let copier_seen = ProcessSeen::of(pid);
        let node = format!("/dev/loop{}", probe::loop_of(&image).number);
        let text = daemon.ask(&["why", &node, "--json"]).succeeded();
        let explanation: Explanation = serde_json::from_str(&text).or_fail("reading the explanation");
        let foreign = explanation.tree.holders.iter().find(|it| it.reason == Reason::ForeignNamespace);
        let foreign = foreign.or_fail("the copy in the other namespace");
        assert!(foreign.remedy.starts_with(&format!("nsenter -m -t {pid} umount ")), "{foreign:?}");
        kill_and_wait(hostler);

        let (lease, _) = daemon.wait_for_end("build", SOON);
        let report = lease.report.or_fail("a report");
        let mounts = report.resources.iter().filter(|resource| resource.kind == Kind::Mount);
        assert_eq!(mounts.filter(|mount| mount.outcome == Outcome::Reclaimed).count(), 2, "{report:?}");
        assert!(copier_seen.runs(), "the innocent builder was touched");
        // Its copy of the bystander's mount is untouched.
        let other = std::fs::read(format!("/proc/{pid}/mountinfo")).or_fail("the copier's mounts");
        let shown = String::from_utf8_lossy(&other).into_owned();
        assert!(shown.contains(&*bystander.point().to_string_lossy()), "{shown}");
        assert!(!shown.contains(&*claim.join("mnt").to_string_lossy()), "{shown}");
        assert!(!probe::loops().iter().any(|device| device.backing == image));
        copier.end();
        bystander.assert_untouched();
    });
}

#[test]
fn why_and_status_name_owner_and_holders_of_a_leak() {
    scenario::privileged("why", |place| {
        let claim = place.directory("claim");
        let image = place.image("claim/image", 8);
        let bystander = Bystander::new(place, &place.directory("other"));
        let daemon = Daemon::start(place, &Settings::default());
        let hostler = start_build(&daemon, place);
        let owner = hostler.id();
        let device = probe::loop_of(&image);
        let point = claim.join("mnt");

        let text = daemon.ask(&["status", "--json"]).succeeded();
        let status: HostStatus = serde_json::from_str(&text).or_fail("reading the status");
        let lease = status.leases.iter().find(|lease| lease.name == "build").or_fail("the lease");
        assert_eq!((lease.state, lease.owner_pid, lease.uid), (LeaseState::Open, owner, 0));
        let verdict = |kind, name: &str| {
            let all = status.leases.iter().flat_map(|lease| &lease.resources).chain(&status.others);
            all.filter(|resource| resource.kind == kind && resource.name == name).map(|it| it.verdict).next()
        };
        assert_eq!(verdict(Kind::Loop, &format!("/dev/loop{}", device.number)), Some(Verdict::Owned));
        assert_eq!(verdict(Kind::Mount, &point.to_string_lossy()), Some(Verdict::Owned));
        let other = format!("/dev/loop{}", bystander.device().number);
        assert_eq!(verdict(Kind::Loop, &other), Some(Verdict::Bystander));
        assert_eq!(verdict(Kind::Mount, &bystander.point().to_string_lossy()), Some(Verdict::Bystander));

        let visitor = place.command("sleep").arg("600").current_dir(&point).spawn();
        let visitor = Visitor(visitor.or_fail("starting the visitor"));
        let visitor_pid = visitor.0.id();
        kill_and_wait(hostler);
        daemon.wait_for_state("build", LeaseState::Pinned, SOON);

        let node = format!("/dev/loop{}", device.number);
        let text = daemon.ask(&["why", &node, "--json"]).succeeded();
        let explanation: Explanation = serde_json::from_str(&text).or_fail("reading the explanation");
        assert!(explanation.tree.what.contains(&node), "{explanation:?}");
        assert!(explanation.tree.whose.contains("lease"), "{explanation:?}");
        let chain = chain(&explanation.tree);
        assert_eq!(chain[0].0, Reason::Mounted, "{chain:?}");
        assert!(chain[0].1.contains(&*point.to_string_lossy()), "{chain:?}");
        let holder = format!("process {visitor_pid} (sleep");
        let found = chain.iter().find(|(_, what)| what.contains(&holder));
        assert_eq!(found.map(|(reason, _)| *reason), Some(Reason::CwdOrRoot), "{chain:?}");

        let shown = daemon.ask(&["why", &node]).succeeded();
        assert!(shown.contains(&format!("to end this: kill {visitor_pid}")), "{shown}");
        let shown = daemon.ask(&["status"]).succeeded();
        assert!(shown.contains("PINNED") && shown.contains(&*point.to_string_lossy()), "{shown}");
        let nobody = daemon.ask(&["why", "/nowhere"]);
        assert_eq!(nobody.status, 3, "{nobody:?}");
        assert!(
            nobody.stderr.contains("name a loop device, a mount point or a process number"),
            "{nobody:?}"
        );

        visitor.end();
        daemon.wait_for_end("build", SOON);
        bystander.assert_untouched();
    });
}

/// All holders of a tree, the nearest first.
fn chain(held: &Held) -> Vec<(Reason, String)> {
    let mut all: Vec<(Reason, String)> = Vec::new();
    let mut level: Vec<&Held> = vec![held];
    while !level.is_empty() {
        let holders: Vec<_> = level.iter().flat_map(|held| &held.holders).collect();
        all.extend(holders.iter().map(|holder| (holder.reason, holder.by.what.clone())));
        level = holders.iter().map(|holder| &holder.by).collect();
    }
    all
}

#[test]
fn a_lazily_unmounted_file_system_pins_the_device_through_who_stands_in_it() {
    scenario::privileged("lazy", |place| {
        let claim = place.directory("claim");
        let image = place.image("claim/image", 8);
        let bystander = Bystander::new(place, &place.directory("other"));
        let daemon = Daemon::start(place, &Settings::default());
        let hostler = start_build(&daemon, place);
        let visitor = place.command("sleep").arg("600").current_dir(claim.join("mnt")).spawn();
        let visitor = Visitor(visitor.or_fail("starting the visitor"));
        let pid = visitor.0.id();
        program::succeed("umount", ["--lazy".as_ref(), claim.join("mnt").as_os_str()]);
        kill_and_wait(hostler);

        let (lease, _) = daemon.wait_for_state("build", LeaseState::Pinned, SOON);
        let report = lease.report.or_fail("a report");
        let device = report.resources.iter().find(|resource| resource.kind == Kind::Loop);
        let device = device.or_fail("the loop device in the report");
        assert_eq!(device.outcome, Outcome::Pinned, "{report:?}");
        assert!(device.reasons.contains(&Reason::DetachedMountFd), "{report:?}");
        assert!(device.detail.contains(&format!("process {pid}")), "{report:?}");
        assert!(ProcessSeen::of(pid).runs());

        visitor.end();
        daemon.wait_for_end("build", SOON);
        assert!(!probe::loops().iter().any(|device| device.backing == image));
        bystander.assert_untouched();
    });
}

#[test]
fn a_frozen_file_system_is_thawed_and_taken_back() {
    scenario::privileged("frozen", |place| {
        let claim = place.directory("claim");
        let image = place.image("claim/image", 8);
        let bystander = Bystander::new(place, &place.directory("other"));
        let daemon = Daemon::start(place, &Settings::default());
        let hostler = start_build(&daemon, place);
        // Unmounted frozen, it would keep its device, and both calls would succeed.
        program::succeed("fsfreeze", ["--freeze".as_ref(), claim.join("mnt").as_os_str()]);
        program::succeed("fsfreeze", ["--freeze".as_ref(), bystander.point().as_os_str()]);
        kill_and_wait(hostler);
        daemon.wait_for_end("build", SOON);
        assert!(!probe::loops().iter().any(|device| device.backing == image));
        // Thawing what is not frozen fails: the bystander's still is.
        program::succeed("fsfreeze", ["--unfreeze".as_ref(), bystander.point().as_os_str()]);
        bystander.assert_untouched();
    });
}
