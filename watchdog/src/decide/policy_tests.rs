use std::path::PathBuf;

use hostler_protocol::lease::LeaseId;
use proptest::prelude::*;

use super::super::fake_kernel::Kernel;
use super::super::fixture::{
    ROOT_DISK, any_host, host, lease, loop_device, loop_identity, loop_number, map, mount, process_identity,
    standing as process_on,
};
use super::super::{PlanSettings, attribute, plan};
use super::*;
use crate::model::{
    BackingFile, BootId, LoopDevice, LoopIdentity, Mount, Phase, Process, Swap, SwapIdentity,
};

fn about_loops() -> Criterion {
    Criterion::Loop { backing_under: Some(PathBuf::from("/images")), uid: None }
}

fn about_mounts() -> Criterion {
    Criterion::Mount { mounted_under: PathBuf::from("/srv") }
}

fn rule(criterion: Criterion, action: Action) -> Rule {
    Rule { name: "stale".to_owned(), criterion, min_age: Duration::ZERO, observations: 1, action }
}

fn match_loop(snapshot: &mut Snapshot, identity: LoopIdentity) {
    let what = ResourceIdentity::Loop(identity);
    snapshot.matches.push(Match { criterion: about_loops(), what });
}

fn match_mount(snapshot: &mut Snapshot, mount: &Mount) {
    let what = ResourceIdentity::Mount(mount.identity);
    snapshot.matches.push(Match { criterion: about_mounts(), what });
}

/// A host with `/dev/loop0` mounted on `/mnt`, which a rule is about.
fn mounted_loop() -> Snapshot {
    let mut snapshot = host();
    snapshot.loops.push(loop_device(0, ROOT_DISK));
    snapshot.mounts.push(mount(2, 1, loop_number(0), "/mnt"));
    match_loop(&mut snapshot, loop_identity(0, ROOT_DISK));
    snapshot
}

fn only(snapshot: &Snapshot, action: Action) -> Option<Standing> {
    let ownership = attribute(snapshot, []);
    let rules = [rule(about_loops(), action), rule(about_mounts(), action)];
    let mut found = candidates(snapshot, &ownership, &rules);
    assert!(found.len() <= 1, "{found:?}");
    found.pop().map(|candidate| candidate.standing)
}

#[track_caller]
fn assert_busy(snapshot: &Snapshot, because: &str) {
    match only(snapshot, Action::Reclaim) {
        Some(Standing::Busy { because: told }) if told.contains(because) => {}
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_lies_on_a_loop_device_goes_with_it() {
    let mut snapshot = mounted_loop();
    snapshot.loops.push(loop_device(1, loop_number(0)));
    snapshot.maps.push(map(0, &[loop_number(1)]));
    let with = BTreeSet::from([
        ResourceIdentity::Mount(snapshot.mounts[1].identity),
        ResourceIdentity::Loop(loop_identity(1, loop_number(0))),
        ResourceIdentity::Map(snapshot.maps[0].identity),
    ]);
    assert_eq!(only(&snapshot, Action::Reclaim), Some(Standing::Idle { with }));
}

#[test]
fn whoever_lives_and_holds_it_keeps_it() {
    let mut snapshot = mounted_loop();
    let mount = snapshot.mounts[1].clone();
    snapshot.processes.push(process_on(50, &mount));
    assert_busy(&snapshot, "process 50");

    // Mounted twice, so a mapping cannot be told to be of the one or the other.
    let mut snapshot = mounted_loop();
    snapshot.mounts.push(super::super::fixture::mount(3, 1, loop_number(0), "/mnt2"));
    let user = Process { mapped: vec![loop_number(0)], ..super::super::fixture::process(51, 1) };
    snapshot.processes.push(user);
    assert_busy(&snapshot, "process 51 has files of it mapped");

    let mut snapshot = mounted_loop();
    let identity = SwapIdentity::File(BackingFile { device: loop_number(0), inode: 7 });
    snapshot.swaps.push(Swap { identity, path: b"/mnt/swap".to_vec() });
    assert_busy(&snapshot, "swaps");
}

#[test]
fn what_a_lease_has_is_no_rules() {
    let snapshot = mounted_loop();
    let mut owner = lease(1, Phase::Open);
    owner.loops.insert(loop_identity(0, ROOT_DISK));
    let ownership = attribute(&snapshot, [&owner]);
    let rules = [rule(about_loops(), Action::Reclaim)];
    assert_eq!(candidates(&snapshot, &ownership, &rules), []);
    assert!(!has_candidates(&snapshot, &ownership));

    // Only what is on it is the lease's.
    let mut owner = lease(1, Phase::Open);
    owner.mounts.insert(snapshot.mounts[1].identity);
    let ownership = attribute(&snapshot, [&owner]);
    let found = candidates(&snapshot, &ownership, &rules);
    assert!(matches!(&found[0].standing, Standing::Busy { because } if because.contains("lease")));
}

#[test]
fn a_loop_device_on_a_mount_is_somebodys_use_of_it() {
    let mut snapshot = host();
    let disk = DeviceNumber { major: 8, minor: 17 };
    let (upper, lower) = (mount(2, 1, disk, "/srv/a"), mount(3, 2, disk, "/srv/a/b"));
    match_mount(&mut snapshot, &upper);
    snapshot.mounts.push(upper.clone());
    let alone = Standing::Idle { with: BTreeSet::new() };
    assert_eq!(only(&snapshot, Action::Reclaim), Some(alone));
    snapshot.loops.push(loop_device(0, disk));
    assert_busy(&snapshot, "not about");
    snapshot.loops.clear();
    // What is mounted on it goes with it only where the rule is about that as well.
    snapshot.mounts.push(lower.clone());
    assert_busy(&snapshot, "not about");
    match_mount(&mut snapshot, &lower);
    let ownership = attribute(&snapshot, []);
    let rules = [rule(about_mounts(), Action::Reclaim)];
    let found = candidates(&snapshot, &ownership, &rules);
    let with = BTreeSet::from([ResourceIdentity::Mount(lower.identity)]);
    assert_eq!(found[0].standing, Standing::Idle { with });
}

#[test]
fn a_mounts_number_that_is_given_again_proves_nothing() {
    let mut snapshot = host();
    let mut old = mount(2, 1, DeviceNumber { major: 0, minor: 50 }, "/srv/a");
    old.identity.number = MountNumber::Reusable(2);
    match_mount(&mut snapshot, &old);
    snapshot.mounts.push(old);
    assert_busy(&snapshot, "before 6.8");
}

#[test]
fn what_was_not_read_may_be_a_holder() {
    let cause = || "denied".to_owned();
    let hiding = [
        Gap::Mounts(cause()),
        Gap::Loops(cause()),
        Gap::Loop(9, cause()),
        Gap::Namespaces(cause()),
        Gap::Blocks(cause()),
        Gap::Processes(cause()),
        Gap::Process(2, cause()),
        Gap::Cgroup(LeaseId(1), cause()),
        Gap::Claim(LeaseId(1), cause()),
    ];
    for gap in hiding {
        let mut snapshot = mounted_loop();
        snapshot.gaps.push(gap);
        assert_busy(&snapshot, "denied");
    }
    for gap in [Gap::Process(1, cause()), Gap::Criterion(cause())] {
        let mut snapshot = mounted_loop();
        snapshot.gaps.push(gap);
        assert!(matches!(only(&snapshot, Action::Reclaim), Some(Standing::Idle { .. })));
    }
}

#[test]
fn of_several_rules_the_first_counts() {
    let snapshot = mounted_loop();
    let rules = [rule(about_loops(), Action::Observe), rule(about_loops(), Action::Reclaim)];
    let found = candidates(&snapshot, &attribute(&snapshot, []), &rules);
    assert_eq!(found.iter().map(|one| one.rule.action).collect::<Vec<_>>(), [Action::Observe]);
}

#[test]
fn what_is_due_is_taken_whole_and_once() {
    // The loop device, and a mount of it that another rule is about.
    let mut snapshot = mounted_loop();
    let upper = snapshot.mounts[1].clone();
    match_mount(&mut snapshot, &upper);
    let rules = [
        Rule { name: "mounts".to_owned(), ..rule(about_mounts(), Action::Reclaim) },
        Rule { name: "loops".to_owned(), ..rule(about_loops(), Action::Reclaim) },
    ];
    let found = candidates(&snapshot, &attribute(&snapshot, []), &rules);
    let first = advance(&Sightings::new(), found.clone(), Duration::from_secs(1));
    assert_eq!(due(&first, &rules), []);
    let second = advance(&first, found, Duration::from_secs(2));
    let what = BTreeSet::from([
        ResourceIdentity::Loop(loop_identity(0, ROOT_DISK)),
        ResourceIdentity::Mount(upper.identity),
    ]);
    let (rule, name) = (Some("loops".to_owned()), "policy: loops".to_owned());
    assert_eq!(due(&second, &rules), [Taking { rule, name, opener: Opener::Policy, what }]);
}

#[test]
fn a_person_is_told_what_comes() {
    let sighting = |action, stage| Sighting {
        rule: Rule { observations: 3, ..rule(about_loops(), action) },
        since: Duration::ZERO,
        observations: 2,
        standing: Standing::Idle { with: BTreeSet::new() },
        stage,
    };
    let told = |action, stage| sighting(action, stage).sentence();
    assert_eq!(told(Action::Reclaim, Stage::Observed), "rule stale: seen unchanged 2 times, 3 are needed");
    assert_eq!(told(Action::Observe, Stage::Observed), "rule stale: seen unchanged 2 times");
    assert_eq!(told(Action::Quarantine, Stage::Quarantined), "rule stale: taken for leaked, and left");
    assert!(told(Action::Reclaim, Stage::Quarantined).contains("at the next sweep"));
}

/// What one sweep sees of one resource: nothing, or how it stands.
fn any_sight() -> impl Strategy<Value = Option<Standing>> {
    let other = ResourceIdentity::Process(process_identity(7));
    prop_oneof![
        1 => Just(None),
        1 => Just(Some(Standing::Busy { because: "process 5 holds it".to_owned() })),
        6 => Just(Some(Standing::Idle { with: BTreeSet::new() })),
        2 => Just(Some(Standing::Idle { with: BTreeSet::from([other]) })),
    ]
}

fn any_action() -> impl Strategy<Value = Action> {
    prop_oneof![Just(Action::Observe), Just(Action::Quarantine), Just(Action::Reclaim)]
}

proptest! {
    #[test]
    fn nothing_is_due_before_its_time(
        action in any_action(),
        needed in 1..5u32,
        min_age in 0..20u64,
        sights in proptest::collection::vec((any_sight(), 1..5u64), 1..40),
    ) {
        let what = ResourceIdentity::Loop(loop_identity(0, ROOT_DISK));
        let min_age = Duration::from_secs(min_age);
        let rule = Rule { min_age, observations: needed, ..rule(about_loops(), action) };
        let mut sightings = Sightings::new();
        let mut history: Vec<(Duration, Option<Standing>)> = Vec::new();
        let mut now = Duration::ZERO;
        for (sight, later) in sights {
            now += Duration::from_secs(later);
            let seen = sight.iter().map(|standing| {
                Candidate { what, rule: rule.clone(), standing: standing.clone() }
            });
            sightings = advance(&sightings, seen.collect(), now);
            history.push((now, sight.clone()));
            prop_assert_eq!(sightings.contains_key(&what), sight.is_some());
            let Some(sighting) = sightings.get(&what) else { continue };
            // The streak of sweeps that saw exactly this, counted anew.
            let same = history.iter().rev().take_while(|(_, other)| *other == sight);
            let same: Vec<Duration> = same.map(|(when, _)| *when).collect();
            let is_idle = matches!(sight, Some(Standing::Idle { .. }));
            let age = now - *same.last().expect("this sweep");
            let is_leaked = |count: usize, age: Duration| {
                is_idle && count >= needed as usize && age >= min_age
            };
            // It was taken for leaked one sweep ago already.
            let was_leaked = same.len() > 1 && is_leaked(same.len() - 1, same[1] - *same.last().expect("two"));
            let expected = match (action, is_leaked(same.len(), age), was_leaked) {
                (Action::Observe, _, _) | (_, false, _) => Stage::Observed,
                (Action::Reclaim, true, true) => Stage::Due,
                (_, true, _) => Stage::Quarantined,
            };
            prop_assert_eq!(sighting.stage, expected);
            prop_assert_eq!(due(&sightings, std::slice::from_ref(&rule)).len(), usize::from(expected == Stage::Due));
        }
    }

    #[test]
    fn what_is_taken_is_what_was_judged_and_nothing_protected(
        snapshot in any_host(),
        protected in proptest::collection::vec(any::<prop::sample::Index>(), 0..3),
        gap in any::<bool>(),
    ) {
        let mut snapshot = snapshot;
        let loops: Vec<LoopIdentity> = snapshot.loops.iter().filter_map(LoopDevice::identity).collect();
        for identity in &loops {
            match_loop(&mut snapshot, *identity);
        }
        for mount in snapshot.mounts.clone().iter().filter(|mount| mount.point != b"/") {
            match_mount(&mut snapshot, mount);
        }
        for index in protected.iter().filter(|_| !loops.is_empty()) {
            snapshot.protected.insert(ResourceIdentity::Loop(loops[index.index(loops.len())]));
        }
        if gap {
            snapshot.gaps.push(Gap::Processes("denied".to_owned()));
        }
        let owner = lease(1, Phase::Over);
        let ownership = attribute(&snapshot, [&owner]);
        let rules = [rule(about_loops(), Action::Reclaim), rule(about_mounts(), Action::Reclaim)];
        let found = candidates(&snapshot, &ownership, &rules);
        for candidate in &found {
            prop_assert!(!ownership.owners.contains_key(&candidate.what));
            prop_assert!(!ownership.protected.contains(&candidate.what));
        }
        let once = advance(&Sightings::new(), found.clone(), Duration::ZERO);
        let twice = advance(&once, found, Duration::ZERO);
        let takings = due(&twice, &rules);
        prop_assert!(!gap || takings.is_empty());
        let numbers = (10..).map(LeaseId);
        let opened: Vec<_> = takings
            .iter()
            .zip(numbers)
            .map(|(taking, id)| taking.lease(id, process_identity(1), &BootId("b".to_owned()), 0))
            .collect();
        let with_them = attribute(&snapshot, opened.iter().chain([&owner]));
        // Nobody loses anything by it.
        prop_assert_eq!(&with_them.doubtful, &ownership.doubtful);
        for (resource, owner) in &ownership.owners {
            prop_assert_eq!(with_them.owners.get(resource), Some(owner));
        }
        for (taking, opened) in takings.iter().zip(&opened) {
            let mut kernel = Kernel::new(&snapshot);
            for step in plan(opened, &snapshot, &with_them, &PlanSettings::default()).steps {
                for resource in step.resources() {
                    prop_assert!(taking.what.contains(&resource), "{step:?}");
                    prop_assert!(!with_them.protected.contains(&resource), "{step:?}");
                }
                prop_assert_eq!(kernel.apply(&step), Ok(()), "{:?}", step);
            }
            // Nobody who lives loses what it stands in.
            for place in kernel.now.processes.iter().filter_map(|process| process.current_directory) {
                prop_assert!(kernel.now.mounts.iter().any(|mount| mount.short_number == place.mount));
            }
        }
    }
}
