//! Swap areas: on a loop device, in a file, and in a file that no path leads to any more.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use hostler_tests::bystander::attach;
use hostler_tests::failure::{OrFail, wait_until};
use hostler_tests::{probe, program, scenario};
use hostler_watchdog::model::{
    BackingFile, DeviceNumber, DiskSequence, Gap, LoopIdentity, ResourceIdentity, Snapshot, SnapshotDepth,
    Step, StepResult, Swap, SwapIdentity,
};
use nix::mount::{MntFlags, umount2};

use crate::kernel_seen::{resource, shown_at};
use crate::worker::{Worker, identity, loop_at};

/// A swap area of 8 MiB. It ends when this is dropped.
struct Area {
    path: PathBuf,
}

impl Area {
    fn new(path: &Path) -> Self {
        if !path.starts_with("/dev") {
            // swapon takes no file with holes.
            fs::write(path, vec![0; 8 << 20]).or_fail("writing a swap file");
            fs::set_permissions(path, fs::Permissions::from_mode(0o600)).or_fail("setting its mode");
        }
        program::succeed("mkswap", [path]);
        program::succeed("swapon", [path]);
        Self { path: path.to_owned() }
    }
}

impl Drop for Area {
    fn drop(&mut self) {
        // Off already is as good.
        let _ = std::process::Command::new("swapoff").arg(&self.path).output();
    }
}

fn area(snapshot: &Snapshot, is_it: impl Fn(SwapIdentity) -> bool) -> Option<&Swap> {
    snapshot.swaps.iter().find(|swap| is_it(swap.identity))
}

#[test]
fn an_area_on_a_loop_device_is_found_and_ended() {
    scenario::privileged("swap-device", |place| {
        let image = place.path("image");
        fs::File::create(&image).and_then(|file| file.set_len(8 << 20)).or_fail("making an image");
        let node = attach(&image);
        let _area = Area::new(Path::new(&node));
        let mut worker = Worker::start(place);
        let snapshot = worker.look(SnapshotDepth::Ownership);
        let device = loop_at(&snapshot, &node).device;
        let swap = area(&snapshot, |swap| swap == SwapIdentity::Device(device)).or_fail("the area");
        assert_eq!(swap.path, node.as_bytes());

        // The path alone does not do.
        let other = SwapIdentity::Device(DeviceNumber { minor: device.minor + 1, ..device });
        let step = Step::SwapOff { swap: other, path: swap.path.clone(), on: None };
        assert_eq!(worker.act(step), StepResult::Gone);
        let still = worker.look(SnapshotDepth::Ownership);
        assert_eq!(area(&still, |swap| swap == SwapIdentity::Device(device)), Some(swap));

        // Nor does the number of a device that is bound to something else by now.
        let ResourceIdentity::Loop(now) = *resource(loop_at(&snapshot, &node)) else {
            panic!("a loop device")
        };
        let before = LoopIdentity { sequence: DiskSequence(now.sequence.0 - 1), ..now };
        let step = |on| {
            let on = Some(Box::new(ResourceIdentity::Loop(on)));
            Step::SwapOff { swap: swap.identity, path: swap.path.clone(), on }
        };
        assert_eq!(worker.act(step(before)), StepResult::Replaced);
        let still = worker.look(SnapshotDepth::Ownership);
        assert_eq!(area(&still, |swap| swap == SwapIdentity::Device(device)), Some(swap));

        let step = step(now);
        assert_eq!(worker.act(step.clone()), StepResult::Done);
        let after = worker.look(SnapshotDepth::Ownership);
        assert_eq!(area(&after, |swap| swap == SwapIdentity::Device(device)), None);
        assert_eq!(worker.act(step), StepResult::Gone);
        program::succeed("losetup", ["-d", &node]);
    });
}

#[test]
fn an_area_in_a_file_is_found_by_what_the_file_is() {
    scenario::privileged("swap-file", |place| {
        let node = attach(&place.image("image", 32));
        let point = place.directory("mnt");
        program::succeed("mount", [node.as_ref(), point.as_os_str()]);
        let file = point.join("a swap\tfile");
        let _area = Area::new(&file);
        let mut worker = Worker::start(place);
        let snapshot = worker.look(SnapshotDepth::Ownership);
        let inode = fs::metadata(&file).or_fail("the file").ino();
        let wanted = SwapIdentity::File(BackingFile { device: shown_at(&point), inode });
        let swap = area(&snapshot, |swap| swap == wanted).or_fail("the area");

        // What hung at an earlier look is not looked up again, and said to be unknown.
        let touched = worker.look_without(SnapshotDepth::Ownership, &[]).1;
        let name = place.path("mnt/a swap");
        let name = name.to_str().or_fail("a path that is text");
        let what = touched.iter().find(|what| what.starts_with(&format!("swap area {name}")));
        let what = what.or_fail(format_args!("{name} among {touched:?}")).clone();
        let (without, touched) = worker.look_without(SnapshotDepth::Ownership, std::slice::from_ref(&what));
        assert!(!touched.contains(&what), "{touched:?}");
        assert!(without.gaps.iter().any(|gap| matches!(gap, Gap::Blocks(cause) if cause.starts_with(&what))));
        let unknown = without.swaps.iter().find(|other| other.path == swap.path).or_fail("the area");
        assert!(matches!(unknown.identity, SwapIdentity::Unreachable(_)), "{unknown:?}");

        let step = Step::SwapOff { swap: wanted, path: swap.path.clone(), on: None };
        assert_eq!(worker.act(step), StepResult::Done);
        let after = worker.look(SnapshotDepth::Ownership);
        assert_eq!(area(&after, |swap| swap == wanted), None);
        program::succeed("umount", [&point]);
        program::succeed("losetup", ["-d", &node]);
    });
}

#[test]
fn an_area_that_no_path_leads_to_ends_with_its_file_system() {
    scenario::privileged("swap-detached", |place| {
        let node = attach(&place.image("image", 32));
        let point = place.directory("mnt");
        program::succeed("mount", [node.as_ref(), point.as_os_str()]);
        fs::create_dir(point.join("deep")).or_fail("making a directory");
        // A name that the host has nothing of: the kernel shows it from the root of the mount.
        let name = format!("deep/hostler-tests-{}", std::process::id());
        let area_there = Area::new(&point.join(&name));
        umount2(&point, MntFlags::MNT_DETACH).or_fail("unmounting lazily");

        let mut worker = Worker::start(place);
        let snapshot = worker.look(SnapshotDepth::Ownership);
        let path = format!("/{name}").into_bytes();
        let swap = snapshot.swaps.iter().find(|swap| swap.path == path).or_fail("the area");
        assert!(matches!(swap.identity, SwapIdentity::Unreachable(_)), "{swap:?}");
        let step = Step::SwapOff { swap: swap.identity, path: path.clone(), on: None };
        assert!(matches!(worker.act(step), StepResult::Failed { .. }));

        let device = loop_at(&snapshot, &node);
        let living = snapshot.filesystems.iter().find(|one| one.blocks == [device.device]);
        assert_eq!(living.or_fail("the file system").kind, "ext4");
        let step = Step::ReleaseFilesystem {
            kind: "ext4".to_owned(),
            device: device.device,
            resource: resource(device),
            // As it was seen when it was still mounted, too.
            swap_files: vec![point.join(&name).into_os_string().into_encoded_bytes(), path],
        };
        let mounts = probe::mounts();
        assert_eq!(worker.act(step), StepResult::Done);
        assert_eq!(probe::mounts(), mounts);
        // The looks of other tests have the device open for a moment.
        wait_until("the end of the file system", Duration::from_secs(15), || {
            let after = worker.look(SnapshotDepth::Ownership);
            after.filesystems.iter().all(|one| one.blocks != [device.device])
        });
        let step = Step::DetachLoop { identity: identity(device), partitions: Vec::new() };
        assert_eq!(worker.act(step), StepResult::Done);
        let is_free = || probe::loops().iter().all(|one| format!("/dev/loop{}", one.number) != node);
        wait_until("the device to be free", Duration::from_secs(15), is_free);
        drop(area_there);
    });
}
