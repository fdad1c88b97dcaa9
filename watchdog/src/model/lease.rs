//! A lease as the daemon keeps it.

use std::collections::BTreeSet;

use hostler_protocol::lease::{Epoch, LeaseId, Tracking};
use hostler_protocol::text::printable;
use serde::{Deserialize, Serialize};

use super::identity::{
    BootId, CgroupIdentity, DirectoryIdentity, DiskSequence, LoopIdentity, MapIdentity, MountIdentity,
    MountNumber, ProcessIdentity, ResourceIdentity,
};
use super::policy::Opener;

/// Where a lease is in its life, as far as decisions need it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// The owner lives: nothing of it may be touched.
    Open,
    /// It is over: what it left is leaked.
    Over,
}

/// A directory that a lease claimed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// Which directory.
    pub directory: DirectoryIdentity,
    /// To be removed with all it holds.
    pub scratch: bool,
    /// Where it was when it was claimed, or the end of that when it is long; for people.
    pub path: String,
    /// The file handle that finds it again after a restart (`name_to_handle_at(2)`): the kernel's
    /// type and bytes; absent where the file system has none.
    pub handle: Option<(i32, Vec<u8>)>,
    /// The mount that it was claimed on: others of the same file system show other paths.
    #[serde(default)]
    pub mount: Option<MountNumber>,
}

/// A lease.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Its number.
    pub id: LeaseId,
    /// Its fence.
    pub epoch: Epoch,
    /// What its client called it, fit to be printed.
    pub name: String,
    /// Who opened it. What the daemon opened has what it names, and nothing that follows from it.
    #[serde(default)]
    pub opener: Opener,
    /// Whose it is.
    pub uid: u32,
    /// The process whose death ends it.
    pub owner: ProcessIdentity,
    /// The kernel's own handle of that process (pidfs, Linux 6.14): no other process ever gets it.
    #[serde(default)]
    pub owner_handle: Option<(i32, Vec<u8>)>,
    /// How its processes are known.
    pub tracking: Tracking,
    /// Its own control group, when it has one, and where it is.
    pub cgroup: Option<(CgroupIdentity, String)>,
    /// The owner put itself under the lease, so that all it starts is born there. It is no resource
    /// of its own lease, and is let out before the rest is taken back.
    pub owner_inside: bool,
    /// Where it is in its life.
    pub phase: Phase,
    /// Its directories.
    pub claims: Vec<Claim>,
    /// Its proven loop devices, and those found to be its own at an earlier look: a backing file
    /// that was removed since cannot be found below a claim any more.
    pub loops: BTreeSet<LoopIdentity>,
    /// Mounts found to be its own at an earlier look.
    pub mounts: BTreeSet<MountIdentity>,
    /// Processes that were put under it, and without a control group those seen to descend from
    /// them.
    pub processes: BTreeSet<ProcessIdentity>,
    /// Maps found to be its own at an earlier look.
    #[serde(default)]
    pub maps: BTreeSet<MapIdentity>,
    /// Mount namespaces, by the number that is never given again, in which only its own processes were
    /// seen, and which were made after the lease was opened.
    #[serde(default)]
    pub namespaces: BTreeSet<u64>,
    /// The mount namespaces that were there before the lease claimed anything; while that is not known, none
    /// counts as later. (Their numbers do not tell: Linux 6.18 gives each processor a supply of its own.)
    #[serde(default)]
    pub namespaces_there: Option<BTreeSet<u64>>,
    /// Attachments with this number or a lower one were there before the lease claimed anything,
    /// so they are never its own unless it proves them.
    pub loops_before: DiskSequence,
    /// Mounts that were below a directory when it was claimed: never the lease's own.
    pub mounts_before: BTreeSet<MountIdentity>,
    /// The boot it was last seen on: identities but those of directories end with it.
    pub boot: BootId,
    /// What lies below its claims has been seen since it was over, so nothing that appears there from
    /// now on is its own.
    pub evidence_closed: bool,
    /// When it was opened, in milliseconds since 1970.
    pub opened_at_ms: u64,
    /// When it ends even if its owner lives, in milliseconds since 1970.
    pub deadline_ms: Option<u64>,
}

impl Lease {
    /// Where a directory or control group of the lease is, fit to be printed; empty for anything else.
    #[must_use]
    pub fn path_of(&self, resource: ResourceIdentity) -> String {
        let path = match resource {
            ResourceIdentity::Directory(directory) => {
                let claim = self.claims.iter().find(|claim| claim.directory == directory);
                claim.map(|claim| claim.path.clone())
            }
            ResourceIdentity::Cgroup(cgroup) => {
                let own = self.cgroup.as_ref().filter(|(own, _)| *own == cgroup);
                own.map(|(_, path)| printable(path.as_bytes()))
            }
            ResourceIdentity::Process(_)
            | ResourceIdentity::Mount(_)
            | ResourceIdentity::Loop(_)
            | ResourceIdentity::Map(_)
            | ResourceIdentity::Nbd(_)
            | ResourceIdentity::Swap(_) => None,
        };
        path.unwrap_or_default()
    }
}
