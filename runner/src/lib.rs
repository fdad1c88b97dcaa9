//! The runner: builds images in virtual machines, without privileges.

pub mod event;
