//! `hostlerd` is killed at random points and right after each step, and each kernel call fails in turn: in
//! the end nothing is left, and no bystander was touched. `make test-crash` tries more points.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use hostler_protocol::lease::LeaseState;
use hostler_tests::bystander::Bystander;
use hostler_tests::daemon::{Daemon, Settings};
use hostler_tests::failure::{OrFail, wait_until};
use hostler_tests::place::{Place, kill};
use hostler_tests::probe::ProcessSeen;
use hostler_tests::random::{Numbers, count};
use hostler_tests::sleeper::Sleeper;
use hostler_tests::{probe, scenario};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    apply_filter,
};

const SOON: Duration = Duration::from_secs(20);

/// A bit of everything, in one of several orders, so that plans differ.
const STACKS: [&str; 3] = [
    r#"device=$(losetup --find --show image); mkdir mnt; mount "$device" mnt
       cp inner.img mnt/inner.img; mkdir mnt/inner; mount -o loop mnt/inner.img mnt/inner
       (trap '' TERM; cd mnt/inner; exec sleep 600) & echo $! >deaf"#,
    r#"mkdir tmp over; mount -t tmpfs none tmp; mkdir tmp/l tmp/u tmp/w
       mount -t overlay -o lowerdir=tmp/l,upperdir=tmp/u,workdir=tmp/w none over || mount --bind tmp/l over
       losetup --find inner.img
       sleep 601 & echo $! >deaf"#,
    r#"device=$(losetup --find --show image); mkdir mnt; mount "$device" mnt; mkdir mnt/dev mnt/proc
       mount --bind /dev mnt/dev; mount --bind mnt mnt/proc; mount -t tmpfs none mnt/proc
       (cd mnt/proc; exec setsid sleep 602) & echo $! >deaf"#,
];

/// Something that a dead owner left.
struct Leak {
    claim: PathBuf,
    processes: Vec<ProcessSeen>,
    hostler: std::process::Child,
}

impl Leak {
    /// With a daemon that runs.
    fn start(daemon: &Daemon<'_>, place: &Place, name: &str, stack: usize) -> Self {
        let claim = place.directory(name);
        let _ = place.image(claim.join("image"), 4);
        let _ = place.image(claim.join("inner.img"), 1);
        let script = format!("{}\necho $$ >shell; sleep 603", STACKS[stack % STACKS.len()]);
        let run =
            daemon.run_script(name, &claim, &script).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let hostler = run.or_fail("starting hostler");
        let processes = ["shell", "deaf"].map(|file| probe::pid_from(&claim.join(file))).to_vec();
        Self { claim, processes, hostler }
    }

    fn kill_owner(&mut self) {
        kill(self.hostler.id());
        self.hostler.wait().or_fail("waiting for hostler");
    }

    fn left(&self) -> Vec<String> {
        let mut left: Vec<String> =
            probe::mounts_below(&self.claim).iter().map(|mount| format!("{:?}", mount.point)).collect();
        left.extend(
            probe::loops_below(&self.claim).iter().map(|device| format!("/dev/loop{}", device.number)),
        );
        left.extend(self.processes.iter().filter(|it| it.runs()).map(|it| format!("process {}", it.pid)));
        left
    }
}

#[test]
fn killed_at_random_points_nothing_is_left_in_the_end() {
    let points = count("HOSTLER_TESTS_CRASHES", 12);
    println!("{points} points");
    let limit = Duration::from_secs(60 + 12 * points as u64);
    scenario::privileged_within("random-kills", limit, |place| {
        let mut numbers = Numbers::new();
        let bystander = Bystander::new(place, &place.directory("other"));
        let mut daemon = Daemon::start(place, &Settings { term_timeout: "60ms", ..Settings::default() });
        let begun = Instant::now();
        for point in 0..points {
            let mut leak = Leak::start(&daemon, place, &format!("claim-{point}"), point);
            leak.kill_owner();
            // Most of it happens soon; some of it while the daemon starts again, and again.
            std::thread::sleep(Duration::from_micros(numbers.below(400_000)));
            daemon.kill();
            while numbers.below(3) == 0 {
                daemon.launch();
                std::thread::sleep(Duration::from_micros(numbers.below(150_000)));
                daemon.kill();
            }
            daemon.start_again();
            daemon.wait_until_idle(SOON);
            assert_eq!(leak.left(), Vec::<String>::new(), "point {point}\n{}", daemon.log());
            assert!(place.lease_groups().is_empty(), "point {point}: {:?}", place.lease_groups());
            bystander.assert_untouched();
            let log = daemon.log();
            assert!(!log.contains("is damaged"), "point {point}\n{log}");
            // The log tells the story to its end.
            assert!(log.contains("nothing is left"), "point {point}\n{log}");
            fs::write(place.path("hostlerd.log"), "").or_fail("emptying the log");
            fs::remove_dir_all(&leak.claim).or_fail("removing the claim");
        }
        println!("killed at {points} random points within {:?}: nothing was left", begun.elapsed());
    });
}

#[test]
fn killed_after_each_step_it_finishes_the_rest() {
    scenario::privileged_within("step-kills", Duration::from_secs(180), |place| {
        let bystander = Bystander::new(place, &place.directory("other"));
        let mut daemon = Daemon::start(place, &Settings { term_timeout: "60ms", ..Settings::default() });
        let mut boundaries = 0;
        for stack in 0..STACKS.len() {
            for step in 1.. {
                let mut leak = Leak::start(&daemon, place, &format!("claim-{stack}-{step}"), stack);
                fs::write(place.path("hostlerd.log"), "").or_fail("emptying the log");
                leak.kill_owner();
                let done = |log: &str| log.lines().filter(|line| line.ends_with(": done")).count();
                let begun = Instant::now();
                let reached = loop {
                    let log = daemon.log();
                    if done(&log) >= step {
                        break true;
                    }
                    if log.contains("nothing is left") {
                        break false;
                    }
                    assert!(begun.elapsed() < SOON, "{log}");
                };
                daemon.kill();
                daemon.start_again();
                daemon.wait_until_idle(SOON);
                assert_eq!(leak.left(), Vec::<String>::new(), "step {step} of {stack}\n{}", daemon.log());
                bystander.assert_untouched();
                boundaries += usize::from(reached);
                if !reached {
                    break;
                }
            }
        }
        println!("killed after each of {boundaries} steps of {} stacks: nothing was left", STACKS.len());
        assert!(boundaries >= 3 * STACKS.len(), "{boundaries}");
    });
}

/// A kernel call that fails.
struct Fault {
    name: &'static str,
    call: i64,
    /// Only with this as its second argument.
    request: Option<u64>,
}

const fn fault(name: &'static str, call: i64) -> Fault {
    Fault { name, call, request: None }
}

const fn ioctl(name: &'static str, request: u64) -> Fault {
    Fault { name, call: nix::libc::SYS_ioctl, request: Some(request) }
}

/// What a reclaim asks of the kernel.
const FAULTS: [Fault; 19] = [
    fault("umount2", nix::libc::SYS_umount2),
    ioctl("LOOP_CLR_FD", 0x4C01),
    ioctl("LOOP_GET_STATUS64", 0x4C05),
    ioctl("BLKGETDISKSEQ", 0x8008_1280),
    fault("pidfd_open", nix::libc::SYS_pidfd_open),
    fault("pidfd_send_signal", nix::libc::SYS_pidfd_send_signal),
    fault("open_by_handle_at", nix::libc::SYS_open_by_handle_at),
    fault("openat2", nix::libc::SYS_openat2),
    fault("statmount", 457),
    fault("listmount", 458),
    fault("statx", nix::libc::SYS_statx),
    fault("readlink", nix::libc::SYS_readlink),
    fault("readlinkat", nix::libc::SYS_readlinkat),
    fault("getdents64", nix::libc::SYS_getdents64),
    fault("poll", nix::libc::SYS_poll),
    fault("rmdir", nix::libc::SYS_rmdir),
    fault("fchdir", nix::libc::SYS_fchdir),
    fault("fdatasync", nix::libc::SYS_fdatasync),
    fault("setns", nix::libc::SYS_setns),
];

const ERRORS: [(&str, i32); 6] = [
    ("EBUSY", nix::libc::EBUSY),
    ("EIO", nix::libc::EIO),
    ("EINTR", nix::libc::EINTR),
    ("ENOMEM", nix::libc::ENOMEM),
    ("EINVAL", nix::libc::EINVAL),
    ("ENXIO", nix::libc::ENXIO),
];

/// Starts the daemon so that this call fails in it and in all its processes.
fn launch_with(daemon: &mut Daemon<'_>, fault: &Fault, error: i32) {
    let condition = |request| {
        let is_it = SeccompCondition::new(1, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, request);
        SeccompRule::new(vec![is_it.or_fail("a condition")]).or_fail("a rule")
    };
    let rules = BTreeMap::from([(fault.call, fault.request.map(condition).into_iter().collect())]);
    let fails = SeccompAction::Errno(error.cast_unsigned());
    let architecture = std::env::consts::ARCH.try_into().or_fail("an architecture that has filters");
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, fails, architecture).or_fail("a filter");
    let program: BpfProgram = filter.try_into().or_fail("a filter's program");
    // A filter is a thread's, and of what it starts from then on.
    daemon.launch_by(|command| {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                apply_filter(&program).map_err(std::io::Error::other)?;
                command.spawn()
            });
            thread.join().unwrap_or_else(|_| Err(std::io::Error::other("the starting thread failed")))
        })
    });
}

#[test]
fn whatever_call_fails_the_verdict_is_right_and_nothing_else_is_touched() {
    // Each call with one of the errors; with more asked for, with all.
    let all = count("HOSTLER_TESTS_FAULTS", 0) > 0;
    let limit = Duration::from_secs(if all { 3600 } else { 240 });
    scenario::privileged_within("faults", limit, |place| {
        let bystander = Bystander::new(place, &place.directory("other"));
        let settings = Settings { term_timeout: "60ms", ..Settings::default() };
        let mut daemon = Daemon::start(place, &settings);
        let (mut tried, mut complete) = (0, 0);
        for (at, fault) in FAULTS.iter().enumerate() {
            for (number, (name, error)) in ERRORS.iter().enumerate() {
                // That is the kernel's word for a device that is not bound: whoever makes it say so always
                // is believed.
                let is_no_error = fault.name == "LOOP_GET_STATUS64" && *error == nix::libc::ENXIO;
                if is_no_error || !all && number != at % ERRORS.len() {
                    continue;
                }
                let what = format!("{} fails with {name}", fault.name);
                let mut leak = Leak::start(&daemon, place, &format!("{}-{name}", fault.name), at);
                daemon.kill();
                leak.kill_owner();
                fs::write(place.path("hostlerd.log"), "").or_fail("emptying the log");
                launch_with(&mut daemon, fault, *error);
                // It has until it says that it is done, or for a while.
                let begun = Instant::now();
                let log = loop {
                    let log = daemon.log();
                    if log.contains("nothing is left") || begun.elapsed() > Duration::from_millis(1200) {
                        break log;
                    }
                    std::thread::sleep(Duration::from_millis(5));
                };
                // A call that fails is never taken for one that worked.
                if log.contains("nothing is left") {
                    complete += 1;
                    assert_eq!(leak.left(), Vec::<String>::new(), "{what}\n{log}");
                }
                bystander.assert_untouched();
                daemon.kill();
                daemon.start_again();
                daemon.wait_until_idle(SOON);
                assert_eq!(leak.left(), Vec::<String>::new(), "after {what}\n{}", daemon.log());
                bystander.assert_untouched();
                tried += 1;
            }
        }
        println!(
            "{tried} failing calls: {complete} reclaims were whole all the same, all after the next start"
        );
    });
}

/// What a worker asks of the kernel; the daemon itself asks none of it.
const HANGS: [Fault; 8] = [
    fault("umount2", nix::libc::SYS_umount2),
    ioctl("LOOP_CLR_FD", 0x4C01),
    ioctl("LOOP_GET_STATUS64", 0x4C05),
    ioctl("BLKGETDISKSEQ", 0x8008_1280),
    fault("open_by_handle_at", nix::libc::SYS_open_by_handle_at),
    fault("fchdir", nix::libc::SYS_fchdir),
    fault("setns", nix::libc::SYS_setns),
    fault("listmount", 458),
];

/// Starts the daemon so that this call never returns in it and in all its processes, until they are killed.
fn launch_hanging(daemon: &mut Daemon<'_>, fault: &Fault) {
    let log = fs::File::options().append(true).open(daemon.place().path("hostlerd.log"));
    let log = log.or_fail("opening the daemon's log");
    daemon.launch_by(|command| {
        let mut hanging = Command::new("python3");
        hanging.args(["-c", include_str!("hang.py"), &fault.call.to_string()]);
        hanging.arg(fault.request.map_or("any".to_owned(), |request| request.to_string()));
        hanging.arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => hanging.env(name, value),
                None => hanging.env_remove(name),
            };
        }
        hanging.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn()
    });
}

#[test]
fn whatever_call_hangs_the_daemon_answers_and_the_next_one_finishes() {
    let all = count("HOSTLER_TESTS_FAULTS", 0) > 0;
    scenario::privileged_within("hanging-calls", Duration::from_secs(400), |place| {
        let bystander = Bystander::new(place, &place.directory("other"));
        let settings = Settings { term_timeout: "60ms", step_timeout: "1s", ..Settings::default() };
        let mut daemon = Daemon::start(place, &settings);
        let mut told = Vec::new();
        for (at, fault) in HANGS.iter().enumerate().filter(|(at, _)| all || at % 4 == 0) {
            let what = format!("{} hangs", fault.name);
            let mut leak = Leak::start(&daemon, place, fault.name, at);
            daemon.kill();
            leak.kill_owner();
            fs::write(place.path("hostlerd.log"), "").or_fail("emptying the log");
            launch_hanging(&mut daemon, fault);
            // It goes on answering all the while, and calls nothing done that is not.
            let begun = Instant::now();
            while begun.elapsed() < Duration::from_secs(4) {
                let asked = Instant::now();
                let _ = daemon.ask(&["lease", "list"]);
                assert!(
                    asked.elapsed() < Duration::from_secs(12),
                    "{what}: it did not answer\n{}",
                    daemon.log()
                );
            }
            if daemon.log().contains("nothing is left") {
                assert_eq!(leak.left(), Vec::<String>::new(), "{what}\n{}", daemon.log());
            } else {
                assert!(!leak.left().is_empty(), "{what}\n{}", daemon.log());
                told.push(fault.name);
            }
            bystander.assert_untouched();
            daemon.kill();
            daemon.start_again();
            daemon.wait_until_idle(SOON);
            assert_eq!(leak.left(), Vec::<String>::new(), "after {what}\n{}", daemon.log());
            bystander.assert_untouched();
        }
        println!("calls that hung, and kept a lease from its end until the next start: {told:?}");
        assert!(told.contains(&"umount2"), "{told:?}");
    });
}

fn resident_kilobytes(pid: u32) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).or_fail("the daemon's status");
    let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).or_fail("its memory");
    line.trim().trim_end_matches(" kB").parse().or_fail("its memory")
}

#[test]
fn many_leases_one_after_the_other_leave_descriptors_and_memory_flat() {
    let leases = count("HOSTLER_TESTS_LEASES", 120);
    scenario::privileged_within("flat", Duration::from_secs(60 + leases as u64 / 4), |place| {
        let daemon = Daemon::start(place, &Settings { leases: 1000, ..Settings::default() });
        let mut client = daemon.client();
        let claim = place.directory("claim");
        let directory = fs::File::open(&claim).or_fail("opening the claim");
        let mut round = |many: usize| {
            for at in 0..many {
                let owner = Sleeper::start(place, false);
                let lease = client.open_lease("flat", &owner);
                client.claim(lease, &directory, false).or_fail("claiming");
                if at % 3 == 0 {
                    // By its death, seen by nobody in particular.
                    drop(owner);
                } else {
                    let close = serde_json::json!({ "lease": lease.lease, "epoch": lease.epoch });
                    client.call("CloseLease", &close, &[]).or_fail("closing");
                }
            }
            daemon.wait_until_idle(SOON);
        };
        round(leases / 4);
        let measure = || (probe::descriptors(daemon.pid()), resident_kilobytes(daemon.pid()));
        let before = measure();
        round(leases);
        let after = measure();
        println!("{leases} leases: {before:?} descriptors and KiB before, {after:?} after");
        assert!(after.0 <= before.0 + 4, "descriptors: {before:?}, {after:?}");
        assert!(after.1 <= before.1 + 4096, "memory: {before:?}, {after:?}");
        let journal = fs::metadata(place.path("state/journal")).or_fail("the journal").len();
        assert!(journal < 6 * 1024 * 1024, "the journal has {journal} bytes");
    });
}

#[test]
fn many_leases_at_once_all_end() {
    let leases = count("HOSTLER_TESTS_AT_ONCE", 60);
    scenario::privileged_within("at-once", Duration::from_secs(90 + leases as u64), |place| {
        let daemon = Daemon::start(place, &Settings { leases: 1000, ..Settings::default() });
        let before = probe::descriptors(daemon.pid());
        let mut client = daemon.client();
        let owners: Vec<Sleeper> = (0..leases).map(|_| Sleeper::start(place, false)).collect();
        for owner in &owners {
            let _ = client.open_lease("at once", owner);
        }
        let open = || daemon.status().leases.iter().filter(|lease| lease.state == LeaseState::Open).count();
        assert_eq!(open(), leases);
        drop(owners);
        daemon.wait_until_idle(Duration::from_secs(60));
        wait_until("as few descriptors as before", SOON, || probe::descriptors(daemon.pid()) <= before + 4);
        assert!(place.lease_groups().is_empty());
    });
}
