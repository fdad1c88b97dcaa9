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
mod index;
mod installer;
mod long_names;
pub mod relation;
pub mod release;
pub mod resolve;
mod select;
mod selection;
pub mod signature;
pub mod sources;
pub mod version;

pub(crate) use index::decompress;
pub use installer::InstallerArchives;
pub use select::{SelectError, fetch, select};
pub(crate) use select::{archives, describe};
pub use selection::{Package, Repository, Selection, Suite};
