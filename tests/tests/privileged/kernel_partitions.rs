//! Partitions of loop devices that `partx` made.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use hostler_tests::bystander::attach;
use hostler_tests::failure::{OrFail, wait_for, wait_until};
use hostler_tests::place::Place;
use hostler_tests::{probe, program, scenario};
use hostler_watchdog::model::{DiskSequence, LoopState, SnapshotDepth, Step, StepResult};

use crate::worker::{Worker, identity, loop_at};

/// An image with two partitions of 4 MiB in an MBR, which fdisk is not needed for.
fn partitioned(place: &Place) -> PathBuf {
    let path = place.path("partitioned");
    let mut image = vec![0; 512];
    for (place, start) in [(446, 2048_u32), (462, 10240)] {
        image[place + 4] = 0x83;
        image[place + 8..place + 12].copy_from_slice(&start.to_le_bytes());
        image[place + 12..place + 16].copy_from_slice(&8192_u32.to_le_bytes());
    }
    image[510..].copy_from_slice(&[0x55, 0xaa]);
    fs::write(&path, image).or_fail("writing a partition table");
    let file = fs::File::options().write(true).open(&path).or_fail("opening the image");
    file.set_len(10 << 20).or_fail("giving the image its size");
    path
}

/// Partitions that were left on one test's device would be in the way of the next one's.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A loop device with partitions. When the test fails, they go all the same.
struct Disk {
    node: String,
    _turn: MutexGuard<'static, ()>,
}

impl Disk {
    fn new(image: &Path) -> Self {
        // A test that failed has removed its partitions, too.
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        let disk = Self { node: attach(image), _turn: turn };
        program::succeed("partx", ["-a", &disk.node]);
        assert_eq!(disk.partitions(), 2, "what partx made");
        disk
    }

    fn partitions(&self) -> usize {
        let name = self.node.trim_start_matches("/dev/");
        (1..=2).filter(|number| Path::new(&format!("/sys/block/{name}/{name}p{number}")).exists()).count()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        for number in ["1", "2"] {
            // Gone already is as good.
            let _ = std::process::Command::new("delpart").args([&self.node, number]).output();
        }
    }
}

#[test]
fn partitions_go_before_the_device_is_detached() {
    scenario::privileged("partitions", |place| {
        let disk = Disk::new(&partitioned(place));
        let mut worker = Worker::start(place);
        let snapshot = worker.look(SnapshotDepth::Ownership);
        let device = loop_at(&snapshot, &disk.node);
        let numbers: Vec<u32> = device.partitions.iter().map(|partition| partition.number).collect();
        assert_eq!(numbers, [1, 2]);

        // Another attachment's partitions are not touched.
        let mut other = identity(device);
        other.sequence = DiskSequence(other.sequence.0 + 1);
        let step = Step::DetachLoop { identity: other, partitions: numbers.clone() };
        assert_eq!(worker.act(step), StepResult::Replaced);
        assert_eq!(disk.partitions(), 2);

        let step = Step::DetachLoop { identity: identity(device), partitions: numbers };
        assert_eq!(worker.act(step.clone()), StepResult::Done);
        assert_eq!(disk.partitions(), 0);
        // The looks of other tests have the device open for a moment, which puts its end off.
        let is_free = || probe::loops().iter().all(|one| format!("/dev/loop{}", one.number) != disk.node);
        wait_until("the device to be free", Duration::from_secs(3), is_free);
        assert_eq!(worker.act(step), StepResult::Gone);
    });
}

#[test]
fn a_partition_in_use_is_named_and_keeps_the_device_attached() {
    scenario::privileged("busy-partition", |place| {
        let disk = Disk::new(&partitioned(place));
        let point = place.directory("mnt");
        let second = format!("{}p2", disk.node);
        program::succeed("mke2fs", ["-q", "-F", &second]);
        program::succeed("mount", [second.as_ref(), point.as_os_str()]);
        let mut worker = Worker::start(place);
        let snapshot = worker.look(SnapshotDepth::Ownership);
        let step =
            Step::DetachLoop { identity: identity(loop_at(&snapshot, &disk.node)), partitions: vec![1, 2] };
        let result = worker.act(step.clone());
        let StepResult::Failed { cause } = result else { panic!("{result:?}") };
        assert!(cause.starts_with(&format!("removing partition 2 of {}: ", disk.node)), "{cause}");
        let after = worker.look(SnapshotDepth::Ownership);
        assert!(matches!(loop_at(&after, &disk.node).state, LoopState::Bound(_)));

        program::succeed("umount", [&point]);
        assert_eq!(worker.act(step), StepResult::Done);
        assert_eq!(disk.partitions(), 0);
    });
}

#[test]
fn partitions_that_were_left_behind_are_seen() {
    scenario::privileged("leftover", |place| {
        let image = partitioned(place);
        let mut worker = Worker::start(place);
        // Another test may be given the device before the look.
        let (left, _) = wait_for("a device that is not bound again", Duration::from_secs(10), || {
            let disk = Disk::new(&image);
            program::succeed("losetup", ["-d", &disk.node]);
            let snapshot = worker.look(SnapshotDepth::Ownership);
            // Where udev runs, it opens the device, and the kernel looks again and finds none: such a host
            // leaves this test out.
            assert!(disk.partitions() > 0, "the partitions of {} ended with the detach", disk.node);
            let device = loop_at(&snapshot, &disk.node).clone();
            (device.state == LoopState::Leftover).then_some(device)
        });
        assert_eq!((left.partitions.len(), left.backing_text.as_str()), (2, ""));
    });
}
