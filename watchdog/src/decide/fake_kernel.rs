//! A kernel to run plans in: it refuses to free what is still held, and unmounts what it would
//! propagate to. Its rules are written anew from the manuals, not from the graph that plans are made by.

use crate::model::{
    DeviceNumber, LoopState, Mount, ResourceIdentity, Snapshot, Step, SwapIdentity, UnmountHow,
};

/// What is there.
#[derive(Clone, Debug)]
pub(super) struct Kernel {
    pub(super) now: Snapshot,
}

impl Kernel {
    pub(super) fn new(snapshot: &Snapshot) -> Self {
        Self { now: snapshot.clone() }
    }

    /// Does a step as the kernel would.
    pub(super) fn apply(&mut self, step: &Step) -> Result<(), String> {
        match step {
            Step::EndProcesses { processes, .. } => {
                self.now.processes.retain(|process| !processes.contains(&process.identity));
                Ok(())
            }
            Step::Unmount { mount, apart_from, how, .. } => {
                if let Some(parent) = apart_from {
                    let parent = self.now.mounts.iter_mut().find(|other| other.identity == *parent);
                    parent.ok_or("the parent to part is gone")?.peers = None;
                }
                let mount = self.now.mounts.iter().find(|other| other.identity == *mount);
                // A copy that went with another is gone, which is no error.
                let Some(mount) = mount.cloned() else { return Ok(()) };
                self.unmount(&mount, *how)
            }
            Step::SwapOff { swap, .. } => {
                let before = self.now.swaps.len();
                self.now.swaps.retain(|other| other.identity != *swap);
                if self.now.swaps.len() < before { Ok(()) } else { Err("no such swap area".to_owned()) }
            }
            Step::DetachLoop { identity, .. } => {
                let at = self.now.loops.iter().position(|device| device.identity() == Some(*identity));
                let at = at.ok_or("gone")?;
                self.refuse_used(self.now.loops[at].device)?;
                for partition in &self.now.loops[at].partitions {
                    self.refuse_used(partition.device)?;
                }
                self.now.loops.remove(at);
                Ok(())
            }
            Step::RemoveMap { map, .. } => {
                let at = self.now.maps.iter().position(|other| other.identity == *map).ok_or("gone")?;
                self.refuse_used(map.device)?;
                self.now.maps.remove(at);
                Ok(())
            }
            Step::DisconnectNbd { nbd } => {
                let at = self.now.nbds.iter().position(|other| other.identity == Some(*nbd));
                self.now.nbds.remove(at.ok_or("gone")?);
                Ok(())
            }
            Step::ReleaseFilesystem { resource, .. } => match **resource {
                ResourceIdentity::Loop(identity) => {
                    let device = self.now.loops.iter().find(|device| device.identity() == Some(identity));
                    let device = device.ok_or("gone")?.device;
                    self.now.filesystems.retain(|filesystem| !filesystem.blocks.contains(&device));
                    Ok(())
                }
                ResourceIdentity::Map(identity) => {
                    self.now.filesystems.retain(|filesystem| !filesystem.blocks.contains(&identity.device));
                    Ok(())
                }
                other => Err(format!("{other:?} carries no file system")),
            },
            Step::AbortFuse { .. } | Step::RemoveDirectory { .. } | Step::RemoveCgroup { .. } => Ok(()),
        }
    }

    fn unmount(&mut self, mount: &Mount, how: UnmountHow) -> Result<(), String> {
        let (point, number) = (String::from_utf8_lossy(&mount.point).into_owned(), mount.short_number);
        if self.now.mounts.iter().any(|other| other.parent == Some(number)) {
            return Err(format!("{point} has a child"));
        }
        let stands = |process: &crate::model::Process| {
            process.current_directory.is_some_and(|place| place.mount == number)
        };
        if how != UnmountHow::Lazy && self.now.processes.iter().any(stands) {
            return Err(format!("a process stands in {point}"));
        }
        let is_last = self.now.mounts.iter().filter(|other| other.device() == mount.device()).count() == 1;
        if is_last && self.has_files_in_use(mount.device()) {
            return Err(format!("{point} has a file in use"));
        }
        let mut gone = vec![mount.identity];
        for peer in self.receivers_of(mount) {
            for copy in self.now.mounts.iter().filter(|other| other.parent == Some(peer.short_number)) {
                let same = copy.device() == mount.device() && copy.root == mount.root;
                let on =
                    |mount: &Mount| self.now.mounts.iter().find(|it| Some(it.short_number) == mount.parent);
                // All roots in these hosts are `/`, so a place in the file system is what follows the
                // parent's mount point.
                let place = |mount: &Mount| {
                    let above = on(mount).map_or(0, |above| above.point.len()).min(mount.point.len());
                    String::from_utf8_lossy(&mount.point[above..]).trim_start_matches('/').to_owned()
                };
                // The kernel keeps a copy that has something mounted on it.
                let is_leaf = !self.now.mounts.iter().any(|other| other.parent == Some(copy.short_number));
                if same && is_leaf && place(copy) == place(mount) {
                    gone.push(copy.identity);
                }
            }
        }
        let is_busy = |process: &crate::model::Process| {
            let on = process.current_directory.map(|place| place.mount);
            let copy = self.now.mounts.iter().find(|other| Some(other.short_number) == on);
            copy.is_some_and(|copy| gone.contains(&copy.identity))
        };
        if how != UnmountHow::Lazy && self.now.processes.iter().any(is_busy) {
            return Err(format!("a process stands in a copy of {point}"));
        }
        self.now.mounts.retain(|other| !gone.contains(&other.identity));
        Ok(())
    }

    fn receivers_of(&self, mount: &Mount) -> Vec<Mount> {
        let parent = self.now.mounts.iter().find(|other| Some(other.short_number) == mount.parent);
        let Some(group) = parent.and_then(|parent| parent.peers) else { return Vec::new() };
        let is_receiver = |other: &&Mount| other.peers == Some(group) || other.master == Some(group);
        self.now.mounts.iter().filter(is_receiver).cloned().collect()
    }

    fn has_files_in_use(&self, device: DeviceNumber) -> bool {
        let backs = self.now.loops.iter().any(|other| match other.state {
            LoopState::Bound(backing) => backing.device == device,
            LoopState::Closing | LoopState::Unread | LoopState::Leftover => false,
        });
        let swaps = self.now.swaps.iter();
        backs
            || swaps
                .into_iter()
                .any(|swap| matches!(swap.identity, SwapIdentity::File(file) if file.device == device))
    }

    /// A block device that is mounted, swapped on, or built on cannot go.
    fn refuse_used(&self, device: DeviceNumber) -> Result<(), String> {
        if self.now.mounts.iter().any(|mount| mount.device() == device) {
            return Err(format!("{device} is mounted"));
        }
        if self.now.swaps.iter().any(|swap| swap.identity == SwapIdentity::Device(device)) {
            return Err(format!("{device} is swapped on"));
        }
        if self.now.maps.iter().any(|map| map.lower.contains(&device)) {
            return Err(format!("{device} carries a map"));
        }
        if self.has_files_in_use(device) {
            return Err(format!("{device} carries a file in use"));
        }
        let unseen = self.now.filesystems.iter().any(|filesystem| filesystem.blocks.contains(&device));
        if unseen {
            return Err(format!("{device} carries a file system in use"));
        }
        Ok(())
    }
}
