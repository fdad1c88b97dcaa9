//! What hostile users try, each against a real daemon as root. `SECURITY.md` says which is which.

mod boundary;
mod floods;
mod lies;
mod looks;
mod others;
mod own;
mod readers;
mod trees;

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use hostler_protocol::lease::{LeaseState, LeaseView};
use hostler_tests::daemon::Daemon;
use hostler_tests::failure::{OrFail, wait_until};
use hostler_tests::place::{Place, USER};
use hostler_tests::sleeper::Sleeper;
use hostler_tests::wire::{Client, Opened, Refusal, as_user};
use serde_json::{Value, json};

/// How long any of it may take.
const SOON: Duration = Duration::from_secs(15);

/// A hostile user, with a lease of his own.
struct Attacker<'place> {
    daemon: &'place Daemon<'place>,
    client: Client,
    lease: Opened,
    owner: Option<Sleeper>,
}

impl<'place> Attacker<'place> {
    fn new(place: &Place, daemon: &'place Daemon<'place>) -> Self {
        let owner = Sleeper::start(place, true);
        let mut client = Client::connect_as(USER, &daemon.socket());
        let lease = client.open_lease("attack", &owner);
        Self { daemon, client, lease, owner: Some(owner) }
    }

    /// Claims what a path leads him to, by opening it as himself.
    fn claim(&mut self, path: &Path, scratch: bool) -> Result<Value, Refusal> {
        let directory = as_user(USER, || File::open(path)).or_fail(format_args!("opening {path:?}"));
        self.client.claim(self.lease, directory, scratch)
    }

    /// The arguments of a call about his lease.
    fn about_lease(&self, field: &str) -> Value {
        json!({ "lease": self.lease.lease, "epoch": self.lease.epoch, field: 0 })
    }

    /// His lease's owner ends; waits until the daemon has taken back all that it will.
    fn end(&mut self) {
        self.owner.take();
        let is_it = |lease: &LeaseView| lease.lease.0 == self.lease.lease;
        wait_until(format_args!("the end of the attack\n{}", self.daemon.log()), SOON, || {
            let leases = self.daemon.status().leases;
            leases.iter().find(|lease| is_it(lease)).is_none_or(|lease| lease.state == LeaseState::Ended)
        });
    }
}

/// What is written to the daemon's clients when they are refused.
#[track_caller]
fn refusal(answer: Result<Value, Refusal>) -> String {
    let refusal = answer.expect_err("this must be refused");
    assert_eq!(refusal.name, "org.hostler.Watchdog.Refused", "{refusal}");
    refusal.details["reason"].as_str().unwrap_or_default().to_owned()
}
