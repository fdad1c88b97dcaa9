//! What the administrator's rules do with what no lease has.

use std::fs;
use std::io::IoSlice;
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::{Child, Stdio};
use std::time::Duration;

use hostler_protocol::lease::{LeaseState, LeaseView};
use hostler_protocol::methods::PolicyStep;
use hostler_protocol::resource::{Kind, Outcome, ResourceView, Verdict};
use hostler_tests::attached::Attached;
use hostler_tests::bystander::Bystander;
use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::{OrFail, wait_until};
use hostler_tests::place::kill;
use hostler_tests::probe::{self, LoopSeen};
use hostler_tests::{program, scenario};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketFlags, SocketType, sendmsg,
    socketpair,
};

/// Some sweeps.
const SOON: Duration = Duration::from_secs(25);

fn settings(interval: &str, more: &str) -> Settings {
    Settings { more: format!("[sweep]\ninterval = \"{interval}\"\n{more}"), ..Settings::default() }
}

/// A rule about loop devices of files below a directory.
fn loop_rule(directory: &Path, rest: &str) -> String {
    format!("[[policy]]\nname = \"stale loops\"\nkind = \"loop\"\nbacking_under = {directory:?}\n{rest}\n")
}

fn mount_rule(directory: &Path, rest: &str) -> String {
    format!("[[policy]]\nname = \"stale mounts\"\nkind = \"mount\"\nmounted_under = {directory:?}\n{rest}\n")
}

fn shown(daemon: &Daemon<'_>, name: &str) -> Option<ResourceView> {
    daemon.status().others.into_iter().find(|resource| resource.name == name)
}

fn verdict(daemon: &Daemon<'_>, name: &str) -> Option<Verdict> {
    shown(daemon, name).map(|resource| resource.verdict)
}

#[track_caller]
fn wait_for_quarantine(daemon: &Daemon<'_>, name: &str) {
    // What it was called before tells why, where that never happens.
    let mut told: Vec<String> = Vec::new();
    let limit = std::time::Instant::now() + SOON;
    loop {
        match shown(daemon, name) {
            Some(seen) if seen.verdict == Verdict::Quarantined => return,
            Some(seen) if told.last() != Some(&seen.detail) => told.push(seen.detail),
            // A mount is told of once a rule is about it.
            Some(_) | None => {}
        }
        let gaps = || daemon.status().gaps;
        assert!(std::time::Instant::now() < limit, "{name} was not quarantined: {told:#?}, {:#?}", gaps());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// The ended lease of a rule.
#[track_caller]
fn wait_for_policy(daemon: &Daemon<'_>, name: &str) -> LeaseView {
    daemon.wait_for_end(&format!("policy: {name}"), SOON).0
}

/// What the plan said is what the journal says was then decided on.
#[track_caller]
fn assert_was_done(daemon: &Daemon<'_>, lease: &LeaseView, planned: &[PolicyStep]) {
    let planned: Vec<_> = planned.iter().map(|step| step.step.clone()).collect();
    let rounds = daemon.planned_in_journal(lease.lease);
    assert_eq!(rounds, [planned], "what hostler plan said is not what was done");
}

/// A build under a lease, which lives.
fn live_build(daemon: &Daemon<'_>, claim: &Path) -> (Child, LoopSeen) {
    hostler_tests::place::make_image(&claim.join("live.img"), 4);
    let script = "losetup --find live.img; echo $$ > shell; sleep 600";
    let mut run = daemon.run_script("live", claim, script);
    let child = run.stdout(Stdio::null()).stderr(Stdio::null()).spawn().or_fail("starting hostler");
    let _ = probe::pid_from(&claim.join("shell"));
    (child, probe::loop_of(&claim.join("live.img")))
}

#[test]
fn a_leaked_loop_device_is_quarantined_then_taken_back_and_what_is_not_meant_stays() {
    scenario::privileged("policy", |place| {
        let ci = place.directory("ci");
        let other = place.directory("other");
        let vm = place.directory("ci/vm");
        let rule = |rest: &str| format!("{}[protect]\nbacking_under = [{vm:?}]\n", loop_rule(&ci, rest));
        let only_quarantined = rule("min_age = \"2s\"\nobservations = 2\naction = \"quarantine\"");
        let mut daemon = Daemon::start(place, &settings("1s", &only_quarantined));
        let leaked = Attached::new(&ci.join("leaked.img"));
        let point = place.directory("leaked");
        leaked.mount(&point);

        let outside = Attached::new(&other.join("outside.img"));
        let in_use = Bystander::new(place, &place.directory("ci/used"));
        let protected = Attached::new(&vm.join("protected.img"));
        // The directory has links to these files, and the files do not lie there.
        hostler_tests::place::make_image(&other.join("linked.img"), 4);
        symlink(other.join("linked.img"), ci.join("linked.img")).or_fail("making a link");
        let linked = Attached::by(&ci.join("linked.img"), &other.join("linked.img"));
        hostler_tests::place::make_image(&other.join("hard.img"), 4);
        fs::hard_link(other.join("hard.img"), ci.join("hard.img")).or_fail("making a link");
        let hard = Attached::by(&ci.join("hard.img"), &other.join("hard.img"));
        let (mut build, of_build) = live_build(&daemon, &place.directory("ci/job"));

        let stay = [&outside, &protected, &linked, &hard];
        let assert_they_stay = || {
            for one in stay {
                one.assert_untouched();
                assert_eq!(verdict(&daemon, &one.node()), Some(Verdict::Bystander), "{:?}", one.image);
            }
            in_use.assert_untouched();
            assert!(probe::loops().contains(&of_build), "the device of the living build is gone");
        };
        wait_for_quarantine(&daemon, &leaked.node());
        leaked.assert_untouched();
        assert_they_stay();
        let used = shown(&daemon, &format!("/dev/loop{}", in_use.device().number)).or_fail("the bystander");
        assert!(used.detail.contains("left, process"), "{used:?}");
        let kept = shown(&daemon, &protected.node()).or_fail("the protected device");
        assert!(kept.detail.contains("protected by [protect]"), "{kept:?}");
        let why = daemon.ask(&["why", &protected.node()]).succeeded();
        assert!(why.contains("[protected by [protect]]"), "{why}");

        // Now for good. All that was counted is forgotten with the daemon that counted it. On a busy host
        // an answer takes seconds, so there are some between two sweeps.
        daemon.kill();
        let for_good = rule("min_age = \"1s\"\nobservations = 2\naction = \"reclaim\"");
        daemon.configure(&settings("6s", &for_good));
        daemon.start_again();
        leaked.assert_untouched();
        assert_ne!(verdict(&daemon, &leaked.node()), Some(Verdict::Quarantined));
        wait_for_quarantine(&daemon, &leaked.node());
        let planned = daemon.plan();
        let told = daemon.ask(&["plan"]).succeeded();
        let does: Vec<&str> = planned.by_policy.iter().map(|step| step.does.as_str()).collect();
        assert_eq!(does.len(), 2, "{planned:?}");
        assert!(does[0].ends_with(&format!("unmount {}", point.display())), "{planned:?}");
        assert_eq!(does[1], format!("detach {}", leaked.node()));
        assert!(planned.by_policy.iter().all(|step| step.policy == "stale loops" && step.in_seconds <= 6.0));
        // Seconds may pass between the two answers, and a sweep with them.
        assert!(told.contains(&format!("detach {}", leaked.node())), "{told}");

        let lease = wait_for_policy(&daemon, "stale loops");
        let report = lease.report.clone().or_fail("a report");
        assert!(report.complete, "{report:?}");
        assert!(report.resources.iter().all(|resource| resource.outcome == Outcome::Reclaimed), "{report:?}");
        assert!(!leaked.is_there());
        assert_eq!(probe::mounts_below(&point), []);
        assert_was_done(&daemon, &lease, &planned.by_policy);
        let assert_they_stay = || {
            for one in stay {
                one.assert_untouched();
            }
            in_use.assert_untouched();
            assert!(probe::loops().contains(&of_build), "the device of the living build is gone");
        };
        // Nor later.
        std::thread::sleep(Duration::from_secs(7));
        assert_they_stay();
        let policies = daemon.status().leases.into_iter().filter(|lease| lease.name.starts_with("policy"));
        assert_eq!(policies.count(), 1);
        kill(build.id());
        build.wait().or_fail("waiting for hostler");
        daemon.wait_for_end("live", SOON);
    });
}

#[test]
fn killed_in_the_middle_it_finishes_what_a_rule_had_it_begin() {
    scenario::privileged("policy-killed", |place| {
        let ci = place.directory("ci");
        let rest = "min_age = \"0s\"\nobservations = 1\naction = \"reclaim\"";
        let mut daemon = Daemon::start(place, &settings("1s", &loop_rule(&ci, rest)));
        let point = place.directory("leaked");
        let begun = |daemon: &Daemon<'_>| daemon.log().matches("opened by hostlerd: policy").count();
        for round in 0..6u64 {
            let before = begun(&daemon);
            let leaked = Attached::new(&ci.join(format!("{round}.img")));
            leaked.mount(&point);
            wait_until("the daemon to begin", SOON, || begun(&daemon) > before);
            // From its beginning until it is done, which takes 100 ms or a few.
            std::thread::sleep(Duration::from_millis(round * 23));
            daemon.kill();
            daemon.start_again();
            wait_until("the device to be taken back", SOON, || !leaked.is_there());
            assert_eq!(probe::mounts_below(&point), []);
            daemon.wait_until_idle(SOON);
        }
        daemon.stop();
    });
}

#[test]
fn mounts_are_taken_back_where_a_rule_says_so_and_nobody_is_in_them() {
    scenario::privileged("policy-mounts", |place| {
        let ci = place.directory("ci");
        let keep = place.directory("ci/keep");
        let more = format!(
            "{}[protect]\nmounted_under = [{keep:?}]\n",
            mount_rule(&ci, "min_age = \"0s\"\nobservations = 1\naction = \"reclaim\"")
        );
        let daemon = Daemon::start(place, &settings("5s", &more));
        let tmpfs = |below: &str| {
            let point = place.directory(below);
            program::succeed("mount", ["-t", "tmpfs", "none", &*point.to_string_lossy()]);
            point
        };
        let outside = tmpfs("outside");
        let kept = tmpfs("ci/keep/kept");
        let used = tmpfs("ci/used");
        let mut user = place.command("sleep").arg("600").current_dir(&used).spawn().or_fail("a user");
        // A file on it backs a loop device, which is somebody's.
        let holding = tmpfs("ci/holding");
        let backed = Attached::new(&holding.join("image"));
        let leaked = tmpfs("ci/leaked");
        let upper = tmpfs("ci/leaked/upper");

        wait_for_quarantine(&daemon, &leaked.to_string_lossy());
        let planned = daemon.plan().by_policy;
        let does: Vec<&str> = planned.iter().map(|step| step.does.as_str()).collect();
        assert_eq!(does, [format!("unmount {}", upper.display()), format!("unmount {}", leaked.display())]);
        let lease = wait_for_policy(&daemon, "stale mounts");
        assert_was_done(&daemon, &lease, &planned);
        std::thread::sleep(Duration::from_secs(6));
        assert_eq!(probe::mounts_below(&leaked), []);
        for point in [&outside, &kept, &used, &holding] {
            assert_eq!(probe::mounts_below(point).len(), 1, "{point:?}");
        }
        backed.assert_untouched();

        // Once nobody is in it any more, it is one of them.
        kill(user.id());
        user.wait().or_fail("waiting for the user");
        wait_until("the mount that nobody uses any more to go", SOON, || {
            probe::mounts_below(&used).is_empty()
        });
        drop(backed);
        for point in [outside, kept] {
            program::succeed("umount", [point]);
        }
        wait_until("the last mount to go", SOON, || probe::mounts_below(&holding).is_empty());
    });
}

#[test]
fn a_rule_that_only_watches_touches_nothing() {
    scenario::privileged("policy-watch", |place| {
        let (seen, quarantined) = (place.directory("seen"), place.directory("quarantined"));
        let more = format!(
            "{}{}",
            loop_rule(&seen, "min_age = \"0s\"\nobservations = 1"),
            loop_rule(&quarantined, "min_age = \"0s\"\nobservations = 1\naction = \"quarantine\"")
                .replace("stale loops", "bad loops")
        );
        let settings = Settings { metrics: true, ..settings("1s", &more) };
        let daemon = Daemon::start(place, &settings);
        let one = Attached::new(&seen.join("image"));
        let other = Attached::new(&quarantined.join("image"));
        wait_for_quarantine(&daemon, &other.node());
        std::thread::sleep(Duration::from_millis(2500));
        one.assert_untouched();
        other.assert_untouched();
        let watched = shown(&daemon, &one.node()).or_fail("the device that is watched");
        assert_eq!(watched.verdict, Verdict::Bystander);
        assert!(watched.detail.contains("rule stale loops: seen unchanged"), "{watched:?}");
        let kept = shown(&daemon, &other.node()).or_fail("the quarantined device");
        assert!(kept.detail.contains("rule bad loops: taken for leaked, and left"), "{kept:?}");
        assert_eq!(daemon.plan().by_policy, []);
        assert!(daemon.ask(&["plan"]).succeeded().starts_with("nothing to do"));
        assert_eq!(daemon.status().leases, []);
        let text = crate::metrics::get(daemon.metrics(), "/metrics").or_fail("the metrics");
        assert!(text.contains("hostler_resources{kind=\"loop\",verdict=\"quarantined\"} 1"), "{text}");
    });
}

#[test]
fn what_cannot_be_taken_back_is_let_go_and_counted_anew() {
    scenario::privileged("policy-pinned", |place| {
        let ci = place.directory("ci");
        let rest = "min_age = \"0s\"\nobservations = 1\naction = \"reclaim\"";
        let daemon = Daemon::start(place, &settings("1s", &mount_rule(&ci, rest)));
        let point = place.directory("ci/leaked");
        program::succeed("mount", ["-t", "tmpfs", "none", &*point.to_string_lossy()]);
        // A descriptor on its way over a socket is nowhere to be seen, and holds all the same.
        let flags = SocketFlags::CLOEXEC;
        let (ours, theirs) =
            socketpair(AddressFamily::UNIX, SocketType::STREAM, flags, None).or_fail("a pair of sockets");
        {
            let file = fs::File::create(point.join("file")).or_fail("a file in the mount");
            let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let descriptors = [file.as_fd()];
            assert!(control.push(SendAncillaryMessage::ScmRights(&descriptors)));
            sendmsg(&ours, &[IoSlice::new(b"x")], &mut control, SendFlags::NOSIGNAL).or_fail("sending it");
        }
        let lease = wait_for_policy(&daemon, "stale mounts");
        let report = lease.report.or_fail("a report");
        assert!(!report.complete, "{report:?}");
        assert_eq!(report.resources.len(), 1);
        assert_eq!(
            (report.resources[0].kind, report.resources[0].outcome),
            (Kind::Mount, Outcome::Pinned),
            "{report:?}"
        );
        assert_eq!(probe::mounts_below(&point).len(), 1);
        assert!(daemon.log().contains("given up, 1 of 1 resources are still there"), "{}", daemon.log());
        drop((ours, theirs));
        wait_until("the mount to go at a later sweep", SOON, || probe::mounts_below(&point).is_empty());
        // Its lease ends a moment after the mount is gone.
        wait_until("the end of both leases", SOON, || {
            let leases = daemon.status().leases;
            leases.len() >= 2 && leases.iter().all(|lease| lease.state == LeaseState::Ended)
        });
    });
}

#[test]
fn a_plan_made_in_the_grace_is_what_is_done_after_it() {
    scenario::privileged("plan-grace", |place| {
        let claim = place.directory("claim");
        let _ = place.image("claim/image", 8);
        let bystander = Bystander::new(place, &place.directory("other"));
        let daemon = Daemon::start(place, &Settings { grace: "3s", ..Settings::default() });
        let script = r#"
            device=$(losetup --find --show image); mkdir mnt; mount "$device" mnt
            mount -t tmpfs none mnt/lost+found
            echo $$ > shell; cd mnt; sleep 600
        "#;
        let mut run = daemon.run_script("build", &claim, script);
        let mut hostler = run.stdout(Stdio::null()).spawn().or_fail("starting hostler");
        let _ = probe::pid_from(&claim.join("shell"));
        assert_eq!(daemon.plan().steps, [], "the owner lives");
        kill(hostler.id());
        hostler.wait().or_fail("waiting for hostler");
        daemon.wait_for_state("build", LeaseState::Closing, SOON);
        let planned = daemon.plan().steps;
        assert!(planned.iter().all(|step| step.in_seconds > 0.0 && step.in_seconds <= 3.0), "{planned:?}");
        let told = daemon.ask(&["plan"]).succeeded();
        assert!(told.contains("in 3s: end process") || told.contains("in 2s: end process"), "{told}");
        let (lease, _) = daemon.wait_for_end("build", SOON);
        let planned: Vec<_> = planned.into_iter().map(|step| step.step).collect();
        assert_eq!(planned.len(), 5, "processes, two mounts, a device, a control group: {planned:?}");
        assert_eq!(daemon.planned_in_journal(lease.lease), [planned]);
        assert_eq!(probe::loops_below(&claim), []);
        bystander.assert_untouched();
    });
}

#[test]
fn what_is_protected_is_not_even_its_leases() {
    scenario::privileged("protect", |place| {
        let claim = place.directory("claim");
        let (vm, keep) = (place.directory("claim/vm"), place.directory("claim/keep"));
        let more = format!("[protect]\nbacking_under = [{vm:?}]\nmounted_under = [{keep:?}]\n");
        let daemon = Daemon::start(place, &settings("5min", &more));
        for image in ["vm/machine.img", "kept.img", "plain.img"] {
            let _ = place.image(claim.join(image), 4);
        }
        let script = r#"
            losetup --find vm/machine.img
            device=$(losetup --find --show kept.img); mkdir keep/mnt; mount "$device" keep/mnt
            losetup --find plain.img
            echo $$ > shell; sleep 600
        "#;
        let mut run = daemon.run_script("build", &claim, script);
        let mut hostler = run.stdout(Stdio::null()).spawn().or_fail("starting hostler");
        let _ = probe::pid_from(&claim.join("shell"));
        let machine = probe::loop_of(&vm.join("machine.img"));
        let kept = probe::loop_of(&claim.join("kept.img"));
        let node = format!("/dev/loop{}", machine.number);
        assert_eq!(verdict(&daemon, &node), Some(Verdict::Bystander));
        kill(hostler.id());
        hostler.wait().or_fail("waiting for hostler");
        let (lease, _) = daemon.wait_for_state("build", LeaseState::Pinned, SOON);
        let report = lease.report.or_fail("a report");
        let device = report.resources.iter().find(|one| one.name == format!("/dev/loop{}", kept.number));
        let device = device.or_fail("the device of the protected mount in the report");
        assert_eq!(device.outcome, Outcome::Pinned);
        assert!(device.reasons.contains(&hostler_protocol::why::Reason::Bystander), "{device:?}");
        assert!(device.detail.contains("protected by [protect]"), "{device:?}");
        assert!(probe::loops().contains(&machine) && probe::loops().contains(&kept));
        assert!(!probe::loops().iter().any(|device| device.backing == claim.join("plain.img")));

        let refused = daemon.ask(&["reclaim", &node]);
        assert_eq!(refused.status, 3, "{refused:?}");
        assert!(refused.stderr.contains("[protect] protects it"), "{refused:?}");
        program::succeed("umount", [keep.join("mnt")]);
        daemon.wait_for_end("build", SOON);
        assert!(probe::loops().contains(&machine), "the protected device is gone");
        program::succeed("losetup", ["-d", &node]);
    });
}

#[test]
fn an_administrator_takes_back_by_name_what_is_nobodys() {
    scenario::privileged("reclaim-target", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let leaked = Attached::new(&place.path("leaked.img"));
        let point = place.directory("mnt");
        leaked.mount(&point);

        let refused = program::finish(&mut daemon.hostler_of_user(&["reclaim", &leaked.node()]));
        assert_eq!(refused.status, 3, "{refused:?}");
        assert!(refused.stderr.contains("only root"), "{refused:?}");
        for (target, status, said) in [("/nowhere", 3, "nothing here is called"), ("/", 3, "the root")] {
            let refused = daemon.ask(&["reclaim", target]);
            assert_eq!(refused.status, status, "{refused:?}");
            assert!(refused.stderr.contains(said), "{refused:?}");
        }
        let answer = daemon.client().call("Reclaim", &serde_json::json!({}), &[]).expect_err("nothing named");
        assert!(answer.details.to_string().contains("name a lease or a target"), "{answer}");

        // A living build's is its own.
        let (mut build, of_build) = live_build(&daemon, &place.directory("job"));
        let node = format!("/dev/loop{}", of_build.number);
        let refused = daemon.ask(&["reclaim", &node]);
        assert_eq!(refused.status, 3, "{refused:?}");
        assert!(refused.stderr.contains("its owner lives"), "{refused:?}");
        kill(build.id());
        build.wait().or_fail("waiting for hostler");
        daemon.wait_for_end("live", SOON);

        // Somebody is in it: it is left, and the report says who that is.
        let mut user = place.command("sleep").arg("600").current_dir(&point).spawn().or_fail("a user");
        let pinned = daemon.ask(&["reclaim", &leaked.node()]);
        assert_eq!(pinned.status, 1, "{pinned:?}");
        let told = format!("mount {}: pinned (held by process {}", point.display(), user.id());
        assert!(pinned.stdout.contains(&told), "{pinned:?}");
        leaked.assert_untouched();
        assert_eq!(probe::mounts_below(&point).len(), 1);
        assert_eq!(verdict(&daemon, &leaked.node()), Some(Verdict::Bystander), "it is nobody's again");
        // The device itself is open: detaching it would be put off to the last close.
        kill(user.id());
        user.wait().or_fail("waiting for the user");
        let open = fs::File::open(leaked.node()).or_fail("opening the device");
        program::succeed("umount", [&point]);
        let pinned = daemon.ask(&["reclaim", &leaked.node()]);
        assert_eq!(pinned.status, 1, "{pinned:?}");
        assert!(pinned.stdout.contains("pinned (held by process"), "{pinned:?}");
        drop(open);
        leaked.mount(&point);

        let taken = daemon.ask(&["reclaim", &leaked.node()]).succeeded();
        assert!(taken.contains(&format!("mount {}: reclaimed\n", point.display())), "{taken}");
        assert!(taken.contains(&format!("loop {}: reclaimed\n", leaked.node())), "{taken}");
        assert!(!leaked.is_there());

        program::succeed("mount", ["-t", "tmpfs", "none", &*point.to_string_lossy()]);
        let taken = daemon.ask(&["reclaim", &point.to_string_lossy(), "--json"]).succeeded();
        assert!(taken.contains("\"complete\": true"), "{taken}");
        assert_eq!(probe::mounts_below(&point), []);
    });
}
