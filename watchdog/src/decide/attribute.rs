//! Whose each resource is.
//!
//! Evidence, in order: a process is in a lease's control group (or was adopted, or descends from
//! such a process where there is no group); a loop device was proven by its descriptor, or its
//! backing file lies below a claimed directory, or on a file system that the lease mounted; a mount
//! is of such a device, or its mount point lies below a claimed directory or on such a mount.
//! Deliberately absent: names, paths and environment variables. They are nobody's proof.

use std::collections::{BTreeMap, BTreeSet};

use hostler_protocol::lease::{LeaseId, Tracking};

use crate::model::{
    DeviceNumber, Gap, Lease, LoopDevice, LoopIdentity, LoopState, Mount, MountNumber, ProcessIdentity,
    ResourceIdentity, Snapshot,
};

/// Whose each resource is, as far as a look can tell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ownership {
    /// The lease that each owned resource belongs to. What is neither here nor in `doubtful` is a
    /// bystander.
    pub owners: BTreeMap<ResourceIdentity, LeaseId>,
    /// What two leases have a claim to: it is kept.
    pub doubtful: BTreeSet<ResourceIdentity>,
}

impl Ownership {
    /// What one lease owns.
    pub fn of(&self, lease: LeaseId) -> impl Iterator<Item = ResourceIdentity> + '_ {
        self.owners.iter().filter(move |(_, owner)| **owner == lease).map(|(identity, _)| *identity)
    }

    /// Whether a lease owns it.
    #[must_use]
    pub fn is_of(&self, identity: ResourceIdentity, lease: LeaseId) -> bool {
        self.owners.get(&identity) == Some(&lease)
    }

    /// Notes a claim; says whether that was news. A second lease's claim makes it doubtful.
    fn claim(&mut self, identity: ResourceIdentity, lease: LeaseId) -> bool {
        if self.doubtful.contains(&identity) {
            return false;
        }
        match self.owners.get(&identity) {
            None => {
                self.owners.insert(identity, lease);
                true
            }
            Some(owner) if *owner == lease => false,
            Some(_) => {
                self.owners.remove(&identity);
                self.doubtful.insert(identity);
                true
            }
        }
    }
}

impl LoopDevice {
    /// Its identity, when it could be learnt.
    #[must_use]
    pub fn identity(&self) -> Option<LoopIdentity> {
        match (self.state, self.sequence) {
            (LoopState::Bound(backing), Some(sequence)) => {
                Some(LoopIdentity { number: self.number, sequence, backing })
            }
            (LoopState::Bound(_), None) | (LoopState::Closing | LoopState::Unread, _) => None,
        }
    }

    /// Whether a device number is this device's or one of its partitions'.
    #[must_use]
    pub fn has_device(&self, device: DeviceNumber) -> bool {
        self.device == device || self.partitions.contains(&device)
    }
}

/// Whose each resource of `snapshot` is.
#[must_use]
pub fn attribute<'a>(snapshot: &Snapshot, leases: impl IntoIterator<Item = &'a Lease>) -> Ownership {
    let leases: Vec<&Lease> = leases.into_iter().collect();
    let mut ownership = Ownership::default();
    for lease in &leases {
        claim_processes(snapshot, lease, &mut ownership);
        claim_directories(snapshot, lease, &mut ownership);
        if let Some(cgroup) = snapshot.cgroups.get(&lease.id) {
            ownership.claim(ResourceIdentity::Cgroup(*cgroup), lease.id);
        }
        claim_by_evidence(snapshot, lease, &mut ownership);
    }
    // A mount on an owned mount, a loop device on an owned file system: until nothing new follows.
    while claim_what_follows(snapshot, &leases, &mut ownership) {}
    ownership
}

fn claim_processes(snapshot: &Snapshot, lease: &Lease, ownership: &mut Ownership) {
    let members = snapshot.members.get(&lease.id).into_iter().flatten();
    for identity in members.filter(|identity| **identity != lease.owner) {
        ownership.claim(ResourceIdentity::Process(*identity), lease.id);
    }
    if lease.tracking == Tracking::Descent
        && !snapshot.gaps.iter().any(|gap| matches!(gap, Gap::Processes(_)))
    {
        for identity in descendants(snapshot, lease) {
            ownership.claim(ResourceIdentity::Process(identity), lease.id);
        }
    }
}

/// The lease's processes that are still there, and all that descends from them. A parent's number
/// counts only together with its start, so a number that was given again adopts nobody.
fn descendants(snapshot: &Snapshot, lease: &Lease) -> BTreeSet<ProcessIdentity> {
    let mut found: BTreeSet<ProcessIdentity> = snapshot
        .processes
        .iter()
        .map(|process| process.identity)
        .filter(|identity| lease.processes.contains(identity))
        .collect();
    loop {
        let parents: BTreeMap<u32, ProcessIdentity> =
            found.iter().map(|identity| (identity.pid, *identity)).collect();
        let before = found.len();
        for process in &snapshot.processes {
            let is_child =
                parents.get(&process.parent).is_some_and(|parent| parent.start <= process.identity.start);
            if is_child {
                found.insert(process.identity);
            }
        }
        if found.len() == before {
            found.remove(&lease.owner);
            return found;
        }
    }
}

fn claim_directories(snapshot: &Snapshot, lease: &Lease, ownership: &mut Ownership) {
    for found in snapshot.directories.iter().filter(|found| found.lease == lease.id) {
        let is_scratch = lease.claims.iter().any(|claim| claim.scratch && claim.directory == found.what);
        if is_scratch {
            ownership.claim(ResourceIdentity::Directory(found.what), lease.id);
        }
    }
}

fn claim_by_evidence(snapshot: &Snapshot, lease: &Lease, ownership: &mut Ownership) {
    for device in &snapshot.loops {
        let Some(identity) = device.identity() else { continue };
        let proven = lease.loops.contains(&identity);
        let below_claim = identity.sequence > lease.loops_before
            && snapshot
                .claimed_files
                .iter()
                .any(|found| found.lease == lease.id && found.what == identity.backing);
        if proven || below_claim {
            ownership.claim(ResourceIdentity::Loop(identity), lease.id);
        }
    }
    for mount in &snapshot.mounts {
        let seen_before = lease.mounts.contains(&mount.identity) && number_is_proof(mount.identity.number);
        let below_claim = !lease.mounts_before.contains(&mount.identity)
            && snapshot
                .claimed_mounts
                .iter()
                .any(|found| found.lease == lease.id && found.what == mount.identity);
        if seen_before || below_claim {
            ownership.claim(ResourceIdentity::Mount(mount.identity), lease.id);
        }
    }
}

fn number_is_proof(number: MountNumber) -> bool {
    match number {
        MountNumber::Unique(_) => true,
        MountNumber::Reusable(_) => false,
    }
}

/// One round of consequences; says whether there were new ones.
fn claim_what_follows(snapshot: &Snapshot, leases: &[&Lease], ownership: &mut Ownership) -> bool {
    let mut news = false;
    for mount in &snapshot.mounts {
        let owner = device_owner(snapshot, ownership, mount.device()).or_else(|| {
            let parent = snapshot.mounts.iter().find(|other| Some(other.short_number) == mount.parent)?;
            ownership.owners.get(&ResourceIdentity::Mount(parent.identity)).copied()
        });
        let Some(owner) = owner else { continue };
        let was_there =
            leases.iter().any(|lease| lease.id == owner && lease.mounts_before.contains(&mount.identity));
        if !was_there {
            news |= ownership.claim(ResourceIdentity::Mount(mount.identity), owner);
        }
    }
    for device in &snapshot.loops {
        let Some(identity) = device.identity() else { continue };
        if let Some(owner) = device_owner(snapshot, ownership, identity.backing.device) {
            news |= ownership.claim(ResourceIdentity::Loop(identity), owner);
        }
    }
    news
}

/// The lease that owns the loop device with this number, whole or by a partition.
fn device_owner(snapshot: &Snapshot, ownership: &Ownership, number: DeviceNumber) -> Option<LeaseId> {
    let device = snapshot.loops.iter().find(|device| device.has_device(number))?;
    ownership.owners.get(&ResourceIdentity::Loop(device.identity()?)).copied()
}

impl Mount {
    /// The file system's device number.
    #[must_use]
    pub fn device(&self) -> DeviceNumber {
        self.identity.device
    }
}

#[cfg(test)]
#[path = "attribute_tests.rs"]
mod tests;
