//! The watchdog.

pub mod decide;
pub mod kernel;
pub mod model;
pub mod worker;
