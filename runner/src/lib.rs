//! The runner: builds images in virtual machines, without privileges.

pub mod build;
pub mod cache;
pub mod cancel;
pub mod child;
pub mod command;
pub mod debian;
pub mod disk;
pub mod event;
pub mod host_tool;
pub mod recipe;
pub mod vm;
pub mod watchdog;
