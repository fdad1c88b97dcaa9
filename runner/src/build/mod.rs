//! Builds an image: from a checked recipe to a file that was proven.
//!
//! ```text
//! preflight ─► select ─► fetch ─► canary ─► compose ─► guest ─► convert ─► verify ─► deliver
//!                                           prepare ─► guest ─► collect ─► inspect ─┘      (kind builder)
//!                                           compose ─► guest ─► inspect ─┘               (kind installer)
//! ```
//!
//! All files are made in one private scratch directory inside the output directory. The image moves
//! out of it, by a rename, only after every proof; whatever goes wrong before, the scratch directory
//! goes with all that is in it, and only the console's log is kept. Deliberately absent: printing,
//! signals, privileges; the program's edge has those.

mod artifacts;
pub mod bundle;
pub mod checkpoint;
pub mod delivery;
mod documents;
mod downloads;
mod error;
pub mod finish;
mod guest_mirror;
pub mod image;
mod inside;
mod installation;
mod keep;
mod machines;
pub mod medium;
pub mod outputs;
pub mod preflight;
mod product;
pub mod registrar;
mod release_tree;
mod request;
mod results;
pub mod scratch;
mod session;
mod throwaway;
pub mod workspace;

pub use error::{BuildError, Failed, GuestError};
pub use request::{Built, BuiltFile, Debugging, Environment, Request};
pub use session::{build, fetch_options};
