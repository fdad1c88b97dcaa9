//! What must survive: a loop device, its mount, and a process in it, of the same shape as what is
//! taken back beside them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use nix::mount::{MntFlags, umount2};

use crate::failure::OrFail;
use crate::place::Place;
use crate::probe::{self, LoopSeen, ProcessSeen};
use crate::program;

/// The bystander. It takes itself away when it is dropped.
#[derive(Debug)]
pub struct Bystander {
    image: PathBuf,
    point: PathBuf,
    device: LoopSeen,
    mount: u64,
    process: ProcessSeen,
    child: Child,
}

impl Bystander {
    /// Makes one in a directory.
    ///
    /// # Panics
    /// When it cannot be made.
    #[must_use]
    pub fn new(place: &Place, directory: &Path) -> Self {
        let image = directory.join("bystander.img");
        crate::place::make_image(&image, 4);
        let point = directory.join("bystander");
        fs::create_dir(&point).or_fail("making the bystander's mount point");
        attach(&image);
        let device = probe::loop_of(&image);
        let node = format!("/dev/loop{}", device.number);
        program::succeed("mount", [node.as_ref(), point.as_os_str()]);
        let child = place
            .command("sleep")
            .arg("600")
            .current_dir(&point)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .spawn()
            .or_fail("starting the bystander");
        let process = ProcessSeen::of(child.id());
        Self { mount: probe::mount_number(&point), image, point, device, process, child }
    }

    /// Fails the test when anything about it is not as it was made.
    ///
    /// # Panics
    /// When something of it was touched.
    #[track_caller]
    pub fn assert_untouched(&self) {
        assert_eq!(probe::loop_of(&self.image), self.device, "the bystander's loop device");
        assert_eq!(probe::mount_number(&self.point), self.mount, "the bystander's mount");
        assert!(self.process.runs(), "the bystander's process has ended");
        let target = fs::read_link(format!("/proc/{}/cwd", self.process.pid)).or_fail("its directory");
        assert_eq!(target, self.point, "the bystander's current directory");
    }

    /// Where it is mounted.
    #[must_use]
    pub fn point(&self) -> &Path {
        &self.point
    }

    /// Its loop device.
    #[must_use]
    pub fn device(&self) -> &LoopSeen {
        &self.device
    }
}

impl Drop for Bystander {
    fn drop(&mut self) {
        // Gone already is as good, at each step.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = umount2(&self.point, MntFlags::UMOUNT_NOFOLLOW);
        let still = probe::loops().into_iter().any(|device| device == self.device);
        if still {
            let node = format!("/dev/loop{}", self.device.number);
            let _ = std::process::Command::new("losetup").arg("-d").arg(node).output();
        }
    }
}

/// Attaches a file to a free loop device, and returns the device's node. Without autoclear: only
/// detaching it frees it.
///
/// # Panics
/// When it cannot be attached.
pub fn attach(image: &Path) -> String {
    let node = program::succeed("losetup", ["--find".as_ref(), "--show".as_ref(), image.as_os_str()]);
    node.trim().to_owned()
}
