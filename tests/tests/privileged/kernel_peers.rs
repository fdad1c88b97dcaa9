//! What an unmount takes along in other namespaces, and what keeps it from doing so.

use std::fs;
use std::path::PathBuf;

use hostler_tests::failure::OrFail;
use hostler_tests::namespace::Namespace;
use hostler_tests::place::Place;
use hostler_tests::{probe, scenario};
use hostler_watchdog::kernel::unmount::{Unmounted, part_from_peers};
use nix::mount::MsFlags;

use crate::kernel_made::{in_namespace, make, mount_tmpfs, take_down, unmount_plainly};

/// A shared mount with one on it, and another namespace that has a copy of both. The copies here are the
/// bystander's.
struct Shared {
    parent: PathBuf,
    target: PathBuf,
    later: PathBuf,
    bystander: u64,
    other: Namespace,
}

impl Shared {
    fn new(place: &Place) -> Self {
        let parent = place.directory("parent");
        mount_tmpfs(&parent);
        make(&parent, MsFlags::MS_SHARED);
        let (target, later) = (parent.join("target"), parent.join("later"));
        mount_tmpfs(&target);
        fs::create_dir(&later).or_fail("fresh");
        fs::create_dir(parent.join("theirs")).or_fail("fresh");
        let bystander = probe::mount_number(&target);
        Self { other: Namespace::new(place), parent, target, later, bystander }
    }

    fn bystander_is_there(&self) -> bool {
        probe::mount_number(&self.target) == self.bystander
    }

    fn other_has(&self, point: &std::path::Path) -> bool {
        self.other.mounts_below(&self.parent).iter().any(|mount| mount.point == point)
    }

    fn end(self) {
        drop(self.other);
        for mount in probe::mounts_below(&self.parent).iter().rev() {
            take_down(&mount.point);
        }
    }
}

#[test]
fn an_unmount_goes_on_to_the_peers_of_the_mount_it_was_on() {
    scenario::privileged("peers", |place| {
        let shared = Shared::new(place);
        let target = in_namespace(&shared.other, &shared.target);
        assert_eq!(unmount_plainly(&target), Unmounted::Done);
        assert!(!shared.bystander_is_there(), "nothing parted them, so it went too");
        shared.end();
    });
}

#[test]
fn parting_the_unmounted_mount_itself_from_its_peers_prevents_nothing() {
    scenario::privileged("target", |place| {
        let shared = Shared::new(place);
        let target = in_namespace(&shared.other, &shared.target);
        assert!(target.peers.is_some(), "what is mounted on a shared mount is shared");
        shared.other.run(["mount".as_ref(), "--make-private".as_ref(), shared.target.as_os_str()]);
        assert_eq!(unmount_plainly(&target), Unmounted::Done);
        assert!(!shared.bystander_is_there());
        shared.end();
    });
}

#[test]
fn a_mount_goes_alone_when_the_one_it_is_on_was_parted_from_its_peers() {
    scenario::privileged("parent", |place| {
        let shared = Shared::new(place);
        // Another bystander, which gets what is mounted on the other's, and gives nothing.
        shared.other.run(["mount".as_ref(), "--make-shared".as_ref(), shared.parent.as_os_str()]);
        let third = Namespace::new(place);
        third.run(["mount".as_ref(), "--make-slave".as_ref(), shared.parent.as_os_str()]);
        let parent = in_namespace(&shared.other, &shared.parent);
        let target = in_namespace(&shared.other, &shared.target);

        part_from_peers(&parent.identity).or_fail("parting");
        part_from_peers(&parent.identity).or_fail("parting what is parted already");
        let parted = in_namespace(&shared.other, &shared.parent);
        assert_eq!((parted.peers, parted.master), (None, parent.peers));
        assert_eq!(unmount_plainly(&target), Unmounted::Done);
        assert!(!shared.other_has(&shared.target));
        assert!(shared.bystander_is_there());
        let third_has =
            |point: &PathBuf| third.mounts_below(&shared.parent).iter().any(|one| one.point == *point);
        assert!(third_has(&shared.target));

        // A slave still gets what is mounted here, as it did before; a private one would not. What is
        // mounted there stays there.
        mount_tmpfs(&shared.later);
        assert!(shared.other_has(&shared.later));
        assert!(third_has(&shared.later));
        let theirs = shared.parent.join("theirs");
        shared.other.run([
            "mount".as_ref(),
            "-t".as_ref(),
            "tmpfs".as_ref(),
            "none".as_ref(),
            theirs.as_os_str(),
        ]);
        assert!(probe::mounts().iter().all(|mount| mount.point != theirs));
        drop(third);
        shared.end();
    });
}

#[test]
fn a_slave_gives_nothing_on_so_it_need_not_be_parted() {
    for how in ["--make-slave", "--make-rslave", "--make-private"] {
        scenario::privileged("slave", |place| {
            let shared = Shared::new(place);
            let on = if how == "--make-rslave" { std::path::Path::new("/") } else { &shared.parent };
            shared.other.run(["mount".as_ref(), how.as_ref(), on.as_os_str()]);
            let parent = in_namespace(&shared.other, &shared.parent);
            let target = in_namespace(&shared.other, &shared.target);
            part_from_peers(&parent.identity).or_fail("nothing is to be done");
            assert_eq!(in_namespace(&shared.other, &shared.parent), parent);
            assert_eq!(unmount_plainly(&target), Unmounted::Done);
            assert!(shared.bystander_is_there(), "{how}");
            assert!(!shared.other_has(&shared.target));
            shared.end();
        });
    }
}

#[test]
fn peers_are_parted_in_the_own_namespace_too() {
    scenario::privileged("bound", |place| {
        // A bind of a shared mount is its peer: a builder's `mount --rbind`, beside what it bound.
        let shared = Shared::new(place);
        let bound = place.directory("bound");
        let all = MsFlags::MS_BIND | MsFlags::MS_REC;
        nix::mount::mount(Some(&shared.parent), &bound, None::<&str>, all, None::<&str>).or_fail("binding");
        let parent = crate::kernel_made::own_at(&bound).pop().or_fail("the bind");
        let target = crate::kernel_made::own_at(&bound.join("target")).pop().or_fail("its copy");
        part_from_peers(&parent.identity).or_fail("parting");
        assert_eq!(unmount_plainly(&target), Unmounted::Done);
        assert!(shared.bystander_is_there());
        assert!(shared.other_has(&shared.target));
        take_down(&bound);
        shared.end();
    });
}

#[test]
fn a_mount_that_is_covered_is_parted_all_the_same_or_said_to_be_out_of_reach() {
    scenario::privileged("covered", |place| {
        let shared = Shared::new(place);
        let parent = in_namespace(&shared.other, &shared.parent);
        // Over the directory that it is mounted in: there is a way past.
        let above = shared.parent.parent().or_fail("the place").to_owned();
        shared.other.run([
            "mount".as_ref(),
            "-t".as_ref(),
            "tmpfs".as_ref(),
            "none".as_ref(),
            above.as_os_str(),
        ]);
        part_from_peers(&parent.identity).or_fail("parting");
        assert_eq!(in_namespace(&shared.other, &shared.parent).peers, None);
        shared.other.run(["umount".as_ref(), above.as_os_str()]);
        shared.end();

        // Over its own root: there is none, and nothing is parted.
        let parent = place.directory("own");
        mount_tmpfs(&parent);
        make(&parent, MsFlags::MS_SHARED);
        mount_tmpfs(&parent);
        let [lower, upper] = crate::kernel_made::own_at(&parent).try_into().expect("two");
        assert!(part_from_peers(&lower.identity).is_err());
        assert_eq!(crate::kernel_made::own_at(&parent), [lower, upper]);
        take_down(&parent);
        take_down(&parent);
    });
}
