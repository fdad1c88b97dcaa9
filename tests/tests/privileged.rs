//! Tests that make loop devices and mounts, and so need root: each in a mount namespace of its own,
//! with a bystander that must survive. They fail where they cannot run;
//! `make test PRIVILEGED=no` leaves the whole target out.

#[path = "privileged/control_groups.rs"]
mod control_groups;
#[path = "privileged/identity.rs"]
mod identity;
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
