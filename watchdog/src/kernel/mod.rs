//! The kernel's interfaces, a file each: small functions that read or act and decide nothing.
//!
//! All `unsafe` of this crate is in `calls`, `block_calls` and `namespace_calls`. What can hang (opening a
//! loop device, reading what a process maps, unmounting), and what goes to another mount namespace or
//! directory, is only ever called in a worker process; see [`crate::worker`].

mod acted;
pub mod backing;
pub mod block;
pub mod block_calls;
pub mod budget;
pub mod calls;
pub mod cgroups;
pub mod claimed;
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
pub mod mount_events;
pub mod mountinfo;
pub mod mounts;
pub mod namespace_calls;
pub mod namespaces;
pub mod nbd;
pub mod processes;
pub mod qemu;
pub mod reach;
pub mod signals;
pub mod statmount;
pub mod swaps;
pub mod unmount;
pub mod visit;

pub use acted::{Acted, Found};
