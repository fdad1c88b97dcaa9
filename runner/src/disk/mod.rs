//! The disk of an image, written on the host without any privilege.
//!
//! `layout` (pure) decides what is where and whose, `tree` and `unpack` write it, `database` (pure)
//! makes dpkg's records, `filesystem` and `partition` make a disk of it, [`compose`] ties them together.

pub mod compose;
pub mod database;
pub mod filesystem;
mod later;
pub mod layout;
pub mod partition;
pub mod rewrite;
pub mod tools;
pub mod tree;
pub mod unpack;

pub use compose::{ComposeError, ComposedDisk, Preinst, compose};
pub use filesystem::FilesystemError;
pub use layout::{Attributes, Kind, Layout, Node, Refusal};
pub use partition::Partition;
pub use rewrite::{RewriteError, rewrite};
pub use tools::{BuilderTools, ToolsError, builder_tools, kernel_package};
pub use tree::{Tree, TreeError};
pub use unpack::{Failed, UnpackError, unpack_some};
