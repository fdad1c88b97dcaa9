use hostler_protocol::lease::LeaseId;
use proptest::prelude::*;

use super::super::fixture::{
    ROOT_DISK, any_host, claim_file, host, lease, loop_device, loop_identity, loop_number, map, mount,
    process_identity,
};
use super::super::{PlanSettings, attribute, plan, reasons_for};
use super::*;
use crate::model::{BackingFile, Claim, DirectoryIdentity, Phase, Snapshot, Step, Swap, UnderClaim};

fn steps(snapshot: &Snapshot) -> Vec<Step> {
    let lease = lease(1, Phase::Over);
    plan(&lease, snapshot, &attribute(snapshot, [&lease]), &PlanSettings::default()).steps
}

#[test]
fn what_lies_on_what_is_protected_is_protected() {
    let mut snapshot = host();
    snapshot.loops =
        vec![loop_device(0, ROOT_DISK), loop_device(1, loop_number(0)), loop_device(2, ROOT_DISK)];
    snapshot.mounts.push(mount(2, 1, loop_number(0), "/a"));
    snapshot.mounts.push(mount(3, 1, loop_number(1), "/b"));
    snapshot.mounts.push(mount(4, 1, loop_number(2), "/c"));
    snapshot.maps = vec![map(0, &[loop_number(1), loop_number(2)])];
    let file = SwapIdentity::File(BackingFile { device: loop_number(1), inode: 9 });
    snapshot.swaps.push(Swap { identity: file, path: b"/b/swap".to_vec() });
    let named = ResourceIdentity::Loop(loop_identity(0, ROOT_DISK));
    snapshot.protected.insert(named);
    let expected = BTreeSet::from([
        named,
        ResourceIdentity::Loop(loop_identity(1, loop_number(0))),
        ResourceIdentity::Mount(snapshot.mounts[1].identity),
        ResourceIdentity::Mount(snapshot.mounts[2].identity),
        ResourceIdentity::Map(snapshot.maps[0].identity),
        ResourceIdentity::Swap(file),
    ]);
    assert_eq!(protected(&Index::new(&snapshot)), expected);
}

#[test]
fn protection_goes_before_a_lease_and_the_report_says_so() {
    let mut snapshot = host();
    let device = loop_device(0, ROOT_DISK);
    claim_file(&mut snapshot, 1, &device);
    snapshot.loops.push(device);
    snapshot.mounts.push(mount(2, 1, loop_number(0), "/srv/a"));
    assert_eq!(steps(&snapshot).len(), 2);
    let mounted = ResourceIdentity::Mount(snapshot.mounts[1].identity);
    snapshot.protected.insert(mounted);
    assert_eq!(steps(&snapshot), []);
    let lease = lease(1, Phase::Over);
    let ownership = attribute(&snapshot, [&lease]);
    let device = ResourceIdentity::Loop(loop_identity(0, ROOT_DISK));
    let (reasons, detail) = reasons_for(device, &snapshot, &ownership);
    assert_eq!(reasons, [Reason::Mounted, Reason::Bystander]);
    assert_eq!(detail, "held by mount /srv/a (ext4), protected by [protect]");
}

#[test]
fn a_copy_of_a_leases_mount_that_is_protected_is_not_taken_along() {
    let mut snapshot = host();
    snapshot.mounts[0].peers = Some(7);
    let mut other_root = mount(5, 1, ROOT_DISK, "/srv");
    other_root.peers = Some(7);
    snapshot.loops.push(loop_device(0, ROOT_DISK));
    snapshot.mounts.push(other_root);
    snapshot.mounts.push(mount(6, 1, loop_number(0), "/w"));
    snapshot.mounts.push(mount(7, 5, loop_number(0), "/srv/w"));
    claim_file(&mut snapshot, 1, &loop_device(0, ROOT_DISK));
    assert!(!steps(&snapshot).is_empty());
    snapshot.protected.insert(ResourceIdentity::Mount(snapshot.mounts[3].identity));
    assert_eq!(steps(&snapshot), []);
}

#[test]
fn a_scratch_directory_with_a_protected_devices_file_stays() {
    let mut snapshot = host();
    let directory = DirectoryIdentity { device: ROOT_DISK, inode: 77 };
    let mut owner = lease(1, Phase::Over);
    owner.claims.push(Claim { directory, scratch: true, path: "/w".to_owned(), handle: None, mount: None });
    snapshot.directories.push(UnderClaim { lease: LeaseId(1), what: directory });
    snapshot.loops.push(loop_device(0, ROOT_DISK));
    claim_file(&mut snapshot, 1, &loop_device(0, ROOT_DISK));
    snapshot.protected.insert(ResourceIdentity::Loop(loop_identity(0, ROOT_DISK)));
    let ownership = attribute(&snapshot, [&owner]);
    assert_eq!(plan(&owner, &snapshot, &ownership, &PlanSettings::default()).steps, []);
    assert_eq!(strangers_below(LeaseId(1), &snapshot, &ownership).0, [Reason::Bystander]);
}

proptest! {
    #[test]
    fn no_plan_touches_what_is_protected(
        snapshot in any_host(),
        which in proptest::collection::vec(any::<prop::sample::Index>(), 1..4),
    ) {
        let mut snapshot = snapshot;
        let everything: Vec<ResourceIdentity> = snapshot
            .loops
            .iter()
            .filter_map(|device| device.identity().map(ResourceIdentity::Loop))
            .chain(snapshot.mounts.iter().map(|mount| ResourceIdentity::Mount(mount.identity)))
            .collect();
        snapshot.protected.extend(which.iter().map(|index| everything[index.index(everything.len())]));
        let mut owner = lease(1, Phase::Over);
        owner.processes.insert(process_identity(50));
        let ownership = attribute(&snapshot, [&owner]);
        let mut kernel = super::super::fake_kernel::Kernel::new(&snapshot);
        for step in plan(&owner, &snapshot, &ownership, &PlanSettings::default()).steps {
            for resource in step.resources() {
                prop_assert!(!ownership.protected.contains(&resource), "{step:?}");
            }
            prop_assert_eq!(kernel.apply(&step), Ok(()), "{:?}", step);
        }
        // Nor does anything protected go with something else.
        for resource in &ownership.protected {
            let is_left = match resource {
                ResourceIdentity::Mount(mount) => kernel.now.mounts.iter().any(|one| one.identity == *mount),
                ResourceIdentity::Loop(device) => {
                    kernel.now.loops.iter().any(|one| one.identity() == Some(*device))
                }
                _ => true,
            };
            prop_assert!(is_left, "{resource:?}");
        }
    }
}
