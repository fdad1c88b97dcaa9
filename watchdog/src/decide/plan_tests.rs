use std::collections::BTreeSet;

use hostler_protocol::lease::LeaseId;
use proptest::prelude::*;

use super::super::attribute;
use super::super::fixture::{
    ROOT_DISK, any_host, claim_file, host, lease, loop_device, loop_number, mount, process, process_identity,
};
use super::{PlanSettings, plan};
use crate::model::{
    CgroupIdentity, Claim, DirectoryIdentity, Gap, LoopState, Phase, ResourceIdentity, Snapshot, Step,
    UnderClaim, UnmountHow,
};

const SETTINGS: PlanSettings = PlanSettings { term_timeout_ms: 5000 };

fn steps(snapshot: &Snapshot) -> Vec<String> {
    let lease = lease(1, Phase::Over);
    let ownership = attribute(snapshot, [&lease]);
    plan(&lease, snapshot, &ownership, SETTINGS).steps.iter().map(Step::sentence).collect()
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
            "unmount /w/root",
            "detach /dev/loop3",
        ]
    );
}

#[test]
fn while_the_owner_lives_nothing_is_planned() {
    let snapshot = chroot();
    let lease = lease(1, Phase::Open);
    let ownership = attribute(&snapshot, [&lease]);
    assert_eq!(plan(&lease, &snapshot, &ownership, SETTINGS).steps, []);
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
    let order: Vec<u64> = plan(&lease, &snapshot, &ownership, SETTINGS)
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
        ["unmount /w/outer/inner", "detach /dev/loop4", "unmount /w/outer", "detach /dev/loop3"]
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
    let planned = plan(&lease, &snapshot, &ownership, SETTINGS);
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
    let planned = plan(&lease, &snapshot, &ownership, SETTINGS);
    let Some(Step::EndProcesses { processes, cgroup, .. }) = planned.steps.first() else {
        panic!("{planned:?} does not begin with its processes");
    };
    assert_eq!(processes, &[process_identity(50)]);
    // Killing the whole group would take the owner along.
    assert_eq!(cgroup, &None);

    snapshot.members.insert(LeaseId(1), vec![process_identity(50)]);
    let planned = plan(&lease, &snapshot, &attribute(&snapshot, [&lease]), SETTINGS);
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
    let planned = plan(&lease, &snapshot, &ownership, SETTINGS);
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
    let planned = plan(&lease, &snapshot, &ownership, SETTINGS);
    assert!(!planned.steps.iter().any(|step| matches!(step, Step::RemoveDirectory { .. })));
}

/// What the kernel would do with a step: it refuses to free what is still held.
fn apply(step: &Step, snapshot: &mut Snapshot) -> Result<(), String> {
    match step {
        Step::Unmount { mount, .. } => {
            let index =
                snapshot.mounts.iter().position(|other| other.identity == *mount).ok_or("not mounted")?;
            let number = snapshot.mounts[index].short_number;
            let device = snapshot.mounts[index].device();
            if snapshot.mounts.iter().any(|other| other.parent == Some(number)) {
                return Err(format!("mount {number} has a child"));
            }
            let is_last = snapshot.mounts.iter().filter(|other| other.device() == device).count() == 1;
            let has_file = snapshot.loops.iter().any(|device_on| match device_on.state {
                LoopState::Bound(backing) => backing.device == device,
                LoopState::Closing | LoopState::Unread | LoopState::Leftover => false,
            });
            if is_last && has_file {
                return Err(format!("mount {number} has an open backing file"));
            }
            snapshot.mounts.remove(index);
        }
        Step::DetachLoop { identity, .. } => {
            let index = snapshot
                .loops
                .iter()
                .position(|device| device.identity() == Some(*identity))
                .ok_or("gone")?;
            let device = &snapshot.loops[index];
            if snapshot.mounts.iter().any(|mount| device.has_device(mount.device())) {
                return Err(format!("loop {} is mounted", identity.number));
            }
            snapshot.loops.remove(index);
        }
        Step::AbortFuse { .. }
        | Step::SwapOff { .. }
        | Step::ReleaseFilesystem { .. }
        | Step::RemoveMap { .. }
        | Step::DisconnectNbd { .. } => return Err("not in these hosts".to_owned()),
        Step::EndProcesses { .. } | Step::RemoveDirectory { .. } | Step::RemoveCgroup { .. } => {}
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_plan_touches_a_bystander(snapshot in any_host()) {
        let lease = lease(1, Phase::Over);
        let ownership = attribute(&snapshot, [&lease]);
        for step in plan(&lease, &snapshot, &ownership, SETTINGS).steps {
            for resource in step.resources() {
                prop_assert!(ownership.is_of(resource, LeaseId(1)), "{step:?}");
            }
        }
    }

    #[test]
    fn every_step_of_a_plan_works_in_its_order(snapshot in any_host()) {
        let lease = lease(1, Phase::Over);
        let ownership = attribute(&snapshot, [&lease]);
        let mut kernel = snapshot.clone();
        for step in plan(&lease, &snapshot, &ownership, SETTINGS).steps {
            let applied = apply(&step, &mut kernel);
            prop_assert!(applied.is_ok(), "{}: {applied:?}", step.sentence());
        }
    }

    #[test]
    fn what_a_plan_leaves_is_held_by_something_it_may_not_touch(snapshot in any_host()) {
        let lease = lease(1, Phase::Over);
        let ownership = attribute(&snapshot, [&lease]);
        let mut kernel = snapshot.clone();
        for step in plan(&lease, &snapshot, &ownership, SETTINGS).steps {
            apply(&step, &mut kernel).expect("see the property above");
        }
        // If the plan left something that one more step could free, it would be incomplete.
        let left: BTreeSet<ResourceIdentity> = ownership.of(LeaseId(1)).collect();
        for mount in kernel.mounts.clone() {
            if left.contains(&ResourceIdentity::Mount(mount.identity)) {
                let step = Step::Unmount {
                    mount: mount.identity,
                    short_number: mount.short_number,
                    point: mount.point.clone(),
                    apart_from: None,
                    how: UnmountHow::Plain,
                };
                let has_nested = kernel.loops.iter().any(|device| {
                    matches!(device.state, LoopState::Bound(backing) if backing.device == mount.device())
                });
                prop_assert!(has_nested || apply(&step, &mut kernel.clone()).is_err(), "{}", step.sentence());
            }
        }
        for identity in kernel.loops.iter().filter_map(crate::model::LoopDevice::identity) {
            if left.contains(&ResourceIdentity::Loop(identity)) {
                let step = Step::DetachLoop { identity, partitions: Vec::new() };
                prop_assert!(apply(&step, &mut kernel.clone()).is_err(), "{}", step.sentence());
            }
        }
    }

    #[test]
    fn a_device_that_could_not_be_asked_is_in_no_plan(snapshot in any_host(), which in any::<prop::sample::Index>()) {
        prop_assume!(!snapshot.loops.is_empty());
        let mut snapshot = snapshot;
        let index = which.index(snapshot.loops.len());
        snapshot.loops[index].state = LoopState::Unread;
        let number = snapshot.loops[index].number;
        let lease = lease(1, Phase::Over);
        let ownership = attribute(&snapshot, [&lease]);
        for step in plan(&lease, &snapshot, &ownership, SETTINGS).steps {
            if let Step::DetachLoop { identity, .. } = step {
                prop_assert_ne!(identity.number, number);
            }
        }
    }

    #[test]
    fn the_same_snapshot_makes_the_same_plan(snapshot in any_host()) {
        let lease = lease(1, Phase::Over);
        let ownership = attribute(&snapshot, [&lease]);
        let first = plan(&lease, &snapshot, &ownership, SETTINGS);
        prop_assert_eq!(plan(&lease, &snapshot, &attribute(&snapshot, [&lease]), SETTINGS), first);
    }
}
