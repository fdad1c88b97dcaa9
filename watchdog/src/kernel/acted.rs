//! How acting on a resource went, as the calls said.

use std::os::fd::OwnedFd;

/// What became of an action on one resource. Success of the calls, never proof.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Acted {
    /// Every call succeeded.
    Done,
    /// The resource was not there any more.
    Gone,
    /// Something else has its name now; nothing was done.
    Replaced,
}

/// A resource that was looked up by its identity to be acted on.
#[derive(Debug)]
pub enum Found {
    /// It, held: while this descriptor is open nothing else can take its place.
    It(OwnedFd),
    /// It was not there any more.
    Gone,
    /// Something else has its name now.
    Replaced,
}
