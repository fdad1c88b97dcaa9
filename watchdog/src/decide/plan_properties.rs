//! What holds for every plan, over random hosts that run in a fake kernel.

use std::collections::BTreeSet;

use hostler_protocol::lease::LeaseId;
use proptest::prelude::*;

use super::super::attribute;
use super::super::fake_kernel::Kernel;
use super::super::fixture::{any_host, lease};
use super::super::{everything_by_lease, everything_of};
use super::{Ownership, PlanSettings, plan};
use crate::model::{Gap, LoopState, Phase, ResourceIdentity, Snapshot, Step, SwapIdentity, UnmountHow};

/// The plan for lease 1 of a host, with whose everything is.
fn planned(snapshot: &Snapshot) -> (crate::model::Plan, Ownership) {
    let lease = lease(1, Phase::Over);
    let ownership = attribute(snapshot, [&lease]);
    (
        plan(
            &lease,
            snapshot,
            &ownership,
            &PlanSettings { term_timeout_ms: 5000, ..PlanSettings::default() },
        ),
        ownership,
    )
}

/// All that a snapshot shows of resources.
fn resources(snapshot: &Snapshot) -> BTreeSet<ResourceIdentity> {
    let mounts = snapshot.mounts.iter().map(|mount| ResourceIdentity::Mount(mount.identity));
    let loops = snapshot.loops.iter().filter_map(crate::model::LoopDevice::identity);
    let maps = snapshot.maps.iter().map(|map| ResourceIdentity::Map(map.identity));
    let swaps = snapshot.swaps.iter().map(|swap| ResourceIdentity::Swap(swap.identity));
    let processes = snapshot.processes.iter().map(|process| ResourceIdentity::Process(process.identity));
    mounts.chain(loops.map(ResourceIdentity::Loop)).chain(maps).chain(swaps).chain(processes).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4000))]

    #[test]
    fn no_plan_touches_a_bystander(snapshot in any_host()) {
        let (plan, ownership) = planned(&snapshot);
        for step in plan.steps {
            for resource in step.resources() {
                prop_assert!(ownership.is_of(resource, LeaseId(1)), "{step:?}");
            }
        }
    }

    #[test]
    fn what_is_looked_up_is_what_is_in_the_lists(snapshot in any_host()) {
        let (plan, ownership) = planned(&snapshot);
        for step in plan.steps {
            for resource in resources(&snapshot) {
                prop_assert_eq!(step.acts_on(resource), step.resources().contains(&resource), "{:?}", step);
            }
        }
        let by_lease = everything_by_lease(&snapshot, &ownership);
        let of_one = by_lease.get(&LeaseId(1)).into_iter().flatten().copied().collect();
        prop_assert_eq!(everything_of(LeaseId(1), &snapshot, &ownership), of_one);
    }

    #[test]
    fn every_step_of_a_plan_works_in_its_order(snapshot in any_host()) {
        let mut kernel = Kernel::new(&snapshot);
        for step in planned(&snapshot).0.steps {
            let applied = kernel.apply(&step);
            prop_assert!(applied.is_ok(), "{}: {applied:?}", step.sentence());
        }
    }

    #[test]
    fn a_plan_that_ran_leaves_every_bystander(snapshot in any_host()) {
        let (plan, ownership) = planned(&snapshot);
        let mut kernel = Kernel::new(&snapshot);
        for step in plan.steps {
            kernel.apply(&step).expect("see the property above");
        }
        let left = resources(&kernel.now);
        for resource in resources(&snapshot) {
            let is_bystander = !ownership.owners.contains_key(&resource);
            prop_assert!(!is_bystander || left.contains(&resource), "{resource:?} went");
        }
    }

    #[test]
    fn what_a_plan_leaves_is_held_by_something_it_may_not_touch(snapshot in any_host()) {
        let (_, ownership) = planned(&snapshot);
        let mut kernel = Kernel::new(&snapshot);
        // Rounds, as the engine makes them: what one frees may let the next free more.
        loop {
            let plan = planned(&kernel.now).0;
            if plan.steps.is_empty() {
                break;
            }
            for step in plan.steps {
                kernel.apply(&step).expect("see the property above");
            }
        }
        // If the plans left something that one more step could free, it would be incomplete.
        for resource in resources(&kernel.now) {
            if !ownership.is_of(resource, LeaseId(1)) {
                continue;
            }
            let step = match resource {
                ResourceIdentity::Loop(identity) => Step::DetachLoop { identity, partitions: Vec::new() },
                ResourceIdentity::Map(map) => Step::RemoveMap { map, name: String::new() },
                ResourceIdentity::Swap(swap) => Step::SwapOff { swap, path: Vec::new(), on: None },
                ResourceIdentity::Mount(identity) => {
                    let has_files = kernel.now.loops.iter().any(|device| {
                        matches!(device.state, LoopState::Bound(backing) if backing.device == identity.device)
                    }) || kernel.now.swaps.iter().any(|swap| {
                        matches!(swap.identity, SwapIdentity::File(file) if file.device == identity.device)
                    });
                    let parent = kernel.now.mounts.iter().find(|mount| mount.identity == identity);
                    let parent = parent.and_then(|mount| mount.parent);
                    let parent =
                        kernel.now.mounts.iter().find(|mount| Some(mount.short_number) == parent);
                    // What propagates is left when in doubt; see the property before this one.
                    if has_files || parent.is_some_and(|parent| parent.peers.is_some()) {
                        continue;
                    }
                    Step::Unmount {
                        mount: identity,
                        short_number: 0,
                        point: Vec::new(),
                        apart_from: None,
                        is_elsewhere: false,
                        how: UnmountHow::Plain,
                    }
                }
                _ => continue,
            };
            prop_assert!(kernel.clone().apply(&step).is_err(), "{step:?}");
        }
    }

    #[test]
    fn a_device_that_could_not_be_asked_is_in_no_plan(snapshot in any_host(), which in any::<prop::sample::Index>()) {
        prop_assume!(!snapshot.loops.is_empty());
        let mut snapshot = snapshot;
        let index = which.index(snapshot.loops.len());
        snapshot.loops[index].state = LoopState::Unread;
        let number = snapshot.loops[index].number;
        for step in planned(&snapshot).0.steps {
            if let Step::DetachLoop { identity, .. } = step {
                prop_assert_ne!(identity.number, number);
            }
        }
    }

    #[test]
    fn a_gap_adds_no_step(snapshot in any_host(), which in 0..6usize) {
        let cause = || "denied".to_owned();
        let gap = [
            Gap::Mounts(cause()),
            Gap::Processes(cause()),
            Gap::Blocks(cause()),
            Gap::Namespaces(cause()),
            Gap::Loops(cause()),
            Gap::Claim(LeaseId(1), cause()),
        ][which].clone();
        let (without, _) = planned(&snapshot);
        let mut snapshot = snapshot;
        snapshot.gaps.push(gap);
        let (with, _) = planned(&snapshot);
        for step in &with.steps {
            prop_assert!(without.steps.contains(step), "{}", step.sentence());
        }
    }

    #[test]
    fn the_same_snapshot_makes_the_same_plan(snapshot in any_host()) {
        prop_assert_eq!(planned(&snapshot), planned(&snapshot));
    }
}
