//! Tests that make loop devices and mounts, and so need root: each in a mount namespace of its own,
//! with a bystander that must survive. They fail where they cannot run;
//! `make test PRIVILEGED=no` leaves the whole target out.

#[path = "privileged/attacks/mod.rs"]
mod attacks;
#[path = "privileged/audit.rs"]
mod audit;
#[path = "privileged/bench.rs"]
mod bench;
#[path = "privileged/churn.rs"]
mod churn;
#[path = "privileged/control_groups.rs"]
mod control_groups;
#[path = "privileged/crashes.rs"]
mod crashes;
#[path = "privileged/deeper_shapes.rs"]
mod deeper_shapes;
#[path = "privileged/hangs.rs"]
mod hangs;
#[path = "privileged/identity.rs"]
mod identity;
#[path = "privileged/kernel_claims.rs"]
mod kernel_claims;
#[path = "privileged/kernel_filesystems.rs"]
mod kernel_filesystems;
#[path = "privileged/kernel_fuse.rs"]
mod kernel_fuse;
#[path = "privileged/kernel_made.rs"]
mod kernel_made;
#[path = "privileged/kernel_mounts.rs"]
mod kernel_mounts;
#[path = "privileged/kernel_namespaces.rs"]
mod kernel_namespaces;
#[path = "privileged/kernel_partitions.rs"]
mod kernel_partitions;
#[path = "privileged/kernel_peers.rs"]
mod kernel_peers;
#[path = "privileged/kernel_processes.rs"]
mod kernel_processes;
#[path = "privileged/kernel_seen.rs"]
mod kernel_seen;
#[path = "privileged/kernel_swaps.rs"]
mod kernel_swaps;
#[path = "privileged/leases.rs"]
mod leases;
#[path = "privileged/many.rs"]
mod many;
#[path = "privileged/metrics.rs"]
mod metrics;
#[path = "privileged/owner_death.rs"]
mod owner_death;
#[path = "privileged/pinned.rs"]
mod pinned;
#[path = "privileged/policy.rs"]
mod policy;
#[path = "privileged/reasons.rs"]
mod reasons;
#[path = "privileged/refusals.rs"]
mod refusals;
#[path = "privileged/restart.rs"]
mod restart;
#[path = "privileged/scratch.rs"]
mod scratch;
#[path = "privileged/service.rs"]
mod service;
#[path = "privileged/shapes.rs"]
mod shapes;
#[path = "privileged/stray.rs"]
mod stray;
#[path = "privileged/wire.rs"]
mod wire;
#[path = "privileged/worker.rs"]
mod worker;
