//! What the tests of block devices see of the host by themselves, in the model's words.

use std::path::Path;

use hostler_tests::failure::OrFail;
use hostler_tests::probe;
use hostler_watchdog::model::{DeviceNumber, LoopDevice, ResourceIdentity};

use crate::worker::identity;

/// A bound loop device as the resource that a file system lies on.
#[track_caller]
pub(crate) fn resource(device: &LoopDevice) -> Box<ResourceIdentity> {
    Box::new(ResourceIdentity::Loop(identity(device)))
}

/// The device that a mount of the test shows.
#[track_caller]
pub(crate) fn shown_at(point: &Path) -> DeviceNumber {
    let mount = probe::mounts().into_iter().rfind(|mount| mount.point == point);
    let mount = mount.or_fail(format_args!("a mount on {}", point.display()));
    DeviceNumber::parse(&mount.device).or_fail("a device number")
}
