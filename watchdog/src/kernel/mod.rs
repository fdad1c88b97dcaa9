//! The kernel's interfaces, a file each: small functions that read or act and decide nothing.
//!
//! All `unsafe` of this crate is in `calls` and `block_calls`. What can hang (opening a loop device, reading what a
//! process maps, unmounting) is only ever called in a worker process; see [`crate::worker`].

mod acted;
pub mod block;
pub mod block_calls;
pub mod calls;
pub mod cgroups;
pub mod detached;
pub mod directories;
pub mod events;
pub mod filesystems;
#[cfg(test)]
mod fixture;
pub mod freeze;
pub mod fuse;
mod holds;
pub mod loops;
pub mod maps;
pub mod mountinfo;
pub mod mounts;
pub mod nbd;
pub mod processes;
pub mod signals;
pub mod swaps;

pub use acted::{Acted, Found};
