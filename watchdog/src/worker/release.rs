//! Frees a file system that nothing shows a mount of.
//!
//! It lives on because it is frozen, or because a file on it is swapped to. To thaw it or to name that
//! file one has to be inside, so it is mounted again, attached nowhere (see
//! [`crate::kernel::detached`]), and that mount ends with this step. When it held the last thing that
//! kept the file system alive, the kernel unmounts the file system then.

use std::io;
use std::path::Path;

use super::hold;
use crate::kernel::detached::{Access, Detached};
use crate::kernel::{Found, block, freeze, swaps};
use crate::model::{DeviceNumber, ResourceIdentity, StepResult};

/// Frees it, once `resource` is seen to be what `device` is of still.
pub(super) fn release(
    kind: &str,
    device: DeviceNumber,
    resource: &ResourceIdentity,
    swap_files: &[Vec<u8>],
) -> io::Result<StepResult> {
    let sys = Path::new("/sys");
    // While this is open, no other disk can take the place of the one that was checked.
    let _held = match hold::hold(sys, Path::new("/proc"), Some(device), resource)? {
        Found::It(held) => held,
        Found::Gone => return Ok(StepResult::Gone),
        Found::Replaced => return Ok(StepResult::Replaced),
    };
    // Mounting would otherwise begin something new: replay a journal, and believe what an image says.
    if !block::is_claimed(sys, device)? {
        return Ok(StepResult::Gone);
    }
    // What is swapped to has to be opened for writing.
    let access = if swap_files.is_empty() { Access::ReadingOnly } else { Access::Writing };
    let mount = Detached::of_living(kind, &block::node_path(sys, device)?, access)?;
    let root = mount.root()?;
    let was_frozen = match freeze::thaw(&root) {
        Ok(()) => true,
        Err(error) if freeze::is_not_frozen(&error) => false,
        Err(error) => return Err(error),
    };
    let ended = swaps::off_below(&root, swap_files)?;
    if !was_frozen && ended == 0 {
        let cause = "it is neither frozen nor swapped to, so something else holds it";
        return Ok(StepResult::Failed { cause: cause.to_owned() });
    }
    Ok(StepResult::Done)
}
