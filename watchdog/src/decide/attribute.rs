//! Whose each resource is.
//!
//! Evidence, in order: a process is in a lease's control group, or was adopted, or descends from
//! such a process; a loop device was proven by its descriptor, or its backing file lies below a
//! claimed directory, or on a file system that is the lease's; a map is built on nothing but the
//! lease's devices; a network block device is served by the lease's process; a mount is of such a
//! device, in whatever namespace, or its mount point lies below a claimed directory or on such a mount,
//! or it is a copy that the kernel made of such a mount, or it keeps a namespace in which there were
//! only the lease's processes; a swap area is such a device, or a file on such a file system.
//!
//! A lease may be opened within another: its control group then lies in the other's. What both have
//! evidence for is the inner one's, but its owner, which is the outer one's. What two other leases
//! have evidence for is nobody's, until both are over.
//!
//! Deliberately absent: names, paths and environment variables. They are nobody's proof.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::{Path, PathBuf};

use hostler_protocol::lease::{LeaseId, Tracking};

use super::index::{Block, Index};
use super::propagation::{counterparts, is_younger};
use super::protect::protected;
use crate::model::{
    BackingFile, DeviceNumber, Gap, Lease, LoopDevice, LoopIdentity, LoopState, Mount, MountIdentity,
    MountNamespace, MountNumber, Namespace, Opener, Phase, ProcessIdentity, ResourceIdentity, Snapshot,
    SwapIdentity,
};

/// Whose each resource is, as far as a look can tell.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ownership {
    /// The lease that each owned resource belongs to. What is neither here nor in `doubtful` is a
    /// bystander.
    pub owners: BTreeMap<ResourceIdentity, LeaseId>,
    /// What two leases have a claim to: it is kept.
    pub doubtful: BTreeSet<ResourceIdentity>,
    /// What `[protect]` protects: a bystander, whoever has evidence for it.
    pub protected: BTreeSet<ResourceIdentity>,
    /// Mount namespaces, by the number that is never given again, in which there are only processes of
    /// one lease.
    pub namespaces: BTreeMap<u64, LeaseId>,
}

impl Ownership {
    /// What one lease owns.
    pub fn of(&self, lease: LeaseId) -> impl Iterator<Item = ResourceIdentity> + '_ {
        self.owners.iter().filter(move |(_, owner)| **owner == lease).map(|(identity, _)| *identity)
    }

    /// What each lease owns that owns something.
    #[must_use]
    pub fn by_lease(&self) -> BTreeMap<LeaseId, Vec<ResourceIdentity>> {
        let mut all: BTreeMap<LeaseId, Vec<ResourceIdentity>> = BTreeMap::new();
        for (identity, owner) in &self.owners {
            all.entry(*owner).or_default().push(*identity);
        }
        all
    }

    /// Whether a lease owns it.
    #[must_use]
    pub fn is_of(&self, identity: ResourceIdentity, lease: LeaseId) -> bool {
        self.owners.get(&identity) == Some(&lease)
    }

    /// Notes a claim; says whether that was news. A second lease's claim makes it doubtful, unless one
    /// is within the other.
    fn claim(&mut self, identity: ResourceIdentity, lease: LeaseId, nesting: &Nesting) -> bool {
        if self.doubtful.contains(&identity) || self.protected.contains(&identity) {
            return false;
        }
        match self.owners.get(&identity) {
            Some(owner) if *owner == lease || nesting.is_within(*owner, lease) => false,
            // Nobody who has it lives, so it is leaked, and either may take it back.
            Some(owner) if nesting.over.contains(owner) && nesting.over.contains(&lease) => false,
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

/// Which leases were opened within which others, and which are over.
#[derive(Debug, Default)]
struct Nesting {
    pairs: BTreeSet<(LeaseId, LeaseId)>,
    /// Those that are over.
    over: BTreeSet<LeaseId>,
}

impl Nesting {
    /// By the paths of the control groups, which the daemon itself made.
    fn of(leases: &[&Lease]) -> Self {
        let path = |lease: &&'_ Lease| -> Option<(LeaseId, PathBuf)> {
            lease.cgroup.as_ref().map(|(_, path)| (lease.id, PathBuf::from(path)))
        };
        let placed: Vec<(LeaseId, PathBuf)> = leases.iter().filter_map(path).collect();
        let mut at: HashMap<&Path, Vec<LeaseId>> = HashMap::new();
        for (lease, path) in &placed {
            at.entry(path).or_default().push(*lease);
        }
        let mut pairs = BTreeSet::new();
        for (inner, path) in &placed {
            let above = path.ancestors().filter_map(|path| at.get(path)).flatten();
            pairs.extend(above.filter(|outer| *outer != inner).map(|outer| (*inner, *outer)));
        }
        let over = leases.iter().filter(|lease| lease.phase == Phase::Over).map(|lease| lease.id).collect();
        Self { pairs, over }
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

    /// Its number, and its partitions'.
    pub fn devices(&self) -> impl Iterator<Item = DeviceNumber> + '_ {
        std::iter::once(self.device).chain(self.partitions.iter().map(|partition| partition.device))
    }

    /// Whether a device number is this device's or one of its partitions'.
    #[must_use]
    pub fn has_device(&self, device: DeviceNumber) -> bool {
        self.devices().any(|own| own == device)
    }
}

/// Whose each resource of `snapshot` is.
#[must_use]
pub fn attribute<'a>(snapshot: &Snapshot, leases: impl IntoIterator<Item = &'a Lease>) -> Ownership {
    let leases: Vec<&Lease> = leases.into_iter().collect();
    let index = Index::new(snapshot);
    let protected = protected(&index);
    let by_number = leases.iter().map(|lease| (lease.id, *lease)).collect();
    let deriver = Deriver { index, protected, nesting: Nesting::of(&leases), leases, by_number };
    // What turns out to be doubtful is no evidence for anything, so what followed from it is derived
    // again without it.
    let mut doubtful = BTreeSet::new();
    loop {
        let ownership = deriver.derive(doubtful.clone());
        if ownership.doubtful == doubtful {
            return ownership;
        }
        doubtful = ownership.doubtful;
    }
}

struct Deriver<'a> {
    index: Index<'a>,
    protected: BTreeSet<ResourceIdentity>,
    leases: Vec<&'a Lease>,
    by_number: HashMap<LeaseId, &'a Lease>,
    nesting: Nesting,
}

impl Deriver<'_> {
    fn derive(&self, doubtful: BTreeSet<ResourceIdentity>) -> Ownership {
        let protected = self.protected.clone();
        let mut ownership = Ownership { doubtful, protected, ..Ownership::default() };
        for lease in &self.leases {
            let mut claim = |identity| ownership.claim(identity, lease.id, &self.nesting);
            for resource in processes(self.index.snapshot, lease) {
                claim(ResourceIdentity::Process(resource));
            }
            for resource in by_evidence(self.index.snapshot, lease) {
                claim(resource);
            }
        }
        ownership.namespaces = self.namespaces(&ownership);
        // A mount on an owned mount, a loop device on an owned file system: until nothing new follows.
        while self.claim_what_follows(&mut ownership) {}
        ownership
    }

    /// The namespaces in which there are only processes of one lease, or were when it was looked at
    /// before, and which were made after the lease had claimed something.
    fn namespaces(&self, ownership: &Ownership) -> BTreeMap<u64, LeaseId> {
        let snapshot = self.index.snapshot;
        // The first process's namespace is the host's; where it may not be read (in some sandboxes),
        // that much is known. Any other that may not be read can be anywhere.
        let unreadable = |process: &&crate::model::Process| {
            process.namespace.is_none() && !process.ended && process.identity.pid != 1
        };
        let all_read = !snapshot.processes.iter().any(|process| unreadable(&process))
            && !snapshot.gaps.iter().any(|gap| matches!(gap, Gap::Processes(_)));
        let mut residents: BTreeMap<MountNamespace, BTreeSet<Option<LeaseId>>> = BTreeMap::new();
        for process in snapshot.processes.iter().filter(|process| !process.ended) {
            let owner = ownership.owners.get(&ResourceIdentity::Process(process.identity)).copied();
            if let Some(namespace) = process.namespace {
                residents.entry(namespace).or_default().insert(owner);
            }
        }
        let mut found = BTreeMap::new();
        for Namespace { namespace, unique, .. } in &snapshot.namespaces {
            let Some(unique) = *unique else { continue };
            let known = self.leases.iter().find(|lease| lease.namespaces.contains(&unique));
            let owner = match (residents.get(namespace), known) {
                (None, Some(lease)) => Some(lease.id),
                (Some(owners), _) if all_read && owners.len() == 1 => owners.first().copied().flatten(),
                (Some(_) | None, _) => None,
            };
            let lease = owner.and_then(|owner| self.by_number.get(&owner));
            let is_later = |lease: &&&Lease| {
                lease.namespaces_there.as_ref().is_some_and(|there| !there.contains(&unique))
            };
            if let Some(lease) = lease.filter(is_later) {
                found.insert(unique, lease.id);
            }
        }
        found
    }

    /// One round of consequences; says whether there were new ones.
    fn claim_what_follows(&self, ownership: &mut Ownership) -> bool {
        let snapshot = self.index.snapshot;
        let mut news = false;
        for (at, mount) in snapshot.mounts.iter().enumerate() {
            let identity = ResourceIdentity::Mount(mount.identity);
            let parent = || ownership.owners.get(&self.mount(self.index.parent(at)?)).copied();
            let owner = self
                .filesystem_owner(ownership, mount.device())
                .or_else(parent)
                .or_else(|| self.keeper_of_a_namespace(ownership, mount));
            let may_be =
                |owner: &LeaseId| !self.was_there(*owner, mount.identity) && !self.is_anothers(*owner, mount);
            if let Some(owner) = owner.filter(may_be) {
                news |= self.claim_consequence(owner, identity, ownership);
            }
            if let Some(owner) = ownership.owners.get(&identity).copied() {
                // The kernel's own copies of it, below peers of the mount that it is on.
                for copy in counterparts(at, &self.index) {
                    let copy = self.index.mount(copy);
                    if is_younger(copy, mount) && !self.was_there(owner, copy.identity) {
                        let copy = ResourceIdentity::Mount(copy.identity);
                        news |= self.claim_consequence(owner, copy, ownership);
                    }
                }
            }
        }
        for device in &snapshot.loops {
            let Some(identity) = device.identity() else { continue };
            let owner = self.filesystem_owner(ownership, identity.backing.device);
            if let Some(owner) = owner.filter(|owner| self.came_later(*owner, identity)) {
                news |= self.claim_consequence(owner, ResourceIdentity::Loop(identity), ownership);
            }
        }
        for map in &snapshot.maps {
            let owners = map
                .lower
                .iter()
                .map(|device| self.index.block(*device).and_then(|block| self.block_owner(ownership, block)));
            if let Some(owner) = the_only(owners) {
                news |= self.claim_consequence(owner, ResourceIdentity::Map(map.identity), ownership);
            }
        }
        for nbd in snapshot.nbds.iter().filter_map(|nbd| nbd.identity) {
            if let Some(owner) = ownership.owners.get(&ResourceIdentity::Process(nbd.server)).copied() {
                news |= self.claim_consequence(owner, ResourceIdentity::Nbd(nbd), ownership);
            }
        }
        for swap in &snapshot.swaps {
            let owner = match swap.identity {
                SwapIdentity::Device(device) => {
                    self.index.block(device).and_then(|block| self.block_owner(ownership, block))
                }
                SwapIdentity::File(file) => self.filesystem_owner(ownership, file.device),
                SwapIdentity::Unreachable(_) => None,
            };
            if let Some(owner) = owner {
                news |= self.claim_consequence(owner, ResourceIdentity::Swap(swap.identity), ownership);
            }
        }
        news
    }

    /// What the daemon opened has what it names: that, and nothing else, was judged.
    fn claim_consequence(
        &self,
        owner: LeaseId,
        identity: ResourceIdentity,
        ownership: &mut Ownership,
    ) -> bool {
        match self.by_number.get(&owner).map(|lease| lease.opener) {
            Some(Opener::Client) => ownership.claim(identity, owner, &self.nesting),
            Some(Opener::Policy | Opener::Administrator) | None => false,
        }
    }

    fn mount(&self, at: usize) -> ResourceIdentity {
        ResourceIdentity::Mount(self.index.mount(at).identity)
    }

    /// Whether a loop device was attached after a lease had claimed something.
    fn came_later(&self, lease: LeaseId, identity: LoopIdentity) -> bool {
        self.by_number.get(&lease).is_some_and(|lease| identity.sequence > lease.loops_before)
    }

    /// Whether a mount was below the directory of a lease when that claimed it.
    fn was_there(&self, lease: LeaseId, mount: MountIdentity) -> bool {
        self.by_number.get(&lease).is_some_and(|lease| lease.mounts_before.contains(&mount))
    }

    fn is_anothers(&self, lease: LeaseId, mount: &Mount) -> bool {
        self.by_number.get(&lease).is_some_and(|lease| is_anothers(lease, mount))
    }

    /// The lease that a file system with this number is of: all that it lies on is, or, where it lies on
    /// no block device of this snapshot, all its mounts are.
    fn filesystem_owner(&self, ownership: &Ownership, device: DeviceNumber) -> Option<LeaseId> {
        let blocks = self.index.blocks_under(device);
        if self.index.lies_on_a_stranger(device) {
            None
        } else if blocks.is_empty() {
            // Only when it is known which those are.
            if self.index.snapshot.gaps.iter().any(|gap| matches!(gap, Gap::Mounts(_) | Gap::Unasked)) {
                return None;
            }
            let mounts = self.index.mounts_of(device).iter();
            the_only(mounts.map(|at| ownership.owners.get(&self.mount(*at)).copied()))
        } else {
            the_only(blocks.into_iter().map(|block| self.block_owner(ownership, block)))
        }
    }

    fn block_owner(&self, ownership: &Ownership, block: Block) -> Option<LeaseId> {
        ownership.owners.get(&self.index.identity(block)?).copied()
    }

    /// The lease whose namespace a mounted nsfs file keeps.
    fn keeper_of_a_namespace(&self, ownership: &Ownership, mount: &Mount) -> Option<LeaseId> {
        let kept = mount.kept_namespace()?;
        let found = self.index.snapshot.namespaces.iter().find(|other| other.namespace == kept)?;
        ownership.namespaces.get(&found.unique?).copied()
    }
}

/// The lease that all are of; `None` when there are none, or any is of another or of none.
fn the_only(owners: impl Iterator<Item = Option<LeaseId>>) -> Option<LeaseId> {
    let mut only = None;
    for owner in owners {
        let owner = owner?;
        if only.is_some_and(|other| other != owner) {
            return None;
        }
        only = Some(owner);
    }
    only
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
    if lease.processes.is_empty() {
        return BTreeSet::new();
    }
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
    let files: HashSet<BackingFile> = snapshot
        .claimed_files
        .iter()
        .filter(|found| found.lease == lease.id)
        .map(|found| found.what)
        .collect();
    for device in &snapshot.loops {
        let Some(identity) = device.identity() else { continue };
        let below_claim = !lease.evidence_closed
            && identity.sequence > lease.loops_before
            && files.contains(&identity.backing);
        if lease.loops.contains(&identity) || below_claim {
            found.push(ResourceIdentity::Loop(identity));
        }
    }
    let maps = snapshot.maps.iter().map(|map| map.identity).filter(|map| lease.maps.contains(map));
    found.extend(maps.map(ResourceIdentity::Map));
    for swap in &snapshot.swaps {
        match swap.identity {
            SwapIdentity::File(file) if !lease.evidence_closed && files.contains(&file) => {
                found.push(ResourceIdentity::Swap(swap.identity));
            }
            SwapIdentity::File(_) | SwapIdentity::Device(_) | SwapIdentity::Unreachable(_) => {}
        }
    }
    let below: HashSet<MountIdentity> = snapshot
        .claimed_mounts
        .iter()
        .filter(|found| found.lease == lease.id)
        .map(|found| found.what)
        .collect();
    for mount in &snapshot.mounts {
        let seen = lease.mounts.contains(&mount.identity);
        let below_claim = below.contains(&mount.identity) && !lease.mounts_before.contains(&mount.identity);
        // A number that is given again proves nothing by itself.
        let proven = seen && number_is_proof(mount.identity.number);
        if (proven || below_claim && (seen || !lease.evidence_closed)) && !is_anothers(lease, mount) {
            found.push(ResourceIdentity::Mount(mount.identity));
        }
    }
    found
}

/// Whether a mount was made for a user who is neither the lease's nor root: users can mount FUSE file systems,
/// also in a directory of somebody else's that they may write to.
fn is_anothers(lease: &Lease, mount: &Mount) -> bool {
    lease.uid != 0 && mount.user.is_some_and(|user| user != 0 && user != lease.uid)
}

fn number_is_proof(number: MountNumber) -> bool {
    match number {
        MountNumber::Unique(_) => true,
        MountNumber::Reusable(_) => false,
    }
}

impl Mount {
    /// The file system's device number.
    #[must_use]
    pub fn device(&self) -> DeviceNumber {
        self.identity.device
    }

    /// The mount namespace that this mount keeps alive, when it is one of an nsfs file. That the root of
    /// an nsfs mount reads `mnt:[INODE]` is the kernel's word: no file there has another name.
    #[must_use]
    pub fn kept_namespace(&self) -> Option<MountNamespace> {
        let root = std::str::from_utf8(&self.root).ok().filter(|_| self.filesystem == "nsfs")?;
        root.strip_prefix("mnt:[")?.strip_suffix(']')?.parse().ok().map(MountNamespace)
    }
}

#[cfg(test)]
#[path = "attribute_tests.rs"]
mod tests;
