use std::path::Path;

use hostler_protocol::lease::{LeaseId, Tracking};
use proptest::prelude::*;

use super::super::fixture::{
    HOST, ROOT_DISK, claim_file, host, lease, loop_device, loop_identity, loop_number, mount, process,
    process_identity,
};
use super::{Nesting, attribute};
use crate::model::{
    BackingFile, CgroupIdentity, DiskSequence, Gap, Lease, LoopState, MountIdentity, MountNumber, Phase,
    ResourceIdentity, UnderClaim,
};

#[test]
fn a_loop_device_whose_file_lies_below_a_claim_is_the_leases_with_all_that_is_on_it() {
    let mut snapshot = host();
    let device = loop_device(3, ROOT_DISK);
    claim_file(&mut snapshot, 1, &device);
    snapshot.loops = vec![device, loop_device(4, ROOT_DISK)];
    let image = mount(2, 1, loop_number(3), "/w/root");
    let bound = mount(3, 2, ROOT_DISK, "/w/root/dev");
    let other = mount(4, 1, loop_number(4), "/other");
    snapshot.mounts.extend([image.clone(), bound.clone(), other.clone()]);

    let ownership = attribute(&snapshot, [&lease(1, Phase::Over)]);
    let of_the_lease: Vec<_> = ownership.of(LeaseId(1)).collect();
    assert_eq!(
        of_the_lease,
        [
            ResourceIdentity::Mount(image.identity),
            ResourceIdentity::Mount(bound.identity),
            ResourceIdentity::Loop(loop_identity(3, ROOT_DISK)),
        ]
    );
    assert!(!ownership.owners.contains_key(&ResourceIdentity::Mount(other.identity)));
}

#[test]
fn what_was_there_before_the_claim_is_a_bystander() {
    let mut snapshot = host();
    let device = loop_device(3, ROOT_DISK);
    claim_file(&mut snapshot, 1, &device);
    snapshot.loops = vec![device];
    let below = mount(2, 1, ROOT_DISK, "/w/old");
    snapshot.claimed_mounts.push(UnderClaim { lease: LeaseId(1), what: below.identity });
    snapshot.mounts.push(below.clone());
    let mut lease = lease(1, Phase::Over);
    lease.loops_before = DiskSequence(103);
    lease.mounts_before.insert(below.identity);
    assert!(attribute(&snapshot, [&lease]).owners.is_empty());

    lease.loops_before = DiskSequence(102);
    let ownership = attribute(&snapshot, [&lease]);
    assert!(ownership.is_of(ResourceIdentity::Loop(loop_identity(3, ROOT_DISK)), LeaseId(1)));
}

#[test]
fn the_same_number_with_another_sequence_is_not_the_proven_device() {
    let mut snapshot = host();
    let mut device = loop_device(3, ROOT_DISK);
    device.sequence = Some(DiskSequence(500));
    snapshot.loops = vec![device];
    let mut lease = lease(1, Phase::Over);
    lease.loops.insert(loop_identity(3, ROOT_DISK));
    assert!(attribute(&snapshot, [&lease]).owners.is_empty());
}

#[test]
fn a_device_that_did_not_answer_is_nobodys_to_take() {
    let mut snapshot = host();
    let mut device = loop_device(3, ROOT_DISK);
    claim_file(&mut snapshot, 1, &device);
    device.state = LoopState::Unread;
    snapshot.loops = vec![device];
    snapshot.mounts.push(mount(2, 1, loop_number(3), "/w/root"));
    assert!(attribute(&snapshot, [&lease(1, Phase::Over)]).owners.is_empty());
}

#[test]
fn what_two_leases_claim_is_doubtful_and_nobodys() {
    let mut snapshot = host();
    let device = loop_device(3, ROOT_DISK);
    claim_file(&mut snapshot, 1, &device);
    claim_file(&mut snapshot, 2, &device);
    snapshot.loops = vec![device];
    let ownership = attribute(&snapshot, [&lease(1, Phase::Over), &lease(2, Phase::Open)]);
    let identity = ResourceIdentity::Loop(loop_identity(3, ROOT_DISK));
    assert!(ownership.owners.is_empty());
    assert!(ownership.doubtful.contains(&identity));
}

#[test]
fn a_nested_device_follows_the_file_system_it_lies_on() {
    let mut snapshot = host();
    let outer = loop_device(3, ROOT_DISK);
    claim_file(&mut snapshot, 1, &outer);
    snapshot.loops = vec![outer, loop_device(4, loop_number(3))];
    let ownership = attribute(&snapshot, [&lease(1, Phase::Over)]);
    assert!(ownership.is_of(ResourceIdentity::Loop(loop_identity(4, loop_number(3))), LeaseId(1)));
}

#[test]
fn a_partition_is_its_device() {
    let mut snapshot = host();
    let mut device = loop_device(3, ROOT_DISK);
    let partition = crate::model::DeviceNumber { major: 259, minor: 5 };
    device.partitions = vec![crate::model::Partition { number: 1, device: partition }];
    claim_file(&mut snapshot, 1, &device);
    snapshot.loops = vec![device];
    let of_partition = mount(2, 1, partition, "/w/p1");
    snapshot.mounts.push(of_partition.clone());
    let ownership = attribute(&snapshot, [&lease(1, Phase::Over)]);
    assert!(ownership.is_of(ResourceIdentity::Mount(of_partition.identity), LeaseId(1)));
}

#[test]
fn members_of_the_control_group_are_the_leases_whoever_their_parent_is() {
    let mut snapshot = host();
    snapshot.processes = vec![process(50, 1), process(51, 1)];
    snapshot.members.insert(LeaseId(1), vec![process_identity(50)]);
    let ownership = attribute(&snapshot, [&lease(1, Phase::Over)]);
    let processes: Vec<_> = ownership.of(LeaseId(1)).collect();
    assert_eq!(processes, [ResourceIdentity::Process(process_identity(50))]);
}

#[test]
fn descent_follows_children_and_not_numbers() {
    let mut snapshot = host();
    // 60 was adopted; 61 and 62 descend from it; 40 is older than the parent whose number it names,
    // so that number was another process's when it was born.
    snapshot.processes =
        vec![process(60, 1), process(61, 60), process(62, 61), process(40, 60), process(70, 1)];
    let mut lease = lease(1, Phase::Over);
    lease.tracking = Tracking::Descent;
    lease.processes.insert(process_identity(60));
    let found: Vec<_> = attribute(&snapshot, [&lease]).of(LeaseId(1)).collect();
    let expected = [60, 61, 62].map(|pid| ResourceIdentity::Process(process_identity(pid)));
    assert_eq!(found, expected);

    snapshot.gaps.push(Gap::Processes("denied".to_owned()));
    assert!(attribute(&snapshot, [&lease]).owners.is_empty());
}

#[test]
fn a_process_that_was_moved_out_of_the_control_group_is_still_the_leases() {
    let mut snapshot = host();
    snapshot.processes = vec![process(60, 1), process(61, 60), process(70, 1)];
    snapshot.members.insert(LeaseId(1), Vec::new());
    let mut lease = lease(1, Phase::Over);
    lease.processes.insert(process_identity(60));
    let found: Vec<_> = attribute(&snapshot, [&lease]).of(LeaseId(1)).collect();
    assert_eq!(found, [60, 61].map(|pid| ResourceIdentity::Process(process_identity(pid))));
}

#[test]
fn what_an_owner_under_its_own_lease_started_elsewhere_is_not_the_leases() {
    let mut snapshot = host();
    let mut lease = lease(1, Phase::Over);
    snapshot.processes = vec![process(lease.owner.pid, 1), process(9500, lease.owner.pid)];
    snapshot.members.insert(LeaseId(1), vec![lease.owner]);
    lease.owner_inside = true;
    lease.processes.insert(lease.owner);
    assert!(attribute(&snapshot, [&lease]).owners.is_empty());
    // Without a group, descent is all there is.
    lease.tracking = Tracking::Descent;
    let found: Vec<_> = attribute(&snapshot, [&lease]).of(LeaseId(1)).collect();
    assert_eq!(found, [ResourceIdentity::Process(process_identity(9500))]);
}

#[test]
fn what_appears_below_a_claim_after_its_lease_was_over_is_a_bystander() {
    let mut snapshot = host();
    let device = loop_device(3, ROOT_DISK);
    claim_file(&mut snapshot, 1, &device);
    snapshot.loops = vec![device];
    let below = mount(2, 1, ROOT_DISK, "/w/theirs");
    snapshot.claimed_mounts.push(UnderClaim { lease: LeaseId(1), what: below.identity });
    snapshot.mounts.push(below.clone());
    let mut lease = lease(1, Phase::Over);
    assert_eq!(attribute(&snapshot, [&lease]).owners.len(), 2);
    lease.evidence_closed = true;
    assert!(attribute(&snapshot, [&lease]).owners.is_empty());
    // What was found before that stays its own.
    lease.loops.insert(loop_identity(3, ROOT_DISK));
    lease.mounts.insert(below.identity);
    assert_eq!(attribute(&snapshot, [&lease]).owners.len(), 2);
}

#[test]
fn a_reusable_mount_number_seen_before_proves_nothing() {
    let mut snapshot = host();
    let mut seen = mount(2, 1, ROOT_DISK, "/w/root");
    seen.identity = MountIdentity { number: MountNumber::Reusable(2), namespace: HOST, device: ROOT_DISK };
    snapshot.mounts.push(seen.clone());
    let mut lease = lease(1, Phase::Over);
    lease.mounts.insert(seen.identity);
    assert!(attribute(&snapshot, [&lease]).owners.is_empty());
}

#[test]
fn a_file_of_the_same_inode_on_another_file_system_is_another_file() {
    let mut snapshot = host();
    let device = loop_device(3, ROOT_DISK);
    let LoopState::Bound(backing) = device.state else { panic!("bound") };
    let elsewhere = BackingFile { device: loop_number(9), inode: backing.inode };
    snapshot.claimed_files.push(UnderClaim { lease: LeaseId(1), what: elsewhere });
    snapshot.loops = vec![device];
    assert!(attribute(&snapshot, [&lease(1, Phase::Over)]).owners.is_empty());
}

/// A lease within another, by its control group.
fn nested() -> (Lease, Lease) {
    let (mut outer, mut inner) = (lease(1, Phase::Over), lease(2, Phase::Open));
    outer.cgroup = Some((CgroupIdentity(5), "/cg/job/hostler-lease-1".to_owned()));
    inner.cgroup = Some((CgroupIdentity(6), "/cg/job/hostler-lease-1/hostler-lease-2".to_owned()));
    (outer, inner)
}

#[test]
fn what_two_nested_leases_have_evidence_for_is_the_inner_ones() {
    let (outer, inner) = nested();
    let mut snapshot = host();
    let device = loop_device(3, ROOT_DISK);
    claim_file(&mut snapshot, 1, &device);
    claim_file(&mut snapshot, 2, &device);
    snapshot.loops = vec![device];
    let members = [inner.owner, process_identity(50)];
    snapshot.processes = vec![process(inner.owner.pid, 1), process(50, 1)];
    snapshot.members.insert(LeaseId(1), members.to_vec());
    snapshot.members.insert(LeaseId(2), members.to_vec());
    for order in [[&outer, &inner], [&inner, &outer]] {
        let ownership = attribute(&snapshot, order);
        assert_eq!(ownership.doubtful.len(), 0);
        let of_the_inner: Vec<_> = ownership.of(LeaseId(2)).collect();
        let expected = [
            ResourceIdentity::Process(process_identity(50)),
            ResourceIdentity::Loop(loop_identity(3, ROOT_DISK)),
        ];
        assert_eq!(of_the_inner, expected);
        // It ends with the outer lease, and then its own lease ends.
        assert!(ownership.is_of(ResourceIdentity::Process(inner.owner), LeaseId(1)));
    }
}

#[test]
fn a_name_that_begins_like_anothers_is_not_within_it() {
    let (mut outer, mut inner) = nested();
    outer.cgroup = Some((CgroupIdentity(5), "/cg/hostler-lease-1".to_owned()));
    inner.cgroup = Some((CgroupIdentity(6), "/cg/hostler-lease-12".to_owned()));
    let mut snapshot = host();
    let device = loop_device(3, ROOT_DISK);
    claim_file(&mut snapshot, 1, &device);
    claim_file(&mut snapshot, 2, &device);
    snapshot.loops = vec![device];
    assert_eq!(attribute(&snapshot, [&outer, &inner]).doubtful.len(), 1);
}

#[test]
fn nothing_follows_from_what_is_doubtful() {
    let mut snapshot = host();
    let device = loop_device(3, ROOT_DISK);
    claim_file(&mut snapshot, 1, &device);
    snapshot.loops = vec![device];
    // Of the first lease by its device, below the second one's claim; on it another mount.
    let image = mount(2, 1, loop_number(3), "/w/root");
    let bound = mount(3, 2, ROOT_DISK, "/w/root/dev");
    snapshot.claimed_mounts.push(UnderClaim { lease: LeaseId(2), what: image.identity });
    snapshot.mounts.extend([image.clone(), bound.clone()]);
    let ownership = attribute(&snapshot, [&lease(1, Phase::Over), &lease(2, Phase::Open)]);
    assert!(ownership.doubtful.contains(&ResourceIdentity::Mount(image.identity)));
    assert!(!ownership.owners.contains_key(&ResourceIdentity::Mount(bound.identity)));
}

#[test]
fn what_another_user_mounted_below_a_claim_is_a_bystander_and_roots_is_not() {
    let below = |user: Option<u32>| {
        let mut snapshot = host();
        let mut fuse = mount(2, 1, loop_number(90), "/w/mnt");
        fuse.user = user;
        snapshot.claimed_mounts.push(UnderClaim { lease: LeaseId(1), what: fuse.identity });
        snapshot.mounts.push(fuse.clone());
        let mut lease = lease(1, Phase::Over);
        lease.uid = 1000;
        let is_leases =
            attribute(&snapshot, [&lease]).owners.contains_key(&ResourceIdentity::Mount(fuse.identity));
        // Nor by having been seen before, nor by what it is mounted on.
        lease.mounts.insert(fuse.identity);
        assert_eq!(
            attribute(&snapshot, [&lease]).owners.contains_key(&ResourceIdentity::Mount(fuse.identity)),
            is_leases
        );
        is_leases
    };
    assert!(below(None) && below(Some(0)) && below(Some(1000)));
    assert!(!below(Some(1001)));
}

#[test]
fn what_two_leases_had_is_taken_back_once_both_are_over() {
    let mut snapshot = host();
    let device = loop_device(3, ROOT_DISK);
    claim_file(&mut snapshot, 1, &device);
    claim_file(&mut snapshot, 2, &device);
    snapshot.loops = vec![device];
    let owners = |second| attribute(&snapshot, [&lease(1, Phase::Over), &lease(2, second)]).owners;
    assert!(owners(Phase::Open).is_empty());
    let of_the_first = [(ResourceIdentity::Loop(loop_identity(3, ROOT_DISK)), LeaseId(1))];
    assert_eq!(owners(Phase::Over), of_the_first.into());
}

#[test]
fn a_loop_device_from_before_the_claim_follows_from_nothing() {
    let mut snapshot = host();
    let outer = loop_device(3, ROOT_DISK);
    snapshot.loops = vec![outer.clone(), loop_device(4, outer.device)];
    let mut lease = lease(1, Phase::Over);
    lease.loops.insert(loop_identity(3, ROOT_DISK));
    let nested = ResourceIdentity::Loop(loop_identity(4, loop_number(3)));
    assert!(attribute(&snapshot, [&lease]).owners.contains_key(&nested));
    lease.loops_before = loop_identity(4, loop_number(3)).sequence;
    assert!(!attribute(&snapshot, [&lease]).owners.contains_key(&nested));
}

#[test]
fn a_namespace_is_later_when_it_was_not_there_whatever_its_number() {
    let mut snapshot = host();
    let kept = crate::model::MountNamespace(77);
    snapshot.namespaces =
        vec![crate::model::Namespace { namespace: kept, unique: Some(5), other_user_namespace: false }];
    let mut inside = process(50, 1);
    inside.namespace = Some(kept);
    snapshot.processes = vec![inside];
    snapshot.members.insert(LeaseId(1), vec![process_identity(50)]);
    let namespaces = |there: Option<&[u64]>| {
        let mut lease = lease(1, Phase::Over);
        lease.namespaces_there = there.map(|there| there.iter().copied().collect());
        attribute(&snapshot, [&lease]).namespaces
    };
    assert_eq!(namespaces(Some(&[9])), [(5, LeaseId(1))].into());
    assert!(namespaces(Some(&[5, 9])).is_empty());
    // Where it was not known what was there, nothing is later.
    assert!(namespaces(None).is_empty());
}

proptest! {
    #[test]
    fn one_lease_is_within_another_when_its_control_group_is(
        paths in proptest::collection::vec(proptest::option::of("(/[ab]{1,2}){1,4}"), 0..12)
    ) {
        let leases: Vec<Lease> = (1..)
            .zip(&paths)
            .map(|(id, path)| Lease {
                cgroup: path.clone().map(|path| (CgroupIdentity(id), path)),
                ..lease(id, Phase::Open)
            })
            .collect();
        let nesting = Nesting::of(&leases.iter().collect::<Vec<_>>());
        for (inner, below) in (1..).zip(&paths) {
            for (outer, above) in (1..).zip(&paths) {
                let is_below = match (below, above) {
                    (Some(below), Some(above)) => inner != outer && Path::new(below).starts_with(above),
                    _ => false,
                };
                prop_assert_eq!(nesting.is_within(LeaseId(inner), LeaseId(outer)), is_below);
            }
        }
    }
}
