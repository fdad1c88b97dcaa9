use hostler_protocol::why::{Held, Reason};

use super::super::attribute;
use super::super::fixture::{ROOT_DISK, host, lease, loop_device, loop_number, mount, process};
use super::{Target, explain, reasons_for};
use crate::model::{FileHold, LoopState, MountNamespace, Phase, Place, Snapshot};

fn reasons(target: Target, snapshot: &Snapshot) -> Vec<Reason> {
    let ownership = attribute(snapshot, [&lease(1, Phase::Over)]);
    reasons_for(target, snapshot, &ownership).0
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
    let ownership = attribute(&snapshot, [&lease(1, Phase::Over)]);
    let tree = explain(Target::Loop(3), &snapshot, &ownership);
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
    assert_eq!(reasons(Target::Loop(3), &snapshot), [Reason::ForeignNamespace]);

    let mut snapshot = with_loop();
    snapshot.loops.push(loop_device(4, loop_number(3)));
    assert_eq!(reasons(Target::Loop(3), &snapshot), [Reason::NestedLoop]);

    let mut snapshot = with_loop();
    snapshot.loops[0].state = LoopState::Closing;
    assert_eq!(reasons(Target::Loop(3), &snapshot), [Reason::AutoclearPending]);

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
    assert_eq!(reasons(Target::Loop(3), &snapshot), [Reason::OpenDeviceFd]);

    let mut snapshot = with_loop();
    let mut inside = process(50, 1);
    inside.current_directory = Some(Place { mount: 99, device: loop_number(3) });
    snapshot.processes = vec![inside];
    assert_eq!(reasons(Target::Loop(3), &snapshot), [Reason::DetachedMountFd]);
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
        reasons(Target::Mount(2), &snapshot),
        [Reason::ChildMount, Reason::StackedMount, Reason::Mapping]
    );
}

#[test]
fn nothing_that_holds_is_said_as_such() {
    let snapshot = with_loop();
    let ownership = attribute(&snapshot, [&lease(1, Phase::Over)]);
    assert_eq!(reasons_for(Target::Loop(3), &snapshot, &ownership), (Vec::new(), String::new()));
}

#[test]
fn a_ring_of_holders_ends() {
    // Two devices whose backing files lie on each other: the kernel refuses it, text cannot.
    let mut snapshot = host();
    snapshot.loops = vec![loop_device(3, loop_number(4)), loop_device(4, loop_number(3))];
    let ownership = attribute(&snapshot, [&lease(1, Phase::Over)]);
    let tree = explain(Target::Loop(3), &snapshot, &ownership);
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
    let ownership = attribute(&snapshot, [&lease(1, Phase::Over)]);
    let (_, detail) = reasons_for(Target::Mount(2), &snapshot, &ownership);
    assert!(detail.ends_with("; and 7 more, see `hostler why`"), "{detail}");
}

#[test]
fn finds_what_people_type() {
    let mut snapshot = with_loop();
    snapshot.mounts.push(mount(2, 1, loop_number(3), "/w\nx"));
    snapshot.processes = vec![process(50, 1)];
    for (text, found) in [
        ("/dev/loop3", Some(Target::Loop(3))),
        ("loop3", Some(Target::Loop(3))),
        ("/dev/loop33", None),
        ("50", Some(Target::Process(50))),
        ("/w\\nx", Some(Target::Mount(2))),
        ("/w\nx", Some(Target::Mount(2))),
        ("/", Some(Target::Mount(1))),
        ("/nowhere", None),
    ] {
        assert_eq!(Target::find(text, &snapshot), found, "{text}");
    }
}
