//! Plain data that every decision is made from: identities, snapshots, leases, plans.
//!
//! Nothing here reads or acts. Identities are what the kernel cannot hand out twice; names and
//! paths beside them are for people.

mod identity;
mod lease;
mod plan;
mod snapshot;

pub use identity::{
    BackingFile, BootId, CgroupIdentity, DeviceNumber, DirectoryIdentity, DiskSequence, LoopIdentity,
    MountIdentity, MountNamespace, MountNumber, ProcessIdentity, ResourceIdentity, StartTime,
};
pub use lease::{Claim, Lease, Phase};
pub use plan::{Plan, Step, StepResult};
pub use snapshot::{
    FileHold, Gap, LoopDevice, LoopState, Mount, Place, Process, Snapshot, SnapshotDepth, UnderClaim,
};
