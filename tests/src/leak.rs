//! A builder under a lease that is killed and leaves something, beside a bystander of the same shape.

use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::time::Duration;

use hostler_protocol::lease::{LeaseState, LeaseView, ResourceOutcome};
use hostler_protocol::methods::Explanation;
use hostler_protocol::resource::{Kind, Outcome};
use hostler_protocol::why::{Held, Reason};

use crate::bystander::Bystander;
use crate::daemon::{Daemon, Settings};
use crate::failure::OrFail;
use crate::place::{Place, kill};
use crate::probe::{self, LoopSeen, ProcessSeen};

/// How long anything of it may take.
const SOON: Duration = Duration::from_secs(15);

/// The lease's name.
const NAME: &str = "build";

/// Mounts the image on `mnt`.
pub const MOUNTED_IMAGE: &str = r#"device=$(losetup --find --show image); mkdir mnt; mount "$device" mnt"#;

/// The builder and its surroundings.
#[derive(Debug)]
pub struct Leak<'place> {
    place: &'place Place,
    daemon: Daemon<'place>,
    bystander: Bystander,
    hostler: Option<Child>,
    shell: ProcessSeen,
}

impl<'place> Leak<'place> {
    /// Starts a daemon, a bystander, and a builder that claims `claim`, has done `script` in it when this
    /// returns, and then waits to be killed. What is to be in the claim before is made by the caller.
    ///
    /// # Panics
    /// When any of it does not come to be.
    #[must_use]
    pub fn start(place: &'place Place, script: &str) -> Self {
        let claim = place.directory("claim");
        let bystander = Bystander::new(place, &place.directory("other"));
        let daemon = Daemon::start(place, &Settings::default());
        let script = format!("{script}\necho $$ >shell\nsleep 600");
        let mut run = daemon.run_script(NAME, &claim, &script);
        let hostler = run.stdout(Stdio::null()).spawn().or_fail("starting hostler");
        let shell = probe::pid_from(&claim.join("shell"));
        Self { place, daemon, bystander, hostler: Some(hostler), shell }
    }

    /// A path in the claimed directory.
    #[must_use]
    pub fn path(&self, below: &str) -> PathBuf {
        self.place.path("claim").join(below)
    }

    /// The daemon.
    #[must_use]
    pub fn daemon(&self) -> &Daemon<'place> {
        &self.daemon
    }

    /// The loop device of `image` in the claim.
    #[must_use]
    #[track_caller]
    pub fn device(&self) -> LoopSeen {
        probe::loop_of(&self.path("image"))
    }

    /// Its node.
    #[must_use]
    #[track_caller]
    pub fn node(&self) -> String {
        format!("/dev/loop{}", self.device().number)
    }

    /// SIGKILL to `hostler`, which owns the lease.
    pub fn kill(&mut self) {
        if let Some(mut hostler) = self.hostler.take() {
            kill(hostler.id());
            let _ = hostler.wait();
        }
    }

    /// Waits until the lease is pinned, and wants its resource of this kind pinned for this reason.
    ///
    /// # Panics
    /// When it is not.
    #[track_caller]
    pub fn pinned(&self, kind: Kind, reason: Reason) -> ResourceOutcome {
        let (lease, _) = self.daemon.wait_for_state(NAME, LeaseState::Pinned, SOON);
        let report = lease.report.or_fail("a report");
        let of_kind = report.resources.iter().filter(|resource| resource.kind == kind);
        let found = of_kind.clone().find(|it| it.outcome == Outcome::Pinned && it.reasons.contains(&reason));
        found.or_fail(format_args!("a {kind:?} pinned by {reason:?} in {report:#?}")).clone()
    }

    /// What `hostler why TARGET --json` says.
    ///
    /// # Panics
    /// When it says nothing.
    #[must_use]
    #[track_caller]
    pub fn why(&self, target: &str) -> Held {
        let text = self.daemon.ask(&["why", target, "--json"]).succeeded();
        let explanation: Explanation = serde_json::from_str(&text).or_fail("reading the explanation");
        explanation.tree
    }

    /// Wants a chain in what `why` says: each of these reasons somewhere below the one before.
    ///
    /// # Panics
    /// When there is none.
    #[track_caller]
    pub fn wants_chain(&self, target: &str, reasons: &[Reason]) {
        fn has(held: &Held, reasons: &[Reason]) -> bool {
            let Some((first, rest)) = reasons.split_first() else { return true };
            held.holders
                .iter()
                .any(|holder| holder.reason == *first && has(&holder.by, rest) || has(&holder.by, reasons))
        }
        let tree = self.why(target);
        assert!(has(&tree, reasons), "no chain {reasons:?} in {tree:#?}");
    }

    /// Waits until all of it is gone, and wants the bystander untouched.
    ///
    /// # Panics
    /// When something stays.
    #[track_caller]
    pub fn gone(&mut self) -> LeaseView {
        let (lease, _) = self.daemon.wait_for_end(NAME, SOON);
        assert_eq!(probe::mounts_below(&self.place.path("claim")), []);
        assert_eq!(probe::loops_below(&self.place.path("claim")), []);
        assert!(!self.shell.runs(), "the builder's shell still runs");
        self.bystander.assert_untouched();
        lease
    }

    /// [`Self::kill`], then [`Self::gone`]; wants so many of a kind told as taken back.
    ///
    /// # Panics
    /// When something stays, or the report tells otherwise.
    #[track_caller]
    pub fn kill_and_want_gone(&mut self, counts: &[(Kind, usize)]) {
        self.kill();
        let report = self.gone().report.or_fail("a report");
        for (kind, wanted) in counts {
            let of_kind = report.resources.iter().filter(|resource| resource.kind == *kind);
            let count = of_kind.filter(|resource| resource.outcome == Outcome::Reclaimed).count();
            assert_eq!(count, *wanted, "{kind:?} in {report:#?}");
        }
    }
}

impl Drop for Leak<'_> {
    fn drop(&mut self) {
        self.kill();
    }
}
