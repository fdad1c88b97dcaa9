//! The runner: builds images in virtual machines, without privileges.

pub mod cancel;
pub mod child;
pub mod event;
pub mod vm;
