//! The cache against an upstream that misbehaves: what is wrong is named, never served and never kept.
//!
//! Needs gnupg, to sign an archive of the test's own, gpgv, and zchunk. Everything else is local.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod connections;
mod downloads;
mod full;
mod host_sources;
mod kills;
mod locked;
mod mirrors;
mod parts;
mod releases;
mod secure;
mod serving;
mod shared;
mod together;
mod trees;
mod unvouched;
mod upstream;
mod upstreams;
mod world;
