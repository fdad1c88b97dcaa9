//! The watchdog's readers of mount tables, against the kernel: each way they know gives the same.

use std::collections::{BTreeSet, HashSet};
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::Duration;

use hostler_tests::bystander::attach;
use hostler_tests::failure::{OrFail, wait_until};
use hostler_tests::namespace::{Namespace, keep_by_file};
use hostler_tests::place::Place;
use hostler_tests::{probe, program, scenario};
use hostler_watchdog::kernel::mount_events::{Change, MountEvent, MountEvents};
use hostler_watchdog::kernel::mounts::{self, Wanted};
use hostler_watchdog::kernel::namespaces::{self, Means, Others};
use hostler_watchdog::kernel::visit::Visit;
use hostler_watchdog::model::{DeviceNumber, Gap, Mount, MountNamespace, MountNumber, SnapshotDepth};
use hostler_watchdog::worker;
use nix::mount::{MsFlags, mount};
use nix::sys::epoll::EpollFlags;

use crate::kernel_made::{bind, mount_tmpfs, take_down};

const SOON: Duration = Duration::from_secs(10);

/// A loop device with a file system, and what is to be wanted of it.
fn device(place: &Place) -> (String, Wanted) {
    let node = attach(&place.image("image", 8));
    let number = fs::metadata(&node).or_fail("the node of a loop device").rdev();
    let device = DeviceNumber { major: rustix::fs::major(number), minor: rustix::fs::minor(number) };
    (node, Wanted { devices: HashSet::from([device]) })
}

/// The mounts of one namespace, by where they are.
fn points_of(others: &Others, namespace: u64) -> Vec<String> {
    let of = others.mounts.iter().filter(|mount| mount.identity.namespace == MountNamespace(namespace));
    let mut points: Vec<String> =
        of.map(|mount| String::from_utf8_lossy(&mount.point).into_owned()).collect();
    points.sort();
    points
}

#[test]
fn namespaces_are_found_with_and_without_processes_by_every_means() {
    scenario::privileged("means", |place| {
        let (node, wanted) = device(place);
        let base = place.directory("base");
        // Files of namespaces can be mounted below what is private only.
        mount_tmpfs(&base);
        fs::create_dir(base.join("mnt")).or_fail("fresh");
        let shell = |words: &str| words.replace("NODE", &node).replace("BASE", &base.to_string_lossy());
        // One with a process; one kept by a file that is mounted here; one whose file is mounted in that
        // one only; one of another user.
        let living = Namespace::new(place);
        let made = "mount NODE BASE/mnt && mkdir BASE/mnt/on && mount -t tmpfs none BASE/mnt/on";
        living.run(["sh", "-ec", &shell(made)]);
        let inner =
            shell("mkdir BASE/two; mount NODE BASE/two; stat -L -c %i /proc/self/ns/mnt >BASE/inner-inode");
        let script = format!("mount NODE BASE/mnt; echo >BASE/inner; sh \"$keep\" BASE/inner '{inner}'");
        let kept = keep_by_file(place, &base.join("outer"), &shell(&script));
        let inner: u64 = fs::read_to_string(base.join("inner-inode"))
            .or_fail("the inner namespace")
            .trim()
            .parse()
            .or_fail("its inode");
        let foreign = Namespace::of_another_user(place);

        let (own, own_mounts) = mounts::own().or_fail("reading the own namespace");
        let ours = [living.inode(), kept, inner, foreign.inode()];
        let mut answers = Vec::new();
        for means in [Means::Numbers, Means::Visits, Means::Search] {
            let others = namespaces::others_by(means, &own_mounts, &wanted, &mut |_| true)
                .or_fail("reading namespaces");
            assert!(others.namespaces.iter().all(|one| one.namespace != own), "{means:?}");
            let found = |inode| others.namespaces.iter().find(|one| one.namespace == MountNamespace(inode));
            for inode in ours {
                let found = found(inode).or_fail(format_args!("namespace {inode} by {means:?}"));
                assert!(found.unique.is_some());
                assert_eq!(found.other_user_namespace, inode == foreign.inode(), "{means:?}");
                assert!(others.unreadable.iter().all(|(one, _)| one.0 != inode), "{others:?}");
            }
            let point = |below: &str| base.join(below).to_string_lossy().into_owned();
            assert_eq!(points_of(&others, living.inode()), [point("mnt"), point("mnt/on")], "{means:?}");
            assert_eq!(points_of(&others, kept), [point("inner"), point("mnt")], "{means:?}");
            // It is a copy of the outer one from before its file was mounted.
            assert_eq!(points_of(&others, inner), [point("mnt"), point("two")], "{means:?}");
            let mut mounts: Vec<Mount> =
                others.mounts.into_iter().filter(|one| ours.contains(&one.identity.namespace.0)).collect();
            mounts.sort_by_key(|mount| mount.identity);
            answers.push(mounts);
            assert_eq!(mounts::namespace_of(None).or_fail("the namespace after all visits"), own);
        }
        assert_eq!(answers[0], answers[1]);
        assert_eq!(answers[0], answers[2]);

        // Without their files the kept ones end, whatever was read of them, and free the device.
        drop(living);
        drop(foreign);
        take_down(&base.join("outer"));
        take_down(&base);
        program::succeed("losetup", ["-d", &node]);
        wait_until("the end of all that held the device", SOON, || {
            probe::loops_below(&place.path("image")).is_empty()
        });
    });
}

#[test]
fn the_own_table_is_mountinfos_with_unique_numbers_and_parents_first() {
    scenario::privileged("own", |place| {
        let base = place.directory("base");
        mount_tmpfs(&base);
        for name in ["old", "young", "source", "target", "layers"] {
            fs::create_dir(base.join(name)).or_fail("fresh");
        }
        // An older mount is moved onto a younger one, so its number is smaller than its parent's.
        mount_tmpfs(&base.join("old"));
        mount_tmpfs(&base.join("young"));
        fs::create_dir(base.join("young/moved")).or_fail("fresh");
        let nothing = None::<&str>;
        mount(Some(&base.join("old")), &base.join("young/moved"), nothing, MsFlags::MS_MOVE, nothing)
            .or_fail("moving a mount");
        mount_tmpfs(&base.join("young"));
        // A bound directory that is removed afterwards.
        bind(&base.join("source"), &base.join("target"));
        fs::remove_dir(base.join("source")).or_fail("removing what is bound");
        for name in ["lo wer", "upper", "work"] {
            fs::create_dir(base.join("layers").join(name)).or_fail("fresh");
        }
        let overlay =
            format!("lowerdir={0}/lo wer,upperdir={0}/upper,workdir={0}/work", base.join("layers").display());
        let merged = place.directory("merged");
        mount(Some("a source"), &merged, Some("overlay"), MsFlags::empty(), Some(overlay.as_str()))
            .or_fail("mounting an overlay");

        let (namespace, own) = mounts::own().or_fail("reading the own namespace");
        let seen = probe::mounts();
        let seen_numbers: BTreeSet<u64> = seen.iter().map(|mount| mount.number).collect();
        assert_eq!(own.iter().map(|mount| mount.short_number).collect::<BTreeSet<_>>(), seen_numbers);
        let place_of = |number| own.iter().position(|mount| mount.short_number == number);
        for (index, mount) in own.iter().enumerate() {
            assert_eq!(mount.identity.namespace, namespace);
            let parent = mount.parent.and_then(place_of);
            assert!(parent.is_none_or(|parent| parent < index), "{mount:?} comes before its parent");
        }
        let of = |point: &Path| -> Vec<&Mount> {
            own.iter().filter(|mount| mount.point == point.as_os_str().as_bytes()).collect()
        };
        let young = of(&base.join("young"));
        assert_eq!(young.len(), 2);
        assert_eq!(young[1].parent, Some(young[0].short_number), "the upper one comes later");
        let moved = of(&base.join("young/moved"))[0];
        assert!(moved.identity.number < young[0].identity.number);
        assert_eq!(MountNumber::Unique(probe::mount_number(&base.join("young"))), young[1].identity.number);
        assert_eq!(of(&base.join("target"))[0].root, b"/source//deleted");
        let overlay = of(&merged)[0];
        let layers = String::from_utf8_lossy(&overlay.layers).into_owned();
        assert!(layers.starts_with("rw,lowerdir=") && layers.contains("/lo wer,"), "{layers}");

        // A single look tells the same of each, as far as a path leads to it.
        for mount in &own {
            let MountNumber::Unique(unique) = mount.identity.number else { panic!("{mount:?}") };
            assert_eq!(mounts::one(unique).or_fail("looking at one").as_ref(), Some(mount));
        }
        let MountNumber::Unique(unique) = overlay.identity.number else { panic!("{overlay:?}") };
        take_down(&merged);
        assert_eq!(mounts::one(unique).or_fail("looking at one"), None);
        for point in ["young", "young/moved", "young", "target", ""] {
            take_down(&base.join(point));
        }
    });
}

#[test]
fn names_of_every_kind_are_read_alike_by_every_means() {
    scenario::privileged("names", |place| {
        let base = place.directory("base");
        mount_tmpfs(&base);
        let long = vec![OsString::from("l".repeat(200)); 19];
        let names = [
            OsString::from("with space\ttab\nline\\back#hash"),
            OsString::from_vec(b"\xff\xfe\\040".to_vec()),
            long.join(OsStr::new("/")),
        ];
        for name in &names {
            let point = base.join(name);
            mount_tmpfs(&point);
            assert!(point.as_os_str().len() < 4096);
        }
        let other = Namespace::new(place);
        let (_, own) = mounts::own().or_fail("reading the own namespace");
        let base_device = own.iter().find(|mount| mount.point == base.as_os_str().as_bytes());
        let devices = HashSet::from([base_device.or_fail("the base").device()]);
        let expected: BTreeSet<Vec<u8>> = names
            .iter()
            .map(|name| base.join(name).into_os_string().into_vec())
            .chain([base.clone().into_os_string().into_vec()])
            .collect();
        for means in [Means::Numbers, Means::Visits, Means::Search] {
            let others =
                namespaces::others_by(means, &own, &Wanted { devices: devices.clone() }, &mut |_| true);
            let mounts = others.or_fail("reading namespaces").mounts;
            let of = mounts.into_iter().filter(|one| one.identity.namespace.0 == other.inode());
            assert_eq!(of.map(|mount| mount.point).collect::<BTreeSet<_>>(), expected, "{means:?}");
        }
        for name in names.iter().rev() {
            take_down(&base.join(name));
        }
        take_down(&base);
    });
}

#[test]
fn a_table_tells_whether_it_changed_since_it_was_opened() {
    scenario::privileged("changes", |place| {
        let (one, two) = (place.directory("one"), place.directory("two"));
        let home = Visit::at_home().or_fail("staying");
        let changed_by = |change: &dyn Fn()| {
            let mut table = home.table().or_fail("opening the table");
            let _ = table.read().or_fail("reading the table");
            change();
            table.has_changed().or_fail("polling the table")
        };
        assert!(!changed_by(&|| {}));
        assert!(changed_by(&|| mount_tmpfs(&one)));
        let nothing = None::<&str>;
        assert!(
            changed_by(&|| mount(Some(&one), &two, nothing, MsFlags::MS_MOVE, nothing).or_fail("moving"))
        );
        // What is mounted elsewhere is another table's.
        let other = Namespace::new(place);
        assert!(!changed_by(&|| drop(other.run(["mount", "-t", "tmpfs", "none", "/tmp"]))));
        assert!(changed_by(&|| take_down(&two)));
    });
}

#[test]
fn events_tell_each_mount_that_came_or_went_and_who_did_it() {
    scenario::privileged("events", |place| {
        let (one, two) = (place.directory("one"), place.directory("two"));
        let events = MountEvents::start().or_fail("watching mounts");
        let MountEvents::Told(_) = &events else { panic!("this kernel has mount events: {events:?}") };
        assert_eq!(events.flags(), EpollFlags::EPOLLIN);
        assert!(events.read_events().or_fail("reading events").is_empty());
        mount_tmpfs(&one);
        let number = probe::mount_number(&one);
        let nothing = None::<&str>;
        mount(Some(&one), &two, nothing, MsFlags::MS_MOVE, nothing).or_fail("moving");
        take_down(&two);
        // Not of this namespace.
        let other = Namespace::new(place);
        other.run(["mount", "-t", "tmpfs", "none", "/tmp"]);

        let told: Vec<(u64, Change, u32, bool)> = events
            .read_events()
            .or_fail("reading events")
            .into_iter()
            .map(|event| match event {
                MountEvent::One { number, change, pid, process } => (number, change, pid, process.is_some()),
                MountEvent::Any => panic!("nothing was lost"),
            })
            .collect();
        let own = std::process::id();
        let expected =
            [Change::Attached, Change::Moved, Change::Detached].map(|change| (number, change, own, true));
        assert_eq!(told, expected);

        let noticed = MountEvents::start_noticing().or_fail("opening mountinfo");
        assert_eq!(noticed.flags(), EpollFlags::EPOLLPRI);
        let read = noticed.read_events().or_fail("nothing can fail");
        assert!(matches!(read.as_slice(), [MountEvent::Any]));
    });
}

#[test]
fn a_watch_of_mounts_does_not_keep_the_namespace() {
    scenario::privileged("watch", |place| {
        let (node, _) = device(place);
        let other = Namespace::new(place);
        let point = place.directory("mnt");
        other.run(["mount".as_ref(), node.as_ref(), point.as_os_str()]);
        let file = fs::File::open(format!("/proc/{}/ns/mnt", other.pid())).or_fail("the namespace");
        let watch = MountEvents::of(&file).or_fail("watching its mounts");
        drop(file);
        // The kernel frees it at the last close, as soon as nothing mounts it any more.
        program::succeed("losetup", ["-d", &node]);
        drop(other);
        wait_until("the end of the namespace and its device", SOON, || {
            probe::loops_below(&place.path("image")).is_empty()
        });
        drop(watch);
    });
}

#[test]
fn a_device_that_somebody_else_gets_during_a_look_is_nobodys_evidence() {
    scenario::privileged("recheck", |place| {
        // What happened: a lease's loop device was freed right after a look had read it, another builder
        // got it and mounted it, and that mount was taken for the lease's, and unmounted.
        let node = attach(&place.image("image", 8));
        let kept = attach(&place.image("kept", 8));
        let (theirs, point) = (place.image("theirs", 8), place.directory("mnt"));
        let number = |node: &str| -> u32 {
            node.trim_start_matches("/dev/loop").parse().or_fail("a loop device's number")
        };
        let other = Namespace::new(place);
        let mut is_done = false;
        let snapshot = worker::look_while(SnapshotDepth::Ownership, &mut |_, what| {
            if what == "mounts" && !std::mem::replace(&mut is_done, true) {
                program::succeed("losetup", ["-d", &node]);
                program::succeed("losetup", [node.as_ref(), theirs.as_os_str()]);
                other.run(["mount".as_ref(), node.as_ref(), point.as_os_str()]);
            }
        });
        assert!(is_done);
        let device = |node| snapshot.loops.iter().find(|device| device.number == number(node));
        let given = device(&node).or_fail("the device");
        assert!(snapshot.mounts.iter().any(|mount| mount.device() == given.device), "it was seen mounted");
        assert_eq!(given.identity(), None);
        let is_gap = |gap: &Gap| matches!(gap, Gap::Loop(which, _) if *which == number(&node));
        assert!(snapshot.gaps.iter().any(is_gap), "{:?}", snapshot.gaps);
        // The bystander's device stayed as it was, and is known.
        assert!(device(&kept).or_fail("the other device").identity().is_some());
        drop(other);
        for node in [node, kept] {
            program::succeed("losetup", ["-d", &node]);
        }
    });
}
