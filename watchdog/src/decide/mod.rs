//! Every decision: pure functions from plain data to plain data.
//!
//! `attribute` says whose each resource is, `plan` what is to be done for a lease that is over,
//! `verify` what became of it by a second look, `explain` what holds a thing; `policy` what the
//! administrator's rules take for leaked of what no lease has, `protect` what nobody may touch. None of
//! them reads the host, knows the time, or can fail.
//!
//! Invariant: a gap in a snapshot only ever makes a resource *doubtful*, never owned; and what is
//! doubtful is in no plan.

mod attribute;
mod explain;
#[cfg(test)]
mod fake_kernel;
#[cfg(test)]
mod fixture;
mod graph;
mod index;
mod nested;
mod numbering;
mod overlays;
mod plan;
pub mod policy;
mod propagation;
mod protect;
mod remedy;
mod requested;
mod settled;
mod verify;

pub use attribute::{Ownership, attribute};
pub use explain::{Access, PROTECTED, explain, reasons_for};
pub use nested::nested_claims;
pub use numbering::{Numbers, learn, unnumbered};
pub use plan::{PlanSettings, plan, stuck};
pub use protect::strangers_below;
pub use requested::{NotTaken, requested};
pub use settled::{forget_what_is_gone, is_settled, may_still_go};
pub use verify::{doubts, everything_by_lease, everything_of, verify};
