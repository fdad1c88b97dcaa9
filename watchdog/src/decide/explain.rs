//! What holds a thing, and what holds that in turn.
//!
//! Read off a snapshot of depth [`SnapshotDepth::Holders`](crate::model::SnapshotDepth::Holders);
//! it is for people and for the reasons in reports, and no step is ever derived from it.

use std::collections::BTreeSet;

use hostler_protocol::text::printable;
use hostler_protocol::why::{Held, Holder, Reason};

use super::attribute::Ownership;
use crate::model::{DeviceNumber, LoopDevice, LoopState, Mount, Process, ResourceIdentity, Snapshot};

/// How deep a chain of holders is followed. Real chains have fewer than ten links; text that a user
/// controls cannot make them longer, but stacked mounts can.
const DEPTH_LIMIT: usize = 32;

/// What can be asked about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// A loop device by number.
    Loop(u32),
    /// A mount by mountinfo's number, of the host's or another namespace.
    Mount(u64),
    /// A process by number.
    Process(u32),
}

impl Target {
    /// Finds what a person named: `/dev/loop3`, `loop3`, a mount point as `findmnt` shows it or as
    /// it is, a process number.
    #[must_use]
    pub fn find(text: &str, snapshot: &Snapshot) -> Option<Self> {
        let loop_name = text.strip_prefix("/dev/").unwrap_or(text).strip_prefix("loop");
        if let Some(number) = loop_name.and_then(|number| number.parse().ok()) {
            return snapshot.loops.iter().any(|device| device.number == number).then_some(Self::Loop(number));
        }
        if let Ok(pid) = text.parse() {
            return snapshot
                .processes
                .iter()
                .any(|process| process.identity.pid == pid)
                .then_some(Self::Process(pid));
        }
        snapshot
            .mounts
            .iter()
            .rev()
            .find(|mount| mount.point == text.as_bytes() || printable(&mount.point) == text)
            .map(|mount| Self::Mount(mount.short_number))
    }

    /// The thing that an identity is of, for as long as it is in the snapshot.
    #[must_use]
    pub fn of(identity: ResourceIdentity, snapshot: &Snapshot) -> Option<Self> {
        match identity {
            ResourceIdentity::Process(process) => Some(Self::Process(process.pid)),
            ResourceIdentity::Loop(device) => Some(Self::Loop(device.number)),
            ResourceIdentity::Mount(mount) => snapshot
                .mounts
                .iter()
                .find(|other| other.identity == mount)
                .map(|mount| Self::Mount(mount.short_number)),
            ResourceIdentity::Directory(_) | ResourceIdentity::Cgroup(_) => None,
            ResourceIdentity::Map(_) | ResourceIdentity::Nbd(_) | ResourceIdentity::Swap(_) => None,
        }
    }
}

/// The tree of holders of `target`.
#[must_use]
pub fn explain(target: Target, snapshot: &Snapshot, ownership: &Ownership) -> Held {
    held(target, snapshot, ownership, &mut BTreeSet::new(), 0)
}

/// The reasons that directly hold `target`, each once, with one sentence for a person.
#[must_use]
pub fn reasons_for(target: Target, snapshot: &Snapshot, ownership: &Ownership) -> (Vec<Reason>, String) {
    let mut reasons = BTreeSet::new();
    let mut sentences = Vec::new();
    for (reason, holder, _) in holders(target, snapshot) {
        reasons.insert(reason);
        let whose = match holder {
            Some(holder) => whose(holder, snapshot, ownership),
            None => String::new(),
        };
        let what = holder.map_or_else(|| reason.name().to_owned(), |holder| what(holder, snapshot));
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

fn held(
    target: Target,
    snapshot: &Snapshot,
    ownership: &Ownership,
    above: &mut BTreeSet<Target>,
    depth: usize,
) -> Held {
    let mut tree =
        Held { what: what(target, snapshot), whose: whose(target, snapshot, ownership), holders: Vec::new() };
    if depth == DEPTH_LIMIT || !above.insert(target) {
        return tree;
    }
    for (reason, holder, remedy) in holders(target, snapshot) {
        let by = match holder {
            Some(holder) => held(holder, snapshot, ownership, above, depth + 1),
            None => Held { what: sentence_without_holder(reason), whose: String::new(), holders: Vec::new() },
        };
        tree.holders.push(Holder { reason, remedy, by });
    }
    above.remove(&target);
    tree
}

fn sentence_without_holder(reason: Reason) -> String {
    match reason {
        Reason::AutoclearPending => "the kernel, which detaches it at the last close".to_owned(),
        Reason::Unknown => "something that could not be read".to_owned(),
        other => other.name().to_owned(),
    }
}

/// What directly holds `target`: how, which thing, and what would end just that.
fn holders(target: Target, snapshot: &Snapshot) -> Vec<(Reason, Option<Target>, String)> {
    match target {
        Target::Loop(number) => {
            let Some(device) = snapshot.loops.iter().find(|device| device.number == number) else {
                return Vec::new();
            };
            loop_holders(device, snapshot)
        }
        Target::Mount(number) => match find_mount(number, snapshot) {
            Some(mount) => mount_holders(mount, snapshot),
            None => Vec::new(),
        },
        // A process is not held by anything that this snapshot could show.
        Target::Process(_) => Vec::new(),
    }
}

fn loop_holders(device: &LoopDevice, snapshot: &Snapshot) -> Vec<(Reason, Option<Target>, String)> {
    let mut found = Vec::new();
    let is_host = |mount: &&Mount| snapshot.namespace == Some(mount.identity.namespace);
    for mount in snapshot.mounts.iter().filter(is_host).filter(|mount| device.has_device(mount.device())) {
        let remedy = format!("umount {}", printable(&mount.point));
        found.push((Reason::Mounted, Some(Target::Mount(mount.short_number)), remedy));
    }
    for mount in snapshot
        .mounts
        .iter()
        .filter(|mount| !is_host(mount))
        .filter(|mount| device.has_device(mount.device()))
    {
        found.push((
            Reason::ForeignNamespace,
            Some(Target::Mount(mount.short_number)),
            foreign_remedy(mount, snapshot),
        ));
    }
    for other in &snapshot.loops {
        match other.state {
            LoopState::Bound(backing) if device.has_device(backing.device) => {
                let remedy = format!("losetup -d /dev/loop{}", other.number);
                found.push((Reason::NestedLoop, Some(Target::Loop(other.number)), remedy));
            }
            LoopState::Bound(_) | LoopState::Closing | LoopState::Unread | LoopState::Leftover => {}
        }
    }
    for process in &snapshot.processes {
        let pid = process.identity.pid;
        if process.files.iter().any(|file| file.block_device.is_some_and(|node| device.has_device(node))) {
            found.push((Reason::OpenDeviceFd, Some(Target::Process(pid)), format!("kill {pid}")));
        }
        if on_detached_mount(process, snapshot, |place| device.has_device(place)) {
            found.push((Reason::DetachedMountFd, Some(Target::Process(pid)), format!("kill {pid}")));
        }
    }
    if device.state == LoopState::Closing {
        found.push((Reason::AutoclearPending, None, String::new()));
    }
    found
}

/// Whether a process stands on, or has open, a file of such a device on a mount that no namespace
/// lists.
fn on_detached_mount(process: &Process, snapshot: &Snapshot, is_it: impl Fn(DeviceNumber) -> bool) -> bool {
    places(process).any(|place| is_it(place.device) && find_mount(place.mount, snapshot).is_none())
}

fn places(process: &Process) -> impl Iterator<Item = crate::model::Place> + '_ {
    [process.current_directory, process.root_directory, process.program]
        .into_iter()
        .flatten()
        .chain(process.files.iter().map(|file| file.place))
}

fn mount_holders(mount: &Mount, snapshot: &Snapshot) -> Vec<(Reason, Option<Target>, String)> {
    let mut found = Vec::new();
    let children = snapshot.mounts.iter();
    for other in children
        .filter(|other| other.parent == Some(mount.short_number) && other.short_number != mount.short_number)
    {
        let reason = if other.point == mount.point { Reason::StackedMount } else { Reason::ChildMount };
        let remedy = format!("umount {}", printable(&other.point));
        found.push((reason, Some(Target::Mount(other.short_number)), remedy));
    }
    for process in &snapshot.processes {
        let pid = process.identity.pid;
        let stands = places(process).any(|place| place.mount == mount.short_number);
        // A mapping names only the file system. Where the process stands on the mount as well, the
        // mapping adds nothing; on the host's own file systems everybody has mappings.
        let maps = process.mapped.contains(&mount.device()) && only_mount_of_its_device(mount, snapshot);
        if stands {
            found.push((Reason::CwdOrRoot, Some(Target::Process(pid)), format!("kill {pid}")));
        } else if maps {
            found.push((Reason::Mapping, Some(Target::Process(pid)), format!("kill {pid}")));
        }
    }
    if snapshot.loops.iter().any(|device| device.has_device(mount.device())) {
        for other in &snapshot.loops {
            match other.state {
                LoopState::Bound(backing) if backing.device == mount.device() => {
                    let remedy = format!("losetup -d /dev/loop{}", other.number);
                    found.push((Reason::NestedLoop, Some(Target::Loop(other.number)), remedy));
                }
                LoopState::Bound(_) | LoopState::Closing | LoopState::Unread | LoopState::Leftover => {}
            }
        }
    }
    found
}

fn only_mount_of_its_device(mount: &Mount, snapshot: &Snapshot) -> bool {
    let all = snapshot.mounts.iter();
    all.filter(|other| other.device() == mount.device()).count() == 1
}

fn foreign_remedy(mount: &Mount, snapshot: &Snapshot) -> String {
    let inside =
        snapshot.processes.iter().find(|process| process.namespace == Some(mount.identity.namespace));
    match inside {
        Some(process) => {
            format!("nsenter -m -t {} umount {}", process.identity.pid, printable(&mount.point))
        }
        None => String::new(),
    }
}

fn find_mount(number: u64, snapshot: &Snapshot) -> Option<&Mount> {
    snapshot.mounts.iter().find(|mount| mount.short_number == number)
}

fn what(target: Target, snapshot: &Snapshot) -> String {
    match target {
        Target::Loop(number) => {
            let device = snapshot.loops.iter().find(|device| device.number == number);
            let backing = device.map_or("", |device| device.backing_text.as_str());
            format!("loop device /dev/loop{number} (backing file {backing})")
        }
        Target::Mount(number) => match find_mount(number, snapshot) {
            Some(mount) => {
                let place = if snapshot.namespace == Some(mount.identity.namespace) {
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
            None => format!("mount {number}"),
        },
        Target::Process(pid) => {
            let process = snapshot.processes.iter().find(|process| process.identity.pid == pid);
            match process {
                Some(process) if process.unit.is_empty() || process.unit == "/" => {
                    format!("process {pid} ({}, uid {})", printable(&process.name), process.uid)
                }
                Some(process) => format!(
                    "process {pid} ({}, uid {}, control group {})",
                    printable(&process.name),
                    process.uid,
                    process.unit
                ),
                None => format!("process {pid}"),
            }
        }
    }
}

fn whose(target: Target, snapshot: &Snapshot, ownership: &Ownership) -> String {
    let identity = match target {
        Target::Loop(number) => snapshot
            .loops
            .iter()
            .find(|device| device.number == number)
            .and_then(LoopDevice::identity)
            .map(ResourceIdentity::Loop),
        Target::Mount(number) => {
            find_mount(number, snapshot).map(|mount| ResourceIdentity::Mount(mount.identity))
        }
        Target::Process(pid) => snapshot
            .processes
            .iter()
            .find(|process| process.identity.pid == pid)
            .map(|process| ResourceIdentity::Process(process.identity)),
    };
    let Some(identity) = identity else { return String::new() };
    match ownership.owners.get(&identity) {
        Some(lease) => format!("lease {lease}"),
        None if ownership.doubtful.contains(&identity) => "more than one lease".to_owned(),
        None => String::new(),
    }
}

#[cfg(test)]
#[path = "explain_tests.rs"]
mod tests;
