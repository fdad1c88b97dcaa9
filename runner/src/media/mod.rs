//! What installers come on: ISO 9660 images, release trees, kernels and disks.
//!
//! Read without mounting and without any program: [`iso`] finds files in an image, [`treeinfo`] reads what a
//! release tree says about itself, [`boot`] tells a kernel, an initial file system and a disk from anything
//! else, [`seed`] makes the small volume that cloud-init takes its configuration from. Everything is bounded:
//! an image may come from anywhere. Deliberately absent: writing ISO images.

pub mod boot;
pub mod iso;
pub mod seed;
pub mod treeinfo;
