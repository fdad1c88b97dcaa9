//! Of which file systems the number that their mounts show has to be known.
//!
//! A btrfs lies on devices that sysfs tells, and its mounts show a number that the kernel tells nowhere
//! beside those. To learn it the file system is mounted once more, which keeps it alive for that moment: so
//! only what a decision needs is asked for, and a bystander's file system is left alone.

use std::collections::{BTreeMap, BTreeSet};

use super::attribute::Ownership;
use super::explain::find;
use super::graph::Node;
use super::index::{Block, Index};
use crate::model::{DeviceNumber, Filesystem, Snapshot};

/// What is known of the file systems that have been asked for; `None` is not known yet.
pub type Numbers = BTreeMap<u64, Option<DeviceNumber>>;

/// The file systems whose number is not in the snapshot, and that something depends on: they lie on what a
/// lease has or may have, on what a rule is about or `[protect]` names, or hold `about`, which a person
/// asked about.
#[must_use]
pub fn unnumbered(snapshot: &Snapshot, ownership: &Ownership, about: Option<&str>) -> Vec<u64> {
    let is_unnumbered = |one: &&Filesystem| one.kind == "btrfs" && one.shown_as.is_empty();
    let mut unnumbered = snapshot.filesystems.iter().filter(is_unnumbered).peekable();
    if unnumbered.peek().is_none() {
        return Vec::new();
    }
    let index = Index::new(snapshot);
    let asked = about.and_then(|target| find(target, &index));
    let is_wanted = |block: Block| {
        let is_somebodys = index.identity(block).is_some_and(|identity| {
            ownership.owners.contains_key(&identity)
                || ownership.doubtful.contains(&identity)
                || ownership.protected.contains(&identity)
                || snapshot.matches.iter().any(|found| found.what == identity)
        });
        is_somebodys
            || match asked {
                Some(Node::Block(asked)) => asked == block,
                // It may be a mount of any of them.
                Some(Node::Mount(at)) => {
                    let mount = index.mount(at.0);
                    mount.filesystem == "btrfs" && index.blocks_under(mount.device()).is_empty()
                }
                Some(_) | None => false,
            }
    };
    let lies_on_wanted =
        |one: &&Filesystem| one.blocks.iter().any(|device| below(*device, &index).into_iter().any(is_wanted));
    unnumbered.filter(lies_on_wanted).map(|one| one.instance).collect()
}

/// The block devices that a device is of, and those that it stands on through maps and arrays.
fn below(device: DeviceNumber, index: &Index<'_>) -> BTreeSet<Block> {
    let mut found = BTreeSet::new();
    let mut left = vec![device];
    while let Some(device) = left.pop() {
        if let Some(block) = index.block(device)
            && found.insert(block)
            && let Block::Map(at) = block
        {
            left.extend(&index.snapshot.maps[at].lower);
        }
    }
    found
}

/// Keeps what a look found out, for as long as the file systems live.
pub fn learn(numbers: &mut Numbers, snapshot: &Snapshot) {
    for filesystem in &snapshot.filesystems {
        if let Some(known) = numbers.get_mut(&filesystem.instance) {
            *known = filesystem.shown_as.first().copied();
        }
    }
    numbers.retain(|instance, _| snapshot.filesystems.iter().any(|one| one.instance == *instance));
}

#[cfg(test)]
mod tests {
    use super::super::attribute::attribute;
    use super::super::fixture::{
        ROOT_DISK, claim_file, host, lease, loop_device, loop_number, map, map_number,
    };
    use super::*;
    use crate::decide::fixture::{loop_identity, mount};
    use crate::model::{Phase, ResourceIdentity};

    fn btrfs(instance: u64, blocks: &[DeviceNumber]) -> Filesystem {
        Filesystem {
            kind: "btrfs".to_owned(),
            instance,
            blocks: blocks.to_vec(),
            shown_as: Vec::new(),
            frozen: None,
        }
    }

    /// A btrfs on each: the lease's loop 1, a bystander's loop 2, a map on 1 and 2, a bystander's disk.
    fn four() -> Snapshot {
        let mut snapshot = host();
        snapshot.loops = vec![loop_device(1, ROOT_DISK), loop_device(2, ROOT_DISK)];
        let own = snapshot.loops[0].clone();
        claim_file(&mut snapshot, 1, &own);
        snapshot.maps = vec![map(0, &[loop_number(1), loop_number(2)])];
        snapshot.filesystems = vec![
            btrfs(11, &[loop_number(1)]),
            btrfs(12, &[loop_number(2)]),
            btrfs(13, &[map_number(0)]),
            btrfs(14, &[ROOT_DISK]),
        ];
        snapshot
    }

    fn asked(snapshot: &Snapshot, about: Option<&str>) -> Vec<u64> {
        unnumbered(snapshot, &attribute(snapshot, [&lease(1, Phase::Open)]), about)
    }

    #[test]
    fn a_bystanders_file_system_is_left_alone() {
        let mut snapshot = four();
        assert_eq!(asked(&snapshot, None), [11, 13]);
        snapshot.filesystems[0].shown_as.push(DeviceNumber { major: 0, minor: 40 });
        assert_eq!(asked(&snapshot, None), [13]);
        snapshot.claimed_files.clear();
        assert_eq!(asked(&snapshot, None), [0; 0]);
    }

    #[test]
    fn what_is_protected_or_what_a_person_asks_about_is_looked_into() {
        let mut snapshot = four();
        snapshot.claimed_files.clear();
        assert_eq!(asked(&snapshot, Some("loop2")), [12, 13]);
        assert_eq!(asked(&snapshot, Some("/dev/mapper/vg-lv0")), [13]);
        let mut mount = mount(2, 1, DeviceNumber { major: 0, minor: 40 }, "/mnt/btrfs");
        mount.filesystem = "btrfs".to_owned();
        snapshot.mounts.push(mount);
        // Not the one that lies on none of what can be taken back.
        assert_eq!(asked(&snapshot, Some("/mnt/btrfs")), [11, 12, 13]);
        assert_eq!(asked(&snapshot, Some("/")), [0; 0]);
        snapshot.protected.insert(ResourceIdentity::Loop(loop_identity(2, ROOT_DISK)));
        assert_eq!(asked(&snapshot, None), [12, 13]);
    }

    #[test]
    fn a_number_is_kept_for_as_long_as_its_file_system_lives() {
        let mut snapshot = four();
        let number = DeviceNumber { major: 0, minor: 40 };
        let mut numbers = Numbers::from([(11, None), (99, Some(number))]);
        learn(&mut numbers, &snapshot);
        assert_eq!(numbers, Numbers::from([(11, None)]));
        snapshot.filesystems[0].shown_as.push(number);
        learn(&mut numbers, &snapshot);
        assert_eq!(numbers, Numbers::from([(11, Some(number))]));
    }
}
