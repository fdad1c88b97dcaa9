//! The kernel's interfaces, a file each: small functions that read or act and decide nothing.
//!
//! All `unsafe` of this crate is in `calls` and `namespace_calls`. What can hang (opening a loop device,
//! reading what a process maps, unmounting), and what goes to another mount namespace or directory, is
//! only ever called in a worker process; see [`crate::worker`].

pub mod calls;
pub mod cgroups;
pub mod claimed;
pub mod directories;
pub mod events;
pub mod freeze;
pub mod loops;
pub mod mount_events;
pub mod mountinfo;
pub mod mounts;
pub mod namespace_calls;
pub mod namespaces;
pub mod processes;
pub mod reach;
pub mod signals;
pub mod statmount;
pub mod unmount;
pub mod visit;
