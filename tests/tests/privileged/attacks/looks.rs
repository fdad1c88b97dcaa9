//! A user who makes what is looked at, or what is told of it, as large as he can.

use std::process::{Child, Stdio};
use std::time::Instant;

use hostler_protocol::methods::Explanation;
use hostler_protocol::why::Held;
use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::{OrFail, wait_until};
use hostler_tests::place::{Place, USER, kill};
use hostler_tests::scenario;
use hostler_tests::wire::Client;
use serde_json::json;

use super::SOON;

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
