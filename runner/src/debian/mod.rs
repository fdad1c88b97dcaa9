//! Debian archives: from signed metadata to the packages of a build.
//!
//! ```text
//! sources ─► signature ─► release ─► catalogue ─► resolve ─► Selection ─► fetch
//! ```
//!
//! `version`, `control`, `relation`, `release`, `catalogue` and `resolve` are pure.

pub mod catalogue;
pub mod control;
pub mod deb;
pub mod relation;
pub mod release;
pub mod resolve;
mod select;
pub mod signature;
pub mod sources;
pub mod version;

pub(crate) use select::describe;
pub use select::{Package, Repository, SelectError, Selection, Suite, fetch, select};
