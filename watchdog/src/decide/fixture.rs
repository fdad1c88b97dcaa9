//! Small hosts for the tests of decisions, and random ones.

use std::collections::BTreeSet;

use hostler_protocol::lease::{Epoch, LeaseId, Tracking};
use proptest::prelude::*;

use crate::model::{
    BackingFile, BootId, DeviceNumber, DiskSequence, Lease, LoopDevice, LoopIdentity, LoopState, Mount,
    MountIdentity, MountNamespace, MountNumber, Phase, Process, ProcessIdentity, Snapshot, StartTime,
    UnderClaim,
};

pub(super) const HOST: MountNamespace = MountNamespace(1);
pub(super) const ROOT_DISK: DeviceNumber = DeviceNumber { major: 254, minor: 0 };

pub(super) fn lease(id: u64, phase: Phase) -> Lease {
    Lease {
        id: LeaseId(id),
        epoch: Epoch(1),
        name: format!("job {id}"),
        uid: 1000,
        owner: process_identity(9000 + u32::try_from(id).expect("small")),
        tracking: Tracking::Cgroup,
        cgroup: None,
        owner_inside: false,
        phase,
        claims: Vec::new(),
        loops: BTreeSet::new(),
        mounts: BTreeSet::new(),
        processes: BTreeSet::new(),
        maps: BTreeSet::new(),
        namespaces: BTreeSet::new(),
        namespaces_before: 0,
        loops_before: DiskSequence(0),
        mounts_before: BTreeSet::new(),
        boot: BootId("a-boot".to_owned()),
        evidence_closed: false,
        opened_at_ms: 0,
        deadline_ms: None,
    }
}

pub(super) fn process_identity(pid: u32) -> ProcessIdentity {
    ProcessIdentity { pid, start: StartTime(u64::from(pid)) }
}

pub(super) fn process(pid: u32, parent: u32) -> Process {
    Process {
        identity: process_identity(pid),
        parent,
        uid: 1000,
        name: b"builder".to_vec(),
        ended: false,
        namespace: Some(HOST),
        current_directory: None,
        root_directory: None,
        program: None,
        files: Vec::new(),
        mapped: Vec::new(),
        unit: String::new(),
    }
}

pub(super) fn loop_number(number: u32) -> DeviceNumber {
    DeviceNumber { major: 7, minor: number }
}

/// `/dev/loopN` with sequence `100 + N` and a backing file of inode `1000 + N` on `on`.
pub(super) fn loop_device(number: u32, on: DeviceNumber) -> LoopDevice {
    LoopDevice {
        number,
        device: loop_number(number),
        sequence: Some(DiskSequence(100 + u64::from(number))),
        state: LoopState::Bound(BackingFile { device: on, inode: 1000 + u64::from(number) }),
        backing_text: format!("/images/{number}.img"),
        autoclear: false,
        partitions: Vec::new(),
    }
}

pub(super) fn loop_identity(number: u32, on: DeviceNumber) -> LoopIdentity {
    loop_device(number, on).identity().expect("bound and numbered")
}

pub(super) fn mount(number: u64, parent: u64, device: DeviceNumber, point: &str) -> Mount {
    Mount {
        identity: MountIdentity { number: MountNumber::Unique(10_000 + number), namespace: HOST, device },
        short_number: number,
        parent: (parent != 0).then_some(parent),
        point: point.as_bytes().to_vec(),
        root: b"/".to_vec(),
        filesystem: "ext4".to_owned(),
        source: b"src".to_vec(),
        peers: None,
        master: None,
        layers: Vec::new(),
    }
}

/// A host with its root mounted as number 1.
pub(super) fn host() -> Snapshot {
    Snapshot { namespace: Some(HOST), mounts: vec![mount(1, 0, ROOT_DISK, "/")], ..Snapshot::default() }
}

/// Says that the backing file of a loop device lies below the lease's claim.
pub(super) fn claim_file(snapshot: &mut Snapshot, lease: u64, device: &LoopDevice) {
    let LoopState::Bound(what) = device.state else { panic!("the fixture's devices are bound") };
    snapshot.claimed_files.push(UnderClaim { lease: LeaseId(lease), what });
}

/// Hosts with loop devices, mounts of and on them, nested devices and claims, some of them a
/// lease's and some nobody's; every shape that the parts can make.
pub(super) fn any_host() -> impl Strategy<Value = Snapshot> {
    let loops = proptest::collection::vec((any::<bool>(), any::<prop::sample::Index>(), 0..3u8), 0..6);
    let mounts = proptest::collection::vec(
        (any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<bool>(), 0..10u8),
        0..12,
    );
    (loops, mounts).prop_map(|(loops, mounts)| {
        let mut snapshot = host();
        for (number, (claimed, on, nested)) in loops.iter().enumerate() {
            let number = u32::try_from(number).expect("few");
            // Some backing files lie on an earlier loop device's file system.
            let on = if *nested == 0 && number > 0 {
                loop_number(u32::try_from(on.index(number as usize)).expect("few"))
            } else {
                ROOT_DISK
            };
            let device = loop_device(number, on);
            if *claimed {
                claim_file(&mut snapshot, 1, &device);
            }
            snapshot.loops.push(device);
        }
        for (index, (parent, device, of_loop, claimed)) in mounts.iter().enumerate() {
            let number = index as u64 + 2;
            let parent = snapshot.mounts[parent.index(snapshot.mounts.len())].short_number;
            let device = match snapshot.loops.as_slice() {
                loops if *of_loop && !loops.is_empty() => loops[device.index(loops.len())].device,
                _ => ROOT_DISK,
            };
            let mount = mount(number, parent, device, &format!("/m{number}"));
            if *claimed == 0 {
                snapshot.claimed_mounts.push(UnderClaim { lease: LeaseId(1), what: mount.identity });
            }
            snapshot.mounts.push(mount);
        }
        snapshot
    })
}
