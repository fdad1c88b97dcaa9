//! The runner: builds images in virtual machines, without privileges.

pub mod cache;
pub mod debian;
pub mod disk;
pub mod event;
pub mod host_tool;
pub mod recipe;
