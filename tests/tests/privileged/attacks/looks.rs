//! A user who makes what is looked at, or what is told of it, as large as he can.

use std::fs;
use std::process::{Child, Stdio};
use std::time::Instant;

use hostler_protocol::methods::{Explanation, HostStatus};
use hostler_protocol::why::Held;
use hostler_tests::bystander::Bystander;
use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::{OrFail, wait_until};
use hostler_tests::leak::MOUNTED_IMAGE;
use hostler_tests::place::{Place, USER, kill};
use hostler_tests::wire::{Client, as_user};
use hostler_tests::{probe, scenario};
use serde_json::json;

use super::{Attacker, SOON};

/// A mount namespace of the user's own, in which a script of his ran. It ends when this is dropped.
struct OwnNamespace(Child);

impl OwnNamespace {
    /// `$1` is the user's directory.
    fn with(place: &Place, script: &str) -> Self {
        let own = place.directory_of_user("own");
        let script = format!("set -eu; cd \"$1\"; {script}; touch done; exec sleep 600");
        let mut command = place.command_of_user("unshare");
        command.args(["--user", "--map-root-user", "--mount", "--", "sh", "-c", &script, "sh"]).arg(&own);
        let child = command.stdin(Stdio::null()).current_dir("/").spawn().or_fail("starting unshare");
        let namespace = Self(child);
        wait_until("the user's mounts", SOON, || own.join("done").exists());
        namespace
    }
}

impl Drop for OwnNamespace {
    fn drop(&mut self) {
        kill(self.0.id());
        let _ = self.0.wait();
    }
}

#[test]
fn as_many_mounts_as_a_user_likes_are_a_gap_and_no_end_of_all_looks() {
    scenario::privileged("many-mounts", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let bystander = Bystander::new(place, &place.directory("other"));
        // An overlay with as long options as there can be, and each time as many more copies of it as there
        // are: 8192 in the end.
        let script = "layers=; for at in $(seq 14); do
                layer=$(printf 'l%0250d' $at); mkdir $layer; layers=$layers:$layer
            done
            for at in $(seq 13); do mkdir $layer/$at; done
            mkdir all; mount -t overlay overlay -o lowerdir=${layers#:} all
            for at in $(seq 13); do mount --rbind all all/$at; done";
        let own = OwnNamespace::with(place, script);
        let mounts = fs::read(format!("/proc/{}/mountinfo", own.0.id())).or_fail("reading mountinfo").len();
        println!("{mounts} bytes of mounts");
        assert!(mounts > 8192 * 3500, "{mounts}");
        let claim = place.directory("claim");
        let _ = place.image("claim/image", 4);
        let script = format!("{MOUNTED_IMAGE}; echo $$ >shell; sleep 600");
        let mut build =
            daemon.run_script("build", &claim, &script).stdout(Stdio::null()).spawn().or_fail("sh");
        let _ = probe::pid_from(&claim.join("shell"));
        let mut client = Client::connect_as(USER, &daemon.socket());
        let status: HostStatus =
            serde_json::from_value(client.call("Status", &json!({}), &[]).or_fail("a status")).or_fail("one");
        let gap = status.gaps.iter().find(|gap| gap.contains("than one look takes in"));
        assert!(gap.is_some(), "{:?}", status.gaps);
        assert!(client.call("Why", &json!({ "target": "/" }), &[]).is_ok());
        // Others' are taken back all the same.
        kill(build.id());
        build.wait().or_fail("waiting for hostler");
        wait_until("what is leaked to be taken back", SOON, || probe::loops_below(&claim).is_empty());
        drop(own);
        daemon.wait_for_end("build", SOON);
        bystander.assert_untouched();
    });
}

#[test]
fn a_claimed_directory_with_a_long_name_of_controls_is_kept_short() {
    scenario::privileged("long-claim", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        let mut attacker = Attacker::new(place, &daemon);
        let own = place.directory_of_user("own");
        let deep = vec!["\u{1}".repeat(250); 14].join("/");
        let deep = own.join(deep);
        as_user(USER, || fs::create_dir_all(&deep)).or_fail("making a directory");
        assert_eq!(attacker.claim(&deep, false), Ok(json!({})));
        let journal = fs::read_to_string(place.path("state/journal")).or_fail("reading the journal");
        let longest = journal.lines().map(str::len).max();
        assert!(longest < Some(4096), "{longest:?}");
        attacker.end();
    });
}

#[test]
fn mounts_that_hide_each_other_are_told_of_once_each() {
    scenario::privileged("hiding", |place| {
        let daemon = Daemon::start(place, &Settings::default());
        // The deepest first, so that each later one hides all that were before it.
        let script = "mkdir l1 l2; deep=d; for at in $(seq 22); do deep=$deep/a; done; mkdir -p $deep;
            while [ $deep != d ]; do
                mount -t overlay overlay -o lowerdir=l1:l2 $deep; deep=${deep%/a}
            done";
        let _own = OwnNamespace::with(place, script);
        let deepest = place.path("own/d").join(["a"; 22].join("/"));
        let mut client = Client::connect_as(USER, &daemon.socket());
        let asked = Instant::now();
        let answer = client.call("Why", &json!({ "target": deepest }), &[]).or_fail("an answer");
        let took = asked.elapsed();
        let tree = serde_json::from_value::<Explanation>(answer).or_fail("an explanation").tree;
        fn count(held: &Held) -> usize {
            1 + held.holders.iter().map(|holder| count(&holder.by)).sum::<usize>()
        }
        println!("{} things, told within {} ms", count(&tree), took.as_millis());
        // 22 mounts, the ways from each to those that hide it, and who keeps the namespace.
        assert!(tree.holders.len() >= 21 && count(&tree) < 1100, "{}", count(&tree));
        assert!(took < SOON, "{took:?}");
    });
}
