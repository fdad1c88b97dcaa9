//! The runner: builds images in virtual machines, without privileges.

pub mod cli;
pub mod command;
pub mod event;
pub mod watchdog;
