//! FUSE connections whose server does not answer.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hostler_tests::failure::{OrFail, wait_until};
use hostler_tests::place::Place;
use hostler_tests::scenario;
use hostler_watchdog::model::{MountIdentity, MountNumber, Snapshot, SnapshotDepth, Step, StepResult};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::kernel_seen::shown_at;
use crate::worker::Worker;

const SOON: Duration = Duration::from_secs(5);

/// A mount whose server, this test, never reads a request.
struct Deaf {
    point: PathBuf,
    _server: File,
}

impl Deaf {
    fn new(place: &Place, name: &str) -> Self {
        let point = place.directory(name);
        let server = File::options().read(true).write(true).open("/dev/fuse").or_fail("opening /dev/fuse");
        let data = format!("fd={},rootmode=40000,user_id=0,group_id=0", server.as_raw_fd());
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some("deaf"), &point, Some("fuse.deaf"), flags, Some(data.as_str())).or_fail("mounting");
        Self { point, _server: server }
    }
}

impl Drop for Deaf {
    fn drop(&mut self) {
        // Whoever waits is freed when the server's descriptor is closed, right after this.
        let _ = umount2(&self.point, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW);
    }
}

#[track_caller]
fn mount_at(snapshot: &Snapshot, point: &Path) -> MountIdentity {
    let is_it = |mount: &&hostler_watchdog::model::Mount| {
        mount.point == point.as_os_str().as_encoded_bytes()
            && Some(mount.identity.namespace) == snapshot.namespace
    };
    snapshot.mounts.iter().find(is_it).or_fail("the mount in the snapshot").identity
}

fn waiting(snapshot: &Snapshot, point: &Path) -> Option<u64> {
    let device = shown_at(point);
    snapshot.fuse.iter().find(|one| one.device == device).map(|one| one.waiting)
}

#[test]
fn who_waits_for_a_server_that_does_not_answer_is_freed_by_an_abort() {
    scenario::privileged("fuse", |place| {
        let stuck = Deaf::new(place, "stuck");
        let beside = Deaf::new(place, "beside");
        let waiter = |point: &Path| {
            let path = point.join("file");
            std::thread::spawn(move || fs::metadata(path).map(|_| ()).map_err(|error| error.raw_os_error()))
        };
        let (of_stuck, of_beside) = (waiter(&stuck.point), waiter(&beside.point));
        let mut worker = Worker::start(place);
        wait_until("two that wait", SOON, || {
            let snapshot = worker.look(SnapshotDepth::Ownership);
            // Besides the first request of the kernel itself.
            [&stuck, &beside].iter().all(|one| waiting(&snapshot, &one.point) >= Some(2))
        });
        let snapshot = worker.look(SnapshotDepth::Holders);

        // A mount that was there and is not any more has no connection to abort.
        let mount = mount_at(&snapshot, &stuck.point);
        let number = match mount.number {
            MountNumber::Unique(number) => MountNumber::Unique(number + 1_000_000),
            MountNumber::Reusable(number) => MountNumber::Reusable(number + 1_000_000),
        };
        let gone = MountIdentity { number, ..mount };
        assert_eq!(worker.act(Step::AbortFuse { mount: gone }), StepResult::Gone);
        assert!(!of_stuck.is_finished());

        assert_eq!(worker.act(Step::AbortFuse { mount }), StepResult::Done);
        wait_until("the waiter's end", SOON, || of_stuck.is_finished());
        assert_eq!(of_stuck.join().or_fail_join(), Err(Some(nix::errno::Errno::ENOTCONN as i32)));
        assert!(!of_beside.is_finished(), "the other connection was touched");
        let after = worker.look(SnapshotDepth::Ownership);
        assert!(waiting(&after, &beside.point) >= Some(2));

        let mount = mount_at(&after, &beside.point);
        assert_eq!(worker.act(Step::AbortFuse { mount }), StepResult::Done);
        let _ = of_beside.join().or_fail_join();
        drop(stuck);
        assert_eq!(
            worker.act(Step::AbortFuse { mount: mount_at(&snapshot, &place.path("stuck")) }),
            StepResult::Gone
        );
    });
}

/// A thread's panic is the test's.
trait Joined<T> {
    fn or_fail_join(self) -> T;
}

impl<T> Joined<T> for std::thread::Result<T> {
    fn or_fail_join(self) -> T {
        self.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}
