//! Tests that make loop devices and mounts, and so need root: each in a mount namespace of its own,
//! with a bystander that must survive. They fail where they cannot run; `make test-unprivileged`
//! leaves the whole target out.

#[path = "privileged/identity.rs"]
mod identity;
#[path = "privileged/metrics.rs"]
mod metrics;
#[path = "privileged/owner_death.rs"]
mod owner_death;
#[path = "privileged/pinned.rs"]
mod pinned;
#[path = "privileged/refusals.rs"]
mod refusals;
#[path = "privileged/restart.rs"]
mod restart;
