//! The watchdog: knows whose each loop device, mount, process and scratch directory of a build host
//! is, and takes back what a dead owner left behind.
//!
//! Data flows one way, for each lease that is over: [`worker`]s observe the host, [`decide`] says
//! whose everything is and what is to be done, workers do it, a second look says what became of
//! it, and [`engine`] tells. [`kernel`] holds the system calls, [`model`] the plain data between.

pub mod api;
pub mod causes;
pub mod closing;
pub mod config;
pub mod confine;
pub mod daemon;
pub mod decide;
pub mod descriptors;
pub mod engine;
pub mod http;
pub mod journal;
pub mod kernel;
pub mod lines;
pub mod metrics;
pub mod model;
pub mod reader;
pub mod worker;
