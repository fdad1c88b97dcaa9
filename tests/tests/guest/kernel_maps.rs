//! Maps and arrays on loop devices: found, and removed by a worker as the daemon has it done.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hostler_tests::bystander::attach;
use hostler_tests::failure::{OrFail, wait_until};
use hostler_tests::place::Place;
use hostler_tests::{probe, program, scenario};
use hostler_watchdog::model::{
    DeviceNumber, DiskSequence, Map, MapIdentity, MapKind, ResourceIdentity, Snapshot, SnapshotDepth, Step,
    StepResult, SwapIdentity,
};

use crate::worker::{Worker, identity, loop_at};

/// What udev does at every change has to have ended, or a device is open for a moment.
fn settle() {
    program::succeed("udevadm", ["settle"]);
}

fn disk(place: &Place, name: &str, mebibytes: u64) -> String {
    let path = place.path(name);
    fs::File::create(&path).and_then(|file| file.set_len(mebibytes << 20)).or_fail("making a disk");
    attach(&path)
}

/// A map that dmsetup makes, of all of a device.
fn linear(name: &str, node: &str) -> PathBuf {
    let sectors = program::succeed("blockdev", ["--getsz", node]);
    let table = format!("0 {} linear {node} 0", sectors.trim());
    program::succeed("dmsetup", ["create", name, "--table", &table]);
    settle();
    Path::new("/dev/mapper").join(name)
}

#[track_caller]
fn map_named<'a>(snapshot: &'a Snapshot, name: &str) -> &'a Map {
    let found = snapshot.maps.iter().find(|map| map.name == name);
    found.or_fail(format_args!("{name} among {:?}, {:?}", snapshot.maps, snapshot.gaps))
}

fn remove(map: &Map) -> Step {
    Step::RemoveMap { map: map.identity, name: map.name.clone() }
}

/// Removes a map by the worker, and sees that it is gone.
#[track_caller]
fn remove_and_see(worker: &mut Worker, name: &str) {
    let snapshot = worker.look(SnapshotDepth::Ownership);
    let map = map_named(&snapshot, name);
    assert_eq!(worker.act(remove(map)), StepResult::Done, "{map:?}");
    let after = worker.look(SnapshotDepth::Ownership);
    assert!(after.maps.iter().all(|other| other.identity != map.identity), "{:?}", after.maps);
    // Whoever opens the node of an array that is stopped makes an empty one of that number.
    let again = worker.act(remove(map));
    assert!(matches!(again, StepResult::Gone | StepResult::Replaced), "{again:?}");
    settle();
}

#[track_caller]
fn detach_and_see(worker: &mut Worker, node: &str) {
    let snapshot = worker.look(SnapshotDepth::Ownership);
    let device = loop_at(&snapshot, node);
    let partitions = device.partitions.iter().map(|partition| partition.number).collect();
    let step = Step::DetachLoop { identity: identity(device), partitions };
    assert_eq!(worker.act(step), StepResult::Done);
    let is_free = || probe::loops().iter().all(|one| format!("/dev/loop{}", one.number) != node);
    wait_until(format_args!("{node} to be free"), Duration::from_secs(5), is_free);
}

#[test]
fn a_map_is_removed_when_it_is_that_map_and_nobody_has_it_open() {
    scenario::guest_apart("linear", |place| {
        let node = disk(place, "disk", 32);
        let map_node = linear("hostler-linear", &node);
        program::succeed("mke2fs", ["-q".as_ref(), "-F".as_ref(), map_node.as_os_str()]);
        let point = place.directory("mnt");
        program::succeed("mount", [&map_node, &point]);
        settle();
        let mut worker = Worker::start(place);
        let snapshot = worker.look(SnapshotDepth::Ownership);
        let map = map_named(&snapshot, "hostler-linear");
        assert_eq!(map.identity.kind, MapKind::DeviceMapper);
        assert_eq!(map.lower, [loop_at(&snapshot, &node).device]);
        assert!(snapshot.filesystems.iter().any(|one| one.blocks == [map.identity.device]));

        let result = worker.act(remove(map));
        let StepResult::Failed { cause } = result else { panic!("{result:?}") };
        assert!(cause.contains("busy"), "{cause}");
        let sequence = DiskSequence(map.identity.sequence.0 + 1);
        let other = MapIdentity { sequence, ..map.identity };
        let step = Step::RemoveMap { map: other, name: map.name.clone() };
        assert_eq!(worker.act(step), StepResult::Replaced);
        assert_eq!(map_named(&worker.look(SnapshotDepth::Ownership), "hostler-linear"), map);

        program::succeed("umount", [&point]);
        remove_and_see(&mut worker, "hostler-linear");
        // A map that has its name now, and its number unless another test was faster, is another one.
        linear("hostler-linear", &node);
        let result = worker.act(remove(map));
        assert!(matches!(result, StepResult::Replaced | StepResult::Gone), "{result:?}");
        remove_and_see(&mut worker, "hostler-linear");
        detach_and_see(&mut worker, &node);
    });
}

#[test]
fn a_frozen_file_system_on_a_map_is_released() {
    scenario::guest_apart("frozen-map", |place| {
        let node = disk(place, "disk", 64);
        let map_node = linear("hostler-frozen", &node);
        let make = ["-q", "-F", "-t", "ext4", "-b", "4096"].map(OsStr::new);
        program::succeed("mke2fs", make.into_iter().chain([map_node.as_os_str()]));
        let point = place.directory("mnt");
        program::succeed("mount", [&map_node, &point]);
        let mut worker = Worker::start(place);
        let frozen = |snapshot: &Snapshot, device: DeviceNumber| {
            let found = snapshot.filesystems.iter().find(|one| one.blocks == [device]);
            found.or_fail("the file system").frozen
        };
        let snapshot = worker.look(SnapshotDepth::Ownership);
        let map = map_named(&snapshot, "hostler-frozen").identity;
        assert_eq!(frozen(&snapshot, map.device), Some(false));
        program::succeed("fsfreeze", ["-f".as_ref(), point.as_os_str()]);
        program::succeed("umount", [&point]);
        settle();
        assert_eq!(frozen(&worker.look(SnapshotDepth::Ownership), map.device), Some(true));

        let step = |map| Step::ReleaseFilesystem {
            kind: "ext4".to_owned(),
            device: map_named(&snapshot, "hostler-frozen").identity.device,
            resource: Box::new(ResourceIdentity::Map(map)),
            swap_files: Vec::new(),
        };
        let other = MapIdentity { sequence: DiskSequence(map.sequence.0 + 1), ..map };
        assert_eq!(worker.act(step(other)), StepResult::Replaced);
        assert_eq!(worker.act(step(map)), StepResult::Done);
        let after = worker.look(SnapshotDepth::Ownership);
        assert!(after.filesystems.iter().all(|one| one.blocks != [map.device]));
        remove_and_see(&mut worker, "hostler-frozen");
        detach_and_see(&mut worker, &node);
    });
}

#[test]
fn logical_volumes_are_removed_and_swapped_to_no_more() {
    scenario::guest_apart("lvm", |place| {
        let node = disk(place, "disk", 128);
        program::succeed("pvcreate", ["-q", &node]);
        program::succeed("vgcreate", ["-q", "hostlervg", &node]);
        program::succeed("lvcreate", ["-q", "-y", "-n", "root", "-L", "32M", "hostlervg"]);
        program::succeed("lvcreate", ["-q", "-y", "-n", "swap", "-L", "32M", "hostlervg"]);
        program::succeed("mkswap", ["/dev/hostlervg/swap"]);
        program::succeed("swapon", ["/dev/hostlervg/swap"]);
        settle();
        let mut worker = Worker::start(place);
        let snapshot = worker.look(SnapshotDepth::Ownership);
        let device = map_named(&snapshot, "hostlervg-swap").identity.device;
        assert!(map_named(&snapshot, "hostlervg-root").uuid.starts_with("LVM-"));
        let is_it = |swap: &&hostler_watchdog::model::Swap| swap.identity == SwapIdentity::Device(device);
        let swap = snapshot.swaps.iter().find(is_it).or_fail("the swap area");
        let step = Step::SwapOff { swap: swap.identity, path: swap.path.clone(), on: None };
        assert_eq!(worker.act(step), StepResult::Done);
        assert!(worker.look(SnapshotDepth::Ownership).swaps.iter().find(is_it).is_none());
        remove_and_see(&mut worker, "hostlervg-swap");
        remove_and_see(&mut worker, "hostlervg-root");
        detach_and_see(&mut worker, &node);
    });
}

#[test]
fn an_encrypted_device_and_what_is_on_it_are_removed_from_the_top() {
    scenario::guest_apart("luks", |place| {
        let node = disk(place, "disk", 64);
        let key = place.path("key");
        fs::write(&key, "not a secret").or_fail("writing a key");
        let key = key.to_str().or_fail("a path that is text");
        let format =
            ["luksFormat", "-q", "--type", "luks2", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
        program::succeed("cryptsetup", format.into_iter().chain([&*node, key]));
        program::succeed("cryptsetup", ["open", "--key-file", key, &node, "hostler-luks"]);
        settle();
        linear("hostler-above", "/dev/mapper/hostler-luks");
        let mut worker = Worker::start(place);
        let snapshot = worker.look(SnapshotDepth::Ownership);
        let (below, above) = (map_named(&snapshot, "hostler-luks"), map_named(&snapshot, "hostler-above"));
        assert!(below.uuid.starts_with("CRYPT-LUKS2-"), "{below:?}");
        assert_eq!(above.lower, [below.identity.device]);
        assert!(matches!(worker.act(remove(below)), StepResult::Failed { .. }));
        remove_and_see(&mut worker, "hostler-above");
        remove_and_see(&mut worker, "hostler-luks");
        detach_and_see(&mut worker, &node);
    });
}

#[test]
fn partitions_as_maps_are_removed() {
    scenario::guest_apart("kpartx", |place| {
        let node = disk(place, "disk", 32);
        let table = "label: dos\n,8M\n,8M\n";
        let mut sfdisk = place.command("sh");
        sfdisk.arg("-c").arg(format!("printf '{table}' | sfdisk -q --no-reread --no-tell-kernel {node}"));
        assert_eq!(program::finish(&mut sfdisk).status, 0);
        program::succeed("kpartx", ["-a", "-s", &node]);
        settle();
        let mut worker = Worker::start(place);
        for number in ["p1", "p2"] {
            let name = format!("{}{number}", node.trim_start_matches("/dev/"));
            remove_and_see(&mut worker, &name);
        }
        detach_and_see(&mut worker, &node);
    });
}

#[test]
fn an_array_is_stopped_when_it_is_that_array_and_nobody_has_it_open() {
    scenario::guest_apart("raid", |place| {
        let disks = [disk(place, "one", 64), disk(place, "two", 64)];
        let make = ["--create", "/dev/md77", "--run", "--level=1", "--metadata=1.2", "--raid-devices=2"];
        program::succeed("mdadm", make.into_iter().chain(disks.iter().map(String::as_str)));
        settle();
        program::succeed("mke2fs", ["-q", "-F", "/dev/md77"]);
        let point = place.directory("mnt");
        program::succeed("mount", ["/dev/md77".as_ref(), point.as_os_str()]);
        settle();
        let mut worker = Worker::start(place);
        let snapshot = worker.look(SnapshotDepth::Ownership);
        let array = map_named(&snapshot, "md77");
        assert_eq!(array.identity.kind, MapKind::Array);
        let mut lower: Vec<_> = disks.iter().map(|node| loop_at(&snapshot, node).device).collect();
        lower.sort_unstable();
        assert_eq!(array.lower, lower);

        let result = worker.act(remove(array));
        let StepResult::Failed { cause } = result else { panic!("{result:?}") };
        assert!(cause.contains("busy"), "{cause}");
        let sequence = DiskSequence(array.identity.sequence.0 + 1);
        let step =
            Step::RemoveMap { map: MapIdentity { sequence, ..array.identity }, name: array.name.clone() };
        assert_eq!(worker.act(step), StepResult::Replaced);
        program::succeed("umount", [&point]);
        remove_and_see(&mut worker, "md77");

        // Assembled again it is another one.
        let assemble = ["--assemble", "/dev/md77"];
        program::succeed("mdadm", assemble.into_iter().chain(disks.iter().map(String::as_str)));
        settle();
        assert_eq!(worker.act(remove(array)), StepResult::Replaced);
        remove_and_see(&mut worker, "md77");

        // One that cannot run holds its disk all the same.
        program::succeed("mdadm", ["--incremental", &disks[0]]);
        settle();
        let snapshot = worker.look(SnapshotDepth::Ownership);
        let lower = [loop_at(&snapshot, &disks[0]).device];
        let inactive = snapshot.maps.iter().find(|map| map.lower == lower).or_fail("an inactive array");
        let name = inactive.name.clone();
        remove_and_see(&mut worker, &name);
        for node in &disks {
            detach_and_see(&mut worker, node);
        }
    });
}
