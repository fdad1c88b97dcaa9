//! The frame that every privileged test runs in.

use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::failure::OrFail;
use crate::place::Place;

/// How long a test may take before the whole run is ended.
const LIMIT: Duration = Duration::from_secs(60);

/// The same for one that builds images: under emulation that takes its time.
const BUILD_LIMIT: Duration = Duration::from_secs(300);

/// Runs a privileged test: as root, in a mount namespace of its own from which nothing propagates,
/// with a deadline, and with a look at the end at what it left.
///
/// # Panics
/// When not run as root, when the test does, or when it left something behind.
pub fn privileged(name: &str, test: impl FnOnce(&Place) + Send) {
    run(name, LIMIT, test);
}

/// The same for one that is made to take long.
///
/// # Panics
/// As [`privileged`].
pub fn privileged_within(name: &str, limit: Duration, test: impl FnOnce(&Place) + Send) {
    run(name, limit, test);
}

/// The same for a test that builds images.
///
/// # Panics
/// As [`privileged`].
pub fn build(name: &str, test: impl FnOnce(&Place) + Send) {
    run(name, BUILD_LIMIT, test);
}

fn run(name: &str, limit: Duration, test: impl FnOnce(&Place) + Send) {
    assert!(
        nix::unistd::geteuid().is_root(),
        "this test makes loop devices, mounts or namespaces: run it as root, or leave the whole target out with `make test PRIVILEGED=no`"
    );
    let (places, placed) = channel();
    let (done, ended) = channel();
    std::thread::scope(|scope| {
        // A namespace is a thread's: the test gets a thread, and what it starts inherits from it.
        let thread = scope.spawn(move || {
            unshare(CloneFlags::CLONE_NEWNS).or_fail("making a mount namespace");
            let all = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
            mount(None::<&str>, "/", None::<&str>, all, None::<&str>).or_fail("making mounts private");
            let place = Arc::new(Place::new(name));
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
