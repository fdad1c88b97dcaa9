//! What belongs to others: it cannot be registered, ended, or asked about.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Stdio;

use hostler_protocol::methods::{HostStatus, Planned};
use hostler_tests::attached::Attached;
use hostler_tests::bystander::Bystander;
use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::{OrFail, wait_until};
use hostler_tests::place::{USER, kill};
use hostler_tests::sleeper::Sleeper;
use hostler_tests::wire::{Client, as_user};
use hostler_tests::{probe, program, scenario};
use rustix::fs::{Mode, OFlags, open};
use serde_json::json;

use super::{Attacker, SOON, refusal};

#[test]
fn nothing_of_others_can_be_registered_by_any_name() {
    scenario::privileged("register-others", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let bystander = Bystander::new(place, &place.directory("other"));
        let mut attacker = Attacker::new(place, &daemon);
        let own = place.directory_of_user("own");
        // Directories, the root of a mount among them: by name, by link, by a path without permissions.
        for (at, target) in
            [Path::new("/"), Path::new("/home"), Path::new("/etc"), &place.path("other"), bystander.point()]
                .into_iter()
                .enumerate()
        {
            let link = own.join(format!("link-{at}"));
            as_user(USER, || symlink(target, &link)).or_fail("making a link");
            for path in [target, link.as_path()] {
                for scratch in [false, true] {
                    let said = refusal(attacker.claim(path, scratch));
                    assert!(said.contains("belongs to user 0") || said.contains("root directory"), "{said}");
                }
                let flags = OFlags::PATH | OFlags::DIRECTORY;
                let by_path = as_user(USER, || open(path, flags, Mode::empty())).or_fail("opening");
                let _ = refusal(attacker.client.claim(attacker.lease, by_path, false));
            }
        }
        // A link itself, as a descriptor.
        let flags = OFlags::PATH | OFlags::NOFOLLOW;
        let link = as_user(USER, || open(own.join("link-1"), flags, Mode::empty())).or_fail("opening a link");
        assert!(refusal(attacker.client.claim(attacker.lease, link, true)).contains("is of no directory"));

        // A process: root's, another user's, one that runs with more rights than who started it.
        let roots = Sleeper::start(place, false);
        let mut command = place.command("setpriv");
        let other = (USER + 1).to_string();
        command.args(["--reuid", &other, "--regid", &other, "--clear-groups", "--", "sleep"]);
        let others = Sleeper::run(command);
        for process in [&roots, &others] {
            let adopt = attacker.about_lease("process");
            let said = refusal(attacker.client.call("Adopt", &adopt, &[process.as_fd()]));
            assert!(said.contains("is not one of user"), "{said}");
            let own = json!({ "name": "x", "owner": 0 });
            let _ = refusal(attacker.client.call("OpenLease", &own, &[process.as_fd()]));
        }
        // A loop device: what he may only look at, by the device, by a partition's number, by its file.
        let device = attacker.about_lease("device");
        let node = format!("/dev/loop{}", bystander.device().number);
        let readable = File::open(&node).or_fail("opening the device");
        let by_path = open(&node, OFlags::PATH, Mode::empty()).or_fail("opening the device's node");
        let image = File::open(place.path("other/bystander.img")).or_fail("opening the backing file");
        for passed in [readable.as_fd(), by_path.as_fd(), image.as_fd()] {
            let _ = refusal(attacker.client.call("RegisterLoop", &device, &[passed]));
        }
        drop(readable);
        attacker.end();
        assert!(roots.runs() && others.runs());
        bystander.assert_untouched();
        assert!(own.exists());
    });
}

#[test]
fn what_is_others_cannot_be_taken_back_planned_or_listed() {
    scenario::privileged("list-others", |place| {
        let daemon = Daemon::start(place, &Settings { grace: "30s", ..Settings::default() });
        let claim = place.directory("claim");
        let image = place.image("claim/image", 8);
        let script = "device=$(losetup --find --show image); mkdir mnt; mount \"$device\" mnt; echo $$ >shell; sleep 600";
        let mut hostler =
            daemon.run_script("roots", &claim, script).stdout(Stdio::null()).spawn().or_fail("starting");
        let shell = probe::pid_from(&claim.join("shell"));
        wait_until("the loop device to be the lease's", SOON, || {
            daemon.lease("roots").is_some_and(|lease| lease.resources.len() >= 3)
        });
        let device = format!("/dev/loop{}", probe::loop_of(&image).number);
        let free = Attached::new(&place.path("free.img"));
        kill(hostler.id());
        hostler.wait().or_fail("waiting for hostler");
        wait_until("a plan", SOON, || !daemon.plan().steps.is_empty());
        let lease = daemon.lease_number("roots");

        let mut client = Client::connect_as(USER, &daemon.socket());
        let status = client.call("Status", &json!({}), &[]).or_fail("a status");
        let text = status.to_string();
        let status: HostStatus = serde_json::from_value(status).or_fail("a status");
        assert_eq!(status.leases, []);
        assert!(!text.contains("roots") && !text.contains(&*claim.to_string_lossy()), "{text}");
        let plan = client.call("Plan", &json!({}), &[]).or_fail("a plan");
        let plan: Planned = serde_json::from_value(plan).or_fail("a plan");
        assert_eq!((plan.steps.len(), plan.by_policy.len()), (0, 0));
        for target in [
            device.clone(),
            claim.join("mnt").display().to_string(),
            shell.pid.to_string(),
            daemon.pid().to_string(),
        ] {
            let error = client.call("Why", &json!({ "target": target }), &[]).expect_err("another's");
            assert_eq!(error.name, "org.hostler.Watchdog.NoSuchTarget", "{target}: {error}");
        }
        // Nor by way of what is there for all to see, and which the other's things hold.
        for target in ["/", "/proc"] {
            let tree = client.call("Why", &json!({ "target": target }), &[]).or_fail("an explanation");
            let text = tree["tree"].to_string();
            for theirs in [&*claim.to_string_lossy(), &format!("{device} ("), &format!("kill {}", shell.pid)]
            {
                assert!(!text.contains(theirs), "{theirs} in {text}");
            }
        }
        let whole = daemon.ask(&["why", "/", "--json"]).succeeded();
        assert!(whole.contains(&*claim.join("mnt").to_string_lossy()), "{whole}");
        for what in [json!({ "lease": lease }), json!({ "target": device }), json!({ "target": free.node() })]
        {
            let _ = refusal(client.call("Reclaim", &what, &[]));
        }
        for epoch in [0u64, 1, u64::MAX] {
            let close = json!({ "lease": lease, "epoch": epoch });
            let error = client.call("CloseLease", &close, &[]).expect_err("another's");
            assert_eq!(error.name, "org.hostler.Watchdog.NoSuchLease");
        }
        free.assert_untouched();
        // Root sees it all, and may.
        assert!(daemon.ask(&["why", &device]).succeeded().contains(&device));
        daemon.ask(&["reclaim", "--lease", &lease.to_string()]).succeeded();
        assert!(!shell.runs());
    });
}

#[test]
fn what_rules_are_about_is_told_to_root_alone() {
    scenario::privileged("rules", |place| {
        let secret = place.path("secret");
        // What it leads to is not what the administrator named.
        symlink("/usr", &secret).or_fail("making a link");
        let more = format!("[protect]\nmounted_under = [{secret:?}]\n");
        let daemon = Daemon::start(place, &Settings { more, ..Settings::default() });
        let is_told = |gaps: &[String]| gaps.iter().any(|gap| gap.contains("secret"));
        assert!(is_told(&daemon.status().gaps), "{:?}", daemon.status().gaps);
        let mut client = Client::connect_as(USER, &daemon.socket());
        for (method, parameters) in [("Status", json!({})), ("Why", json!({ "target": "/" }))] {
            let answer = client.call(method, &parameters, &[]).or_fail(method);
            assert!(!answer["gaps"].to_string().contains("secret"), "{answer}");
        }
    });
}

#[test]
fn root_of_a_user_namespace_is_its_user() {
    scenario::privileged("userns-root", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let roots = Sleeper::start(place, false);
        let lease = daemon.client().open_lease("roots", &roots);
        let hostler = program::path("hostler");
        let run = |arguments: &[&str]| {
            let mut command = place.command_of_user("unshare");
            command.args(["--user", "--map-root-user", "--"]).arg(&hostler).args(arguments);
            program::finish(command.env("HOSTLER_SOCKET", daemon.socket()).current_dir("/"))
        };
        let whoami = program::finish(place.command_of_user("unshare").args([
            "--user",
            "--map-root-user",
            "--",
            "id",
            "-u",
        ]));
        assert_eq!(whoami.succeeded(), "0\n", "this test needs user namespaces for ordinary users");
        let told = run(&["reclaim", "--lease", &lease.lease.to_string()]);
        assert_eq!(told.status, 3, "{told:?}");
        assert!(told.stderr.contains("only root"), "{told:?}");
        let told = run(&["run", "--claim", "/etc", "--", "true"]);
        assert_eq!(told.status, 3, "{told:?}");
        assert!(told.stderr.contains("belongs to user 0"), "{told:?}");
        assert!(!run(&["status"]).succeeded().contains("roots"));
        assert!(roots.runs());
        drop(roots);
        daemon.wait_until_idle(SOON);
    });
}

#[test]
fn a_program_with_anothers_rights_speaks_for_nobody() {
    use rustix::process::{Gid, Uid};
    use rustix::thread::{set_thread_groups, set_thread_res_gid, set_thread_res_uid};
    scenario::privileged("set-user-id", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let socket = daemon.socket();
        let answered = std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                // As in a set-user-ID program of root's that the user started.
                let (user, group, root) = (Uid::from_raw(USER), Gid::from_raw(USER), Uid::ROOT);
                set_thread_groups(&[]).or_fail("giving up groups");
                set_thread_res_gid(group, group, group).or_fail("taking the user's group");
                set_thread_res_uid(user, root, root).or_fail("taking the user's number");
                let mut client = Client::connect(&socket).or_fail("connecting");
                client.send(&json!({ "method": "org.hostler.Watchdog.Status" }), &[]).or_fail("sending");
                client.receive().is_ok()
            });
            thread.join().unwrap_or(true)
        });
        assert!(!answered, "a lease could be opened in root's name");
    });
}

#[test]
fn a_number_that_was_given_again_is_another_process() {
    scenario::privileged("reused-pid", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let mut attacker = Attacker::new(place, &daemon);
        let adopted = Sleeper::start(place, true);
        let adopt = attacker.about_lease("process");
        attacker.client.call("Adopt", &adopt, &[adopted.as_fd()]).or_fail("adopting");
        let pid = adopted.pid();
        drop(adopted);
        // The kernel gives the number after the one that is written here; others start processes, too.
        let last = "/proc/sys/kernel/ns_last_pid";
        let innocent = (0..2000).find_map(|_| {
            std::fs::write(last, (pid - 1).to_string()).or_fail("CONFIG_CHECKPOINT_RESTORE");
            let mut child = std::process::Command::new("sleep").arg("600").spawn().or_fail("sleep");
            if child.id() == pid {
                return Some(child);
            }
            kill(child.id());
            child.wait().or_fail("waiting");
            None
        });
        let mut innocent = innocent.or_fail("a process with the same number");
        let seen = probe::ProcessSeen::of(pid);
        attacker.end();
        let survived = seen.runs();
        kill(innocent.id());
        innocent.wait().or_fail("waiting");
        assert!(survived, "a process was ended for its number");
    });
}

#[test]
fn a_device_that_was_closed_and_bound_to_anothers_file_is_not_the_users() {
    scenario::privileged("raced-loop", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let mut attacker = Attacker::new(place, &daemon);
        let own = Attached::new(&place.path("own.img"));
        let writable = OpenOptions::new().read(true).write(true).open(own.node()).or_fail("opening");
        let device = attacker.about_lease("device");
        assert!(attacker.client.call("RegisterLoop", &device, &[writable.as_fd()]).is_ok());
        let number = own.node();
        drop(writable);
        drop(own);
        let innocent = place.image("innocent.img", 4);
        // Somebody else's file on the same device.
        let taken = program::finish(std::process::Command::new("losetup").arg(&number).arg(&innocent));
        if taken.status == 0 {
            attacker.end();
            let still = probe::loops_below(&innocent).len();
            let _ = program::finish(std::process::Command::new("losetup").args(["-d", &number]));
            assert_eq!(still, 1, "another's attachment was detached");
        } else {
            panic!("the device is in use by another test: {taken:?}");
        }
    });
}
