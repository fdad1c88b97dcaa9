//! Plain data that every decision is made from: identities, snapshots, leases, plans.
//!
//! Nothing here reads or acts. Identities are what the kernel cannot hand out twice; names and
//! paths beside them are for people.

mod bytes;
#[cfg(test)]
pub(crate) mod fixture;
mod identity;
mod lease;
mod plan;
mod policy;
mod proof;
mod snapshot;

pub use identity::{
    BackingFile, BootId, CgroupIdentity, DeviceNumber, DirectoryIdentity, DiskSequence, LoopIdentity,
    MapIdentity, MapKind, MountIdentity, MountNamespace, MountNumber, NbdIdentity, ProcessIdentity,
    ResourceIdentity, StartTime, SwapIdentity,
};
pub use lease::{Claim, Lease, Phase};
pub use plan::{Plan, Step, StepResult, UnmountHow};
pub use policy::{Action, Criterion, Match, Opener, Qemu, Rule, Taking};
pub use proof::{Proof, ProvenDirectory, ProvenLoop, ProvenProcess, Wanted};
pub use snapshot::{
    FileHold, Filesystem, FuseConnection, Gap, LoopDevice, LoopState, Map, Mount, Namespace, Nbd, Partition,
    Place, Process, Snapshot, SnapshotDepth, Swap, UnderClaim,
};
