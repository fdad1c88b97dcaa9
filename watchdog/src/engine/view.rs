//! What clients and Prometheus are shown.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::Duration;

use hostler_protocol::lease::{LeaseState, LeaseView};
use hostler_protocol::methods::{CallError, Explanation, HostStatus};
use hostler_protocol::resource::{ResourceView, Verdict};
use hostler_protocol::text::printable;
use tokio::time::Instant;

use super::lifecycle::{Caller, unavailable};
use super::look::Look;
use super::stray::strays;
use super::sweep::Sweeps;
use super::{Engine, now_ms};
use crate::causes::chain;
use crate::decide::policy::Stage;
use crate::decide::{Access, Ownership, PROTECTED, everything_by_lease, explain};
use crate::kernel::{loops, processes};
use crate::metrics::LEASE_STATES;
use crate::model::{
    DeviceNumber, Gap, Lease, LoopDevice, LoopState, Mount, MountIdentity, Process, ProcessIdentity,
    ResourceIdentity, Snapshot, SnapshotDepth,
};

impl Engine {
    /// Leases and resources of the host: of leases the caller's own, and for root all.
    ///
    /// # Errors
    /// When looking gives nothing.
    pub async fn status(&self, caller: Caller) -> Result<HostStatus, CallError> {
        let look = self.look(SnapshotDepth::Status).await.map_err(unavailable)?;
        let Look { snapshot, ownership } = &*look;
        let now = now_ms();
        let everything = everything_by_lease(snapshot, ownership);
        let things = Things::of(snapshot);
        let state = self.shared.state.borrow();
        let ended = state.ended().filter(|lease| caller.may_use(lease.uid));
        let mut leases: Vec<LeaseView> = ended.cloned().collect();
        let mut room = Room { left: TOLD_LIMIT, left_out: 0 };
        for record in state.records().filter(|record| caller.may_use(record.lease.uid)) {
            let verdict = verdict_of(record.state);
            let resources = everything.get(&record.lease.id).into_iter().flatten();
            let resources = resources.map(|identity| show(*identity, &things, verdict, Some(&record.lease)));
            let resources = room.take(resources);
            leases.push(record.view(now, resources));
        }
        leases.sort_by_key(|lease| lease.lease);
        let others = room.take(others(snapshot, ownership, &self.shared.sweeps));
        let mut gaps = self.gaps_for(caller, snapshot);
        gaps.extend(room.sentence());
        Ok(HostStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            loops_in_use: snapshot.loops.len() as u64,
            loops_limit: loops::limit(),
            leases,
            others,
            stray_qemu: strays(snapshot, ownership, state.leases())
                .into_iter()
                .filter(|stray| caller.may_use(stray.uid))
                .collect(),
            gaps,
        })
    }

    /// What could not be read, but of others' leases; and of the rules, which are root's, to root only.
    fn gaps_for(&self, caller: Caller, snapshot: &Snapshot) -> Vec<String> {
        let state = self.shared.state.borrow();
        let is_callers = |gap: &&Gap| match gap {
            Gap::Claim(lease, _) | Gap::Cgroup(lease, _) => {
                state.get(*lease).is_some_and(|record| caller.may_use(record.lease.uid))
            }
            Gap::Criterion(_) => caller.is_root(),
            Gap::Loops(_)
            | Gap::Loop(..)
            | Gap::Mounts(_)
            | Gap::Unasked
            | Gap::Namespace(..)
            | Gap::Namespaces(_)
            | Gap::Blocks(_)
            | Gap::Processes(_)
            | Gap::Process(..) => true,
        };
        snapshot.gaps.iter().filter(is_callers).map(Gap::sentence).collect()
    }

    /// What a caller may learn of something: root all, whoever's lease has it all, and of what no lease has
    /// everybody that it is there, but of processes only whose they are.
    fn access(&self, caller: Caller, resource: ResourceIdentity, look: &Look) -> Access {
        if caller.is_root() {
            return Access::Own;
        }
        let owner = look.ownership.owners.get(&resource);
        let state = self.shared.state.borrow();
        let is_own = match (owner, resource) {
            (Some(lease), _) => state.get(*lease).is_some_and(|it| caller.may_use(it.lease.uid)),
            (None, ResourceIdentity::Process(process)) => {
                processes::real_user(process.pid).is_ok_and(|user| user == caller.uid)
            }
            (None, _) => return Access::Seen,
        };
        if is_own { Access::Own } else { Access::Hidden }
    }

    /// Whether a user has a lease that has not ended.
    #[must_use]
    pub fn has_lease(&self, user: u32) -> bool {
        self.shared.state.borrow().leases().any(|lease| lease.uid == user)
    }

    /// Why something is still there.
    ///
    /// # Errors
    /// When nothing has that name, or looking gives nothing.
    pub async fn why(&self, caller: Caller, target: &str) -> Result<Explanation, CallError> {
        let look = self.look_about(target).await.map_err(unavailable)?;
        let Look { snapshot, ownership } = &*look;
        let access = |resource| self.access(caller, resource, &look);
        match explain(target, snapshot, ownership, access) {
            Some(tree) => Ok(Explanation { tree, gaps: self.gaps_for(caller, snapshot) }),
            None => Err(CallError::NoSuchTarget { target: printable(target.as_bytes()) }),
        }
    }

    /// The metrics as text, after a look when the last one is older than a few seconds.
    ///
    /// # Errors
    /// When the library cannot encode them.
    pub async fn metrics_text(&self) -> Result<String, prometheus::Error> {
        const FRESH: Duration = Duration::from_secs(5);
        let is_fresh = self.shared.measured.get().is_some_and(|when| when.elapsed() < FRESH);
        if !is_fresh {
            // A look that fails is counted, and the other metrics are still told.
            if let Err(error) = self.look(SnapshotDepth::Status).await {
                tracing::warn!("a look for the metrics gave nothing: {}", chain(&error));
            }
        }
        self.count_leases();
        self.shared.metrics.text()
    }

    fn count_leases(&self) {
        let state = self.shared.state.borrow();
        for (which, name) in LEASE_STATES {
            let count = match which {
                LeaseState::Ended => state.ended().count(),
                LeaseState::Open | LeaseState::Closing | LeaseState::Reclaiming | LeaseState::Pinned => {
                    state.records().filter(|record| record.state == which).count()
                }
            };
            self.shared
                .metrics
                .leases
                .with_label_values(&[name])
                .set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// Sets the gauges of resources.
    pub(super) fn measure(&self, snapshot: &Snapshot, ownership: &Ownership) {
        let metrics = &self.shared.metrics;
        let state = self.shared.state.borrow();
        let everything = everything_by_lease(snapshot, ownership);
        let mut counts: BTreeMap<(&str, &str), i64> = BTreeMap::new();
        for record in state.records() {
            let verdict = verdict_of(record.state);
            for identity in everything.get(&record.lease.id).into_iter().flatten() {
                *counts.entry((identity.kind().name(), verdict.name())).or_default() += 1;
            }
        }
        for other in others(snapshot, ownership, &self.shared.sweeps) {
            *counts.entry((other.kind.name(), other.verdict.name())).or_default() += 1;
        }
        for kind in hostler_protocol::resource::Kind::ALL {
            for verdict in Verdict::ALL {
                let labels = (kind.name(), verdict.name());
                let count = counts.get(&labels).copied().unwrap_or(0);
                metrics.resources.with_label_values(&[labels.0, labels.1]).set(count);
            }
        }
        metrics.loops_in_use.set(i64::try_from(snapshot.loops.len()).unwrap_or(i64::MAX));
        let limit = loops::limit().unwrap_or(0);
        metrics.loops_limit.set(i64::try_from(limit).unwrap_or(i64::MAX));
        if snapshot.qemus.is_some() {
            let stray = strays(snapshot, ownership, state.leases()).len();
            metrics.stray_qemu.set(i64::try_from(stray).unwrap_or(i64::MAX));
            self.shared.measured.set(Some(Instant::now()));
        }
    }
}

/// How many bytes of resources one answer tells: users can bind a mount as often as they like, and whoever asks
/// takes no more than 64 MiB.
const TOLD_LIMIT: usize = 16 * 1024 * 1024;

/// What an answer has room for.
struct Room {
    left: usize,
    left_out: usize,
}

impl Room {
    /// As many of these as there is room for.
    fn take(&mut self, resources: impl IntoIterator<Item = ResourceView>) -> Vec<ResourceView> {
        // The numbers and the words around them, and a backslash that JSON writes twice.
        let size = |resource: &ResourceView| 100 + 2 * (resource.name.len() + resource.detail.len());
        let mut taken = Vec::new();
        for resource in resources {
            match self.left.checked_sub(size(&resource)) {
                Some(left) => {
                    self.left = left;
                    taken.push(resource);
                }
                None => self.left_out += 1,
            }
        }
        taken
    }

    fn sentence(&self) -> Option<String> {
        let count = self.left_out;
        (count > 0).then(|| format!("{count} more things are not listed: an answer has no room for them"))
    }
}

fn verdict_of(state: LeaseState) -> Verdict {
    match state {
        LeaseState::Open => Verdict::Owned,
        LeaseState::Closing | LeaseState::Reclaiming | LeaseState::Ended => Verdict::Leaked,
        LeaseState::Pinned => Verdict::Pinned,
    }
}

/// Loop devices, mounts of loop devices, and whatever else a rule is about, that no lease has.
fn others(snapshot: &Snapshot, ownership: &Ownership, sweeps: &Sweeps) -> Vec<ResourceView> {
    let things = Things::of(snapshot);
    let is_free = |identity: &ResourceIdentity| !ownership.owners.contains_key(identity);
    let show_free = |identity| {
        let sighting = sweeps.sighting(identity);
        let is_quarantined = sighting.as_ref().is_some_and(|sighting| sighting.stage >= Stage::Quarantined);
        let (verdict, remark) = if ownership.protected.contains(&identity) {
            (Verdict::Bystander, Some(PROTECTED.to_owned()))
        } else if ownership.doubtful.contains(&identity) {
            (Verdict::Unknown, None)
        } else {
            let verdict = if is_quarantined { Verdict::Quarantined } else { Verdict::Bystander };
            (verdict, sighting.map(|sighting| sighting.sentence()))
        };
        let mut shown = show(identity, &things, verdict, None);
        if let Some(remark) = remark {
            shown.detail = format!("{} ({remark})", shown.detail);
        }
        shown
    };
    let mut found = Vec::new();
    for device in &snapshot.loops {
        match device.identity().map(ResourceIdentity::Loop) {
            Some(identity) if is_free(&identity) => found.push(show_free(identity)),
            Some(_) => {}
            None => found.push(ResourceView {
                kind: hostler_protocol::resource::Kind::Loop,
                name: format!("/dev/loop{}", device.number),
                detail: match device.state {
                    LoopState::Closing => "detached, and still open somewhere".to_owned(),
                    LoopState::Bound(_) | LoopState::Unread | LoopState::Leftover => {
                        device.backing_text.clone()
                    }
                },
                verdict: Verdict::Unknown,
                lease: None,
            }),
        }
    }
    let of_loops: HashSet<DeviceNumber> = snapshot.loops.iter().flat_map(LoopDevice::devices).collect();
    for mount in &snapshot.mounts {
        let identity = ResourceIdentity::Mount(mount.identity);
        if (of_loops.contains(&mount.device()) || sweeps.knows(identity)) && is_free(&identity) {
            found.push(show_free(identity));
        }
    }
    found
}

/// A resource's name for people, as a look has it.
pub(super) fn name_of(identity: ResourceIdentity, snapshot: &Snapshot) -> String {
    show(identity, &Things::of(snapshot), Verdict::Bystander, None).name
}

/// The things of a look by what identifies them: each of a lease's may be one of thousands.
struct Things<'look> {
    snapshot: &'look Snapshot,
    processes: HashMap<ProcessIdentity, &'look Process>,
    mounts: HashMap<MountIdentity, &'look Mount>,
    loops: HashMap<u32, &'look LoopDevice>,
}

impl<'look> Things<'look> {
    fn of(snapshot: &'look Snapshot) -> Self {
        let Snapshot { processes, mounts, loops, .. } = snapshot;
        Self {
            snapshot,
            processes: processes.iter().map(|process| (process.identity, process)).collect(),
            mounts: mounts.iter().map(|mount| (mount.identity, mount)).collect(),
            loops: loops.iter().map(|device| (device.number, device)).collect(),
        }
    }
}

fn show(
    identity: ResourceIdentity,
    things: &Things<'_>,
    verdict: Verdict,
    lease: Option<&Lease>,
) -> ResourceView {
    let (name, detail) = match identity {
        ResourceIdentity::Process(process) => {
            let found = things.processes.get(&process);
            let name = found.map(|process| printable(&process.name)).unwrap_or_default();
            (process.pid.to_string(), name)
        }
        ResourceIdentity::Mount(mount) => match things.mounts.get(&mount) {
            Some(mount) => {
                let elsewhere = if things.snapshot.namespace == Some(mount.identity.namespace) {
                    String::new()
                } else {
                    format!(" in mount namespace {}", mount.identity.namespace.0)
                };
                let detail = format!(
                    "{} on {}{elsewhere}",
                    printable(mount.filesystem.as_bytes()),
                    printable(&mount.source)
                );
                (printable(&mount.point), detail)
            }
            None => (format!("{:?}", mount.number), String::new()),
        },
        ResourceIdentity::Loop(device) => {
            let found = things.loops.get(&device.number);
            let backing = found.map(|device| device.backing_text.clone()).unwrap_or_default();
            (format!("/dev/loop{}", device.number), backing)
        }
        ResourceIdentity::Map(map) => (format!("map {}", map.device), String::new()),
        ResourceIdentity::Nbd(nbd) => (format!("/dev/nbd{}", nbd.number), String::new()),
        ResourceIdentity::Swap(_) => (String::new(), String::new()),
        ResourceIdentity::Directory(_) | ResourceIdentity::Cgroup(_) => {
            (lease.map(|lease| lease.path_of(identity)).unwrap_or_default(), String::new())
        }
    };
    ResourceView { kind: identity.kind(), name, detail, verdict, lease: lease.map(|lease| lease.id) }
}

#[cfg(test)]
mod tests {
    use hostler_protocol::resource::Kind;

    use super::*;

    #[test]
    fn an_answer_has_room_for_so_much_and_says_what_it_leaves_out() {
        let resource = |length: usize| ResourceView {
            kind: Kind::Mount,
            name: "\\".repeat(length),
            detail: "\\".repeat(length),
            verdict: Verdict::Bystander,
            lease: None,
        };
        let mut room = Room { left: TOLD_LIMIT, left_out: 0 };
        // A mount point of control characters is printed with five for each.
        let taken = room.take((0..2000).map(|_| resource(5 * 4096)));
        assert!(taken.len() > 100 && taken.len() + room.left_out == 2000);
        assert!(serde_json::to_vec(&taken).expect("text").len() <= TOLD_LIMIT);
        // What is small still has its place.
        assert_eq!(room.take([resource(10)]).len(), 1);
        assert!(room.sentence().is_some_and(|said| said.starts_with(&room.left_out.to_string())));
    }
}
