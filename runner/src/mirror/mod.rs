//! Mirrors of release trees, for other hosts and for builds.
//!
//! ```text
//! debian ─┐                                        ┌► snapshots/<time>/tree: any web server
//!         ├► Plan (path ─► file) ─► fetch ─► publish
//! rpm ────┘                                        └► snapshots/<time>/manifest: serve, checked
//! ```
//!
//! A mirror is a directory: `store` is a cache, in which every file is under its digest; a snapshot is a
//! tree of hard links into it, so any number of snapshots cost what is different between them. `current`
//! leads to the newest; it changes in one step, after everything is there.
//!
//! What signs a tree stays as upstream has it, so whoever uses the mirror checks what the mirror checked.
//! Deliberately absent: signing anything.

pub mod debian;
mod directory;
mod manifest;
pub mod rpm;
mod serve;
mod snapshot_name;

pub use directory::{Directory, DirectoryError, Published, Verified};
pub use manifest::{Entry, Folder, Manifest};
pub use serve::Served;

use crate::cache::Wanted;

/// What a snapshot is to have.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// Folders that are made anew; what other folders the snapshot before had stays.
    pub folders: Vec<(String, Folder)>,
    /// Files by their paths in the tree.
    pub files: Vec<(String, Wanted)>,
    /// Whether suites that the folders had before may go.
    pub replace: bool,
}
