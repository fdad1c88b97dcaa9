use super::super::attribute;
use super::super::fixture::{
    ROOT_DISK, host, lease, loop_device, loop_identity, loop_number, mount, standing,
};
use super::*;
use crate::model::{DeviceNumber, MountNamespace, Phase};

/// A host with `/dev/loop0` mounted on `/mnt`, and something mounted on that.
fn mounted_loop() -> Snapshot {
    let mut snapshot = host();
    snapshot.loops.push(loop_device(0, ROOT_DISK));
    snapshot.mounts.push(mount(2, 1, loop_number(0), "/mnt"));
    snapshot.mounts.push(mount(3, 2, DeviceNumber { major: 0, minor: 50 }, "/mnt/tmp"));
    snapshot
}

fn ask(target: &str, snapshot: &Snapshot) -> Result<BTreeSet<ResourceIdentity>, NotTaken> {
    requested(target, snapshot, &attribute(snapshot, [])).map(|taking| taking.what)
}

#[test]
fn what_is_named_is_taken_with_all_that_lies_on_it() {
    let mut snapshot = mounted_loop();
    let device = ResourceIdentity::Loop(loop_identity(0, ROOT_DISK));
    let [_, lower, upper] = [0, 1, 2].map(|at: usize| ResourceIdentity::Mount(snapshot.mounts[at].identity));
    assert_eq!(ask("/dev/loop0", &snapshot), Ok(BTreeSet::from([device, lower, upper])));
    assert_eq!(ask("/mnt", &snapshot), Ok(BTreeSet::from([lower, upper])));
    // Who uses it is the report's to say.
    let user = standing(50, &snapshot.mounts[1]);
    snapshot.processes.push(user);
    assert_eq!(ask("/mnt", &snapshot), Ok(BTreeSet::from([lower, upper])));
    // A loop device on a mount is somebody's.
    snapshot.loops.push(loop_device(1, loop_number(0)));
    assert_eq!(ask("/mnt", &snapshot), Ok(BTreeSet::from([lower, upper])));
    assert_eq!(ask("/dev/loop0", &snapshot).map(|what| what.len()), Ok(4));
}

#[test]
fn what_is_somebodys_is_refused() {
    let mut snapshot = mounted_loop();
    assert_eq!(ask("/nowhere", &snapshot), Err(NotTaken::Nothing));
    assert_eq!(ask("/", &snapshot), Err(NotTaken::Root));
    snapshot.processes.push(super::super::fixture::process(50, 1));
    assert_eq!(ask("50", &snapshot), Err(NotTaken::AnotherKind));
    let mut owner = lease(4, Phase::Open);
    owner.loops.insert(loop_identity(0, ROOT_DISK));
    let ownership = attribute(&snapshot, [&owner]);
    let refused = requested("/dev/loop0", &snapshot, &ownership).expect_err("a lease's");
    assert_eq!(refused, NotTaken::OfALease(LeaseId(4)));
    let mut other = lease(5, Phase::Over);
    other.loops.insert(loop_identity(0, ROOT_DISK));
    let ownership = attribute(&snapshot, [&owner, &other]);
    assert_eq!(requested("/dev/loop0", &snapshot, &ownership), Err(NotTaken::Doubtful));
    snapshot.protected.insert(ResourceIdentity::Loop(loop_identity(0, ROOT_DISK)));
    assert_eq!(ask("/dev/loop0", &snapshot), Err(NotTaken::Protected));
    assert_eq!(ask("/mnt", &snapshot), Err(NotTaken::Protected));
}

#[test]
fn what_is_mounted_elsewhere_only_is_refused() {
    let mut snapshot = mounted_loop();
    snapshot.mounts[1].identity.namespace = MountNamespace(2);
    assert_eq!(ask("/mnt", &snapshot), Err(NotTaken::Elsewhere));
}
