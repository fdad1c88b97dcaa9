//! The part of a look that is about mounts: those of the own namespace, then those of all others that
//! matter.

use std::collections::HashSet;

use super::blocks::Careful;
use crate::kernel::mounts::{self, Wanted};
use crate::kernel::namespaces;
use crate::model::{DeviceNumber, Gap, LoopState, MountNamespace, Snapshot};

/// Reads the mounts of the own namespace.
pub(super) fn read_own(touching: &mut dyn FnMut(Option<u32>, &str), snapshot: &mut Snapshot) {
    touching(None, "mounts");
    match mounts::own() {
        Ok((namespace, mounts)) => {
            snapshot.namespace = Some(namespace);
            snapshot.mounts = mounts;
        }
        Err(error) => snapshot.gaps.push(Gap::Mounts(error.to_string())),
    }
}

/// Reads those of all others into a snapshot that has its block devices and file systems already.
///
/// Each namespace is left again before the next, and may end with that, which ends the mounts in it. Users
/// make namespaces, and can have them change all the time: when all of them together took too long, the next
/// look tells of each.
pub(super) fn read_others(careful: &mut Careful<'_>, snapshot: &mut Snapshot) {
    const ALL: &str = "mount namespaces";
    let one_by_one = !careful.may_touch(None, ALL);
    let mut may_look = |namespace: MountNamespace| {
        !one_by_one || careful.may_touch(None, &format!("the mounts of namespace {}", namespace.0))
    };
    match namespaces::others(&snapshot.mounts, &wanted(snapshot), &mut may_look) {
        Ok(others) => {
            snapshot.namespaces = others.namespaces;
            snapshot.mounts.extend(others.mounts);
            let gaps =
                others.unreadable.into_iter().map(|(namespace, cause)| Gap::Namespace(namespace, cause));
            snapshot.gaps.extend(gaps);
            snapshot.gaps.extend(others.unlisted.map(Gap::Namespaces));
        }
        Err(error) => snapshot.gaps.push(Gap::Namespaces(error.to_string())),
    }
}

/// The file systems whose mounts in other namespaces matter: those on any block device of the snapshot, and
/// those without one that images of loop devices lie on, but for the one that the host's root is. Each namespace has that one, with all it holds mounted on it,
/// and no lease can have made it.
fn wanted(snapshot: &Snapshot) -> Wanted {
    let mut devices = HashSet::new();
    for device in &snapshot.loops {
        // Of a file system in memory or the like, such as a container's, it matters whose other mounts are.
        if let LoopState::Bound(backing) = device.state
            && backing.device.major == 0
        {
            devices.insert(backing.device);
        }
        devices.insert(device.device);
        devices.extend(device.partitions.iter().map(|partition| partition.device));
    }
    for map in &snapshot.maps {
        devices.insert(map.identity.device);
        devices.extend(map.partitions.iter().map(|partition| partition.device));
    }
    for nbd in &snapshot.nbds {
        devices.insert(nbd.device);
        devices.extend(nbd.partitions.iter().map(|partition| partition.device));
    }
    let on_these: Vec<DeviceNumber> = snapshot
        .filesystems
        .iter()
        .filter(|filesystem| filesystem.blocks.iter().any(|block| devices.contains(block)))
        .flat_map(|filesystem| filesystem.shown_as.iter().copied())
        .collect();
    devices.extend(on_these);
    for root in snapshot.mounts.iter().filter(|mount| mount.point == b"/") {
        devices.remove(&root.device());
    }
    Wanted { devices }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{
        BackingFile, DiskSequence, Filesystem, LoopDevice, Map, MapIdentity, MapKind, Mount, MountIdentity,
        MountNumber, Partition,
    };

    fn device(major: u32, minor: u32) -> DeviceNumber {
        DeviceNumber { major, minor }
    }

    fn map(minor: u32) -> Map {
        let identity = MapIdentity {
            kind: MapKind::DeviceMapper,
            device: device(252, minor),
            sequence: DiskSequence(1),
        };
        Map { identity, name: String::new(), uuid: String::new(), lower: Vec::new(), partitions: Vec::new() }
    }

    #[test]
    fn wants_what_lies_on_block_devices_but_not_the_hosts_root() {
        let mut snapshot = Snapshot::default();
        snapshot.loops.push(LoopDevice {
            number: 3,
            device: device(7, 3),
            sequence: None,
            state: LoopState::Bound(BackingFile { device: device(8, 1), inode: 5 }),
            backing_text: String::new(),
            autoclear: false,
            partitions: vec![Partition { number: 1, device: device(259, 0) }],
        });
        let on_tmpfs = LoopState::Bound(BackingFile { device: device(0, 60), inode: 5 });
        let image = LoopDevice {
            number: 4,
            device: device(7, 4),
            state: on_tmpfs,
            partitions: Vec::new(),
            ..snapshot.loops[0].clone()
        };
        snapshot.loops.push(image);
        snapshot.maps.extend([map(0), map(1)]);
        let filesystem = |blocks, shown_as| Filesystem {
            kind: "btrfs".to_owned(),
            instance: 1,
            blocks,
            shown_as,
            frozen: None,
        };
        snapshot.filesystems = vec![
            filesystem(vec![device(259, 0)], vec![device(0, 50)]),
            filesystem(vec![device(8, 1)], vec![device(0, 51)]),
        ];
        snapshot.mounts.push(Mount {
            identity: MountIdentity {
                number: MountNumber::Unique(1),
                namespace: MountNamespace(1),
                device: device(252, 0),
            },
            short_number: 1,
            parent: None,
            point: b"/".to_vec(),
            root: b"/".to_vec(),
            filesystem: "ext4".to_owned(),
            source: Vec::new(),
            peers: None,
            master: None,
            layers: Vec::new(),
            user: None,
        });
        let expected =
            [device(7, 3), device(259, 0), device(7, 4), device(0, 60), device(252, 1), device(0, 50)];
        assert_eq!(wanted(&snapshot).devices, HashSet::from(expected));
    }
}
