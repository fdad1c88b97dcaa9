//! Whose each resource is.
//!
//! Evidence, in order: a process is in a lease's control group, or was adopted, or descends from
//! such a process; a loop device was proven by its descriptor, or its
//! backing file lies below a claimed directory, or on a file system that the lease mounted; a mount
//! is of such a device, or its mount point lies below a claimed directory or on such a mount.
//!
//! A lease may be opened within another: its control group then lies in the other's. What both have
//! evidence for is the inner one's, but its owner, which is the outer one's. What two other leases
//! have evidence for is nobody's.
//!
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

    /// Notes a claim; says whether that was news. A second lease's claim makes it doubtful, unless one
    /// is within the other.
    fn claim(&mut self, identity: ResourceIdentity, lease: LeaseId, nesting: &Nesting) -> bool {
        if self.doubtful.contains(&identity) {
            return false;
        }
        match self.owners.get(&identity) {
            Some(owner) if *owner == lease || nesting.is_within(*owner, lease) => false,
            Some(owner) if !nesting.is_within(lease, *owner) => {
                self.owners.remove(&identity);
                self.doubtful.insert(identity);
                true
            }
            Some(_) | None => {
                self.owners.insert(identity, lease);
                true
            }
        }
    }
}

/// Which leases were opened within which others.
#[derive(Debug, Default)]
struct Nesting {
    pairs: BTreeSet<(LeaseId, LeaseId)>,
}

impl Nesting {
    /// By the paths of the control groups, which the daemon itself made.
    fn of(leases: &[&Lease]) -> Self {
        let path = |lease: &Lease| lease.cgroup.as_ref().map(|(_, path)| std::path::PathBuf::from(path));
        let mut pairs = BTreeSet::new();
        for inner in leases {
            for outer in leases {
                let (Some(below), Some(above)) = (path(inner), path(outer)) else { continue };
                if inner.id != outer.id && below.starts_with(above) {
                    pairs.insert((inner.id, outer.id));
                }
            }
        }
        Self { pairs }
    }

    fn is_within(&self, inner: LeaseId, outer: LeaseId) -> bool {
        self.pairs.contains(&(inner, outer))
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
            (LoopState::Bound(_), None)
            | (LoopState::Closing | LoopState::Unread | LoopState::Leftover, _) => None,
        }
    }

    /// Whether a device number is this device's or one of its partitions'.
    #[must_use]
    pub fn has_device(&self, device: DeviceNumber) -> bool {
        self.device == device || self.partitions.iter().any(|partition| partition.device == device)
    }
}

/// Whose each resource of `snapshot` is.
#[must_use]
pub fn attribute<'a>(snapshot: &Snapshot, leases: impl IntoIterator<Item = &'a Lease>) -> Ownership {
    let leases: Vec<&Lease> = leases.into_iter().collect();
    let nesting = Nesting::of(&leases);
    // What turns out to be doubtful is no evidence for anything, so what followed from it is derived
    // again without it.
    let mut doubtful = BTreeSet::new();
    loop {
        let ownership = derive(snapshot, &leases, &nesting, doubtful.clone());
        if ownership.doubtful == doubtful {
            return ownership;
        }
        doubtful = ownership.doubtful;
    }
}

fn derive(
    snapshot: &Snapshot,
    leases: &[&Lease],
    nesting: &Nesting,
    doubtful: BTreeSet<ResourceIdentity>,
) -> Ownership {
    let mut ownership = Ownership { owners: BTreeMap::new(), doubtful };
    for lease in leases {
        let mut claim = |identity| ownership.claim(identity, lease.id, nesting);
        for resource in processes(snapshot, lease) {
            claim(ResourceIdentity::Process(resource));
        }
        for resource in by_evidence(snapshot, lease) {
            claim(resource);
        }
    }
    // A mount on an owned mount, a loop device on an owned file system: until nothing new follows.
    while claim_what_follows(snapshot, leases, nesting, &mut ownership) {}
    ownership
}

fn processes(snapshot: &Snapshot, lease: &Lease) -> BTreeSet<ProcessIdentity> {
    let mut found: BTreeSet<ProcessIdentity> =
        snapshot.members.get(&lease.id).into_iter().flatten().copied().collect();
    let is_known = !snapshot.gaps.iter().any(|gap| matches!(gap, Gap::Processes(_)));
    // Also beside a control group: whoever may (a login session's PAM module, for one) can move a
    // process out of it, and it is still what the lease started.
    if is_known {
        found.extend(descendants(snapshot, lease));
    }
    found.remove(&lease.owner);
    found
}

/// The lease's processes that are still there, and all that descends from them. A parent's number
/// counts only together with its start, so a number that was given again adopts nobody.
fn descendants(snapshot: &Snapshot, lease: &Lease) -> BTreeSet<ProcessIdentity> {
    let mut found: BTreeSet<ProcessIdentity> = snapshot
        .processes
        .iter()
        .map(|process| process.identity)
        .filter(|identity| lease.processes.contains(identity))
        // With a control group, what an owner that is under its own lease starts is in the group; what
        // it started before is not the lease's.
        .filter(|identity| *identity != lease.owner || lease.tracking == Tracking::Descent)
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
            return found;
        }
    }
}

/// What there is direct evidence for, but processes.
fn by_evidence(snapshot: &Snapshot, lease: &Lease) -> Vec<ResourceIdentity> {
    let mut found = Vec::new();
    let directories = snapshot.directories.iter().filter(|found| found.lease == lease.id);
    found.extend(
        directories
            .filter(|found| lease.claims.iter().any(|claim| claim.scratch && claim.directory == found.what))
            .map(|found| ResourceIdentity::Directory(found.what)),
    );
    found.extend(snapshot.cgroups.get(&lease.id).copied().map(ResourceIdentity::Cgroup));
    for device in &snapshot.loops {
        let Some(identity) = device.identity() else { continue };
        let proven = lease.loops.contains(&identity);
        let below_claim = !lease.evidence_closed
            && identity.sequence > lease.loops_before
            && snapshot
                .claimed_files
                .iter()
                .any(|found| found.lease == lease.id && found.what == identity.backing);
        if proven || below_claim {
            found.push(ResourceIdentity::Loop(identity));
        }
    }
    for mount in &snapshot.mounts {
        let seen = lease.mounts.contains(&mount.identity);
        let below_claim = !lease.mounts_before.contains(&mount.identity)
            && snapshot
                .claimed_mounts
                .iter()
                .any(|found| found.lease == lease.id && found.what == mount.identity);
        // A number that is given again proves nothing by itself.
        let proven = seen && number_is_proof(mount.identity.number);
        if proven || below_claim && (seen || !lease.evidence_closed) {
            found.push(ResourceIdentity::Mount(mount.identity));
        }
    }
    found
}

fn number_is_proof(number: MountNumber) -> bool {
    match number {
        MountNumber::Unique(_) => true,
        MountNumber::Reusable(_) => false,
    }
}

/// One round of consequences; says whether there were new ones.
fn claim_what_follows(
    snapshot: &Snapshot,
    leases: &[&Lease],
    nesting: &Nesting,
    ownership: &mut Ownership,
) -> bool {
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
            news |= ownership.claim(ResourceIdentity::Mount(mount.identity), owner, nesting);
        }
    }
    for device in &snapshot.loops {
        let Some(identity) = device.identity() else { continue };
        if let Some(owner) = device_owner(snapshot, ownership, identity.backing.device) {
            news |= ownership.claim(ResourceIdentity::Loop(identity), owner, nesting);
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
