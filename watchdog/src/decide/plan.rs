//! What is to be done for a lease that is over.
//!
//! Order: processes end first; then FUSE connections that hang are aborted; then swap areas, mounts,
//! maps, network block devices and loop devices, each after all that holds it by the
//! [holder graph](super::graph); then scratch directories; then the control group.
//!
//! What a bystander holds is in no plan, and neither is what that holds in turn.

use std::collections::{BTreeMap, BTreeSet};

use hostler_protocol::lease::LeaseId;
use hostler_protocol::why::Reason;

use super::attribute::Ownership;
use super::graph::{Certainty, Edge, Node, holders, identity_of};
use super::index::{Block, Index};
use super::policy::is_clear;
use super::propagation::{counterparts, is_younger};
use super::protect::strangers_below;
use crate::model::{
    CgroupIdentity, DeviceNumber, Filesystem, Gap, Lease, MountIdentity, Phase, Plan, ProcessIdentity,
    ResourceIdentity, Snapshot, Step, SwapIdentity, UnmountHow,
};

/// What a plan depends on besides what was seen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PlanSettings {
    /// How long processes have to end after SIGTERM, in milliseconds.
    pub term_timeout_ms: u64,
    /// Mounts that stayed although no bystander holds them, for so long that the last rung is due:
    /// they are unmounted lazily.
    pub lazily: BTreeSet<MountIdentity>,
}

/// What is to be done for `lease`, given whose everything is. Empty while its owner lives.
#[must_use]
pub fn plan(lease: &Lease, snapshot: &Snapshot, ownership: &Ownership, settings: &PlanSettings) -> Plan {
    match lease.phase {
        Phase::Open => return Plan::default(),
        Phase::Over => {}
    }
    let mut steps = Vec::new();
    let processes = live_processes(lease.id, snapshot, ownership);
    if !processes.is_empty() {
        steps.push(Step::EndProcesses {
            processes,
            cgroup: killable_cgroup(lease, snapshot, ownership),
            term_timeout_ms: settings.term_timeout_ms,
        });
    }
    // Without the list of mounts nobody knows what holds a device or lies in a directory.
    let mounts_known = !snapshot.gaps.iter().any(|gap| matches!(gap, Gap::Mounts(_) | Gap::Unasked));
    if mounts_known {
        let index = Index::new(snapshot);
        let planner = Planner { lease: lease.id, index: &index, ownership, settings };
        steps.extend(planner.fuse_aborts());
        steps.extend(planner.in_holding_order());
        steps.extend(directories(lease, snapshot, ownership));
    }
    if let Some((identity, path)) = &lease.cgroup
        && snapshot.cgroups.get(&lease.id) == Some(identity)
    {
        steps.push(Step::RemoveCgroup { cgroup: *identity, path: path.clone() });
    }
    Plan { steps }
}

/// The lease's mounts that are still there because processes hold them that are its own, and nothing else
/// does, by a look at everything that may hold something: such as a process in uninterruptible sleep. What
/// nobody can be seen to hold may be held by a bystander.
#[must_use]
pub fn stuck(lease: LeaseId, after: &Snapshot, ownership: &Ownership) -> BTreeSet<MountIdentity> {
    // What could not be looked into may hold any of them.
    if !is_clear(after) {
        return BTreeSet::new();
    }
    let index = Index::new(after);
    let is_own = |node| {
        let identity = identity_of(node, &index);
        identity.is_some_and(|identity| ownership.is_of(identity, lease))
    };
    let own_mounts = after
        .mounts
        .iter()
        .enumerate()
        .filter(|(_, mount)| ownership.is_of(ResourceIdentity::Mount(mount.identity), lease));
    own_mounts
        .filter(|(at, _)| {
            let edges = holders(Node::Mount(std::cmp::Reverse(*at)), &index);
            let is_process = |edge: &Edge| matches!(edge.holder, Some(Node::Process(_)));
            edges.iter().any(is_process) && edges.iter().all(|edge| edge.holder.is_some_and(is_own))
        })
        .map(|(_, mount)| mount.identity)
        .collect()
}

/// The lease's control group, when it may be killed as a whole: not while a process is in it that is
/// not to be ended, such as a living owner, or those of a lease within this one.
fn killable_cgroup(
    lease: &Lease,
    snapshot: &Snapshot,
    ownership: &Ownership,
) -> Option<(CgroupIdentity, String)> {
    let members = snapshot.members.get(&lease.id)?;
    let (identity, path) = lease.cgroup.clone()?;
    let is_there = snapshot.cgroups.get(&lease.id) == Some(&identity);
    let all_ours = members.iter().all(|member| ownership.is_of(ResourceIdentity::Process(*member), lease.id));
    let all_read = !snapshot.gaps.iter().any(|gap| matches!(gap, Gap::Cgroup(of, _) if *of == lease.id));
    (is_there && all_ours && all_read).then_some((identity, path))
}

fn live_processes(lease: LeaseId, snapshot: &Snapshot, ownership: &Ownership) -> Vec<ProcessIdentity> {
    snapshot
        .processes
        .iter()
        .filter(|process| !process.ended)
        .map(|process| process.identity)
        .filter(|identity| ownership.is_of(ResourceIdentity::Process(*identity), lease))
        .collect()
}

/// Whether a reason is that a file of a file system is in use.
fn is_file_in_use(reason: Reason) -> bool {
    matches!(reason, Reason::NestedLoop | Reason::Swapfile)
}

/// What has to go before a node, and what had better.
#[derive(Debug, Default)]
struct Waits {
    sure: BTreeSet<Node>,
    hints: BTreeSet<Node>,
    /// Files in use on the mounted file system: the last of its mounts waits for them.
    files: BTreeSet<Node>,
}

impl Waits {
    fn forget(&mut self, gone: Node) {
        for set in [&mut self.sure, &mut self.hints, &mut self.files] {
            set.remove(&gone);
        }
    }
}

struct Planner<'a> {
    lease: LeaseId,
    index: &'a Index<'a>,
    ownership: &'a Ownership,
    settings: &'a PlanSettings,
}

impl Planner<'_> {
    fn is_own(&self, identity: ResourceIdentity) -> bool {
        self.ownership.is_of(identity, self.lease)
    }

    fn is_own_mount(&self, at: usize) -> bool {
        self.is_own(ResourceIdentity::Mount(self.index.mount(at).identity))
    }

    /// One for each FUSE connection all of whose mounts are the lease's, while requests of it wait.
    /// Its processes have been told to end by then; a server that lives on is somebody else's, or hangs.
    fn fuse_aborts(&self) -> Vec<Step> {
        // A namespace that could not be read may have a bystander's mount of any.
        if self.index.snapshot.gaps.iter().any(|gap| matches!(gap, Gap::Namespace(..) | Gap::Namespaces(_))) {
            return Vec::new();
        }
        let hung = self.index.snapshot.fuse.iter().filter(|connection| connection.waiting > 0);
        hung.filter_map(|connection| {
            let mounts = self.index.mounts_of(connection.device);
            let all_own = mounts.iter().all(|at| self.is_own_mount(*at));
            let mount = mounts.first().filter(|_| all_own)?;
            Some(Step::AbortFuse { mount: self.index.mount(*mount).identity })
        })
        .collect()
    }

    /// Swap areas, mounts and block devices, each after all that holds it. What a bystander holds,
    /// directly or through something else, is left out.
    fn in_holding_order(&self) -> Vec<Step> {
        let nodes = self.nodes();
        let mut waits_for: BTreeMap<Node, Waits> = BTreeMap::new();
        for node in &nodes {
            if let Some(waits) = self.holders_among(*node, &nodes) {
                waits_for.insert(*node, waits);
            }
        }
        let mut steps = Vec::new();
        // Each round takes the first node that nothing holds any more. Hints can go in circles (a bind
        // of a file system inside an image that lies on it), so where nothing else is free, they yield.
        // A node that waits for one that was left out, or for itself, is never taken.
        let mut unmounted = BTreeSet::new();
        while let Some(next) = self.next_of(&waits_for, &unmounted) {
            waits_for.remove(&next);
            waits_for.values_mut().for_each(|waits| waits.forget(next));
            if let Node::Mount(at) = next {
                unmounted.extend(self.that_go_with(at.0));
            }
            steps.extend(self.step(next));
        }
        steps
    }

    fn next_of(&self, waits_for: &BTreeMap<Node, Waits>, unmounted: &BTreeSet<usize>) -> Option<Node> {
        let is_last = |node: &Node| match node {
            Node::Mount(at) => {
                let going = self.that_go_with(at.0);
                let stays = |other: &usize| !unmounted.contains(other) && !going.contains(other);
                !self.index.mounts_of(self.index.mount(at.0).device()).iter().any(stays)
            }
            _ => true,
        };
        let mut free = waits_for
            .iter()
            .filter(|(node, waits)| waits.sure.is_empty() && (waits.files.is_empty() || !is_last(node)));
        let best = free.clone().find(|(_, waits)| waits.hints.is_empty() && waits.files.is_empty());
        best.or_else(|| free.next()).map(|(node, _)| *node)
    }

    /// A mount, and those that are unmounted with it.
    fn that_go_with(&self, at: usize) -> Vec<usize> {
        let mut going = counterparts(at, self.index);
        going.push(at);
        going
    }

    /// The lease's swap areas, mounts and block devices, and the file systems on those that nothing
    /// shows a mount of.
    fn nodes(&self) -> BTreeSet<Node> {
        let snapshot = self.index.snapshot;
        let mut nodes = BTreeSet::new();
        for at in (0..snapshot.mounts.len()).filter(|at| self.is_own_mount(*at)) {
            nodes.insert(Node::Mount(std::cmp::Reverse(at)));
        }
        for (at, swap) in snapshot.swaps.iter().enumerate() {
            if self.is_own(ResourceIdentity::Swap(swap.identity)) {
                nodes.insert(Node::Swap(at));
            }
        }
        let loops = (0..snapshot.loops.len()).map(Block::Loop);
        let blocks = loops.chain((0..snapshot.maps.len()).map(Block::Map));
        for block in blocks.chain((0..snapshot.nbds.len()).map(Block::Nbd)) {
            if self.index.identity(block).is_some_and(|identity| self.is_own(identity)) {
                nodes.insert(Node::Block(block));
            }
        }
        for (at, filesystem) in snapshot.filesystems.iter().enumerate() {
            if self.owned_block(filesystem).is_some() && self.is_out_of_sight(filesystem) {
                nodes.insert(Node::Filesystem(at));
            }
        }
        nodes
    }

    /// The first block that a file system lies on, when all are the lease's.
    fn owned_block(&self, filesystem: &Filesystem) -> Option<Block> {
        let mut blocks = filesystem.blocks.iter().map(|device| self.index.block(*device));
        let all_own = blocks.clone().all(|block| {
            let identity = block.and_then(|block| self.index.identity(block));
            identity.is_some_and(|identity| self.is_own(identity))
        });
        if all_own { blocks.next().flatten() } else { None }
    }

    fn is_out_of_sight(&self, filesystem: &Filesystem) -> bool {
        let numbers = filesystem.blocks.iter().chain(&filesystem.shown_as);
        let not_mounted = |number: &DeviceNumber| self.index.mounts_of(*number).is_empty();
        numbers.into_iter().all(not_mounted)
    }

    /// What of `nodes` holds a node; `None` when something else holds it that no step of ours ends.
    fn holders_among(&self, node: Node, nodes: &BTreeSet<Node>) -> Option<Waits> {
        let mut found = Waits::default();
        if let Node::Mount(at) = node
            && self.would_take_a_bystanders(at.0)
        {
            return None;
        }
        for edge in holders(node, self.index) {
            match (edge.holder, edge.certainty) {
                // The partitions of a device go with it; what holds them holds it.
                (Some(partition @ Node::Partition(_)), _) => {
                    let Waits { sure, hints, files } = self.holders_among(partition, nodes)?;
                    found.sure.extend(sure);
                    found.hints.extend(hints);
                    found.files.extend(files);
                }
                // The lease's own processes have ended by then.
                (Some(process @ Node::Process(_)), Certainty::Sure) => {
                    let identity = identity_of(process, self.index)?;
                    if !self.is_own(identity) {
                        return None;
                    }
                }
                (Some(holder), Certainty::Sure) if !nodes.contains(&holder) => return None,
                (Some(holder), Certainty::Sure) => {
                    found.sure.insert(holder);
                }
                (Some(holder), Certainty::Hint) if is_file_in_use(edge.reason) => {
                    found.files.insert(holder);
                }
                (Some(holder), Certainty::Hint) if nodes.contains(&holder) => {
                    found.hints.insert(holder);
                }
                (Some(_), Certainty::Hint) | (None, _) => {}
            }
        }
        Some(found)
    }

    fn step(&self, node: Node) -> Option<Step> {
        let snapshot = self.index.snapshot;
        match node {
            Node::Mount(at) => Some(self.unmount(at.0)),
            Node::Swap(at) => {
                let swap = &snapshot.swaps[at];
                let block = match swap.identity {
                    SwapIdentity::Device(device) => self.index.block(device),
                    SwapIdentity::File(file) => self.index.blocks_under(file.device).first().copied(),
                    SwapIdentity::Unreachable(_) => None,
                };
                let on = block.and_then(|block| self.index.identity(block)).map(Box::new);
                Some(Step::SwapOff { swap: swap.identity, path: swap.path.clone(), on })
            }
            Node::Filesystem(at) => {
                let filesystem = &snapshot.filesystems[at];
                let resource = self.owned_block(filesystem).and_then(|block| self.index.identity(block))?;
                let files = snapshot.swaps.iter().filter(|swap| match swap.identity {
                    SwapIdentity::Device(_) => false,
                    SwapIdentity::File(_) | SwapIdentity::Unreachable(_) => true,
                });
                Some(Step::ReleaseFilesystem {
                    kind: filesystem.kind.clone(),
                    device: *filesystem.blocks.first()?,
                    resource: Box::new(resource),
                    swap_files: files.map(|swap| swap.path.clone()).collect(),
                })
            }
            Node::Block(Block::Loop(at)) => {
                let device = &snapshot.loops[at];
                let partitions = device.partitions.iter().map(|partition| partition.number).collect();
                Some(Step::DetachLoop { identity: device.identity()?, partitions })
            }
            Node::Block(Block::Map(at)) => {
                let map = &snapshot.maps[at];
                Some(Step::RemoveMap { map: map.identity, name: map.name.clone() })
            }
            Node::Block(Block::Nbd(at)) => Some(Step::DisconnectNbd { nbd: snapshot.nbds[at].identity? }),
            Node::Process(_) | Node::Partition(_) => None,
        }
    }

    fn unmount(&self, at: usize) -> Step {
        let mount = self.index.mount(at);
        let apart_from = self.parent_to_part(at).map(|parent| self.index.mount(parent).identity);
        // Only what lies on the lease's own devices is thawed: a frozen file system of the host's own,
        // which a builder bound somewhere, is somebody's snapshot being taken.
        let own_blocks = self.index.blocks_under(mount.device());
        let is_own_block = |block| self.index.identity(block).is_some_and(|identity| self.is_own(identity));
        let on_own_blocks = !own_blocks.is_empty() && own_blocks.into_iter().all(is_own_block);
        let how = if self.settings.lazily.contains(&mount.identity) {
            UnmountHow::Lazy
        } else if on_own_blocks {
            UnmountHow::Thawed
        } else {
            UnmountHow::Plain
        };
        Step::Unmount {
            mount: mount.identity,
            short_number: mount.short_number,
            point: mount.point.clone(),
            apart_from,
            is_elsewhere: !self.index.is_host(mount.identity.namespace),
            how,
        }
    }

    /// Whether unmounting this would unmount a bystander's mount as well, because both are on peers that
    /// are not the lease's to part.
    fn would_take_a_bystanders(&self, at: usize) -> bool {
        let is_parted = self.index.parent(at).is_none_or(|parent| self.is_own_mount(parent));
        !is_parted && self.has_older_counterpart(at)
    }

    fn has_older_counterpart(&self, at: usize) -> bool {
        let mount = self.index.mount(at);
        let is_bystanders = |other: usize| {
            let identity = ResourceIdentity::Mount(self.index.mount(other).identity);
            let is_copy = is_younger(self.index.mount(other), mount);
            !self.is_own_mount(other) && (!is_copy || self.ownership.protected.contains(&identity))
        };
        counterparts(at, self.index).into_iter().any(is_bystanders)
    }

    /// The mount that this one is on, when unmounting there would unmount a bystander's mount as well,
    /// and it is the lease's, so that it may be parted from its peers. Not when that other one is
    /// younger: then it is a copy of what the lease mounted, and is to go with it.
    fn parent_to_part(&self, at: usize) -> Option<usize> {
        let parent = self.index.parent(at).filter(|parent| self.is_own_mount(*parent))?;
        self.has_older_counterpart(at).then_some(parent)
    }
}

fn directories(lease: &Lease, snapshot: &Snapshot, ownership: &Ownership) -> Vec<Step> {
    lease
        .claims
        .iter()
        .filter(|claim| claim.scratch)
        .filter(|claim| ownership.is_of(ResourceIdentity::Directory(claim.directory), lease.id))
        // To remove what is around a stranger's things would take them too.
        .filter(|_| strangers_below(lease.id, snapshot, ownership).0.is_empty())
        .map(|claim| Step::RemoveDirectory {
            directory: claim.directory,
            lease: lease.id,
            path: claim.path.clone(),
        })
        .collect()
}

#[cfg(test)]
#[path = "plan_properties.rs"]
mod properties;
#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;
