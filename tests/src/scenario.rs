//! The frame that every test runs in which makes kernel objects.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::failure::OrFail;
use crate::patience::stretched;
use crate::place::{Mounts, Place};

/// How long a test may take before the whole run is ended.
const LIMIT: Duration = Duration::from_secs(60);

/// The same for one that builds images: under emulation that takes its time.
const BUILD_LIMIT: Duration = Duration::from_secs(300);

/// How mounts of a test's own namespace propagate: `private`, which is what is meant where it is
/// unset, or `shared`, as systemd sets hosts up, where each bind of a mount is its peer.
const PROPAGATION: &str = "HOSTLER_TESTS_PROPAGATION";

/// What `hostler-vm` tells its guest, and puts on the guest's kernel's command line.
const GUEST: &str = "HOSTLER_TESTS_GUEST";

/// The guest, which most tests can share.
static HOST: RwLock<()> = RwLock::new(());

/// Runs a privileged test: as root, in a mount namespace of its own from which nothing propagates,
/// with a deadline, and with a look at the end at what it left.
///
/// # Panics
/// When not run as root, when the test does, or when it left something behind.
pub fn privileged(name: &str, test: impl FnOnce(&Place) + Send) {
    privileged_within(name, LIMIT, test);
}

/// The same for one that is made to take long.
///
/// # Panics
/// As [`privileged`].
pub fn privileged_within(name: &str, limit: Duration, test: impl FnOnce(&Place) + Send) {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this test makes loop devices, mounts or namespaces: run it as root, or leave the whole target out with `make test PRIVILEGED=no`"
    );
    run(name, Mounts::Own, limit, test);
}

/// The same for a test that builds images.
///
/// # Panics
/// As [`privileged`].
pub fn build(name: &str, test: impl FnOnce(&Place) + Send) {
    privileged_within(name, BUILD_LIMIT, test);
}

/// Runs a test that needs a host to itself, among that host's own mounts: only in a machine that
/// `hostler-vm` booted.
///
/// # Panics
/// When run anywhere else, when the test does, or when it left something behind.
pub fn guest(name: &str, test: impl FnOnce(&Place) + Send) {
    assert_is_guest();
    let _shared = HOST.read().unwrap_or_else(PoisonError::into_inner);
    run(name, Mounts::Hosts, LIMIT, test);
}

/// The same, with no other test beside it: for one that changes what the host itself does.
///
/// # Panics
/// As [`guest`].
pub fn guest_alone(name: &str, test: impl FnOnce(&Place) + Send) {
    assert_is_guest();
    let _alone = HOST.write().unwrap_or_else(PoisonError::into_inner);
    run(name, Mounts::Hosts, LIMIT, test);
}

/// The same in a mount namespace of its own, for a test to which mounts do not matter.
///
/// # Panics
/// As [`guest`].
pub fn guest_apart(name: &str, test: impl FnOnce(&Place) + Send) {
    assert_is_guest();
    let _shared = HOST.read().unwrap_or_else(PoisonError::into_inner);
    run(name, Mounts::Own, LIMIT, test);
}

fn assert_is_guest() {
    let mark = std::env::var(GUEST).unwrap_or_default();
    let line = std::fs::read_to_string("/proc/cmdline").or_fail("reading /proc/cmdline");
    let is_guest =
        !mark.is_empty() && line.split_whitespace().any(|word| word == format!("hostler.tests={mark}"));
    assert!(
        is_guest,
        "this test has the host to itself, with its mounts, maps, arrays and nbd devices: it only runs in a virtual machine of its own, with `make test-vm`"
    );
}

fn run(name: &str, mounts: Mounts, limit: Duration, test: impl FnOnce(&Place) + Send) {
    let limit = stretched(limit);
    let (places, placed) = channel();
    let (done, ended) = channel();
    std::thread::scope(|scope| {
        // A namespace is a thread's: the test gets a thread, and what it starts inherits from it.
        let thread = scope.spawn(move || {
            if mounts == Mounts::Own {
                leave_the_hosts_mounts();
            }
            let place = Arc::new(Place::new(name, mounts));
            // Nobody waits for it when the deadline has passed.
            let _ = places.send(Arc::clone(&place));
            test(&place);
            place.assert_clean();
            let _ = done.send(());
        });
        let place = placed.recv().ok();
        match ended.recv_timeout(limit) {
            Ok(()) | Err(RecvTimeoutError::Disconnected) => {}
            Err(RecvTimeoutError::Timeout) => {
                let left = place.as_ref().map(|place| place.left());
                eprintln!("{name} did not end within {limit:?}; what is there: {left:#?}");
                if let Some(place) = place {
                    place.clear();
                }
                // The thread cannot be ended, and waiting for it would hang.
                std::process::abort();
            }
        }
        match thread.join() {
            Ok(()) => {}
            Err(panic) => std::panic::resume_unwind(panic),
        }
    });
}

/// Gives the calling thread a mount namespace of its own, from which nothing gets to the host's.
fn leave_the_hosts_mounts() {
    unshare(CloneFlags::CLONE_NEWNS).or_fail("making a mount namespace");
    let change = |how: MsFlags, what: &str| {
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | how, None::<&str>).or_fail(what);
    };
    change(MsFlags::MS_PRIVATE, "making mounts private");
    match std::env::var(PROPAGATION).as_deref() {
        Err(_) | Ok("private") => {}
        // After they were private: peers of each other in here, and of none outside.
        Ok("shared") => change(MsFlags::MS_SHARED, "making mounts shared"),
        Ok(other) => panic!("{PROPAGATION} is {other:?}; give it private or shared, or leave it unset"),
    }
}
