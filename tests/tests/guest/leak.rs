//! One shape under a lease, and the same shape beside it, which must survive.

use std::process::Stdio;
use std::time::{Duration, Instant};

use hostler_protocol::resource::Outcome;
use hostler_tests::blocks::{self, BlockSeen};
use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::{OrFail, wait_for};
use hostler_tests::place::kill;
use hostler_tests::stack::{Shape, Stack};
use hostler_tests::{probe, scenario};

/// How long a leak may take to be taken back.
const SOON: Duration = Duration::from_secs(10);
/// How long a script may take to build a shape.
const BUILT: Duration = Duration::from_secs(30);

/// Builds the shape under a lease, SIGKILLs its owner, and wants all of it gone and reported.
#[track_caller]
pub(crate) fn leak_and_want_it_gone(shape: Shape) {
    scenario::guest(shape.name(), |place| {
        let bystander = Stack::new(place, &place.directory("other"), shape);
        let claim = place.directory("claim");
        let daemon = Daemon::start(place, &Settings::default());
        let script =
            format!("{}\n(cd mnt && exec sleep 600) &\necho $$ > shell; sleep 601", shape.script("lease"));
        let log = std::fs::File::create(place.path("build.log")).or_fail("making a log");
        let mut run = daemon.run_script("build", &claim, &script);
        run.stdin(Stdio::null()).stdout(log.try_clone().or_fail("the log")).stderr(log);
        let mut hostler = run.spawn().or_fail("starting hostler");
        let said = || std::fs::read_to_string(place.path("build.log")).unwrap_or_default();
        let (shell, _) = wait_for("the shape to be built", BUILT, || {
            let ended = hostler.try_wait().or_fail("looking for hostler");
            assert!(ended.is_none(), "building {} failed: {}", shape.name(), said());
            claim.join("shell").exists().then(|| probe::pid_from(&claim.join("shell")))
        });
        let built = blocks::made_of_files_below(&claim);
        let mut kinds: Vec<_> = built.iter().filter_map(BlockSeen::kind).collect();
        kinds.sort_unstable();
        assert_eq!(kinds, shape.kinds(), "what was built is not what it should be: {built:?}");
        let mounts = probe::mounts_below(&claim).len();
        assert!(mounts >= 1);

        let killed = Instant::now();
        kill(hostler.id());
        hostler.wait().or_fail("waiting for hostler");
        let (lease, _) = daemon.wait_for_end("build", SOON);
        println!("{}: taken back {} ms after its owner's death", shape.name(), killed.elapsed().as_millis());

        assert_eq!(probe::mounts_below(&claim), []);
        let still: Vec<_> = built.iter().filter(|block| block.is_there()).collect();
        assert!(still.is_empty(), "still there: {still:?}");
        assert_eq!(blocks::made_of_files_below(&claim), []);
        assert!(!shell.runs());
        let report = lease.report.or_fail("a report");
        assert!(report.complete, "{report:?}");
        let reclaimed = |kind: &str| {
            let of_kind = report.resources.iter().filter(|one| one.kind.name() == kind);
            of_kind.filter(|one| one.outcome == Outcome::Reclaimed).count()
        };
        for kind in ["loop", "map", "nbd"] {
            let count = kinds.iter().filter(|built| **built == kind).count();
            assert_eq!(reclaimed(kind), count, "{kind}: {report:?}");
        }
        assert!(reclaimed("mount") >= mounts, "{report:?}");
        assert!(report.resources.iter().all(|one| one.outcome == Outcome::Reclaimed), "{report:?}");
        bystander.assert_untouched();
    });
}
