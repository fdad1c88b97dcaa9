//! What a kind of build comes to, before it is made into the files that were asked for.

use std::path::PathBuf;
use std::time::Duration;

use crate::contents::provenance::Artifact;
use crate::vm::argv::Accelerator;

use super::inside::Contents;
use super::session::Packages;

/// What a kind of build comes to.
pub(super) struct Product {
    /// The raw disk of an image.
    pub(super) disk: Option<PathBuf>,
    /// What is in it, where that is known already.
    pub(super) contents: Option<Contents>,
    /// Files that are delivered as they are.
    pub(super) artifacts: Vec<PathBuf>,
    /// Consoles' logs.
    pub(super) logs: Vec<PathBuf>,
    /// What executed the guests.
    pub(super) accelerator: Accelerator,
    /// When each of the guest's steps began, counted from its start.
    pub(super) steps: Vec<(String, Duration)>,
    /// Where packages came from.
    pub(super) packages: Packages,
    /// What went in beside the packages that were chosen.
    pub(super) materials: Vec<Artifact>,
}
