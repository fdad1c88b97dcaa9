//! What holds a thing, and what holds that in turn: the [holder graph](super::graph) for people.
//!
//! Read off a snapshot of depth [`SnapshotDepth::Holders`](crate::model::SnapshotDepth::Holders).

use std::collections::{BTreeSet, HashMap};

use hostler_protocol::text::printable;
use hostler_protocol::why::{Held, Holder, Reason};

use super::attribute::Ownership;
use super::graph::{Edge, Node, holders, identity_of, node_of};
use super::index::{Block, Index};
use super::remedy::remedy;
use crate::model::{MapKind, Mount, ResourceIdentity, Snapshot};

/// How deep a chain of holders is followed. Real chains have fewer than ten links; text that a user
/// controls cannot make them longer, but stacked mounts can.
const DEPTH_LIMIT: usize = 32;
/// How many things one answer names. Nobody reads more, and mounts that hide each other have as many ways
/// from one to another as a user likes.
const NAMED_LIMIT: usize = 1000;
/// How many bytes all of them together may have. Mount points can be as long as the kernel lets them, and
/// whoever asks takes no more than 64 MiB.
const TEXT_LIMIT: usize = 8 * 1024 * 1024;
/// Whose a thing is that the configuration says nobody may touch.
pub const PROTECTED: &str = "protected by [protect]";

/// What somebody may learn of a thing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// It is his: also what directly holds it, whoever's that is. His lease's report tells the same.
    Own,
    /// It is there for all to see.
    Seen,
    /// Nothing.
    Hidden,
}

/// Finds what a person named: `/dev/loop3`, `loop3`, `/dev/nbd0`, `/dev/dm-0`, `/dev/mapper/NAME`, a
/// mount point as `findmnt` shows it or as it is, a swap file, a process number; and says what holds it.
/// `None` when nothing has that name that `access` lets be asked about. What holds it and is hidden is
/// named by its kind alone.
#[must_use]
pub fn explain(
    target: &str,
    snapshot: &Snapshot,
    ownership: &Ownership,
    access: impl Fn(ResourceIdentity) -> Access,
) -> Option<Held> {
    let index = Index::new(snapshot);
    let asked = find(target, &index)?;
    let access = |node| identity_of(node, &index).map_or(Access::Seen, &access);
    if access(asked) == Access::Hidden {
        return None;
    }
    let narrator = Narrator { index: &index, ownership };
    Some(Answer::about(asked, &narrator, access).held(0))
}

/// The reasons that directly hold a resource, each once, with one sentence for a person.
#[must_use]
pub fn reasons_for(
    resource: ResourceIdentity,
    snapshot: &Snapshot,
    ownership: &Ownership,
) -> (Vec<Reason>, String) {
    let index = Index::new(snapshot);
    let Some(node) = node_of(resource, &index) else { return (Vec::new(), String::new()) };
    let narrator = Narrator { index: &index, ownership };
    let mut reasons = BTreeSet::new();
    let mut sentences = Vec::new();
    for edge in narrator.through_partitions(node) {
        reasons.insert(edge.reason);
        let what = match edge.holder {
            Some(holder) => narrator.what(holder),
            None => sentence_without_holder(edge.reason),
        };
        if edge.holder.is_some_and(|holder| narrator.is_protected(holder)) {
            reasons.insert(Reason::Bystander);
            sentences.push(format!("{what}, {PROTECTED}"));
            continue;
        }
        let whose = edge.holder.map(|holder| narrator.whose(holder)).unwrap_or_default();
        sentences.push(if whose.is_empty() { what } else { format!("{what} of {whose}") });
    }
    let shown = sentences.iter().take(3).map(String::as_str).collect::<Vec<_>>().join("; ");
    let detail = match sentences.len() {
        0 => String::new(),
        1..=3 => format!("held by {shown}"),
        more => format!("held by {shown}; and {} more, see `hostler why`", more - 3),
    };
    (reasons.into_iter().collect(), detail)
}

pub(super) fn find(text: &str, index: &Index<'_>) -> Option<Node> {
    let snapshot = index.snapshot;
    let name = text.strip_prefix("/dev/").unwrap_or(text);
    let number = |prefix: &str| name.strip_prefix(prefix)?.parse::<u32>().ok();
    if let Some(number) = number("loop") {
        let at = snapshot.loops.iter().position(|device| device.number == number)?;
        return Some(Node::Block(Block::Loop(at)));
    }
    if let Some(number) = number("nbd") {
        let at = snapshot.nbds.iter().position(|device| device.number == number)?;
        return Some(Node::Block(Block::Nbd(at)));
    }
    let mapped = name.strip_prefix("mapper/").unwrap_or(name);
    let is_it = |map: &crate::model::Map| {
        map.name == mapped
            || map.identity.kind == MapKind::DeviceMapper && number("dm-") == Some(map.identity.device.minor)
    };
    if let Some(at) = snapshot.maps.iter().position(is_it) {
        return Some(Node::Block(Block::Map(at)));
    }
    if let Ok(pid) = text.parse::<u32>() {
        let at = snapshot.processes.iter().position(|process| process.identity.pid == pid)?;
        return Some(Node::Process(at));
    }
    let is_at = |point: &[u8]| point == text.as_bytes() || printable(point) == text;
    let in_host = |mount: &Mount| index.is_host(mount.identity.namespace);
    // The upper of two on one point comes later; the host's own come before others.
    let mounts = || snapshot.mounts.iter().enumerate().filter(|(_, mount)| is_at(&mount.point));
    let mount = mounts().rfind(|(_, mount)| in_host(mount)).or_else(|| mounts().next_back());
    mount.map(|(at, _)| Node::Mount(std::cmp::Reverse(at))).or_else(|| {
        let swap = snapshot.swaps.iter().position(|swap| is_at(&swap.path));
        swap.map(Node::Swap)
    })
}

fn sentence_without_holder(reason: Reason) -> String {
    match reason {
        Reason::AutoclearPending => "the kernel, which detaches it at the last close".to_owned(),
        Reason::Unknown => {
            "something that cannot be seen: a descriptor on its way over a socket, or what could not be read"
                .to_owned()
        }
        Reason::FuseHung => "a FUSE server that does not answer".to_owned(),
        Reason::Frozen => "a freeze (fsfreeze)".to_owned(),
        Reason::MntLocked => "the user namespace that its mount namespace belongs to".to_owned(),
        other => other.name().to_owned(),
    }
}

/// What is told, as a list that becomes a tree: what is nearest to what was asked about comes first. So a
/// thing that holds in many ways is told of at the end of the shortest, and no long branch takes the place
/// of what directly holds.
struct Answer {
    named: Vec<Named>,
    /// How many bytes that has.
    length: usize,
}

/// One thing in an answer.
struct Named {
    what: String,
    whose: String,
    /// What holds it: how, what would end that, and its place in the answer.
    holders: Vec<(Reason, String, usize)>,
    /// Where what holds it is told, if not here.
    told_at: Option<usize>,
    /// What there was no room for.
    left_out: Option<LeftOut>,
}

enum LeftOut {
    /// So many more holders, the first of which holds like this.
    More(Reason, usize),
    /// What holds it, if anything does.
    All,
}

impl Answer {
    fn about(asked: Node, narrator: &Narrator<'_>, access: impl Fn(Node) -> Access) -> Self {
        let mut answer = Self { named: vec![Named::of(asked, narrator)], length: 0 };
        let mut first = HashMap::from([(asked, 0)]);
        // Each thing once: its place in the answer, and how far it is from what was asked about.
        let mut queue = std::collections::VecDeque::from([(asked, 0, 0)]);
        while let Some((node, place, depth)) = queue.pop_front() {
            if depth == DEPTH_LIMIT || answer.is_full() {
                // A process is never held.
                let may_be_held = !matches!(node, Node::Process(_));
                answer.named[place].left_out = may_be_held.then_some(LeftOut::All);
                continue;
            }
            let edges = narrator.edges(node);
            // Those of one kind that hold in one way are told together, where the first of them is.
            let mut others: HashMap<(Reason, &str), (usize, usize)> = HashMap::new();
            for (at, edge) in edges.iter().enumerate() {
                let to = answer.named.len();
                if answer.is_full() {
                    answer.named[place].left_out = Some(LeftOut::More(edge.reason, edges.len() - at));
                    break;
                }
                let mut command = remedy(narrator.index, node, edge);
                let named = match edge.holder {
                    None => Named::plain(sentence_without_holder(edge.reason)),
                    Some(holder) if access(holder) == Access::Hidden => {
                        if access(node) == Access::Own {
                            Named::of(holder, narrator)
                        } else {
                            let (one, several) = kind_of(holder);
                            let (first, count) = others.entry((edge.reason, one)).or_insert((to, 0));
                            *count += 1;
                            if *count > 1 {
                                answer.named[*first].what = format!("{count} {several} of other users");
                                continue;
                            }
                            command.clear();
                            Named::plain(format!("{one} of another user's"))
                        }
                    }
                    Some(holder) => {
                        let told_at = first.get(&holder).copied();
                        if told_at.is_none() {
                            first.insert(holder, to);
                            queue.push_back((holder, to, depth + 1));
                        }
                        Named { told_at, ..Named::of(holder, narrator) }
                    }
                };
                answer.length += named.what.len() + command.len();
                answer.named.push(named);
                answer.named[place].holders.push((edge.reason, command, to));
            }
        }
        answer
    }

    fn is_full(&self) -> bool {
        self.named.len() >= NAMED_LIMIT || self.length >= TEXT_LIMIT
    }

    fn held(&self, place: usize) -> Held {
        let named = &self.named[place];
        let mut what = named.what.clone();
        if named.told_at.is_some_and(|other| self.named[other].is_held()) {
            what.push_str(" (what holds it is told elsewhere in this answer)");
        }
        if matches!(named.left_out, Some(LeftOut::All)) {
            what.push_str(" (what holds it is left out: it is too far, or too much)");
        }
        let mut holders: Vec<Holder> = named
            .holders
            .iter()
            .map(|(reason, remedy, at)| Holder {
                reason: *reason,
                remedy: remedy.clone(),
                by: self.held(*at),
            })
            .collect();
        if let Some(LeftOut::More(reason, count)) = named.left_out {
            let what = format!("{count} more, left out: an answer has no room for them");
            let by = Held { what, whose: String::new(), holders: Vec::new() };
            holders.push(Holder { reason, remedy: String::new(), by });
        }
        Held { what, whose: named.whose.clone(), holders }
    }
}

impl Named {
    fn of(node: Node, narrator: &Narrator<'_>) -> Self {
        Self { whose: narrator.whose(node), ..Self::plain(narrator.what(node)) }
    }

    fn plain(what: String) -> Self {
        Self { what, whose: String::new(), holders: Vec::new(), told_at: None, left_out: None }
    }

    fn is_held(&self) -> bool {
        !self.holders.is_empty() || self.left_out.is_some()
    }
}

/// A thing's kind, for one and for several.
fn kind_of(node: Node) -> (&'static str, &'static str) {
    match node {
        Node::Process(_) => ("a process", "processes"),
        Node::Mount(_) => ("a mount", "mounts"),
        Node::Swap(_) => ("a swap area", "swap areas"),
        Node::Filesystem(_) => ("a file system", "file systems"),
        Node::Block(Block::Loop(_)) => ("a loop device", "loop devices"),
        Node::Block(Block::Map(_)) => ("a map", "maps"),
        Node::Block(Block::Nbd(_)) => ("a network block device", "network block devices"),
        Node::Partition(_) => ("a partition", "partitions"),
    }
}

struct Narrator<'a> {
    index: &'a Index<'a>,
    ownership: &'a Ownership,
}

impl Narrator<'_> {
    /// What holds a node, without what is of no use to a person: loop devices and swap files on the
    /// host's own file systems, seen from one of their many mounts; partitions that nothing holds.
    fn edges(&self, node: Node) -> Vec<Edge> {
        let is_of_use = |edge: &Edge| match (edge.reason, edge.holder) {
            (Reason::NestedLoop | Reason::Swapfile, Some(_)) => {
                edge.certainty == super::graph::Certainty::Sure
            }
            (Reason::Partition, Some(partition)) => !holders(partition, self.index).is_empty(),
            _ => true,
        };
        holders(node, self.index).into_iter().filter(is_of_use).collect()
    }

    /// The same, with what holds a partition in the partition's place.
    fn through_partitions(&self, node: Node) -> Vec<Edge> {
        let mut found = Vec::new();
        for edge in self.edges(node) {
            match edge.holder {
                Some(partition @ Node::Partition(_)) => found.extend(holders(partition, self.index)),
                Some(_) | None => found.push(edge),
            }
        }
        found
    }

    fn what(&self, node: Node) -> String {
        let snapshot = self.index.snapshot;
        match node {
            Node::Block(Block::Loop(at)) => {
                let device = &snapshot.loops[at];
                format!("loop device /dev/loop{} (backing file {})", device.number, device.backing_text)
            }
            Node::Block(Block::Map(at)) => {
                let map = &snapshot.maps[at];
                let name = printable(map.name.as_bytes());
                match map.identity.kind {
                    MapKind::DeviceMapper => {
                        let kind = map_kind(&map.uuid);
                        format!("{kind} /dev/mapper/{name} (dm-{})", map.identity.device.minor)
                    }
                    MapKind::Array => format!("array /dev/{name}"),
                }
            }
            Node::Block(Block::Nbd(at)) => {
                format!("network block device /dev/nbd{}", snapshot.nbds[at].number)
            }
            Node::Partition(device) => self.partition(device),
            Node::Filesystem(at) => {
                let filesystem = &snapshot.filesystems[at];
                match filesystem.frozen {
                    Some(true) => format!("a frozen {} file system", filesystem.kind),
                    Some(false) | None => {
                        format!("a {} file system that nothing shows a mount of", filesystem.kind)
                    }
                }
            }
            Node::Swap(at) => format!("swap area {}", printable(&snapshot.swaps[at].path)),
            Node::Mount(at) => {
                let mount = self.index.mount(at.0);
                let place = if self.index.is_host(mount.identity.namespace) {
                    String::new()
                } else {
                    format!(" in mount namespace {}", mount.identity.namespace.0)
                };
                format!(
                    "mount {} ({}){place}",
                    printable(&mount.point),
                    printable(mount.filesystem.as_bytes())
                )
            }
            Node::Process(at) => {
                let process = &snapshot.processes[at];
                let (pid, name, uid) = (process.identity.pid, printable(&process.name), process.uid);
                if process.unit.is_empty() || process.unit == "/" {
                    format!("process {pid} ({name}, uid {uid})")
                } else {
                    format!("process {pid} ({name}, uid {uid}, control group {})", process.unit)
                }
            }
        }
    }

    fn partition(&self, device: crate::model::DeviceNumber) -> String {
        let found = self.index.block(device).and_then(|block| {
            let (_, partitions) = self.index.device_of(block);
            let partition = partitions.iter().find(|partition| partition.device == device)?;
            Some((block, partition.number))
        });
        match found {
            Some((Block::Loop(at), number)) => {
                format!("partition /dev/loop{}p{number}", self.index.snapshot.loops[at].number)
            }
            Some((_, number)) => format!("partition {number}"),
            None => format!("partition {device}"),
        }
    }

    fn whose(&self, node: Node) -> String {
        let Some(identity) = identity_of(node, self.index) else { return String::new() };
        match self.ownership.owners.get(&identity) {
            Some(lease) => format!("lease {lease}"),
            None if self.ownership.protected.contains(&identity) => PROTECTED.to_owned(),
            None if self.ownership.doubtful.contains(&identity) => "more than one lease".to_owned(),
            None => String::new(),
        }
    }

    fn is_protected(&self, node: Node) -> bool {
        identity_of(node, self.index).is_some_and(|identity| self.ownership.protected.contains(&identity))
    }
}

/// What made a map, by the uuid that it gave it.
fn map_kind(uuid: &str) -> &'static str {
    match uuid.split(['-', '_']).next() {
        Some("LVM") => "logical volume",
        Some("CRYPT") => "encrypted container",
        Some(part) if part.starts_with("part") => "partition map",
        Some(_) | None => "map",
    }
}

#[cfg(test)]
#[path = "explain_tests.rs"]
mod tests;
