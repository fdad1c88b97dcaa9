use std::collections::BTreeSet;

use hostler_protocol::lease::LeaseId;

use super::super::attribute;
use super::super::fixture::{
    ROOT_DISK, claim_file, host, lease, loop_device, loop_number, map, map_number, mount, process,
    process_identity, standing,
};
use super::{PlanSettings, plan, strangers_below, stuck};
use crate::model::{
    CgroupIdentity, Claim, DirectoryIdentity, DiskSequence, Filesystem, Gap, MountNamespace, Phase, Snapshot,
    Step, Swap, SwapIdentity, UnderClaim,
};

fn settings() -> PlanSettings {
    PlanSettings { term_timeout_ms: 5000, ..PlanSettings::default() }
}

fn steps(snapshot: &Snapshot) -> Vec<String> {
    let lease = lease(1, Phase::Over);
    let ownership = attribute(snapshot, [&lease]);
    plan(&lease, snapshot, &ownership, &settings()).steps.iter().map(Step::sentence).collect()
}

/// A mounted image with three binds inside, as a chroot builder leaves it.
fn chroot() -> Snapshot {
    let mut snapshot = host();
    let device = loop_device(3, ROOT_DISK);
    claim_file(&mut snapshot, 1, &device);
    snapshot.loops = vec![device];
    snapshot.mounts.extend([
        mount(2, 1, loop_number(3), "/w/root"),
        mount(3, 2, ROOT_DISK, "/w/root/dev"),
        mount(4, 3, ROOT_DISK, "/w/root/dev/pts"),
        mount(5, 2, ROOT_DISK, "/w/root/proc"),
    ]);
    snapshot.processes = vec![process(50, 1)];
    snapshot.members.insert(LeaseId(1), vec![process_identity(50)]);
    snapshot
}

#[test]
fn a_chroot_comes_apart_from_the_inside() {
    assert_eq!(
        steps(&chroot()),
        [
            "end process 50 (SIGTERM, after 5.0 s SIGKILL)",
            "unmount /w/root/proc",
            "unmount /w/root/dev/pts",
            "unmount /w/root/dev",
            "thaw and unmount /w/root",
            "detach /dev/loop3",
        ]
    );
}

#[test]
fn while_the_owner_lives_nothing_is_planned() {
    let snapshot = chroot();
    let lease = lease(1, Phase::Open);
    let ownership = attribute(&snapshot, [&lease]);
    assert_eq!(plan(&lease, &snapshot, &ownership, &settings()).steps, []);
}

#[test]
fn a_stack_comes_down_from_the_top() {
    let mut snapshot = host();
    let device = loop_device(3, ROOT_DISK);
    claim_file(&mut snapshot, 1, &device);
    snapshot.loops = vec![device];
    // Each is mounted on the root of the one before, on the same point.
    snapshot.mounts.extend([
        mount(7, 1, loop_number(3), "/w/a"),
        mount(5, 7, loop_number(3), "/w/a"),
        mount(6, 5, loop_number(3), "/w/a"),
    ]);
    let lease = lease(1, Phase::Over);
    let ownership = attribute(&snapshot, [&lease]);
    let order: Vec<u64> = plan(&lease, &snapshot, &ownership, &settings())
        .steps
        .iter()
        .filter_map(|step| match step {
            Step::Unmount { short_number, .. } => Some(*short_number),
            _ => None,
        })
        .collect();
    assert_eq!(order, [6, 5, 7]);
}

#[test]
fn a_nested_image_is_detached_before_what_it_lies_on() {
    let mut snapshot = host();
    let outer = loop_device(3, ROOT_DISK);
    claim_file(&mut snapshot, 1, &outer);
    snapshot.loops = vec![outer, loop_device(4, loop_number(3))];
    snapshot
        .mounts
        .extend([mount(2, 1, loop_number(3), "/w/outer"), mount(3, 2, loop_number(4), "/w/outer/inner")]);
    assert_eq!(
        steps(&snapshot),
        [
            "thaw and unmount /w/outer/inner",
            "detach /dev/loop4",
            "thaw and unmount /w/outer",
            "detach /dev/loop3"
        ]
    );
}

#[test]
fn what_a_bystander_holds_is_left_with_all_below_it() {
    let mut snapshot = chroot();
    // An administrator's own mount, made before the claim, deep inside.
    let others = mount(6, 3, ROOT_DISK, "/w/root/dev/shm");
    snapshot.mounts.push(others.clone());
    let mut lease = lease(1, Phase::Over);
    lease.mounts_before.insert(others.identity);
    let ownership = attribute(&snapshot, [&lease]);
    let planned = plan(&lease, &snapshot, &ownership, &settings());
    let sentences: Vec<String> = planned.steps.iter().map(Step::sentence).collect();
    assert_eq!(
        sentences,
        ["end process 50 (SIGTERM, after 5.0 s SIGKILL)", "unmount /w/root/proc", "unmount /w/root/dev/pts",]
    );
}

#[test]
fn without_the_mount_table_only_processes_end() {
    let mut snapshot = chroot();
    snapshot.gaps.push(Gap::Mounts("denied".to_owned()));
    assert_eq!(steps(&snapshot), ["end process 50 (SIGTERM, after 5.0 s SIGKILL)"]);
}

#[test]
fn a_loop_device_on_the_hosts_own_disk_does_not_hold_binds_of_that_disk() {
    let mut snapshot = chroot();
    snapshot.loops.push(loop_device(9, ROOT_DISK));
    assert!(steps(&snapshot).contains(&"unmount /w/root/dev".to_owned()));
}

#[test]
fn an_ended_process_is_not_signalled() {
    let mut snapshot = chroot();
    snapshot.processes[0].ended = true;
    assert!(steps(&snapshot).iter().all(|step| !step.starts_with("end ")));
}

#[test]
fn an_owner_in_its_own_lease_is_not_ended_with_it() {
    let mut snapshot = chroot();
    let mut lease = lease(1, Phase::Over);
    lease.owner_inside = true;
    lease.cgroup = Some((CgroupIdentity(5), "/cg/x".to_owned()));
    snapshot.cgroups.insert(LeaseId(1), CgroupIdentity(5));
    snapshot.processes.push(process(lease.owner.pid, 1));
    snapshot.members.insert(LeaseId(1), vec![process_identity(50), lease.owner]);
    let ownership = attribute(&snapshot, [&lease]);
    let planned = plan(&lease, &snapshot, &ownership, &settings());
    let Some(Step::EndProcesses { processes, cgroup, .. }) = planned.steps.first() else {
        panic!("{planned:?} does not begin with its processes");
    };
    assert_eq!(processes, &[process_identity(50)]);
    // Killing the whole group would take the owner along.
    assert_eq!(cgroup, &None);

    snapshot.members.insert(LeaseId(1), vec![process_identity(50)]);
    let planned = plan(&lease, &snapshot, &attribute(&snapshot, [&lease]), &settings());
    assert!(matches!(&planned.steps[0], Step::EndProcesses { cgroup: Some(_), .. }));
}

#[test]
fn a_scratch_directory_goes_after_its_mounts_and_not_around_a_bystanders() {
    let mut snapshot = chroot();
    let directory = DirectoryIdentity { device: ROOT_DISK, inode: 77 };
    snapshot.directories.push(UnderClaim { lease: LeaseId(1), what: directory });
    let mut lease = lease(1, Phase::Over);
    lease.claims.push(Claim { directory, scratch: true, path: "/w".to_owned(), handle: None, mount: None });
    lease.cgroup = Some((CgroupIdentity(5), "/cg/x".to_owned()));
    snapshot.cgroups.insert(LeaseId(1), CgroupIdentity(5));
    let ownership = attribute(&snapshot, [&lease]);
    let planned = plan(&lease, &snapshot, &ownership, &settings());
    let sentences: Vec<String> = planned.steps.iter().map(Step::sentence).collect();
    assert_eq!(
        sentences[sentences.len() - 3..],
        ["detach /dev/loop3", "remove directory /w", "remove control group /cg/x"]
    );

    let others = mount(6, 1, ROOT_DISK, "/w/theirs");
    snapshot.claimed_mounts.push(UnderClaim { lease: LeaseId(1), what: others.identity });
    snapshot.mounts.push(others.clone());
    lease.mounts_before.insert(others.identity);
    let ownership = attribute(&snapshot, [&lease]);
    let planned = plan(&lease, &snapshot, &ownership, &settings());
    assert!(!planned.steps.iter().any(|step| matches!(step, Step::RemoveDirectory { .. })));
}

#[test]
fn a_scratch_directory_is_not_removed_around_what_others_have_in_it() {
    let directory = DirectoryIdentity { device: ROOT_DISK, inode: 77 };
    let mut lease = lease(1, Phase::Over);
    lease.claims.push(Claim { directory, scratch: true, path: "/w".to_owned(), handle: None, mount: None });
    let mut snapshot = host();
    snapshot.directories.push(UnderClaim { lease: LeaseId(1), what: directory });
    let is_removed = |snapshot: &Snapshot| {
        let ownership = attribute(snapshot, [&lease]);
        let planned = plan(&lease, snapshot, &ownership, &settings());
        let removes = planned.steps.iter().any(|step| matches!(step, Step::RemoveDirectory { .. }));
        assert_eq!(removes, strangers_below(LeaseId(1), snapshot, &ownership).0.is_empty());
        removes
    };
    assert!(is_removed(&snapshot));
    let mut another_lease = snapshot.clone();
    another_lease.inner_claims.push(UnderClaim { lease: LeaseId(1), what: LeaseId(2) });
    assert!(!is_removed(&another_lease));
    // Attached before the directory was claimed.
    let mut image = loop_device(3, ROOT_DISK);
    image.sequence = Some(DiskSequence(0));
    claim_file(&mut snapshot, 1, &image);
    snapshot.loops.push(image);
    assert!(!is_removed(&snapshot));
}

#[test]
fn a_group_with_an_unknown_process_is_not_killed_as_a_whole() {
    let mut snapshot = chroot();
    let mut lease = lease(1, Phase::Over);
    lease.cgroup = Some((CgroupIdentity(5), "/cg/x".to_owned()));
    snapshot.cgroups.insert(LeaseId(1), CgroupIdentity(5));
    let kills = |snapshot: &Snapshot| {
        let planned = plan(&lease, snapshot, &attribute(snapshot, [&lease]), &settings());
        matches!(planned.steps.first(), Some(Step::EndProcesses { cgroup: Some(_), .. }))
    };
    assert!(kills(&snapshot));
    snapshot.gaps.push(Gap::Cgroup(LeaseId(1), "what its process 60 is: denied".to_owned()));
    assert!(!kills(&snapshot));
}

#[test]
fn what_no_own_process_is_seen_to_hold_is_never_unmounted_lazily() {
    let mut snapshot = host();
    let image = mount(2, 1, loop_number(3), "/w");
    snapshot.claimed_mounts.push(UnderClaim { lease: LeaseId(1), what: image.identity });
    snapshot.mounts.push(image.clone());
    snapshot.members.insert(LeaseId(1), vec![process_identity(50)]);
    let stuck = |snapshot: &Snapshot| {
        let ownership = attribute(snapshot, [&lease(1, Phase::Over)]);
        !stuck(LeaseId(1), snapshot, &ownership).is_empty()
    };
    // Something keeps it busy, and nothing shows what: a descriptor on its way over a socket, a thread.
    assert!(!stuck(&snapshot));
    snapshot.processes = vec![standing(50, &image)];
    assert!(stuck(&snapshot));
    let mut foreign = snapshot.clone();
    foreign.processes.push(standing(60, &image));
    assert!(!stuck(&foreign));
    snapshot.gaps.push(Gap::Namespaces("denied".to_owned()));
    assert!(!stuck(&snapshot));
}

#[test]
fn a_logical_volume_on_an_image_comes_apart_from_the_top() {
    let mut snapshot = host();
    let device = loop_device(3, ROOT_DISK);
    claim_file(&mut snapshot, 1, &device);
    snapshot.loops = vec![device];
    snapshot.maps = vec![map(0, &[loop_number(3)]), map(1, &[map_number(0)])];
    snapshot.swaps =
        vec![Swap { identity: SwapIdentity::Device(map_number(1)), path: b"/dev/dm-1".to_vec() }];
    snapshot.mounts.push(mount(2, 1, map_number(0), "/w/root"));
    assert_eq!(
        steps(&snapshot),
        [
            "thaw and unmount /w/root",
            "stop swapping to /dev/dm-1",
            "remove map vg-lv1",
            "remove map vg-lv0",
            "detach /dev/loop3",
        ]
    );
}

#[test]
fn a_map_that_also_lies_on_a_bystanders_device_is_left_and_pins_the_leases() {
    let mut snapshot = host();
    let device = loop_device(3, ROOT_DISK);
    claim_file(&mut snapshot, 1, &device);
    snapshot.loops = vec![device, loop_device(4, ROOT_DISK)];
    snapshot.maps = vec![map(0, &[loop_number(3), loop_number(4)])];
    assert_eq!(steps(&snapshot), [] as [&str; 0]);
}

#[test]
fn copies_in_other_namespaces_are_unmounted_before_the_device_is_detached() {
    let mut snapshot = chroot();
    let mut copy = mount(20, 19, loop_number(3), "/w/root");
    copy.identity.namespace = MountNamespace(77);
    let mut bound = mount(21, 20, ROOT_DISK, "/w/root/dev");
    bound.identity.namespace = MountNamespace(77);
    snapshot.mounts.extend([copy, bound]);
    let planned = steps(&snapshot);
    let at = |what: &str| planned.iter().position(|step| step == what).expect(what);
    let copy = at("thaw and unmount /w/root in mount namespace 77");
    assert!(at("thaw and unmount /w/root").max(copy) < at("detach /dev/loop3"), "{planned:?}");
    assert!(at("unmount /w/root/dev in mount namespace 77") < copy, "{planned:?}");
}

#[test]
fn a_frozen_file_system_that_was_unmounted_is_thawed_before_its_device_goes() {
    let mut snapshot = host();
    let device = loop_device(3, ROOT_DISK);
    claim_file(&mut snapshot, 1, &device);
    snapshot.loops = vec![device];
    let blocks = vec![loop_number(3)];
    let filesystem =
        Filesystem { kind: "ext4".to_owned(), instance: 1, blocks, shown_as: Vec::new(), frozen: Some(true) };
    snapshot.filesystems.push(filesystem);
    assert_eq!(
        steps(&snapshot),
        ["thaw the ext4 file system on 7:3, which is mounted nowhere", "detach /dev/loop3"]
    );
    // Mounted, it is thawed by the step that unmounts it.
    snapshot.mounts.push(mount(2, 1, loop_number(3), "/w"));
    assert_eq!(steps(&snapshot), ["thaw and unmount /w", "detach /dev/loop3"]);
}

#[test]
fn an_overlay_goes_before_its_layers_and_a_bystanders_keeps_them() {
    let mut snapshot = chroot();
    let mut overlay = mount(9, 1, ROOT_DISK, "/w/merged");
    overlay.identity.device.minor = 99;
    overlay.filesystem = "overlay".to_owned();
    overlay.layers = b"rw,lowerdir=/w/root/base,upperdir=/up,workdir=/wd".to_vec();
    snapshot.mounts.push(overlay.clone());
    let planned = steps(&snapshot);
    assert!(!planned.contains(&"thaw and unmount /w/root".to_owned()), "{planned:?}");

    snapshot.claimed_mounts.push(UnderClaim { lease: LeaseId(1), what: overlay.identity });
    let planned = steps(&snapshot);
    let at = |what: &str| planned.iter().position(|step| step == what).expect("planned");
    assert!(at("unmount /w/merged") < at("thaw and unmount /w/root"), "{planned:?}");
}

#[test]
fn a_hung_fuse_connection_is_aborted_only_when_all_its_mounts_are_leaked() {
    let mut snapshot = host();
    let device = crate::model::DeviceNumber { major: 0, minor: 55 };
    let mut fuse = mount(2, 1, device, "/w/fuse");
    fuse.filesystem = "fuse.sshfs".to_owned();
    snapshot.mounts.push(fuse.clone());
    snapshot.claimed_mounts.push(UnderClaim { lease: LeaseId(1), what: fuse.identity });
    snapshot.fuse = vec![crate::model::FuseConnection { device, waiting: 1 }];
    assert_eq!(steps(&snapshot), ["abort the FUSE connection of mount 0:55", "unmount /w/fuse"]);
    snapshot.fuse[0].waiting = 0;
    assert_eq!(steps(&snapshot), ["unmount /w/fuse"]);
    snapshot.fuse[0].waiting = 1;
    let mut elsewhere = mount(3, 1, device, "/theirs");
    elsewhere.filesystem = "fuse.sshfs".to_owned();
    snapshot.mounts.push(elsewhere);
    assert_eq!(steps(&snapshot), ["unmount /w/fuse"]);
    snapshot.mounts.pop();
    snapshot.gaps.push(Gap::Namespace(MountNamespace(77), "it changed at each read".to_owned()));
    assert_eq!(steps(&snapshot), ["unmount /w/fuse"]);
}

#[test]
fn the_last_rung_is_taken_only_for_mounts_that_it_is_due_for() {
    let snapshot = chroot();
    let lease = lease(1, Phase::Over);
    let ownership = attribute(&snapshot, [&lease]);
    let stuck_mount = snapshot.mounts[1].identity;
    let settings = PlanSettings { lazily: BTreeSet::from([stuck_mount]), ..settings() };
    let planned = plan(&lease, &snapshot, &ownership, &settings);
    let lazily: Vec<String> =
        planned.steps.iter().map(Step::sentence).filter(|step| step.contains("lazily")).collect();
    assert_eq!(lazily, ["unmount lazily, which frees nothing, /w/root"]);
}
