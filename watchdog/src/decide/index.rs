//! A snapshot with its cross-references, so that a decision about one thing need not go through all.

use std::cell::OnceCell;
use std::collections::HashMap;

use super::overlays;
use crate::model::{
    DeviceNumber, Filesystem, LoopState, Map, Mount, MountNamespace, Nbd, Partition, ResourceIdentity,
    Snapshot,
};

/// A block device that can be taken back, by its place in the snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Block {
    /// In `Snapshot::loops`.
    Loop(usize),
    /// In `Snapshot::maps`.
    Map(usize),
    /// In `Snapshot::nbds`.
    Nbd(usize),
}

/// The cross-references.
#[derive(Debug)]
pub(super) struct Index<'a> {
    pub(super) snapshot: &'a Snapshot,
    by_number: HashMap<u64, usize>,
    children: HashMap<u64, Vec<usize>>,
    by_device: HashMap<DeviceNumber, Vec<usize>>,
    by_peers: HashMap<u64, Vec<usize>>,
    by_master: HashMap<u64, Vec<usize>>,
    blocks: HashMap<DeviceNumber, Block>,
    /// What lies on a device, for the numbers that a file system on several shows instead.
    lies_on: HashMap<DeviceNumber, Vec<DeviceNumber>>,
    backed_by: HashMap<DeviceNumber, Vec<usize>>,
    built_on: HashMap<DeviceNumber, Vec<usize>>,
    /// Read from their options once somebody asks.
    overlays: OnceCell<HashMap<usize, Vec<usize>>>,
}

impl<'a> Index<'a> {
    pub(super) fn new(snapshot: &'a Snapshot) -> Self {
        let mut index = Self {
            snapshot,
            by_number: HashMap::new(),
            children: HashMap::new(),
            by_device: HashMap::new(),
            by_peers: HashMap::new(),
            by_master: HashMap::new(),
            blocks: HashMap::new(),
            lies_on: HashMap::new(),
            backed_by: HashMap::new(),
            built_on: HashMap::new(),
            overlays: OnceCell::new(),
        };
        index.refer_to_mounts();
        index.refer_to_blocks();
        index
    }

    fn refer_to_mounts(&mut self) {
        for (at, mount) in self.snapshot.mounts.iter().enumerate() {
            self.by_number.insert(mount.short_number, at);
            self.by_device.entry(mount.device()).or_default().push(at);
            if let Some(parent) = mount.parent.filter(|parent| *parent != mount.short_number) {
                self.children.entry(parent).or_default().push(at);
            }
            if let Some(group) = mount.peers {
                self.by_peers.entry(group).or_default().push(at);
            }
            if let Some(group) = mount.master {
                self.by_master.entry(group).or_default().push(at);
            }
        }
    }

    fn refer_to_blocks(&mut self) {
        for (at, device) in self.snapshot.loops.iter().enumerate() {
            self.refer_to_block(Block::Loop(at), device.device, &device.partitions);
            if let LoopState::Bound(backing) = device.state {
                self.backed_by.entry(backing.device).or_default().push(at);
            }
        }
        for (at, map) in self.snapshot.maps.iter().enumerate() {
            self.refer_to_block(Block::Map(at), map.identity.device, &map.partitions);
            for lower in &map.lower {
                self.built_on.entry(*lower).or_default().push(at);
            }
        }
        for (at, nbd) in self.snapshot.nbds.iter().enumerate() {
            self.refer_to_block(Block::Nbd(at), nbd.device, &nbd.partitions);
        }
        for filesystem in &self.snapshot.filesystems {
            for shown in &filesystem.shown_as {
                self.lies_on.entry(*shown).or_default().extend(&filesystem.blocks);
            }
        }
    }

    fn refer_to_block(&mut self, block: Block, device: DeviceNumber, partitions: &[Partition]) {
        self.blocks.insert(device, block);
        for partition in partitions {
            self.blocks.insert(partition.device, block);
        }
    }

    pub(super) fn mount(&self, at: usize) -> &'a Mount {
        &self.snapshot.mounts[at]
    }

    /// The mount with this number of mountinfo's.
    pub(super) fn by_number(&self, number: u64) -> Option<usize> {
        self.by_number.get(&number).copied()
    }

    /// The mount that another is on.
    pub(super) fn parent(&self, at: usize) -> Option<usize> {
        let mount = self.mount(at);
        mount.parent.filter(|parent| *parent != mount.short_number).and_then(|parent| self.by_number(parent))
    }

    /// What is mounted on a mount.
    pub(super) fn children(&self, at: usize) -> &[usize] {
        self.children.get(&self.mount(at).short_number).map_or(&[], Vec::as_slice)
    }

    /// What is mounted on the same mount as this one, this one too.
    pub(super) fn siblings(&self, at: usize) -> &[usize] {
        let parent = self.mount(at).parent;
        parent.and_then(|parent| self.children.get(&parent)).map_or(&[], Vec::as_slice)
    }

    /// The mounts that show this number as their file system's.
    pub(super) fn mounts_of(&self, device: DeviceNumber) -> &[usize] {
        self.by_device.get(&device).map_or(&[], Vec::as_slice)
    }

    /// The overlays with a layer on a mount.
    pub(super) fn overlays_on(&self, at: usize) -> &[usize] {
        let overlays = self.overlays.get_or_init(|| overlays::by_mount(self.snapshot));
        overlays.get(&at).map_or(&[], Vec::as_slice)
    }

    pub(super) fn in_peer_group(&self, group: u64) -> &[usize] {
        self.by_peers.get(&group).map_or(&[], Vec::as_slice)
    }

    pub(super) fn slaves_of(&self, group: u64) -> &[usize] {
        self.by_master.get(&group).map_or(&[], Vec::as_slice)
    }

    /// The block devices that a file system with this number lies on: mostly one.
    pub(super) fn blocks_under(&self, shown: DeviceNumber) -> Vec<Block> {
        let direct = self.blocks.get(&shown).copied();
        let several = self.lies_on.get(&shown).into_iter().flatten();
        let mut blocks: Vec<Block> =
            direct.into_iter().chain(several.filter_map(|device| self.blocks.get(device).copied())).collect();
        blocks.sort_unstable();
        blocks.dedup();
        blocks
    }

    /// Whether a file system with this number lies on a block device of which nothing is known.
    pub(super) fn lies_on_a_stranger(&self, shown: DeviceNumber) -> bool {
        self.lies_on.get(&shown).is_some_and(|on| on.iter().any(|device| !self.blocks.contains_key(device)))
    }

    /// The loop devices whose backing files lie on a file system with this number.
    pub(super) fn loops_backed_by(&self, shown: DeviceNumber) -> &[usize] {
        self.backed_by.get(&shown).map_or(&[], Vec::as_slice)
    }

    /// The maps that have this device as one of theirs.
    pub(super) fn maps_on(&self, device: DeviceNumber) -> &[usize] {
        self.built_on.get(&device).map_or(&[], Vec::as_slice)
    }

    /// A block device's own number, and its partitions.
    pub(super) fn device_of(&self, block: Block) -> (DeviceNumber, &'a [Partition]) {
        match block {
            Block::Loop(at) => {
                let device = &self.snapshot.loops[at];
                (device.device, &device.partitions)
            }
            Block::Map(at) => {
                let Map { identity, partitions, .. } = &self.snapshot.maps[at];
                (identity.device, partitions)
            }
            Block::Nbd(at) => {
                let Nbd { device, partitions, .. } = &self.snapshot.nbds[at];
                (*device, partitions)
            }
        }
    }

    /// The block device with this number, whole or by a partition.
    pub(super) fn block(&self, device: DeviceNumber) -> Option<Block> {
        self.blocks.get(&device).copied()
    }

    /// What identifies a block device; `None` when that could not be read.
    pub(super) fn identity(&self, block: Block) -> Option<ResourceIdentity> {
        match block {
            Block::Loop(at) => self.snapshot.loops[at].identity().map(ResourceIdentity::Loop),
            Block::Map(at) => Some(ResourceIdentity::Map(self.snapshot.maps[at].identity)),
            Block::Nbd(at) => self.snapshot.nbds[at].identity.map(ResourceIdentity::Nbd),
        }
    }

    /// The file systems in use on one block device number.
    pub(super) fn filesystems_on(
        &self,
        device: DeviceNumber,
    ) -> impl Iterator<Item = (usize, &'a Filesystem)> + use<'a> {
        let all = self.snapshot.filesystems.iter().enumerate();
        all.filter(move |(_, filesystem)| filesystem.blocks.contains(&device))
    }

    /// The numbers that mounts of a file system on this device show.
    pub(super) fn shown_for(&self, device: DeviceNumber) -> Vec<DeviceNumber> {
        let others =
            self.filesystems_on(device).flat_map(|(_, filesystem)| filesystem.shown_as.iter().copied());
        std::iter::once(device).chain(others).collect()
    }

    pub(super) fn is_host(&self, namespace: MountNamespace) -> bool {
        self.snapshot.namespace == Some(namespace)
    }
}
