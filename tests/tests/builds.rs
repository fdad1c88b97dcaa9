//! Image builds as a whole: who does what with which rights, and what is left when they are killed, run
//! out of time, or cannot start. Real packages from the archive that the host's apt sources name, kept
//! in a cache below cargo's target directory, and real machines under emulation.
//!
//! Needs root, for control groups and to become other users; fails where it cannot run.

#[path = "builds/again.rs"]
mod again;
#[path = "builds/killed.rs"]
mod killed;
#[path = "builds/limits.rs"]
mod limits;
#[path = "builds/mirror.rs"]
mod mirror;
#[path = "builds/moments.rs"]
mod moments;
#[path = "builds/of_root.rs"]
mod of_root;
#[path = "builds/outputs.rs"]
mod outputs;
#[path = "builds/rpm_mirror.rs"]
mod rpm_mirror;
#[path = "builds/stopped.rs"]
mod stopped;
#[path = "builds/throwaway.rs"]
mod throwaway;
#[path = "builds/together.rs"]
mod together;
#[path = "builds/unfit.rs"]
mod unfit;
