//! Small hosts for the tests of decisions, and random ones.

use std::collections::BTreeSet;

use hostler_protocol::lease::{Epoch, LeaseId, Tracking};
use proptest::prelude::*;

pub(super) use crate::model::fixture::{HOST, mount, process, process_identity};
use crate::model::{
    BackingFile, BootId, DeviceNumber, DiskSequence, Filesystem, Lease, LoopDevice, LoopIdentity, LoopState,
    Map, MapIdentity, MapKind, Mount, MountNamespace, Opener, Phase, Place, Process, Snapshot, Swap,
    SwapIdentity, UnderClaim,
};

pub(super) const ROOT_DISK: DeviceNumber = DeviceNumber { major: 254, minor: 0 };

pub(super) fn lease(id: u64, phase: Phase) -> Lease {
    Lease {
        id: LeaseId(id),
        epoch: Epoch(1),
        name: format!("job {id}"),
        opener: Opener::Client,
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
        namespaces_there: Some(BTreeSet::new()),
        loops_before: DiskSequence(0),
        mounts_before: BTreeSet::new(),
        boot: BootId("a-boot".to_owned()),
        evidence_closed: false,
        owner_handle: None,
        opened_at_ms: 0,
        deadline_ms: None,
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

/// A host with its root mounted as number 1.
pub(super) fn host() -> Snapshot {
    Snapshot { namespace: Some(HOST), mounts: vec![mount(1, 0, ROOT_DISK, "/")], ..Snapshot::default() }
}

/// Says that the backing file of a loop device lies below the lease's claim.
pub(super) fn claim_file(snapshot: &mut Snapshot, lease: u64, device: &LoopDevice) {
    let LoopState::Bound(what) = device.state else { panic!("the fixture's devices are bound") };
    snapshot.claimed_files.push(UnderClaim { lease: LeaseId(lease), what });
}

/// A device-mapper map `dm-N` on these devices.
pub(super) fn map(number: u32, lower: &[DeviceNumber]) -> Map {
    let device = map_number(number);
    Map {
        identity: MapIdentity {
            kind: MapKind::DeviceMapper,
            device,
            sequence: DiskSequence(500 + u64::from(number)),
        },
        name: format!("vg-lv{number}"),
        uuid: format!("LVM-{number}"),
        lower: lower.to_vec(),
        partitions: Vec::new(),
    }
}

pub(super) fn map_number(number: u32) -> DeviceNumber {
    DeviceNumber { major: 253, minor: number }
}

/// A process with its current directory on a mount.
pub(super) fn standing(pid: u32, on: &Mount) -> Process {
    let place = Place { mount: on.short_number, device: on.device() };
    Process { current_directory: Some(place), ..process(pid, 1) }
}

/// The random parts that a host is made of.
type Parts = (
    Vec<(bool, prop::sample::Index, u8, bool)>,
    Vec<(prop::sample::Index, prop::sample::Index, u8)>,
    Vec<(prop::sample::Index, prop::sample::Index, u8, u8)>,
    Vec<(prop::sample::Index, bool)>,
    Vec<(prop::sample::Index, bool)>,
);

/// Hosts with loop devices, maps, swap areas, frozen file systems, mounts of and on them in two
/// namespaces and with propagation, and processes in those; some of all that a lease's and some
/// nobody's: every shape that the parts can make.
pub(super) fn any_host() -> impl Strategy<Value = Snapshot> {
    let index = any::<prop::sample::Index>;
    let loops = proptest::collection::vec((any::<bool>(), index(), 0..3u8, any::<bool>()), 0..6);
    let maps = proptest::collection::vec((index(), index(), 0..4u8), 0..4);
    let mounts = proptest::collection::vec((index(), index(), 0..4u8, 0..20u8), 0..14);
    let swaps = proptest::collection::vec((index(), any::<bool>()), 0..3);
    let processes = proptest::collection::vec((index(), any::<bool>()), 0..3);
    (loops, maps, mounts, swaps, processes).prop_map(|parts| host_of(&parts))
}

fn host_of((loops, maps, mounts, swaps, processes): &Parts) -> Snapshot {
    let mut snapshot = host();
    for (number, (claimed, on, nested, _)) in (0..).zip(loops) {
        // Some backing files lie on an earlier loop device's file system.
        let on = match number {
            1.. if *nested == 0 => loop_number((0..number).nth(on.index(number as usize)).unwrap_or(0)),
            _ => ROOT_DISK,
        };
        let device = loop_device(number, on);
        if *claimed {
            claim_file(&mut snapshot, 1, &device);
        }
        snapshot.loops.push(device);
    }
    let mut blocks: Vec<DeviceNumber> = snapshot.loops.iter().map(|device| device.device).collect();
    for (number, (one, other, how)) in (0..).zip(maps) {
        let Some(&first) = pick(&blocks, one) else { break };
        let lower = match how {
            0 => vec![first, *pick(&blocks, other).unwrap_or(&first)],
            // One that also lies on the host's own disk is not the lease's.
            1 => vec![first, ROOT_DISK],
            _ => vec![first],
        };
        snapshot.maps.push(map(number, &lower));
        blocks.push(map_number(number));
    }
    for (number, (parent, device, of, bits)) in (2..).zip(mounts) {
        let mut parent = snapshot.mounts[parent.index(snapshot.mounts.len())].clone();
        let device = match of {
            0 => ROOT_DISK,
            _ => *pick(&blocks, device).unwrap_or(&ROOT_DISK),
        };
        let point = format!("{}/m{}", String::from_utf8_lossy(&parent.point).trim_end_matches('/'), bits % 3);
        // Where something is mounted already, the next is mounted on that.
        while let Some(upper) = snapshot
            .mounts
            .iter()
            .find(|other| other.parent == Some(parent.short_number) && other.point == point.as_bytes())
        {
            parent = upper.clone();
        }
        let mut mount = mount(number, parent.short_number, device, &point);
        mount.identity.namespace = parent.identity.namespace;
        // Some are the root of another namespace, some propagate.
        if bits % 10 == 9 {
            mount.parent = None;
            mount.identity.namespace = MountNamespace(2);
        }
        mount.peers = (bits % 4 == 1).then_some(u64::from(bits % 2));
        mount.master = (bits % 7 == 3).then_some(1);
        if *bits == 0 {
            snapshot.claimed_mounts.push(UnderClaim { lease: LeaseId(1), what: mount.identity });
        }
        snapshot.mounts.push(mount);
    }
    for (on, file) in swaps {
        let Some(device) = pick(&blocks, on) else { break };
        let inode = 5000 + snapshot.swaps.len() as u64;
        let identity = match file {
            true => SwapIdentity::File(BackingFile { device: *device, inode }),
            false => SwapIdentity::Device(*device),
        };
        if !snapshot.swaps.iter().any(|swap| swap.identity == identity) {
            snapshot.swaps.push(Swap { identity, path: b"/swap".to_vec() });
        }
    }
    for (at, (_, _, _, frozen)) in loops.iter().enumerate().filter(|(_, parts)| parts.3) {
        let device = snapshot.loops[at].device;
        let is_mounted = snapshot.mounts.iter().any(|mount| mount.device() == device);
        if !is_mounted && snapshot.maps.iter().all(|map| !map.lower.contains(&device)) {
            let blocks = vec![device];
            let filesystem = Filesystem {
                kind: "ext4".to_owned(),
                instance: 1,
                blocks,
                shown_as: Vec::new(),
                frozen: Some(*frozen),
            };
            snapshot.filesystems.push(filesystem);
        }
    }
    for (pid, (on, own)) in (50..).zip(processes) {
        let on = snapshot.mounts[on.index(snapshot.mounts.len())].clone();
        snapshot.processes.push(standing(pid, &on));
        if *own {
            snapshot.members.entry(LeaseId(1)).or_default().push(process_identity(pid));
        }
    }
    snapshot
}

fn pick<'a, T>(from: &'a [T], index: &prop::sample::Index) -> Option<&'a T> {
    if from.is_empty() { None } else { from.get(index.index(from.len())) }
}
