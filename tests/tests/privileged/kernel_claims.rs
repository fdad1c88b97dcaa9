//! What the watchdog finds below a claimed directory, and how it opens one again.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use hostler_tests::bystander::attach;
use hostler_tests::failure::OrFail;
use hostler_tests::{probe, program, scenario};
use hostler_watchdog::kernel::claimed::MountPoints;
use hostler_watchdog::kernel::{calls, directories, mounts};
use hostler_watchdog::model::{Claim, Mount, MountNumber};
use nix::mount::{MsFlags, mount};

use crate::kernel_made::{bind, mount_tmpfs, take_down};

fn open(path: &Path) -> OwnedFd {
    fs::File::open(path).or_fail(format_args!("opening {}", path.display())).into()
}

fn claim(directory: &OwnedFd) -> Claim {
    Claim {
        directory: directories::identity(directory).or_fail("the directory's identity"),
        scratch: false,
        path: String::new(),
        handle: Some(calls::file_handle(directory).or_fail("the directory's handle")),
        mount: Some(directories::mount_of(directory).or_fail("the directory's mount")),
    }
}

/// The numbers of the mounts found below a directory, the oldest first.
fn below(directory: &OwnedFd) -> Vec<u64> {
    let (own, mounts) = mounts::own().or_fail("reading the own namespace");
    let found = MountPoints::new(&mounts, Some(own)).below(directory).or_fail("looking below a claim");
    let mut numbers: Vec<u64> = found
        .into_iter()
        .map(|identity| match identity.number {
            MountNumber::Unique(number) | MountNumber::Reusable(number) => number,
        })
        .collect();
    numbers.sort_unstable();
    numbers
}

fn reopen(claim: &Claim) -> std::io::Result<OwnedFd> {
    let (_, mounts) = mounts::own().or_fail("reading the own namespace");
    directories::reopen(claim, &mounts.iter().collect::<Vec<&Mount>>())
}

#[test]
fn mounts_below_a_claim_and_right_on_it_are_found_and_none_beside() {
    scenario::privileged("below", |place| {
        let claimed = place.directory("claimed");
        let directory = open(&claimed);
        let mut expected = Vec::new();
        let mut mount_there = |point: &Path| {
            mount_tmpfs(point);
            expected.push(probe::mount_number(point));
        };
        mount_there(&claimed.join("a"));
        mount_there(&claimed.join("a/deep/er"));
        // Stacked.
        mount_there(&claimed.join("b c\nd"));
        mount_there(&claimed.join("b c\nd"));
        // A bystander beside it, and one that has the name of something below it.
        mount_tmpfs(&place.path("claimed-not"));
        assert_eq!(below(&directory), expected);

        // Right on it, twice; what is on those has no way from the directory, and is found by what it is on.
        let mut mount_there = |point: &Path| {
            mount_tmpfs(point);
            expected.push(probe::mount_number(point));
        };
        mount_there(&claimed);
        mount_there(&claimed);
        mount_tmpfs(&claimed.join("a"));
        assert_eq!(below(&directory), expected);

        // All hidden with the directory that they are in, but not from the directory: only whatever is right
        // on it is, as ".." leads onto what hides it.
        let above = claimed.parent().or_fail("the place");
        mount_tmpfs(above);
        mount_tmpfs(&claimed);
        mount_tmpfs(&claimed.join("a"));
        expected.truncate(4);
        assert_eq!(below(&directory), expected);
        for point in ["a", "", "..", "a", "", "", "b c\nd", "b c\nd", "a/deep/er", "a"] {
            take_down(&if point == ".." { above.to_owned() } else { claimed.join(point) });
        }
        take_down(&place.path("claimed-not"));
    });
}

#[test]
fn a_mount_that_is_claimed_as_a_whole_is_not_on_itself() {
    scenario::privileged("root", |place| {
        let claimed = place.directory("claimed");
        mount_tmpfs(&claimed);
        mount_tmpfs(&claimed);
        let directory = open(&claimed);
        assert_eq!(below(&directory), Vec::<u64>::new());
        mount_tmpfs(&claimed.join("in"));
        let inside = probe::mount_number(&claimed.join("in"));
        mount_tmpfs(&claimed);
        assert_eq!(below(&directory), [inside, probe::mount_number(&claimed)]);
        take_down(&claimed);
        take_down(&claimed.join("in"));
        drop(directory);
        take_down(&claimed);
        take_down(&claimed);
    });
}

#[test]
fn a_claim_is_opened_again_on_the_mount_that_it_was_made_on() {
    scenario::privileged("reopen", |place| {
        let base = place.directory("base");
        mount_tmpfs(&base);
        for name in ["dir/claimed", "first", "hidden"] {
            fs::create_dir_all(base.join(name)).or_fail("fresh");
        }
        // Binds of the same file system, one older and one younger than what is claimed on.
        bind(&base.join("dir"), &base.join("first"));
        let (one, two) = (place.directory("one"), place.directory("two"));
        bind(&base, &one);
        bind(&base, &two);
        let claimed = one.join("dir/claimed");
        let directory = open(&claimed);
        let claim = claim(&directory);
        drop(directory);
        mount_tmpfs(&claimed.join("mnt"));
        let number = probe::mount_number(&claimed.join("mnt"));
        let opened = reopen(&claim).or_fail("opening the claim again");
        assert_eq!(directories::path(&opened).or_fail("its path"), claimed);
        assert_eq!(below(&opened), [number]);
        drop(opened);

        // One from before that was not kept: any mount of the file system will do.
        let old = Claim { mount: None, ..claim.clone() };
        let opened = reopen(&old).or_fail("opening the claim again");
        assert_eq!(directories::identity(&opened).or_fail("its identity"), claim.directory);
        drop(opened);
        // Its own mount is gone.
        take_down(&claimed.join("mnt"));
        take_down(&one);
        let opened = reopen(&claim).or_fail("opening the claim again");
        assert_eq!(directories::identity(&opened).or_fail("its identity"), claim.directory);
        assert_ne!(Some(directories::mount_of(&opened).or_fail("its mount")), claim.mount);
        drop(opened);

        // Removed, while a bystander of the same kind stays.
        fs::remove_dir_all(two.join("dir/claimed")).or_fail("removing the claimed directory");
        fs::create_dir(two.join("dir/claimed")).or_fail("making another one");
        let gone = reopen(&claim).expect_err("it is gone");
        assert_eq!(gone.kind(), std::io::ErrorKind::StaleNetworkFileHandle);
        take_down(&two);
        take_down(&base.join("first"));
        take_down(&base);
    });
}

#[test]
fn a_claim_on_a_subvolume_is_opened_again() {
    scenario::privileged("subvolume", |place| {
        let image = place.path("image");
        fs::File::create(&image).and_then(|file| file.set_len(128 * 1024 * 1024)).or_fail("making an image");
        let base = place.directory("base");
        program::succeed("mkfs.btrfs", ["-q".as_ref(), image.as_os_str()]);
        let node = attach(&image);
        mount(Some(node.as_str()), &base, Some("btrfs"), MsFlags::empty(), None::<&str>)
            .or_fail("mounting btrfs");
        let directory = open(&base);
        let claim = claim(&directory);
        drop(directory);
        let (_, all) = mounts::own().or_fail("reading the own namespace");
        let device = all.last().or_fail("a mount").device();
        assert_ne!(device, claim.directory.device, "a subvolume has a number of its own");
        for claim in [&claim, &Claim { mount: None, ..claim.clone() }] {
            let opened = reopen(claim).or_fail("opening the claim again");
            assert_eq!(directories::identity(&opened).or_fail("its identity"), claim.directory);
        }
        take_down(&base);
        program::succeed("losetup", ["-d", &node]);
    });
}

#[test]
fn thousands_of_mounts_below_a_claim_are_found_in_time() {
    scenario::privileged("thousands", |place| {
        let base = place.directory("base");
        mount_tmpfs(&base);
        let directory = open(&base);
        for number in 0..3_000 {
            // A third of them on one point.
            let point = if number % 3 == 0 { base.join("stack") } else { base.join(format!("dir/{number}")) };
            mount_tmpfs(&point);
        }
        let (own, all) = mounts::own().or_fail("reading the own namespace");
        let start = std::time::Instant::now();
        let points = MountPoints::new(&all, Some(own));
        let found = points.below(&directory).or_fail("looking below a claim");
        let took = start.elapsed();
        println!("{} mounts below a claim were found in {} ms", found.len(), took.as_millis());
        assert_eq!(found.len(), 3_000);
        // Built without optimisation; a search through all for each of them takes seconds.
        assert!(took < std::time::Duration::from_millis(500), "{took:?}");
        drop(directory);
        nix::mount::umount2(&base, nix::mount::MntFlags::MNT_DETACH).or_fail("unmounting them all");
    });
}
