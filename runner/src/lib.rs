//! The runner: builds images in virtual machines, without privileges.

pub mod beside;
pub mod build;
pub mod cache;
pub mod calls;
pub mod cancel;
pub mod causes;
pub mod child;
pub mod class;
pub mod command;
pub mod contents;
pub mod debian;
pub mod disk;
pub mod event;
pub mod installer;
pub mod lock;
pub mod media;
pub mod mirror;
pub mod passing;
pub mod recipe;
pub mod rpm;
pub mod signs;
pub mod stop;
pub mod vm;
pub mod watchdog;
mod xz;
