use hostler_protocol::resource::Outcome;

use super::super::fixture::{
    ROOT_DISK, host, lease, loop_device, loop_identity, mount, process, process_identity,
};
use super::{doubts, verify};
use crate::model::{
    Claim, DirectoryIdentity, DiskSequence, Gap, LoopState, Phase, Plan, ResourceIdentity, Step, StepResult,
};

fn detach(number: u32) -> (ResourceIdentity, Plan) {
    let identity = loop_identity(number, ROOT_DISK);
    (
        ResourceIdentity::Loop(identity),
        Plan { steps: vec![Step::DetachLoop { identity, partitions: Vec::new() }] },
    )
}

#[test]
fn a_call_that_succeeded_is_not_believed() {
    let (resource, plan) = detach(3);
    let mut after = host();
    after.loops = vec![loop_device(3, ROOT_DISK)];
    assert_eq!(verify(resource, &plan, &[StepResult::Done], &after), Outcome::Pinned);
    after.loops[0].state = LoopState::Closing;
    assert_eq!(verify(resource, &plan, &[StepResult::Done], &after), Outcome::Pinned);
    after.loops.clear();
    assert_eq!(verify(resource, &plan, &[StepResult::Done], &after), Outcome::Reclaimed);
}

#[test]
fn what_went_by_itself_is_told_from_what_was_taken() {
    let (resource, plan) = detach(3);
    assert_eq!(verify(resource, &plan, &[StepResult::Gone], &host()), Outcome::AlreadyGone);
    assert_eq!(verify(resource, &Plan::default(), &[], &host()), Outcome::AlreadyGone);
    // A step may fail because an earlier one freed its thing in passing.
    let failed = StepResult::Failed { cause: "EBUSY".to_owned() };
    assert_eq!(verify(resource, &plan, &[failed], &host()), Outcome::Reclaimed);
}

#[test]
fn a_name_in_use_by_something_else_is_told() {
    let (resource, plan) = detach(3);
    let mut after = host();
    let mut other = loop_device(3, ROOT_DISK);
    other.sequence = Some(DiskSequence(900));
    after.loops = vec![other];
    assert_eq!(verify(resource, &plan, &[StepResult::Replaced], &after), Outcome::Replaced);
    assert_eq!(verify(resource, &plan, &[StepResult::Done], &after), Outcome::Reclaimed);
}

#[test]
fn what_could_not_be_read_is_unknown_and_never_gone() {
    let (resource, plan) = detach(3);
    let mut after = host();
    after.gaps = vec![Gap::Loops("denied".to_owned())];
    assert_eq!(verify(resource, &plan, &[StepResult::Done], &after), Outcome::Unknown);
    after.gaps.clear();
    let mut silent = loop_device(3, ROOT_DISK);
    silent.state = LoopState::Unread;
    after.loops = vec![silent];
    assert_eq!(verify(resource, &plan, &[StepResult::Done], &after), Outcome::Unknown);

    let gone = ResourceIdentity::Mount(mount(2, 1, ROOT_DISK, "/w").identity);
    let mut after = host();
    assert_eq!(verify(gone, &plan, &[StepResult::Done], &after), Outcome::AlreadyGone);
    after.gaps = vec![Gap::Mounts("denied".to_owned())];
    assert_eq!(verify(gone, &plan, &[StepResult::Done], &after), Outcome::Unknown);
}

#[test]
fn a_zombie_holds_nothing() {
    let resource = ResourceIdentity::Process(process_identity(50));
    let mut after = host();
    after.processes = vec![process(50, 1)];
    assert_eq!(verify(resource, &Plan::default(), &[], &after), Outcome::Pinned);
    after.processes[0].ended = true;
    assert_eq!(verify(resource, &Plan::default(), &[], &after), Outcome::AlreadyGone);
}

#[test]
fn a_loop_device_that_goes_with_its_mount_was_taken_back() {
    let (resource, detach) = detach(3);
    let mounted = mount(2, 1, super::super::fixture::loop_number(3), "/w");
    let unmount = Step::Unmount {
        mount: mounted.identity,
        short_number: 2,
        point: mounted.point,
        apart_from: None,
        is_elsewhere: false,
        how: crate::model::UnmountHow::Plain,
    };
    let plan = Plan { steps: [vec![unmount], detach.steps].concat() };
    let results = [StepResult::Done, StepResult::Gone];
    assert_eq!(verify(resource, &plan, &results, &host()), Outcome::Reclaimed);
    let results = [StepResult::Gone, StepResult::Gone];
    assert_eq!(verify(resource, &plan, &results, &host()), Outcome::AlreadyGone);
}

#[test]
fn a_device_that_could_not_be_asked_is_a_doubt_of_whoever_may_have_it() {
    let mut snapshot = host();
    let mut device = loop_device(3, ROOT_DISK);
    device.state = LoopState::Unread;
    snapshot.loops = vec![device];
    snapshot.gaps = vec![Gap::Loop(3, "EBUSY".to_owned())];
    let doubted = |path: &str, before: u64, closed: bool| {
        let mut lease = lease(1, Phase::Over);
        let directory = DirectoryIdentity { device: ROOT_DISK, inode: 2 };
        lease.claims.push(Claim {
            directory,
            scratch: false,
            path: path.to_owned(),
            handle: None,
            mount: None,
        });
        lease.loops_before = DiskSequence(before);
        lease.evidence_closed = closed;
        doubts(&lease, &snapshot).len()
    };
    // Its file is /images/3.img, and its number is 103.
    assert_eq!(doubted("/images", 102, false), 1);
    assert_eq!(doubted("…ges", 102, false), 1);
    assert_eq!(doubted("/image", 102, false), 0);
    assert_eq!(doubted("/images", 103, false), 0);
    assert_eq!(doubted("/images", 102, true), 0);
}
