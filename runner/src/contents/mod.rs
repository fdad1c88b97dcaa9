//! What is in an image and what it was made of, as documents for people's tools.
//!
//! Pure: texts that a guest wrote about its own packages go in ([`manifest`]), documents come out: the list
//! of packages, a bill of materials ([`sbom`], SPDX 2.3), and where everything came from ([`provenance`], an
//! in-toto statement with SLSA's predicate). Deliberately absent: the look into the image, which a guest does.

pub mod appliance;
pub mod manifest;
pub mod provenance;
pub mod sbom;

pub use manifest::{Installed, Manifest, ManifestError, System};
