//! Trees of files as sysfs and procfs show them, for tests of their readers.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use crate::model::DeviceNumber;

/// A temporary tree.
pub(super) struct Tree(tempfile::TempDir);

impl Tree {
    pub(super) fn new() -> Self {
        Self(tempfile::tempdir().expect("a temporary directory"))
    }

    pub(super) fn path(&self) -> &Path {
        self.0.path()
    }

    /// A file with what the kernel would show in it.
    pub(super) fn file(self, path: &str, content: impl AsRef<[u8]>) -> Self {
        let path = self.path().join(path);
        fs::create_dir_all(path.parent().expect("below the tree")).expect("fresh");
        fs::write(path, content).expect("fresh");
        self
    }

    pub(super) fn directory(self, path: &str) -> Self {
        fs::create_dir_all(self.path().join(path)).expect("fresh");
        self
    }

    pub(super) fn link(self, path: &str, target: &str) -> Self {
        let path = self.path().join(path);
        fs::create_dir_all(path.parent().expect("below the tree")).expect("fresh");
        symlink(target, path).expect("fresh");
        self
    }
}

pub(super) fn device_number(major: u32, minor: u32) -> DeviceNumber {
    DeviceNumber { major, minor }
}
