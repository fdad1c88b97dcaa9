//! `hostlerd` is killed at any moment, started again, and finishes what it had begun.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use hostler_protocol::lease::Tracking;
use hostler_tests::bystander::Bystander;
use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::{OrFail, wait_until};
use hostler_tests::place::{Place, kill};
use hostler_tests::probe::ProcessSeen;
use hostler_tests::{probe, scenario};

const SOON: Duration = Duration::from_secs(10);

/// A bit of everything: an image in an image, a bind, a tmpfs, a process that will not hear.
const MIXED: &str = r#"
    device=$(losetup --find --show image)
    mkdir -p mnt tmp; mount "$device" mnt
    cp inner.img mnt/inner.img; mkdir mnt/inner mnt/dev
    mount -o loop mnt/inner.img mnt/inner
    mount --bind /dev mnt/dev
    mount -t tmpfs none tmp
    (trap '' TERM; cd mnt/inner; exec sleep 600) & echo $! > deaf
    sleep 601 & echo $! > other
    echo $$ > shell
    sleep 602
"#;

struct Build {
    hostler: Child,
    processes: Vec<ProcessSeen>,
}

impl Build {
    fn start(daemon: &Daemon<'_>, claim: &Path) -> Self {
        let mut run = daemon.run_script("build", claim, MIXED);
        let hostler = run.stdout(Stdio::null()).stderr(Stdio::null()).spawn().or_fail("starting hostler");
        let processes = ["shell", "deaf", "other"].map(|name| probe::pid_from(&claim.join(name)));
        Self { hostler, processes: processes.to_vec() }
    }

    fn kill_owner(mut self) -> Vec<ProcessSeen> {
        kill(self.hostler.id());
        self.hostler.wait().or_fail("waiting for hostler");
        self.processes
    }
}

fn claim_with_images(place: &Place, name: &str) -> std::path::PathBuf {
    let claim = place.directory(name);
    let _ = place.image(claim.join("image"), 16);
    let _ = place.image(claim.join("inner.img"), 2);
    claim
}

#[track_caller]
fn assert_nothing_left(place: &Place, claim: &Path, processes: &[ProcessSeen]) {
    assert_eq!(probe::mounts_below(claim), []);
    assert_eq!(probe::loops_below(claim), []);
    assert!(processes.iter().all(|process| !process.runs()), "{processes:?}");
    assert!(place.lease_groups().is_empty(), "{:?}", place.lease_groups());
}

#[test]
fn killed_in_the_middle_of_taking_back_it_finishes_after_a_restart() {
    scenario::privileged("middle", |place| {
        let claim = claim_with_images(place, "claim");
        let bystander = Bystander::new(place, &place.directory("other"));
        let mut daemon = Daemon::start(place, &Settings { term_timeout: "2s", ..Settings::default() });
        let build = Build::start(&daemon, &claim);
        let deaf = build.processes[1];
        let processes = build.kill_owner();
        std::thread::sleep(Duration::from_millis(500));
        assert!(deaf.runs(), "SIGTERM was to be ignored");
        daemon.kill();
        assert!(!probe::mounts_below(&claim).is_empty(), "killed too late for this test");
        daemon.start_again();
        let took = daemon.wait_until_idle(SOON);
        println!(
            "killed while it waited for a deaf process, it finished {} ms after its restart",
            took.as_millis()
        );
        assert_nothing_left(place, &claim, &processes);
        bystander.assert_untouched();
        daemon.stop();
    });
}

#[test]
fn an_owner_that_dies_while_hostlerd_is_down_is_noticed_at_its_start() {
    scenario::privileged("down", |place| {
        let claim = claim_with_images(place, "claim");
        let bystander = Bystander::new(place, &place.directory("other"));
        let mut daemon = Daemon::start(place, &Settings { term_timeout: "200ms", ..Settings::default() });
        let build = Build::start(&daemon, &claim);
        daemon.kill();
        let processes = build.kill_owner();
        assert!(processes.iter().any(|process| process.runs()));
        daemon.start_again();
        daemon.wait_until_idle(SOON);
        assert_nothing_left(place, &claim, &processes);
        bystander.assert_untouched();
    });
}

#[test]
fn an_owner_that_lives_through_a_restart_keeps_its_lease() {
    scenario::privileged("lives", |place| {
        let claim = claim_with_images(place, "claim");
        let mut daemon = Daemon::start(place, &Settings { term_timeout: "200ms", ..Settings::default() });
        let build = Build::start(&daemon, &claim);
        let mounts = probe::mounts_below(&claim);
        daemon.stop();
        daemon.start_again();
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(probe::mounts_below(&claim), mounts, "a restart touched what a living owner has");
        assert!(build.processes.iter().all(|process| process.runs()));
        let processes = build.kill_owner();
        daemon.wait_for_end("build", SOON);
        assert_nothing_left(place, &claim, &processes);
    });
}

/// Starts the daemon so that nobody in it gets a pidfd for as long as a file is there.
fn launch_without_pidfds(daemon: &mut Daemon<'_>, file: &Path) {
    let log = fs::File::options().append(true).open(daemon.place().path("hostlerd.log"));
    let log = log.or_fail("opening the daemon's log");
    daemon.launch_by(|command| {
        let mut failing = Command::new("python3");
        failing.args(["-c", include_str!("failing.py"), &nix::libc::SYS_pidfd_open.to_string()]);
        failing.arg(nix::libc::ENOMEM.to_string()).arg(file);
        failing.arg(command.get_program()).args(command.get_args());
        failing.env("HOSTLER_LOG", "info").stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        failing.spawn()
    });
}

#[test]
fn an_owner_that_cannot_be_asked_counts_as_living_until_it_can() {
    scenario::privileged("unasked", |place| {
        let bystander = Bystander::new(place, &place.directory("other"));
        let mut daemon = Daemon::start(place, &Settings { term_timeout: "200ms", ..Settings::default() });
        let build = |name: &str| {
            let claim = claim_with_images(place, name);
            (Build::start(&daemon, &claim), claim)
        };
        let (dead, dead_claim) = build("dead");
        let (living, living_claim) = build("living");
        daemon.kill();
        let dead = dead.kill_owner();
        let fails = place.path("no-pidfds");
        fs::write(&fails, "").or_fail("making pidfd_open fail");
        launch_without_pidfds(&mut daemon, &fails);
        let cannot_be_told = || daemon.log().matches("lives cannot be told").count() == 2;
        wait_until("both owners to be asked in vain", SOON, cannot_be_told);
        // It asks each second. No client can be served without pidfds.
        std::thread::sleep(Duration::from_millis(2500));
        for claim in [&dead_claim, &living_claim] {
            assert!(!probe::mounts_below(claim).is_empty(), "{claim:?}\n{}", daemon.log());
        }
        fs::remove_file(&fails).or_fail("letting pidfd_open be");
        let begun = Instant::now();
        let is_gone =
            || probe::mounts_below(&dead_claim).is_empty() && probe::loops_below(&dead_claim).is_empty();
        wait_until("what the dead owner left to be gone", SOON, is_gone);
        println!("asked again and taken back within {} ms", begun.elapsed().as_millis());
        wait_until("the living owner to be watched", SOON, || {
            daemon.log().contains("its owner lives, and is watched")
        });
        assert!(!probe::mounts_below(&living_claim).is_empty());
        let living = living.kill_owner();
        daemon.wait_until_idle(SOON);
        for (claim, processes) in [(&dead_claim, &dead), (&living_claim, &living)] {
            assert_nothing_left(place, claim, processes);
        }
        bystander.assert_untouched();
    });
}

#[test]
fn whenever_it_is_killed_nothing_is_left_in_the_end() {
    scenario::privileged("points", |place| {
        let bystander = Bystander::new(place, &place.directory("other"));
        let mut daemon = Daemon::start(place, &Settings { term_timeout: "60ms", ..Settings::default() });
        for point in 0..30u64 {
            let claim = claim_with_images(place, &format!("claim-{point}"));
            let build = Build::start(&daemon, &claim);
            let processes = build.kill_owner();
            // Spread over the time that taking back takes (about 250 ms), in no order.
            let after = Duration::from_millis(point * 7919 % 241);
            std::thread::sleep(after);
            daemon.kill();
            if point % 3 == 0 {
                // Once more, while it starts.
                daemon.launch();
                std::thread::sleep(Duration::from_millis(point * 104_729 % 61));
                daemon.kill();
            }
            daemon.start_again();
            daemon.wait_until_idle(SOON);
            assert_nothing_left(place, &claim, &processes);
        }
        bystander.assert_untouched();
        assert!(!daemon.log().contains("journal is damaged"), "{}", daemon.log());
    });
}

#[test]
fn killed_while_leases_are_opened_it_leaves_no_control_groups() {
    scenario::privileged("opening", |place| {
        let mut daemon = Daemon::start(place, &Settings { term_timeout: "200ms", ..Settings::default() });
        for point in 0..40u64 {
            let claim = place.directory(format!("claim-{point}"));
            let mut run = daemon.run_script("opening", &claim, "exec sleep 600");
            let mut hostler =
                run.stdout(Stdio::null()).stderr(Stdio::null()).spawn().or_fail("starting hostler");
            std::thread::sleep(Duration::from_micros(point * 7919 % 29_000));
            daemon.kill();
            daemon.start_again();
            kill(hostler.id());
            hostler.wait().or_fail("waiting for hostler");
            daemon.wait_until_idle(SOON);
            assert!(place.lease_groups().is_empty(), "point {point}: {:?}", place.lease_groups());
        }
    });
}

#[test]
fn anothers_control_group_of_the_same_number_is_neither_in_the_way_nor_touched() {
    scenario::privileged("stale-group", |place| {
        let claim = place.directory("claim");
        let daemon = Daemon::start(place, &Settings::default());
        // Another daemon's, or what one left that lost its state.
        for group in place.groups() {
            fs::create_dir(group.join("hostler-lease-1")).or_fail("making a stale group");
        }
        let script = "echo $$ > shell; sleep 600";
        let mut run = daemon.run_script("next", &claim, script);
        let mut hostler = run.stdout(Stdio::null()).spawn().or_fail("starting hostler");
        let _ = probe::pid_from(&claim.join("shell"));
        let lease = daemon.lease("next").or_fail("the lease");
        assert_eq!((lease.lease.0, lease.tracking), (1, Tracking::Cgroup));
        kill(hostler.id());
        hostler.wait().or_fail("waiting for hostler");
        daemon.wait_for_end("next", SOON);
        for group in place.groups() {
            fs::remove_dir(group.join("hostler-lease-1")).or_fail("the other's group, as it was");
        }
    });
}
