//! What the administrator's rules take for leaked, of what no lease has.
//!
//! A resource that a rule is about is *sighted* at each sweep. While it and all that holds it stay exactly
//! what they were, and nothing that lives holds it, the sweeps count; anything else begins the count anew.
//! After enough sweeps and enough time it is quarantined, and where the rule says so it is due at the
//! sweep after that.
//!
//! Of several rules about one resource the first counts. What a lease owns, what is doubtful and what is
//! protected is no rule's.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use hostler_protocol::text::printable;
use hostler_protocol::why::Reason;

use super::attribute::Ownership;
use super::graph::{Certainty, Edge, Node, holders, identity_of, node_of};
use super::index::Index;
use crate::model::{
    Action, Criterion, DeviceNumber, Gap, Match, MountNumber, Opener, ResourceIdentity, Rule, Snapshot,
    Taking,
};

/// A resource that a rule is about, at one sweep.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Which.
    pub what: ResourceIdentity,
    /// The rule.
    pub rule: Rule,
    /// Whether anything speaks for leaving it.
    pub standing: Standing,
}

/// Whether a resource is in use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Nothing that lives holds it.
    Idle {
        /// What holds it, and would have to go first: all of it lies on it.
        with: BTreeSet<ResourceIdentity>,
    },
    /// It is in use, or may be.
    Busy {
        /// Why, for a person.
        because: String,
    },
}

/// How far a rule has come with a resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// It is looked at.
    Observed,
    /// It is taken for leaked.
    Quarantined,
    /// It is to be taken back now.
    Due,
}

/// What is known of a resource that a rule is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sighting {
    /// The rule.
    pub rule: Rule,
    /// Since when it has been as it is. Times are those of the daemon's own clock.
    pub since: Duration,
    /// At how many sweeps in a row it was; 0 while it is in use.
    pub observations: u32,
    /// How it was at the last.
    pub standing: Standing,
    /// What follows from that.
    pub stage: Stage,
}

/// All sightings.
pub type Sightings = BTreeMap<ResourceIdentity, Sighting>;

/// What the rules are about at a look of depth [`Holders`](crate::model::SnapshotDepth::Holders), and
/// whether it is in use.
#[must_use]
pub fn candidates(snapshot: &Snapshot, ownership: &Ownership, rules: &[Rule]) -> Vec<Candidate> {
    let index = Index::new(snapshot);
    let unclear = snapshot.gaps.iter().find(|gap| may_hide_a_holder(gap)).map(Gap::sentence);
    let mut found: BTreeMap<ResourceIdentity, Candidate> = BTreeMap::new();
    for rule in rules {
        let about = snapshot.matches.iter().filter(|one| one.criterion == rule.criterion);
        for what in about.map(|one| one.what).filter(|what| is_free(*what, ownership)) {
            found.entry(what).or_insert_with(|| {
                let standing = match &unclear {
                    Some(because) => Standing::Busy { because: because.clone() },
                    None => standing(what, &rule.criterion, &index, ownership),
                };
                Candidate { what, rule: rule.clone(), standing }
            });
        }
    }
    found.into_values().collect()
}

/// Whether any rule is about anything that no lease has: only then is it worth looking who holds it.
#[must_use]
pub fn has_candidates(snapshot: &Snapshot, ownership: &Ownership) -> bool {
    snapshot.matches.iter().any(|one| is_free(one.what, ownership))
}

fn is_free(what: ResourceIdentity, ownership: &Ownership) -> bool {
    !ownership.owners.contains_key(&what)
        && !ownership.doubtful.contains(&what)
        && !ownership.protected.contains(&what)
}

/// Whether a look missed nothing that may matter.
#[must_use]
pub fn is_clear(snapshot: &Snapshot) -> bool {
    hidden(snapshot).is_none()
}

/// Something that a look missed and that may matter.
#[must_use]
pub fn hidden(snapshot: &Snapshot) -> Option<&Gap> {
    snapshot.gaps.iter().find(|gap| may_hide_a_holder(gap))
}

/// Whether something that was not read may be a holder, or an owner.
fn may_hide_a_holder(gap: &Gap) -> bool {
    match gap {
        // Some sandboxes let nobody look at the first process, ever. It is no builder; and what it should
        // hold all the same, the kernel refuses to unmount, and detaches only once it lets go.
        Gap::Process(1, _) | Gap::Criterion(_) => false,
        Gap::Loops(_)
        | Gap::Loop(..)
        | Gap::Mounts(_)
        | Gap::Unasked
        | Gap::Namespace(..)
        | Gap::Namespaces(_)
        | Gap::Blocks(_)
        | Gap::Processes(_)
        | Gap::Process(..)
        | Gap::Cgroup(..)
        | Gap::Claim(..) => true,
    }
}

fn standing(
    what: ResourceIdentity,
    criterion: &Criterion,
    index: &Index<'_>,
    ownership: &Ownership,
) -> Standing {
    let busy = |because: &str| Standing::Busy { because: because.to_owned() };
    let Some(node) = node_of(what, index) else { return busy("it is not there any more") };
    if is_reusable(what) {
        return busy("this kernel gives the numbers of mounts again (Linux before 6.8)");
    }
    let mut cone = Cone::new(index, ownership);
    cone.follow(node);
    // Below a directory is below it; what else holds a mount is somebody's use of it.
    let is_on_it = |held_by: &ResourceIdentity| match (criterion, held_by) {
        (Criterion::Loop { .. }, _) => true,
        (Criterion::Mount { .. }, ResourceIdentity::Mount(_)) => {
            let same = Match { criterion: criterion.clone(), what: *held_by };
            index.snapshot.matches.contains(&same)
        }
        (Criterion::Mount { .. }, _) => false,
    };
    match cone.first_use {
        Some(because) => Standing::Busy { because },
        None if !cone.with.iter().all(is_on_it) => {
            busy("something that the rule is not about is mounted, attached or built on it")
        }
        None => Standing::Idle { with: cone.with },
    }
}

/// Whether a mount's number may be another one's later.
pub(super) fn is_reusable(what: ResourceIdentity) -> bool {
    match what {
        ResourceIdentity::Mount(mount) => match mount.number {
            MountNumber::Unique(_) => false,
            MountNumber::Reusable(_) => true,
        },
        ResourceIdentity::Process(_)
        | ResourceIdentity::Loop(_)
        | ResourceIdentity::Map(_)
        | ResourceIdentity::Nbd(_)
        | ResourceIdentity::Swap(_)
        | ResourceIdentity::Directory(_)
        | ResourceIdentity::Cgroup(_) => false,
    }
}

/// Everything that holds a thing, directly or through others.
pub(super) struct Cone<'a> {
    index: &'a Index<'a>,
    ownership: &'a Ownership,
    seen: BTreeSet<Node>,
    /// What of it is nobody's, and would go with the thing.
    pub(super) with: BTreeSet<ResourceIdentity>,
    /// The first sign that somebody uses it, for a person.
    pub(super) first_use: Option<String>,
}

impl<'a> Cone<'a> {
    pub(super) fn new(index: &'a Index<'a>, ownership: &'a Ownership) -> Self {
        Self { index, ownership, seen: BTreeSet::new(), with: BTreeSet::new(), first_use: None }
    }

    /// Adds all that holds a node.
    pub(super) fn follow(&mut self, node: Node) {
        let mut next = vec![node];
        while let Some(node) = next.pop() {
            if !self.seen.insert(node) {
                continue;
            }
            self.note_mappings(node);
            for edge in holders(node, self.index) {
                next.extend(self.note(&edge));
            }
        }
    }

    /// Notes what an edge leads to, and returns it when what holds it in turn matters.
    fn note(&mut self, edge: &Edge) -> Option<Node> {
        match (edge.holder, edge.certainty) {
            (Some(Node::Process(at)), _) => {
                let process = &self.index.snapshot.processes[at];
                let (pid, name) = (process.identity.pid, printable(&process.name));
                self.is_used(format!("process {pid} ({name}) holds it"));
                None
            }
            (Some(partition @ Node::Partition(_)), _) => Some(partition),
            (Some(Node::Swap(_)), Certainty::Sure) => {
                self.is_used("the host swaps to it".to_owned());
                None
            }
            (Some(Node::Filesystem(at)), _) => {
                if self.index.snapshot.filesystems[at].frozen != Some(true) {
                    self.is_used("a file system on it is in use, and nothing shows by whom".to_owned());
                }
                None
            }
            (Some(holder @ (Node::Mount(_) | Node::Block(_))), Certainty::Sure) => {
                match identity_of(holder, self.index) {
                    Some(identity) if is_reusable(identity) => {
                        self.is_used("it is mounted where the kernel gives mounts' numbers again".to_owned());
                    }
                    Some(identity) if is_free(identity, self.ownership) => {
                        self.with.insert(identity);
                        return Some(holder);
                    }
                    Some(_) => self.is_used("something of a lease's or protected holds it".to_owned()),
                    None => self.is_used("something holds it that did not tell what it is".to_owned()),
                }
                None
            }
            // They only order.
            (Some(Node::Mount(_) | Node::Block(_) | Node::Swap(_)), Certainty::Hint) => None,
            (None, _) => {
                match edge.reason {
                    Reason::Frozen => {}
                    reason => self.is_used(format!("it is in use ({})", reason.name())),
                }
                None
            }
        }
    }

    /// A mapping names only the file system, so the graph counts it only where that has one mount. Of a
    /// file system on a block device that is to go, each mapping counts.
    fn note_mappings(&mut self, node: Node) {
        let devices: Vec<DeviceNumber> = match node {
            Node::Block(block) => self.index.shown_for(self.index.device_of(block).0),
            Node::Partition(device) => self.index.shown_for(device),
            Node::Process(_) | Node::Mount(_) | Node::Swap(_) | Node::Filesystem(_) => return,
        };
        let processes = &self.index.snapshot.processes;
        let user = processes.iter().find(|process| devices.iter().any(|one| process.mapped.contains(one)));
        if let Some(process) = user {
            self.is_used(format!("process {} has files of it mapped", process.identity.pid));
        }
    }

    fn is_used(&mut self, because: String) {
        self.first_use.get_or_insert(because);
    }
}

/// What is known after one more sweep. What is not there any more, or no rule's any more, is forgotten.
#[must_use]
pub fn advance(before: &Sightings, candidates: Vec<Candidate>, now: Duration) -> Sightings {
    let next = |candidate: Candidate| (candidate.what, sight(before.get(&candidate.what), candidate, now));
    candidates.into_iter().map(next).collect()
}

fn sight(before: Option<&Sighting>, candidate: Candidate, now: Duration) -> Sighting {
    let Candidate { rule, standing, .. } = candidate;
    let is_idle = matches!(standing, Standing::Idle { .. });
    let unchanged = before.filter(|before| is_idle && before.rule == rule && before.standing == standing);
    let (since, observations) = match unchanged {
        Some(before) => (before.since, before.observations.saturating_add(1)),
        None => (now, u32::from(is_idle)),
    };
    let is_leaked = is_idle && observations >= rule.observations && now.saturating_sub(since) >= rule.min_age;
    let stage = match (is_leaked, rule.action, unchanged.map(|before| before.stage)) {
        (false, _, _) | (true, Action::Observe, _) => Stage::Observed,
        (true, Action::Reclaim, Some(Stage::Quarantined | Stage::Due)) => Stage::Due,
        (true, Action::Quarantine | Action::Reclaim, _) => Stage::Quarantined,
    };
    Sighting { rule, since, observations, standing, stage }
}

/// What is due, by rule, in the rules' order. What lies on something else that is due goes with that, and
/// what has something in common with what an earlier rule takes is left to a later sweep: nothing can be
/// two leases'.
#[must_use]
pub fn due(sightings: &Sightings, rules: &[Rule]) -> Vec<Taking> {
    let all = || sightings.iter().filter(|(_, sighting)| sighting.stage == Stage::Due);
    let goes_with_another = |what: &ResourceIdentity| {
        all().any(|(_, other)| match &other.standing {
            Standing::Idle { with } => with.contains(what),
            Standing::Busy { .. } => false,
        })
    };
    let mut takings = Vec::new();
    let mut taken = BTreeSet::new();
    for rule in rules {
        let mut what = BTreeSet::new();
        for (identity, sighting) in all().filter(|(_, sighting)| sighting.rule == *rule) {
            let Standing::Idle { with } = &sighting.standing else { continue };
            let is_taken = taken.contains(identity) || !taken.is_disjoint(with);
            if !is_taken && !goes_with_another(identity) {
                what.insert(*identity);
                what.extend(with);
            }
        }
        if !what.is_empty() {
            taken.extend(&what);
            let (name, opener) = (format!("policy: {}", rule.name), Opener::Policy);
            takings.push(Taking { rule: Some(rule.name.clone()), name, opener, what });
        }
    }
    takings
}

impl Sighting {
    /// What a person is told of it.
    #[must_use]
    pub fn sentence(&self) -> String {
        let Rule { name, observations, action, .. } = &self.rule;
        match (&self.standing, self.stage, action) {
            (Standing::Busy { because }, _, _) => format!("rule {name}: left, {because}"),
            (_, Stage::Observed, Action::Observe) => {
                format!("rule {name}: seen unchanged {} times", self.observations)
            }
            (_, Stage::Observed, _) => {
                format!("rule {name}: seen unchanged {} times, {observations} are needed", self.observations)
            }
            (_, Stage::Quarantined, Action::Reclaim) => {
                format!("rule {name}: taken back at the next sweep, see hostler plan")
            }
            (_, Stage::Quarantined, _) => format!("rule {name}: taken for leaked, and left"),
            (_, Stage::Due, _) => format!("rule {name}: is being taken back"),
        }
    }
}

#[cfg(test)]
#[path = "policy_tests.rs"]
mod tests;
