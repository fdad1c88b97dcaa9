//! FUSE connections: fusectl's folders, and aborting one.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, openat, statfs};

use super::{Acted, block, detached::Detached};
use crate::model::{DeviceNumber, FuseConnection};

/// `FUSE_CTL_SUPER_MAGIC` (`fs/fuse/control.c`).
const CONTROL_MAGIC: u64 = 0x6573_5543;

/// Where fusectl's folders are: where it is mounted, else in a mount of its own that is attached
/// nowhere. The file system is the same one in each.
#[derive(Debug)]
enum Control {
    Mounted(PathBuf),
    Detached(Detached),
}

impl Control {
    fn path(&self) -> PathBuf {
        match self {
            Self::Mounted(path) => path.clone(),
            Self::Detached(mount) => mount.path(),
        }
    }
}

/// `None` when the kernel has no FUSE, or has not loaded it: then there is no connection.
fn control(sys: &Path) -> io::Result<Option<Control>> {
    let path = sys.join("fs/fuse/connections");
    match statfs(&path) {
        Ok(status) if u64::try_from(status.f_type).is_ok_and(|kind| kind == CONTROL_MAGIC) => {
            Ok(Some(Control::Mounted(path)))
        }
        // The module makes that folder when it is loaded, and whoever sets the host up mounts it.
        Ok(_) => Ok(Some(Control::Detached(Detached::of_kernel("fusectl")?))),
        Err(rustix::io::Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// All connections, by device. `sys` is where sysfs is mounted.
///
/// # Errors
/// When fusectl can neither be read nor be mounted.
pub fn list(sys: &Path) -> io::Result<Vec<FuseConnection>> {
    match control(sys)? {
        Some(control) => read(&control.path()),
        None => Ok(Vec::new()),
    }
}

fn read(connections: &Path) -> io::Result<Vec<FuseConnection>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(connections)? {
        let entry = entry?;
        let Some(device) = entry.file_name().to_str().and_then(device) else { continue };
        // One that ends meanwhile has an empty file, or none.
        let Some(waiting) = block::read_if_there(&entry.path().join("waiting"))? else { continue };
        if let Ok(waiting) = String::from_utf8_lossy(&waiting).trim().parse() {
            found.push(FuseConnection { device, waiting });
        }
    }
    found.sort_by_key(|connection| connection.device);
    Ok(found)
}

/// A connection's folder is named by its device number as the kernel holds it, in decimal
/// (`fuse_ctl_add_conn`): for most the minor number alone, and for fuseblk that of a real device.
fn device(name: &str) -> Option<DeviceNumber> {
    name.parse().ok().map(block::from_kernel)
}

fn folder(device: DeviceNumber) -> String {
    block::to_kernel(device).to_string()
}

/// Aborts the connection of a mount: all who wait for its server get an error, and so do all who come
/// later. `is_there` tells whether that mount still is.
///
/// The kernel gives device numbers again, so one number may soon be another connection's. But the
/// file that aborts a connection does nothing once that connection is over (`fuse_ctl_remove_conn`),
/// and it is opened first: when the mount is there afterwards, it was there before, and the file is of
/// its connection.
///
/// # Errors
/// What the calls and `is_there` say.
pub fn abort(
    sys: &Path,
    device: DeviceNumber,
    is_there: impl FnOnce() -> io::Result<bool>,
) -> io::Result<Acted> {
    let Some(control) = control(sys)? else { return Ok(Acted::Gone) };
    let folder = control.path().join(folder(device));
    let Some(file) = open_abort(CWD, &folder.join("abort"))? else { return Ok(Acted::Gone) };
    if !is_there()? {
        return Ok(Acted::Gone);
    }
    rustix::io::write(&file, b"1")?;
    Ok(Acted::Done)
}

fn open_abort(directory: impl AsFd, path: &Path) -> io::Result<Option<OwnedFd>> {
    match openat(directory, path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()) {
        Ok(file) => Ok(Some(file)),
        Err(rustix::io::Errno::NOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{Tree, device_number as number};
    use super::*;

    #[test]
    fn lists_connections_by_their_devices() {
        // A user's server with two requests that wait, and ntfs-3g on 8:17.
        let tree = Tree::new()
            .file("61/waiting", "2\n")
            .file("61/abort", "")
            .file("8388625/waiting", "0\n")
            .file("notes", "");
        assert_eq!(
            read(tree.path()).expect("readable"),
            [
                FuseConnection { device: number(0, 61), waiting: 2 },
                FuseConnection { device: number(8, 17), waiting: 0 },
            ]
        );
        assert_eq!(folder(number(8, 17)), "8388625");
        assert_eq!(folder(number(0, 61)), "61");
    }

    #[test]
    fn a_kernel_without_fuse_has_no_connection() {
        let tree = Tree::new();
        assert_eq!(list(tree.path()).expect("nothing to read"), []);
        let gone = abort(tree.path(), number(0, 61), || panic!("nothing is asked about"));
        assert_eq!(gone.expect("nothing to do"), Acted::Gone);
    }
}
