//! The holder graph: what directly holds each thing, and how.
//!
//! One graph for everything: plans order their steps by it, and `why` prints it. It knows nothing of
//! owners. An edge is *sure* when what it leads to must go before what it comes from can be freed; one
//! that is not only orders steps, where both ends are to go, and tells a person what may matter.

use super::index::{Block, Index};
use super::propagation::{counterparts, is_younger};
use crate::model::{
    DeviceNumber, LoopState, Mount, Partition, Place, Process, ResourceIdentity, Snapshot, SwapIdentity,
};
use hostler_protocol::why::Reason;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A thing of the graph, by its place in the snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Node {
    /// A process.
    Process(usize),
    /// A mount. The latest comes first: of two that could go next, it does.
    Mount(std::cmp::Reverse<usize>),
    /// A swap area.
    Swap(usize),
    /// A file system in use that nothing shows a mount of.
    Filesystem(usize),
    /// A block device.
    Block(Block),
    /// A partition of a block device.
    Partition(DeviceNumber),
}

/// Whether a holder must go first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Certainty {
    /// What it holds cannot be freed before it.
    Sure,
    /// It may matter.
    Hint,
}

/// One holder of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Edge {
    pub(super) reason: Reason,
    /// What holds; `None` for what has no place in the snapshot.
    pub(super) holder: Option<Node>,
    pub(super) certainty: Certainty,
}

fn sure(reason: Reason, holder: Node) -> Edge {
    Edge { reason, holder: Some(holder), certainty: Certainty::Sure }
}

fn hint(reason: Reason, holder: Option<Node>) -> Edge {
    Edge { reason, holder, certainty: Certainty::Hint }
}

/// How many processes are named that only keep a namespace: any build host has thousands.
const RESIDENTS_NAMED: usize = 3;

/// What directly holds `node`.
pub(super) fn holders(node: Node, index: &Index<'_>) -> Vec<Edge> {
    match node {
        // A process is not held by anything that a snapshot could show.
        Node::Process(_) => Vec::new(),
        Node::Mount(at) => mount_holders(at.0, index),
        Node::Swap(_) => Vec::new(),
        Node::Filesystem(at) => {
            let frozen = index.snapshot.filesystems[at].frozen == Some(true);
            vec![hint(if frozen { Reason::Frozen } else { Reason::Unknown }, None)]
        }
        Node::Block(block) => {
            let (device, partitions) = index.device_of(block);
            let mut found = device_holders(device, index);
            found.extend(
                partitions
                    .iter()
                    .map(|Partition { device, .. }| sure(Reason::Partition, Node::Partition(*device))),
            );
            found.extend(own_holders(block, index));
            found
        }
        Node::Partition(device) => device_holders(device, index),
    }
}

/// The node of a resource, while it is in the snapshot.
pub(super) fn node_of(identity: ResourceIdentity, index: &Index<'_>) -> Option<Node> {
    let snapshot = index.snapshot;
    match identity {
        ResourceIdentity::Process(process) => {
            snapshot.processes.iter().position(|other| other.identity == process).map(Node::Process)
        }
        ResourceIdentity::Mount(mount) => snapshot
            .mounts
            .iter()
            .position(|other| other.identity == mount)
            .map(|at| Node::Mount(std::cmp::Reverse(at))),
        ResourceIdentity::Loop(device) => snapshot
            .loops
            .iter()
            .position(|other| other.number == device.number)
            .map(|at| Node::Block(Block::Loop(at))),
        ResourceIdentity::Map(map) => {
            snapshot.maps.iter().position(|other| other.identity == map).map(|at| Node::Block(Block::Map(at)))
        }
        ResourceIdentity::Nbd(nbd) => snapshot
            .nbds
            .iter()
            .position(|other| other.number == nbd.number)
            .map(|at| Node::Block(Block::Nbd(at))),
        ResourceIdentity::Swap(swap) => {
            snapshot.swaps.iter().position(|other| other.identity == swap).map(Node::Swap)
        }
        ResourceIdentity::Directory(_) | ResourceIdentity::Cgroup(_) => None,
    }
}

/// What a node is, when that is known for sure.
pub(super) fn identity_of(node: Node, index: &Index<'_>) -> Option<ResourceIdentity> {
    let snapshot = index.snapshot;
    match node {
        Node::Process(at) => Some(ResourceIdentity::Process(snapshot.processes[at].identity)),
        Node::Mount(at) => Some(ResourceIdentity::Mount(index.mount(at.0).identity)),
        Node::Swap(at) => Some(ResourceIdentity::Swap(snapshot.swaps[at].identity)),
        Node::Block(block) => index.identity(block),
        Node::Partition(device) => index.identity(index.block(device)?),
        Node::Filesystem(_) => None,
    }
}

/// What holds one device number: a whole block device or one partition.
fn device_holders(device: DeviceNumber, index: &Index<'_>) -> Vec<Edge> {
    let snapshot = index.snapshot;
    let mut found = Vec::new();
    for shown in index.shown_for(device) {
        for at in index.mounts_of(shown) {
            let is_host = index.is_host(index.mount(*at).identity.namespace);
            let reason = if is_host { Reason::Mounted } else { Reason::ForeignNamespace };
            found.push(sure(reason, Node::Mount(std::cmp::Reverse(*at))));
        }
        found.extend(files_on(shown, index));
        for (at, process) in snapshot.processes.iter().enumerate() {
            if let Some(reason) = stands_out_of_sight(process, shown, index) {
                found.push(sure(reason, Node::Process(at)));
            }
        }
    }
    for at in index.maps_on(device) {
        found.push(sure(Reason::Map, Node::Block(Block::Map(*at))));
    }
    for (at, swap) in snapshot.swaps.iter().enumerate() {
        if swap.identity == SwapIdentity::Device(device) {
            found.push(sure(Reason::Swap, Node::Swap(at)));
        }
    }
    for (at, process) in snapshot.processes.iter().enumerate() {
        if process.files.iter().any(|file| file.block_device == Some(device)) {
            found.push(sure(Reason::OpenDeviceFd, Node::Process(at)));
        }
    }
    for (at, filesystem) in index.filesystems_on(device) {
        let is_shown = index.shown_for(device).iter().any(|shown| !index.mounts_of(*shown).is_empty());
        let is_explained = found.iter().any(|edge| edge.reason != Reason::OpenDeviceFd);
        if !is_shown && (filesystem.frozen == Some(true) || !is_explained) {
            let reason = if filesystem.frozen == Some(true) { Reason::Frozen } else { Reason::Unknown };
            found.push(hint(reason, Some(Node::Filesystem(at))));
        }
    }
    found
}

/// What holds a block device as a whole, besides what holds its device number.
fn own_holders(block: Block, index: &Index<'_>) -> Vec<Edge> {
    let snapshot = index.snapshot;
    match block {
        Block::Loop(at) => match snapshot.loops[at].state {
            LoopState::Closing => vec![hint(Reason::AutoclearPending, None)],
            LoopState::Bound(_) | LoopState::Unread | LoopState::Leftover => Vec::new(),
        },
        Block::Nbd(at) => {
            // Its server keeps it connected.
            let server = snapshot.nbds[at].identity.map(|identity| identity.server);
            let at = snapshot.processes.iter().position(|other| Some(other.identity) == server);
            at.map(|at| hint(Reason::OpenDeviceFd, Some(Node::Process(at)))).into_iter().collect()
        }
        Block::Map(_) => Vec::new(),
    }
}

/// Loop devices' backing files and swap files on a file system with this number.
fn files_on(shown: DeviceNumber, index: &Index<'_>) -> Vec<Edge> {
    let mut found = Vec::new();
    for at in index.loops_backed_by(shown) {
        found.push(sure(Reason::NestedLoop, Node::Block(Block::Loop(*at))));
    }
    for (at, swap) in index.snapshot.swaps.iter().enumerate() {
        if matches!(swap.identity, SwapIdentity::File(file) if file.device == shown) {
            found.push(sure(Reason::Swapfile, Node::Swap(at)));
        }
    }
    found
}

/// Whether a process stands on, or has open, a file of such a file system on a mount that no namespace
/// lists, and which kind of descriptor that is.
fn stands_out_of_sight(process: &Process, shown: DeviceNumber, index: &Index<'_>) -> Option<Reason> {
    let is_out_of_sight = |place: &Place| place.device == shown && index.by_number(place.mount).is_none();
    let file = process.files.iter().find(|file| is_out_of_sight(&file.place));
    let by_other = own_places(process).any(|place| is_out_of_sight(&place));
    match file {
        // `open_tree(2)` gives a descriptor of the kind that `O_PATH` does, of the root of a copy.
        Some(file) if file.is_path && file.text == b"/" && !by_other => Some(Reason::OpenTree),
        Some(_) => Some(Reason::DetachedMountFd),
        None => by_other.then_some(Reason::DetachedMountFd),
    }
}

fn own_places(process: &Process) -> impl Iterator<Item = Place> + '_ {
    [process.current_directory, process.root_directory, process.program].into_iter().flatten()
}

fn mount_holders(at: usize, index: &Index<'_>) -> Vec<Edge> {
    let mount = index.mount(at);
    let mut found = Vec::new();
    for child in index.children(at) {
        let is_stacked = index.mount(*child).point == mount.point;
        let reason = if is_stacked { Reason::StackedMount } else { Reason::ChildMount };
        found.push(sure(reason, Node::Mount(std::cmp::Reverse(*child))));
    }
    for sibling in index.siblings(at) {
        // What is mounted over a directory on the way hides it. It can be reached all the same, so this
        // only orders.
        if *sibling != at && hides(index.mount(*sibling), mount) {
            found.push(hint(Reason::StackedMount, Some(Node::Mount(std::cmp::Reverse(*sibling)))));
        }
    }
    let is_only = index.mounts_of(mount.device()).len() == 1;
    // The kernel unmounts all copies or none: whoever stands in one holds all (`propagate_mount_busy`).
    let copies: Vec<u64> =
        counterparts(at, index).into_iter().map(|copy| index.mount(copy).short_number).collect();
    for (at, process) in index.snapshot.processes.iter().enumerate() {
        let stands = own_places(process)
            .chain(process.files.iter().map(|file| file.place))
            .any(|place| place.mount == mount.short_number || copies.contains(&place.mount));
        // A mapping names only the file system. Where the process stands on the mount as well, the
        // mapping adds nothing; on the host's own file systems everybody has mappings.
        if stands {
            found.push(sure(Reason::CwdOrRoot, Node::Process(at)));
        } else if is_only && process.mapped.contains(&mount.device()) {
            found.push(sure(Reason::Mapping, Node::Process(at)));
        }
    }
    // A file in use holds the mount that it was opened through, and nothing tells which one that is. Of
    // the host's own file systems, which every builder binds somewhere, other mounts remain anyway.
    for edge in files_on(mount.device(), index) {
        let certainty = if is_only { Certainty::Sure } else { Certainty::Hint };
        found.push(Edge { certainty, ..edge });
    }
    found.extend(overlays_on(at, index));
    found.extend(what_a_person_should_know(mount, index));
    found
}

/// Whether one mount hides another of the same parent: it came later, on a directory above.
fn hides(upper: &Mount, lower: &Mount) -> bool {
    let (above, below) = (OsStr::from_bytes(&upper.point), OsStr::from_bytes(&lower.point));
    above != below && Path::new(below).starts_with(above) && !is_younger(lower, upper)
}

/// Overlays in the same namespace with a layer on this mount. Their options are text that the kernel
/// kept of what was mounted: enough to leave the layer alone, and no proof of whose the overlay is.
fn overlays_on(at: usize, index: &Index<'_>) -> impl Iterator<Item = Edge> {
    let overlays = index.overlays_on(at).iter();
    overlays.map(|overlay| sure(Reason::OverlayLower, Node::Mount(std::cmp::Reverse(*overlay))))
}

/// What keeps a mount in its own way: hints, for `why`.
fn what_a_person_should_know(mount: &Mount, index: &Index<'_>) -> Vec<Edge> {
    let snapshot = index.snapshot;
    let mut found = Vec::new();
    let connection = snapshot.fuse.iter().find(|connection| connection.device == mount.device());
    if connection.is_some_and(|connection| connection.waiting > 0) && mount.filesystem.starts_with("fuse") {
        found.push(hint(Reason::FuseHung, None));
    }
    let frozen = snapshot.filesystems.iter().enumerate().find(|(_, filesystem)| {
        filesystem.frozen == Some(true)
            && (filesystem.blocks.contains(&mount.device()) || filesystem.shown_as.contains(&mount.device()))
    });
    if let Some((at, _)) = frozen {
        found.push(hint(Reason::Frozen, Some(Node::Filesystem(at))));
    }
    if index.is_host(mount.identity.namespace) {
        return found;
    }
    let namespace = snapshot.namespaces.iter().find(|other| other.namespace == mount.identity.namespace);
    if namespace.is_some_and(|namespace| namespace.other_user_namespace) {
        found.push(hint(Reason::MntLocked, None));
    }
    found.extend(keepers(mount, snapshot));
    found
}

/// What keeps another namespace alive: processes in it, open files of it, and mounts of its file.
fn keepers(mount: &Mount, snapshot: &Snapshot) -> Vec<Edge> {
    let namespace = mount.identity.namespace;
    let processes = snapshot.processes.iter().enumerate().filter(|(_, process)| {
        !process.ended
            && (process.namespace == Some(namespace)
                || process.files.iter().any(|file| file.namespace == Some(namespace)))
    });
    let mut found: Vec<Edge> = processes
        .take(RESIDENTS_NAMED)
        .map(|(at, _)| hint(Reason::ForeignNamespace, Some(Node::Process(at))))
        .collect();
    let files = snapshot.mounts.iter().enumerate();
    let files = files.filter(|(_, other)| other.kept_namespace() == Some(namespace));
    found.extend(
        files.map(|(at, _)| hint(Reason::ForeignNamespace, Some(Node::Mount(std::cmp::Reverse(at))))),
    );
    found
}
