//! The watchdog's unmounting of exactly one mount, wherever it is and whatever hides it.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use hostler_tests::bystander::{Bystander, attach};
use hostler_tests::failure::{OrFail, wait_until};
use hostler_tests::namespace::{Namespace, keep_by_file};
use hostler_tests::place::kill;
use hostler_tests::{probe, program, scenario};
use hostler_watchdog::kernel::mounts;
use hostler_watchdog::kernel::unmount::Unmounted;
use hostler_watchdog::model::UnmountHow;
use nix::mount::{MsFlags, mount};

use crate::kernel_made::{
    bind, in_namespace, mount_tmpfs, other_at, own_at, take_down, unmount_how, unmount_plainly,
};

const SOON: Duration = Duration::from_secs(10);

#[test]
fn unmounts_in_the_namespace_of_a_process_and_nowhere_else() {
    scenario::privileged("there", |place| {
        let point = place.directory("mnt");
        mount_tmpfs(&point);
        let (one, bystander) = (Namespace::new(place), Namespace::new(place));
        let own = probe::mount_number(&point);
        let target = in_namespace(&one, &point);
        let theirs = in_namespace(&bystander, &point);
        // It may have no procfs, and others may stand where it is to be done.
        one.run(["umount", "--lazy", "/proc"]);
        assert_eq!(unmount_plainly(&target), Unmounted::Done);
        assert!(probe::mount_number(&point) == own);
        assert_eq!(in_namespace(&bystander, &point), theirs);
        assert_eq!(unmount_plainly(&target), Unmounted::Gone);
        drop(one);
        assert_eq!(unmount_plainly(&target), Unmounted::Gone);
        drop(bystander);
        take_down(&point);
    });
}

#[test]
fn unmounts_in_a_namespace_that_only_a_file_keeps() {
    scenario::privileged("kept", |place| {
        let base = place.directory("base");
        mount_tmpfs(&base);
        let point = base.join("mnt");
        mount_tmpfs(&point);
        let device = own_at(&point)[0].device();
        let [one, bystander] = ["one", "other"].map(|name| keep_by_file(place, &base.join(name), "true"));
        let at = |inode| other_at(inode, &[device], &point).pop().or_fail("the copy");
        let (target, theirs) = (at(one), at(bystander));
        assert_eq!(unmount_plainly(&target), Unmounted::Done);
        assert_eq!(unmount_plainly(&target), Unmounted::Gone);
        assert_eq!(at(bystander), theirs);
        take_down(&point);
        take_down(&base.join("one"));
        take_down(&base.join("other"));
        assert_eq!(unmount_plainly(&theirs), Unmounted::Gone);
        take_down(&base);
    });
}

#[test]
fn a_mount_that_a_user_namespace_locks_is_said_to_be_locked() {
    scenario::privileged("locked", |place| {
        let point = place.directory("mnt");
        mount_tmpfs(&point);
        let other = Namespace::of_another_user(place);
        let target = in_namespace(&other, &point);
        assert_eq!(unmount_plainly(&target), Unmounted::Locked);
        assert_eq!(unmount_how(&target, UnmountHow::Lazy).or_fail("asking"), Unmounted::Locked);
        assert_eq!(in_namespace(&other, &point), target);
        // What was mounted in there is not locked.
        other.run(["mount".as_ref(), "-t".as_ref(), "tmpfs".as_ref(), "none".as_ref(), point.as_os_str()]);
        let theirs = in_namespace(&other, &point);
        assert_eq!(unmount_plainly(&target), Unmounted::OtherOnTop);
        assert_eq!(unmount_plainly(&theirs), Unmounted::Done);
        assert_eq!(in_namespace(&other, &point), target);
        drop(other);
        take_down(&point);
    });
}

#[test]
fn a_busy_mount_fails_and_goes_lazily_but_never_from_below_another() {
    scenario::privileged("busy", |place| {
        let (point, other) = (place.directory("mnt"), place.directory("other"));
        for point in [&point, &other] {
            mount_tmpfs(point);
        }
        let mut visitors = [&point, &other].map(|point| {
            let mut sleep = place.command("sleep");
            sleep.arg("600").current_dir(point).stdin(Stdio::null()).spawn().or_fail("starting a visitor")
        });
        let target = own_at(&point).remove(0);
        let busy = unmount_how(&target, UnmountHow::Plain);
        assert_eq!(busy.map_err(|error| error.kind()), Err(ErrorKind::ResourceBusy));
        // A bystander's mount on it: MNT_DETACH would take that one.
        mount_tmpfs(&point);
        assert_eq!(unmount_how(&target, UnmountHow::Lazy).or_fail("asking"), Unmounted::OtherOnTop);
        assert_eq!(unmount_plainly(&target), Unmounted::OtherOnTop);
        assert_eq!(own_at(&point).len(), 2);
        take_down(&point);
        assert_eq!(unmount_how(&target, UnmountHow::Lazy).or_fail("unmounting lazily"), Unmounted::Done);
        assert!(probe::mounts().iter().all(|mount| mount.point != point));
        assert_eq!(own_at(&other).len(), 1);
        for visitor in &mut visitors {
            kill(visitor.id());
            visitor.wait().or_fail("waiting for a visitor");
        }
        take_down(&other);
    });
}

#[test]
fn a_frozen_file_system_is_thawed_first_and_frees_its_device() {
    scenario::privileged("frozen", |place| {
        let point = place.directory("mnt");
        let node = attach(&place.image("image", 8));
        program::succeed("mount", [node.as_ref(), point.as_os_str()]);
        let frozen = place.directory("frozen");
        let other = attach(&place.image("other", 8));
        program::succeed("mount", [other.as_ref(), frozen.as_os_str()]);
        for point in [&point, &frozen] {
            program::succeed("fsfreeze", ["--freeze".as_ref(), point.as_os_str()]);
        }
        let target = own_at(&point).remove(0);
        assert_eq!(unmount_how(&target, UnmountHow::Thawed).or_fail("unmounting"), Unmounted::Done);
        program::succeed("losetup", ["-d", &node]);
        wait_until("the end of the loop device", SOON, || {
            probe::loops_below(&place.path("image")).is_empty()
        });
        // The bystander's is frozen still: another freeze says so.
        let again = program::finish(std::process::Command::new("fsfreeze").arg("--freeze").arg(&frozen));
        assert_ne!(again.status, 0, "it was thawed");
        program::succeed("fsfreeze", ["--unfreeze".as_ref(), frozen.as_os_str()]);
        // One that is not frozen goes the same way.
        let target = own_at(&frozen).remove(0);
        assert_eq!(unmount_how(&target, UnmountHow::Thawed).or_fail("unmounting"), Unmounted::Done);
        program::succeed("losetup", ["-d", &other]);
    });
}

/// A mount that is hidden by a bystander's, which was mounted over a directory of its path.
fn hide(base: &Path) -> (hostler_watchdog::model::Mount, u64) {
    let inner = base.join("dir/deep/mnt");
    mount_tmpfs(&inner);
    mount_tmpfs(&base.join("dir/deep/other"));
    let target = own_at(&inner).remove(0);
    mount_tmpfs(&base.join("dir"));
    // The bystander has the same names.
    mount_tmpfs(&inner);
    (target, probe::mount_number(&inner))
}

#[test]
fn a_mount_hidden_by_a_bystanders_is_reached_below_it() {
    scenario::privileged("hidden", |place| {
        let base = place.directory("base");
        mount_tmpfs(&base);
        let (target, bystander) = hide(&base);
        let over = probe::mount_number(&base.join("dir"));
        let beside = own_at(&base.join("dir/deep/other"));
        let other = Namespace::new(place);
        let there = other_at(other.inode(), &[target.device()], &base.join("dir/deep/mnt"));
        assert_eq!(there.len(), 1);
        assert_eq!(unmount_plainly(&there[0]), Unmounted::Done);
        assert_eq!(own_at(&base.join("dir/deep/mnt")).len(), 2);
        assert_eq!(other.mounts_below(&base).len(), 4);
        drop(other);

        assert_eq!(unmount_plainly(&target), Unmounted::Done);
        assert_eq!(unmount_plainly(&target), Unmounted::Gone);
        assert_eq!(probe::mount_number(&base.join("dir")), over);
        assert_eq!(probe::mount_number(&base.join("dir/deep/mnt")), bystander);
        assert_eq!(own_at(&base.join("dir/deep/other")), beside);
        for below in ["dir/deep/mnt", "dir", "dir/deep/other", ""] {
            take_down(&base.join(below));
        }
    });
}

#[test]
fn a_mount_hidden_twice_is_reached_too() {
    scenario::privileged("twice", |place| {
        let base = place.directory("base");
        mount_tmpfs(&base);
        // One on the root of a mount that is itself hidden; and both hidden in the end.
        let middle = base.join("one/middle");
        mount_tmpfs(&middle);
        let inner = middle.join("two/mnt");
        mount_tmpfs(&inner);
        let target = own_at(&inner).remove(0);
        mount_tmpfs(&middle.join("two"));
        mount_tmpfs(&base.join("one"));
        let numbers = || [base.join("one"), base.clone()].map(|point| probe::mount_number(&point));
        let before = numbers();
        assert_eq!(unmount_plainly(&target), Unmounted::Done);
        assert_eq!(numbers(), before);
        assert_eq!(probe::mounts_below(&base).len(), 4);
        for below in ["one", "one/middle/two", "one/middle", ""] {
            take_down(&base.join(below));
        }
    });
}

#[test]
fn what_no_way_leads_to_is_left() {
    scenario::privileged("out-of-reach", |place| {
        // Its parent is covered as a whole.
        let base = place.directory("base");
        mount_tmpfs(&base);
        mount_tmpfs(&base.join("mnt"));
        let target = own_at(&base.join("mnt")).remove(0);
        mount_tmpfs(&base);
        assert_eq!(unmount_plainly(&target), Unmounted::OtherOnTop);
        assert_eq!(own_at(&base.join("mnt")), [target]);
        assert_eq!(own_at(&base).len(), 2);
        take_down(&base);
        take_down(&base.join("mnt"));

        // It is hidden on a file system without file handles.
        for name in ["lower", "upper", "work", "merged"] {
            fs::create_dir(base.join(name)).or_fail("fresh");
        }
        let layers = format!("lowerdir={0}/lower,upperdir={0}/upper,workdir={0}/work", base.display());
        let merged = base.join("merged");
        mount(Some("none"), &merged, Some("overlay"), MsFlags::empty(), Some(layers.as_str()))
            .or_fail("mounting an overlay");
        let (target, bystander) = hide(&merged);
        assert_eq!(unmount_plainly(&target), Unmounted::OtherOnTop);
        assert_eq!(own_at(&merged.join("dir/deep/mnt"))[0], target);
        assert_eq!(probe::mount_number(&merged.join("dir/deep/mnt")), bystander);
        for below in ["dir/deep/mnt", "dir", "dir/deep/mnt", "dir/deep/other", ""] {
            take_down(&merged.join(below));
        }
        take_down(&base);
    });
}

#[test]
fn mount_points_of_every_name_and_length_are_unmounted() {
    scenario::privileged("points", |place| {
        let base = place.directory("base");
        mount_tmpfs(&base);
        let long = vec![OsString::from("l".repeat(200)); 19].join(OsStr::new("/"));
        let names = [
            OsString::from("with space\ttab\nline\\back#hash\\040"),
            OsString::from_vec(b"-\xff\xfe".to_vec()),
            long.clone(),
        ];
        for name in &names {
            let point = base.join(name);
            mount_tmpfs(&point);
            // A bystander of nearly that name.
            let mut near = point.clone().into_os_string();
            near.push("+");
            mount_tmpfs(Path::new(&near));
        }
        for name in &names {
            let target = own_at(&base.join(name)).remove(0);
            assert_eq!(unmount_plainly(&target), Unmounted::Done);
        }
        assert_eq!(probe::mounts_below(&base).len(), 1 + names.len());

        // Longer than any path that can be named at once: whoever goes there step by step can mount there.
        let go = |path: &Path| std::env::set_current_dir(path).or_fail("going step by step");
        go(&base.join(&long));
        for _ in 0..4 {
            let step = vec![OsString::from("l".repeat(200)); 5].join(OsStr::new("/"));
            fs::create_dir_all(&step).or_fail("making a step");
            go(Path::new(&step));
        }
        for name in ["mnt", "mnt+"] {
            fs::create_dir(name).or_fail("fresh");
            mount(Some("far"), name, Some("tmpfs"), MsFlags::empty(), None::<&str>)
                .or_fail("mounting far away");
        }
        go(Path::new("/"));
        let (_, all) = mounts::own().or_fail("reading the own namespace");
        let far: Vec<_> = all.into_iter().filter(|mount| mount.source == b"far").collect();
        let lengths: Vec<usize> = far.iter().map(|mount| mount.point.len()).collect();
        assert!(lengths.len() == 2 && lengths.iter().all(|length| *length > 7_000), "{lengths:?}");
        assert_eq!(unmount_plainly(&far[0]), Unmounted::Done);
        let (_, all) = mounts::own().or_fail("reading the own namespace");
        assert_eq!(all.iter().filter(|mount| mount.source == b"far").collect::<Vec<_>>(), [&far[1]]);
        assert_eq!(unmount_plainly(&far[1]), Unmounted::Done);
        for mount in probe::mounts_below(&base).iter().rev() {
            take_down(&mount.point);
        }
    });
}

#[test]
fn a_bind_whose_directory_was_removed_and_a_bound_file_are_unmounted() {
    scenario::privileged("bound", |place| {
        let names = ["source", "target", "other", "file", "on", "beside"];
        let [source, target, other, file, on, beside] = names.map(|name| place.path(name));
        for directory in [&source, &target, &other] {
            fs::create_dir(directory).or_fail("fresh");
        }
        for file in [&file, &on, &beside] {
            fs::write(file, "").or_fail("fresh");
        }
        bind(&source, &target);
        bind(&source, &other);
        bind(&file, &on);
        bind(&file, &beside);
        fs::remove_dir(&source).or_fail("removing what is bound");
        let removed = own_at(&target).remove(0);
        assert!(removed.root.ends_with(b"/source//deleted"));
        for how in [UnmountHow::Plain, UnmountHow::Thawed] {
            let point = if how == UnmountHow::Plain { &target } else { &on };
            let mount = own_at(point).remove(0);
            assert_eq!(unmount_how(&mount, how).or_fail("unmounting"), Unmounted::Done);
        }
        assert_eq!((own_at(&other).len(), own_at(&beside).len()), (1, 1));
        take_down(&other);
        take_down(&beside);
    });
}

#[test]
fn a_link_at_the_recorded_path_leads_nowhere() {
    scenario::privileged("link", |place| {
        let bystander = Bystander::new(place, &place.directory("other"));
        let point = place.directory("dir/mnt");
        mount_tmpfs(&point);
        let target = own_at(&point).remove(0);
        // Its directory is moved away, and a link is put in its place.
        fs::rename(place.path("dir"), place.path("moved")).or_fail("renaming");
        let beside = bystander.point().parent().or_fail("the bystander's directory");
        std::os::unix::fs::symlink(beside, place.path("dir")).or_fail("planting a link");
        fs::rename(beside.join("bystander"), beside.join("mnt")).expect_err("a mount point is not renamed");
        // It is found where it is now.
        assert_eq!(unmount_plainly(&target), Unmounted::Done);
        bystander.assert_untouched();
    });
}

#[test]
fn a_file_system_that_never_answers_hangs_neither_reading_nor_unmounting() {
    scenario::privileged("mute", |place| {
        let (point, other) = (place.directory("mnt"), place.directory("other"));
        // A FUSE server that does not even answer the first request.
        let server =
            fs::OpenOptions::new().read(true).write(true).open("/dev/fuse").or_fail("opening /dev/fuse");
        let options = format!("fd={},rootmode=40000,user_id=0,group_id=0", server.as_raw_fd());
        mount(Some("mute"), &point, Some("fuse.mute"), MsFlags::empty(), Some(options.as_str()))
            .or_fail("mounting a FUSE file system");
        bind(&point, &other);
        let namespace = Namespace::new(place);
        let there = in_namespace(&namespace, &point);
        assert_eq!(there.filesystem, "fuse.mute");
        assert_eq!(unmount_plainly(&there), Unmounted::Done);
        let target = own_at(&point).remove(0);
        assert_eq!(unmount_how(&target, UnmountHow::Lazy).or_fail("unmounting lazily"), Unmounted::Done);
        assert_eq!(own_at(&other).len(), 1);
        drop(namespace);
        let target = own_at(&other).remove(0);
        assert_eq!(unmount_plainly(&target), Unmounted::Done);
    });
}
