//! Whether a loop device is really free, by the word of `loopdev-3`: a library that shares no line
//! with the daemon.

use std::path::Path;
use std::time::Duration;

use loopdev::LoopDevice;

use crate::failure::{OrFail, wait_for};

/// Attaches `image` to exactly this device, which the kernel only lets happen when nothing is
/// attached to it, and detaches it again.
///
/// # Panics
/// When it is not free within seconds.
pub fn assert_free(number: u32, image: &Path) {
    let path = format!("/dev/loop{number}");
    wait_for(format_args!("{path} to take another file"), Duration::from_secs(5), || {
        let device = LoopDevice::open(&path).or_fail(format_args!("opening {path}"));
        match device.attach_file(image) {
            Ok(()) => {
                device.detach().or_fail(format_args!("detaching {path}"));
                Some(())
            }
            // Another test may have been given the number meanwhile: it frees it, too.
            Err(error) if error.raw_os_error() == Some(16) => None,
            Err(error) => panic!("attaching to {path}: {error}"),
        }
    });
}
