//! A loop device that belongs to nobody but the test.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::bystander::attach;
use crate::failure::OrFail;
use crate::place::make_image;
use crate::probe::{self, LoopSeen};
use crate::program;

/// A loop device of a test. It goes with this, if it has not gone before.
#[derive(Debug)]
pub struct Attached {
    /// Its backing file.
    pub image: PathBuf,
    device: LoopSeen,
}

impl Attached {
    /// Makes an image and attaches it.
    ///
    /// # Panics
    /// When it cannot be attached.
    #[must_use]
    pub fn new(image: &Path) -> Self {
        make_image(image, 4);
        Self::by(image, image)
    }

    /// Attaches an image by any of its names.
    ///
    /// # Panics
    /// When it cannot be attached.
    #[must_use]
    pub fn by(name: &Path, image: &Path) -> Self {
        let node = attach(name);
        let devices = probe::loops();
        let device = devices.into_iter().find(|device| format!("/dev/loop{}", device.number) == node);
        Self { image: image.to_owned(), device: device.or_fail("the device that was attached") }
    }

    /// `/dev/loopN`.
    #[must_use]
    pub fn node(&self) -> String {
        format!("/dev/loop{}", self.device.number)
    }

    /// Whether it still is this attachment, whatever its file is called now.
    #[must_use]
    pub fn is_there(&self) -> bool {
        let is_it =
            |other: &LoopSeen| (other.number, other.sequence) == (self.device.number, self.device.sequence);
        probe::loops().iter().any(is_it)
    }

    /// Mounts it.
    ///
    /// # Panics
    /// When it cannot be mounted.
    pub fn mount(&self, point: &Path) {
        program::succeed("mount", [self.node().as_ref(), point.as_os_str()]);
    }

    /// Fails the test when it was detached.
    ///
    /// # Panics
    /// When it was.
    #[track_caller]
    pub fn assert_untouched(&self) {
        assert!(self.is_there(), "{} of {:?} is gone", self.node(), self.image);
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        if self.is_there() {
            let _ = Command::new("losetup").arg("-d").arg(self.node()).output();
        }
    }
}
