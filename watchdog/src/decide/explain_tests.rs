use hostler_protocol::why::{Held, Reason};
use proptest::prelude::*;

use super::super::attribute;
use super::super::fixture::{
    ROOT_DISK, any_host, host, lease, loop_device, loop_identity, loop_number, map, map_number, mount,
    process, standing,
};
use super::{Access, NAMED_LIMIT, explain, reasons_for};
use crate::model::{
    DeviceNumber, FileHold, Filesystem, LoopState, MountNamespace, MountNumber, Namespace, Partition, Phase,
    Place, ResourceIdentity, Snapshot, Swap, SwapIdentity,
};

fn loop_3(snapshot: &Snapshot) -> (Vec<Reason>, String) {
    reasons_of(ResourceIdentity::Loop(loop_identity(3, ROOT_DISK)), snapshot)
}

fn reasons_of(resource: ResourceIdentity, snapshot: &Snapshot) -> (Vec<Reason>, String) {
    reasons_for(resource, snapshot, &attribute(snapshot, [&lease(1, Phase::Over)]))
}

fn why(target: &str, snapshot: &Snapshot) -> Held {
    let ownership = attribute(snapshot, [&lease(1, Phase::Over)]);
    explain(target, snapshot, &ownership, |_| Access::Own).expect("it is there")
}

fn with_loop() -> Snapshot {
    let mut snapshot = host();
    snapshot.loops = vec![loop_device(3, ROOT_DISK)];
    snapshot
}

#[test]
fn follows_the_chain_to_the_process_at_its_end() {
    let mut snapshot = with_loop();
    snapshot.mounts.push(mount(2, 1, loop_number(3), "/w"));
    let mut holder = process(50, 1);
    holder.current_directory = Some(Place { mount: 2, device: loop_number(3) });
    snapshot.processes = vec![holder];
    let tree = why("/dev/loop3", &snapshot);
    assert_eq!(tree.what, "loop device /dev/loop3 (backing file /images/3.img)");
    assert_eq!(tree.holders[0].reason, Reason::Mounted);
    assert_eq!(tree.holders[0].by.holders[0].reason, Reason::CwdOrRoot);
    assert_eq!(tree.holders[0].by.holders[0].by.what, "process 50 (builder, uid 1000)");
    assert_eq!(tree.holders[0].by.holders[0].remedy, "kill 50");
}

#[test]
fn names_each_way_to_hold_a_device() {
    let mut snapshot = with_loop();
    let mut foreign = mount(2, 1, loop_number(3), "/w");
    foreign.identity.namespace = MountNamespace(77);
    snapshot.mounts.push(foreign);
    assert_eq!(loop_3(&snapshot).0, [Reason::ForeignNamespace]);

    let mut snapshot = with_loop();
    snapshot.loops.push(loop_device(4, loop_number(3)));
    assert_eq!(loop_3(&snapshot).0, [Reason::NestedLoop]);

    let mut snapshot = with_loop();
    snapshot.loops[0].state = LoopState::Closing;
    assert_eq!(loop_3(&snapshot).0, [Reason::AutoclearPending]);

    let mut snapshot = with_loop();
    let mut opener = process(50, 1);
    let node = Place { mount: 1, device: ROOT_DISK };
    let block_device = Some(loop_number(3));
    opener.files = vec![FileHold {
        descriptor: 4,
        place: node,
        block_device,
        is_path: false,
        namespace: None,
        text: Vec::new(),
    }];
    snapshot.processes = vec![opener];
    assert_eq!(loop_3(&snapshot).0, [Reason::OpenDeviceFd]);

    let mut snapshot = with_loop();
    let mut inside = process(50, 1);
    inside.current_directory = Some(Place { mount: 99, device: loop_number(3) });
    snapshot.processes = vec![inside];
    assert_eq!(loop_3(&snapshot).0, [Reason::DetachedMountFd]);
}

#[test]
fn names_each_way_to_hold_a_mount() {
    let mut snapshot = with_loop();
    snapshot.mounts.extend([
        mount(2, 1, loop_number(3), "/w"),
        mount(3, 2, ROOT_DISK, "/w"),
        mount(4, 2, ROOT_DISK, "/w/dev"),
    ]);
    let mut mapper = process(50, 1);
    mapper.mapped = vec![loop_number(3)];
    snapshot.processes = vec![mapper];
    assert_eq!(
        reasons_of(ResourceIdentity::Mount(snapshot.mounts[1].identity), &snapshot).0,
        [Reason::ChildMount, Reason::StackedMount, Reason::Mapping]
    );
}

#[test]
fn nothing_that_holds_is_said_as_such() {
    let snapshot = with_loop();
    assert_eq!(loop_3(&snapshot), (Vec::new(), String::new()));
}

#[test]
fn a_ring_of_holders_ends() {
    // Two devices whose backing files lie on each other: the kernel refuses it, text cannot.
    let mut snapshot = host();
    snapshot.loops = vec![loop_device(3, loop_number(4)), loop_device(4, loop_number(3))];
    let tree = why("/dev/loop3", &snapshot);
    fn depth(held: &Held) -> usize {
        1 + held.holders.iter().map(|holder| depth(&holder.by)).max().unwrap_or(0)
    }
    assert_eq!(depth(&tree), 3);
}

#[test]
fn a_long_list_is_cut_short_and_says_so() {
    let mut snapshot = with_loop();
    snapshot.mounts.push(mount(2, 1, loop_number(3), "/w"));
    for pid in 50..60 {
        let mut holder = process(pid, 1);
        holder.current_directory = Some(Place { mount: 2, device: loop_number(3) });
        snapshot.processes.push(holder);
    }
    let (_, detail) = reasons_of(ResourceIdentity::Mount(snapshot.mounts[1].identity), &snapshot);
    assert!(detail.ends_with("; and 7 more, see `hostler why`"), "{detail}");
}

#[test]
fn finds_what_people_type() {
    let mut snapshot = with_loop();
    snapshot.mounts.push(mount(2, 1, loop_number(3), "/w\nx"));
    snapshot.processes = vec![process(50, 1)];
    snapshot.maps = vec![map(0, &[loop_number(3)])];
    snapshot.swaps =
        vec![Swap { identity: SwapIdentity::Device(map_number(0)), path: b"/dev/dm-0".to_vec() }];
    let ownership = attribute(&snapshot, [&lease(1, Phase::Over)]);
    for (text, found) in [
        ("/dev/loop3", Some("loop device /dev/loop3 (backing file /images/3.img)")),
        ("loop3", Some("loop device /dev/loop3 (backing file /images/3.img)")),
        ("/dev/loop33", None),
        ("50", Some("process 50 (builder, uid 1000)")),
        ("/w\\nx", Some("mount /w\\nx (ext4)")),
        ("/w\nx", Some("mount /w\\nx (ext4)")),
        ("/dev/mapper/vg-lv0", Some("logical volume /dev/mapper/vg-lv0 (dm-0)")),
        ("/dev/dm-0", Some("logical volume /dev/mapper/vg-lv0 (dm-0)")),
        ("/w", None),
        ("", None),
    ] {
        let what = explain(text, &snapshot, &ownership, |_| Access::Own).map(|held| held.what);
        assert_eq!(what.as_deref(), found, "{text}");
    }
}

#[test]
fn names_each_layer_of_a_stack_with_what_would_end_it() {
    let mut snapshot = with_loop();
    snapshot.loops[0].partitions =
        vec![Partition { number: 1, device: DeviceNumber { major: 259, minor: 1 } }];
    snapshot.maps = vec![map(0, &[DeviceNumber { major: 259, minor: 1 }])];
    snapshot.swaps =
        vec![Swap { identity: SwapIdentity::Device(map_number(0)), path: b"/dev/dm-0".to_vec() }];
    let tree = why("/dev/loop3", &snapshot);
    let partition = &tree.holders[0];
    assert_eq!((partition.reason, partition.by.what.as_str()), (Reason::Partition, "partition /dev/loop3p1"));
    let map = &partition.by.holders[0];
    assert_eq!((map.reason, map.remedy.as_str()), (Reason::Map, "dmsetup remove vg-lv0"));
    let swap = &map.by.holders[0];
    assert_eq!((swap.reason, swap.remedy.as_str()), (Reason::Swap, "swapoff /dev/dm-0"));
    assert_eq!(loop_3(&snapshot).0, [Reason::Map]);
}

#[test]
fn a_file_system_that_nothing_shows_is_frozen_or_unknown_and_never_free() {
    let mut snapshot = with_loop();
    let filesystem = |frozen| Filesystem {
        instance: 1,
        kind: "ext4".to_owned(),
        blocks: vec![loop_number(3)],
        shown_as: Vec::new(),
        frozen,
    };
    snapshot.filesystems = vec![filesystem(None)];
    assert_eq!(loop_3(&snapshot).0, [Reason::Unknown]);
    snapshot.filesystems = vec![filesystem(Some(true))];
    assert_eq!(loop_3(&snapshot).0, [Reason::Frozen]);
    let tree = why("/dev/loop3", &snapshot);
    assert!(tree.holders[0].remedy.contains("fsfreeze --unfreeze"), "{tree:?}");
}

#[test]
fn a_mount_elsewhere_names_who_keeps_its_namespace() {
    let mut snapshot = with_loop();
    let mut foreign = mount(2, 1, loop_number(3), "/w x");
    foreign.identity.namespace = MountNamespace(77);
    snapshot.mounts.push(foreign);
    let mut resident = process(50, 1);
    resident.namespace = Some(MountNamespace(77));
    snapshot.processes = vec![resident];
    snapshot.namespaces =
        vec![Namespace { namespace: MountNamespace(77), unique: Some(5), other_user_namespace: true }];
    let tree = why("/dev/loop3", &snapshot);
    assert_eq!(tree.holders[0].reason, Reason::ForeignNamespace);
    assert_eq!(tree.holders[0].remedy, "nsenter -m -t 50 umount '/w x'");
    let reasons: Vec<Reason> = tree.holders[0].by.holders.iter().map(|holder| holder.reason).collect();
    assert_eq!(reasons, [Reason::MntLocked, Reason::ForeignNamespace]);

    snapshot.processes.clear();
    let mut file = mount(3, 1, DeviceNumber { major: 0, minor: 4 }, "/run/ns");
    file.filesystem = "nsfs".to_owned();
    file.root = b"mnt:[77]".to_vec();
    snapshot.mounts.push(file);
    let tree = why("/dev/loop3", &snapshot);
    assert_eq!(tree.holders[0].remedy, "nsenter --mount=/run/ns umount '/w x'");
    assert_eq!(tree.holders[0].by.holders[1].remedy, "umount /run/ns");
}

#[test]
fn what_may_not_be_asked_about_is_answered_as_if_it_were_not_there() {
    let snapshot = with_loop();
    let ownership = attribute(&snapshot, [&lease(1, Phase::Over)]);
    assert!(explain("/dev/loop3", &snapshot, &ownership, |_| Access::Seen).is_some());
    assert!(explain("/dev/loop3", &snapshot, &ownership, |_| Access::Hidden).is_none());
}

fn count(held: &Held) -> usize {
    1 + held.holders.iter().map(|holder| count(&holder.by)).sum::<usize>()
}

/// Mounts on one parent, the deepest first, each of which is hidden by all that came later.
fn hiding_each_other(depth: u64) -> Snapshot {
    let mut snapshot = host();
    snapshot.mounts.extend((0..depth).map(|at| {
        let point = format!("/d{}", "/a".repeat(usize::try_from(depth - at).expect("small")));
        mount(2 + at, 1, DeviceNumber { major: 0, minor: 60 }, &point)
    }));
    snapshot
}

#[test]
fn mounts_that_hide_each_other_are_each_told_of_once() {
    let tree = why(&format!("/d{}", "/a".repeat(30)), &hiding_each_other(30));
    // All edges, and not all the 2^29 ways along them.
    assert_eq!(count(&tree), 1 + 29 * 30 / 2);
    let last = &tree.holders[28].by;
    assert_eq!((last.what.as_str(), last.holders.len()), ("mount /d/a (ext4)", 0));
    let second = &tree.holders[0].by.holders[0].by;
    assert_eq!(
        second.what,
        format!("mount /d{} (ext4) (what holds it is told elsewhere in this answer)", "/a".repeat(28))
    );
    let tree = why(&format!("/d{}", "/a".repeat(200)), &hiding_each_other(200));
    // And of each that is not told whole, one line that says so.
    assert!((NAMED_LIMIT..NAMED_LIMIT + 40).contains(&count(&tree)), "{}", count(&tree));
    // What is nearest is told first, and what there is no room for is said to be left out.
    assert_eq!(tree.holders.len(), 199);
    let cut = tree.holders.iter().find(|holder| holder.by.what.contains("is left out"));
    assert!(cut.is_some(), "{tree:?}");
    let more = tree.holders.iter().filter_map(|holder| holder.by.holders.last());
    assert_eq!(more.filter(|last| last.by.what.contains("more, left out")).count(), 1);
}

#[test]
fn long_names_fill_an_answer_sooner() {
    let mut snapshot = with_loop();
    for number in 2..900 {
        // What is printed of each of these takes five bytes.
        let mut long = mount(number, 1, loop_number(3), &"\u{1}".repeat(4000));
        long.identity.namespace = MountNamespace(number);
        snapshot.mounts.push(long);
    }
    let tree = why("/dev/loop3", &snapshot);
    let length = serde_json::to_vec(&tree).expect("text").len();
    assert!(length < 32 * 1024 * 1024, "{length}");
    let last = tree.holders.last().expect("one that says so");
    assert!(last.by.what.ends_with("more, left out: an answer has no room for them"), "{}", last.by.what);
}

proptest! {
    #[test]
    fn an_answer_is_bounded_and_holds_nothing_of_what_is_hidden(snapshot in any_host()) {
        let ownership = attribute(&snapshot, [&lease(1, Phase::Over)]);
        let is_hidden = |resource: ResourceIdentity| match resource {
            ResourceIdentity::Process(_) => true,
            ResourceIdentity::Mount(mount) => matches!(mount.number, MountNumber::Unique(at) if at % 2 == 0),
            _ => false,
        };
        let access = |resource| if is_hidden(resource) { Access::Hidden } else { Access::Seen };
        for device in &snapshot.loops {
            let target = format!("/dev/loop{}", device.number);
            let Some(tree) = explain(&target, &snapshot, &ownership, access) else { continue };
            prop_assert!(count(&tree) <= NAMED_LIMIT + 40);
            let mut left = vec![&tree];
            while let Some(held) = left.pop() {
                prop_assert!(!held.what.contains("builder"), "{}", held.what);
                for holder in &held.holders {
                    let is_anothers = ["of another user's", "of other users"];
                    let is_anothers = is_anothers.iter().any(|others| holder.by.what.ends_with(others));
                    prop_assert!(!is_anothers || holder.by.holders.is_empty() && holder.remedy.is_empty());
                    prop_assert!(!holder.remedy.starts_with("kill"), "{}", holder.remedy);
                    left.push(&holder.by);
                }
            }
        }
    }
}

#[test]
fn what_is_anothers_is_named_by_its_kind_unless_it_holds_ones_own() {
    let mut snapshot = with_loop();
    snapshot.mounts.push(mount(2, 1, loop_number(3), "/w"));
    let others = snapshot.mounts[1].clone();
    snapshot.processes = vec![standing(50, &others)];
    let ownership = attribute(&snapshot, [&lease(1, Phase::Over)]);
    let asked = |device: Access| {
        let tree = explain("/dev/loop3", &snapshot, &ownership, |resource| match resource {
            ResourceIdentity::Loop(_) => device,
            _ => Access::Hidden,
        });
        tree.expect("it may be asked about").holders.remove(0)
    };
    let (seen, own) = (asked(Access::Seen), asked(Access::Own));
    assert_eq!((seen.by.what.as_str(), seen.remedy.as_str()), ("a mount of another user's", ""));
    assert_eq!((own.by.what.as_str(), own.remedy.as_str()), ("mount /w (ext4)", "umount /w"));
    assert_eq!((seen.by.holders.len(), own.by.holders.len()), (0, 0));
    snapshot.mounts.push(mount(3, 1, loop_number(3), "/x"));
    let tree = explain("/dev/loop3", &snapshot, &ownership, |resource| match resource {
        ResourceIdentity::Loop(_) => Access::Seen,
        _ => Access::Hidden,
    });
    let holders = tree.expect("it may be asked about").holders;
    let told: Vec<&str> = holders.iter().map(|holder| holder.by.what.as_str()).collect();
    assert_eq!(told, ["2 mounts of other users"]);
}
