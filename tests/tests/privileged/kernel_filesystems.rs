//! File systems that live on although nothing shows a mount of them.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hostler_tests::bystander::attach;
use hostler_tests::failure::{OrFail, wait_until};
use hostler_tests::place::Place;
use hostler_tests::{probe, program, scenario};
use hostler_watchdog::model::{
    DeviceNumber, DiskSequence, Filesystem, ResourceIdentity, Snapshot, SnapshotDepth, Step, StepResult,
};

use crate::kernel_seen::{resource, shown_at};
use crate::worker::{Worker, identity, loop_at};
use hostler_watchdog::worker::{NumberQuery, Query};

/// For how long the looks of other tests, each of which has every loop device open for a moment, may
/// put off the end of something.
const OTHERS: Duration = Duration::from_secs(3);

/// An image of a type, made by the type's own tool.
fn image(place: &Place, name: &str, mebibytes: u64, make: &[&str]) -> PathBuf {
    let path = place.path(name);
    let file = fs::File::create(&path).or_fail("making an image");
    file.set_len(mebibytes << 20).or_fail("giving the image its size");
    let arguments = make[1..].iter().map(std::ffi::OsStr::new);
    program::succeed(make[0], arguments.chain([path.as_os_str()]));
    path
}

/// A loop device with a file system mounted. When the test fails it is thawed and goes all the same.
struct Mounted {
    kind: &'static str,
    node: String,
    point: PathBuf,
}

impl Mounted {
    fn new(place: &Place, kind: &'static str, image: &Path, options: &str) -> Self {
        let point = place.directory(format!("mnt-{kind}"));
        let mounted = Self { kind, node: attach(image), point };
        mounted.mount(options);
        mounted
    }

    fn mount(&self, options: &str) {
        let point = self.point.as_os_str();
        program::succeed(
            "mount",
            ["-t".as_ref(), self.kind.as_ref(), "-o".as_ref(), options.as_ref(), self.node.as_ref(), point],
        );
    }

    fn freeze(&self) {
        program::succeed("fsfreeze", ["-f".as_ref(), self.point.as_os_str()]);
    }

    fn unmount(&self) {
        program::succeed("umount", [&self.point]);
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let run = |program: &str, arguments: &[&std::ffi::OsStr]| {
            let _ = std::process::Command::new(program).args(arguments).output();
        };
        let (node, point) = (self.node.as_ref(), self.point.as_os_str());
        let is_mine = probe::loops().iter().any(|device| format!("/dev/loop{}", device.number) == self.node);
        if is_mine && std::thread::panicking() {
            for options in ["rw", "ro"] {
                run(
                    "mount",
                    &["-t".as_ref(), self.kind.as_ref(), "-o".as_ref(), options.as_ref(), node, point],
                );
            }
            run("fsfreeze", &["-u".as_ref(), point]);
            run("umount", &[point]);
        }
    }
}

#[track_caller]
fn living(snapshot: &Snapshot, device: DeviceNumber) -> Option<&Filesystem> {
    snapshot.filesystems.iter().find(|one| one.blocks.contains(&device))
}

fn release(worker: &mut Worker, mounted: &Mounted) -> (DeviceNumber, StepResult) {
    let snapshot = worker.look(SnapshotDepth::Ownership);
    let device = loop_at(&snapshot, &mounted.node);
    let kind = living(&snapshot, device.device).or_fail("the file system").kind.clone();
    let step = Step::ReleaseFilesystem {
        kind,
        device: device.device,
        resource: resource(device),
        swap_files: Vec::new(),
    };
    (device.device, worker.act(step))
}

#[track_caller]
fn detach(worker: &mut Worker, mounted: &Mounted) {
    let snapshot = worker.look(SnapshotDepth::Ownership);
    let step =
        Step::DetachLoop { identity: identity(loop_at(&snapshot, &mounted.node)), partitions: Vec::new() };
    assert_eq!(worker.act(step), StepResult::Done);
    let is_it = |device: &probe::LoopSeen| format!("/dev/loop{}", device.number) == mounted.node;
    wait_until(format_args!("{} to be free", mounted.node), OTHERS, || !probe::loops().iter().any(is_it));
}

/// Waits until nothing lives on a device any more.
#[track_caller]
fn wait_for_its_end(worker: &mut Worker, device: DeviceNumber) {
    let what = format_args!("the end of the file system on {device}");
    wait_until(what, OTHERS, || living(&worker.look(SnapshotDepth::Ownership), device).is_none());
}

#[test]
fn a_frozen_ext4_is_seen_and_freed_also_when_it_is_unmounted() {
    scenario::privileged("frozen", |place| {
        let image = image(place, "image", 16, &["mke2fs", "-q", "-F", "-t", "ext4"]);
        let mounted = Mounted::new(place, "ext4", &image, "rw");
        let mut worker = Worker::start(place);
        let mut frozen = || {
            let snapshot = worker.look(SnapshotDepth::Ownership);
            let device = loop_at(&snapshot, &mounted.node).device;
            living(&snapshot, device).or_fail("the file system").frozen
        };
        assert_eq!(frozen(), Some(false));
        mounted.freeze();
        assert_eq!(frozen(), Some(true));
        program::succeed("fsfreeze", ["-u".as_ref(), mounted.point.as_os_str()]);
        assert_eq!(frozen(), Some(false));
        mounted.freeze();
        mounted.unmount();
        assert_eq!(frozen(), Some(true));
        assert_eq!(probe::mounts_below(&mounted.point), []);

        let (device, result) = release(&mut worker, &mounted);
        assert_eq!(result, StepResult::Done);
        wait_for_its_end(&mut worker, device);
        assert_eq!(probe::mounts_below(&mounted.point), []);
        detach(&mut worker, &mounted);
        program::succeed("e2fsck", ["-f".as_ref(), "-n".as_ref(), image.as_os_str()]);
    });
}

#[test]
fn what_tells_no_freeze_is_not_taken_for_thawed() {
    scenario::privileged("no-mark", |place| {
        let without_journal = place.image("without", 8);
        let with = image(place, "with", 16, &["mke2fs", "-q", "-F", "-t", "ext4"]);
        let one = Mounted::new(place, "ext4", &without_journal, "rw");
        let other = Mounted { kind: "ext4", node: attach(&with), point: place.directory("other") };
        other.mount("ro");
        let mut worker = Worker::start(place);
        let snapshot = worker.look(SnapshotDepth::Ownership);
        for mounted in [&one, &other] {
            let device = loop_at(&snapshot, &mounted.node).device;
            assert_eq!(living(&snapshot, device).or_fail("the file system").frozen, None);
            mounted.unmount();
            program::succeed("losetup", ["-d", &mounted.node]);
        }
    });
}

fn thawed_however_it_was_mounted(kind: &'static str, mebibytes: u64, make: &[&str]) {
    scenario::privileged(&format!("thawed-{kind}"), |place| {
        let mut worker = Worker::start(place);
        let image = image(place, kind, mebibytes, make);
        for options in ["rw", "ro"] {
            let mounted = Mounted::new(place, kind, &image, options);
            mounted.freeze();
            mounted.unmount();
            let (device, result) = release(&mut worker, &mounted);
            assert_eq!(result, StepResult::Done, "{kind} {options}");
            wait_for_its_end(&mut worker, device);
            detach(&mut worker, &mounted);
        }
    });
}

#[test]
fn ext2_is_thawed_however_it_was_mounted() {
    thawed_however_it_was_mounted("ext2", 16, &["mke2fs", "-q", "-F", "-t", "ext2"]);
}

#[test]
fn ext3_is_thawed_however_it_was_mounted() {
    thawed_however_it_was_mounted("ext3", 16, &["mke2fs", "-q", "-F", "-t", "ext3"]);
}

#[test]
fn ext4_is_thawed_however_it_was_mounted() {
    thawed_however_it_was_mounted("ext4", 16, &["mke2fs", "-q", "-F", "-t", "ext4"]);
}

#[test]
fn xfs_is_thawed_however_it_was_mounted() {
    thawed_however_it_was_mounted("xfs", 320, &["mkfs.xfs", "-q", "-f"]);
}

#[test]
fn btrfs_is_thawed_however_it_was_mounted() {
    thawed_however_it_was_mounted("btrfs", 128, &["mkfs.btrfs", "-q", "-f"]);
}

#[test]
fn only_what_lives_and_is_stuck_is_released() {
    scenario::privileged("not-stuck", |place| {
        let image = image(place, "image", 16, &["mke2fs", "-q", "-F", "-t", "ext4"]);
        let mounted = Mounted::new(place, "ext4", &image, "rw");
        let mut worker = Worker::start(place);
        let (device, result) = release(&mut worker, &mounted);
        let cause = "it is neither frozen nor swapped to, so something else holds it".to_owned();
        assert_eq!(result, StepResult::Failed { cause });

        // Of another attachment nothing is thawed.
        mounted.freeze();
        let snapshot = worker.look(SnapshotDepth::Ownership);
        let own = loop_at(&snapshot, &mounted.node);
        let mut other = identity(own);
        other.sequence = DiskSequence(other.sequence.0 - 1);
        let step = |resource, device| Step::ReleaseFilesystem {
            kind: "ext4".to_owned(),
            device,
            resource: Box::new(ResourceIdentity::Loop(resource)),
            swap_files: Vec::new(),
        };
        assert_eq!(worker.act(step(other, device)), StepResult::Replaced);
        // A device that is no part of the resource is not what was meant.
        let beside = DeviceNumber { minor: device.minor + 1, ..device };
        assert_eq!(worker.act(step(identity(own), beside)), StepResult::Replaced);
        let after = worker.look(SnapshotDepth::Ownership);
        assert_eq!(living(&after, device).or_fail("the file system").frozen, Some(true));
        program::succeed("fsfreeze", ["-u".as_ref(), mounted.point.as_os_str()]);

        // What does not live is not mounted to find that out.
        mounted.unmount();
        program::succeed("sync", [&image]);
        let before = fs::read(&image).or_fail("the image");
        assert_eq!(worker.act(step(identity(own), device)), StepResult::Gone);
        assert!(fs::read(&image).or_fail("the image") == before, "the image was written to");
        detach(&mut worker, &mounted);
    });
}

#[test]
fn a_frozen_file_system_on_a_partition_is_released() {
    scenario::privileged("frozen-partition", |place| {
        let whole = place.path("disk");
        fs::File::create(&whole).and_then(|file| file.set_len(17 << 20)).or_fail("making a disk");
        let node = attach(&whole);
        program::succeed("addpart", [&node, "1", "2048", "32768"]);
        let partition = format!("{node}p1");
        program::succeed("mke2fs", ["-q", "-F", "-t", "ext4", &partition]);
        let mounted = Mounted { kind: "ext4", node: partition, point: place.directory("mnt") };
        mounted.mount("rw");
        mounted.freeze();
        mounted.unmount();

        let mut worker = Worker::start(place);
        let snapshot = worker.look(SnapshotDepth::Ownership);
        let disk = loop_at(&snapshot, &node);
        let device = disk.partitions[0].device;
        assert_eq!(living(&snapshot, device).or_fail("the file system").frozen, Some(true));
        let step = Step::ReleaseFilesystem {
            kind: "ext4".to_owned(),
            device,
            resource: resource(disk),
            swap_files: Vec::new(),
        };
        assert_eq!(worker.act(step), StepResult::Done);
        let step = Step::DetachLoop { identity: identity(disk), partitions: vec![1] };
        assert_eq!(worker.act(step), StepResult::Done);
    });
}

#[test]
fn a_btrfs_is_shown_by_the_number_of_its_mounts() {
    scenario::privileged("btrfs", |place| {
        let images: Vec<PathBuf> = ["one", "two"]
            .map(|name| {
                let path = place.path(name);
                fs::File::create(&path).and_then(|file| file.set_len(128 << 20)).or_fail("making an image");
                path
            })
            .into();
        let second = attach(&images[1]);
        let point = place.directory("mnt-btrfs");
        let first = attach(&images[0]);
        program::succeed("mkfs.btrfs", ["-q", "-f", "-d", "single", "-m", "single", &first, &second]);
        program::succeed("mount", [first.as_ref(), point.as_os_str()]);
        program::succeed("btrfs", ["subvolume".as_ref(), "create".as_ref(), point.join("sub").as_os_str()]);
        let below = place.directory("sub");
        let options: [&std::ffi::OsStr; 2] = ["-o".as_ref(), "subvol=sub".as_ref()];
        program::succeed("mount", options.into_iter().chain([first.as_ref(), below.as_os_str()]));

        let mut worker = Worker::start(place);
        let number = shown_at(&point);
        assert_eq!(shown_at(&below), number);
        // Nobody asks for it, so it is not mounted again.
        let (snapshot, touched) = worker.look_without(SnapshotDepth::Holders, &[]);
        let device = |node: &str| loop_at(&snapshot, node).device;
        let mut blocks = vec![device(&first), device(&second)];
        blocks.sort_unstable();
        let found = living(&snapshot, blocks[0]).or_fail("the file system").clone();
        assert_eq!((found.kind.as_str(), &found.blocks, &found.shown_as), ("btrfs", &blocks, &Vec::new()));
        let what = format!("the number of the btrfs on {}", blocks[0]);
        assert!(!touched.contains(&what), "{touched:?}");

        let mut seen = |instance, known, is_touched| {
            let numbers = vec![NumberQuery { instance, number: known }];
            let query = Query { numbers, ..Query::host(SnapshotDepth::Ownership) };
            let (snapshot, touched) = worker.look_for(query, &[]);
            assert_eq!(touched.contains(&what), is_touched, "{touched:?}");
            let found = living(&snapshot, blocks[0]).or_fail("the file system");
            (found.instance, found.shown_as.clone())
        };
        assert_eq!(seen(found.instance, None, true), (found.instance, vec![number]));
        assert_eq!(seen(found.instance, Some(number), false), (found.instance, vec![number]));
        // A later one of the same devices is another, and what was known of this one is not of that.
        for point in [&below, &point] {
            program::succeed("umount", [point]);
        }
        let only_reading: [&std::ffi::OsStr; 2] = ["-o".as_ref(), "ro".as_ref()];
        program::succeed("mount", only_reading.into_iter().chain([first.as_ref(), point.as_os_str()]));
        let (later, shown) = seen(found.instance, Some(number), false);
        assert!(later != found.instance && shown.is_empty(), "{later} {shown:?}");
        // It was mounted for reading only, and stays so when its number is found out.
        let is_for_reading = || {
            let table = fs::read_to_string("/proc/thread-self/mountinfo").or_fail("reading the mounts");
            let line = table.lines().find(|line| line.contains(point.to_str().or_fail("text")));
            line.or_fail("its mount").contains(&format!(" - btrfs {first} ro,"))
        };
        assert!(is_for_reading());
        assert_eq!(seen(later, None, true), (later, vec![shown_at(&point)]));
        assert!(is_for_reading());
        // Also when nothing of it is mounted where the daemon looks: a file that is open holds it.
        let number = shown_at(&point);
        let held = fs::File::open(point.join(".")).or_fail("opening a directory");
        nix::mount::umount2(&point, nix::mount::MntFlags::MNT_DETACH).or_fail("unmounting lazily");
        assert_eq!(seen(later, None, true), (later, vec![number]));
        drop(held);
        let device = loop_at(&worker.look(SnapshotDepth::Ownership), &first).device;
        wait_for_its_end(&mut worker, device);
        for node in [&first, &second] {
            program::succeed("losetup", ["-d", node]);
        }
    });
}
