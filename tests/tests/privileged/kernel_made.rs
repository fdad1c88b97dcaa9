//! Mounts that the tests of the watchdog's kernel modules make, and how they find them again.

use std::collections::HashSet;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::{Duration, Instant};

use hostler_tests::failure::OrFail;
use hostler_tests::namespace::Namespace;
use hostler_tests::probe;
use hostler_watchdog::kernel::mounts::{self, Wanted};
use hostler_watchdog::kernel::namespaces;
use hostler_watchdog::kernel::unmount::{self, Unmounted};
use hostler_watchdog::model::{DeviceNumber, Mount, UnmountHow};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

pub(crate) fn mount_tmpfs(point: &Path) {
    fs::create_dir_all(point).or_fail("making a mount point");
    mount(Some("none"), point, Some("tmpfs"), MsFlags::empty(), None::<&str>).or_fail("mounting a tmpfs");
}

pub(crate) fn bind(from: &Path, to: &Path) {
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>).or_fail("binding");
}

/// Changes how a mount propagates.
pub(crate) fn make(point: &Path, how: MsFlags) {
    mount(None::<&str>, point, None::<&str>, how, None::<&str>).or_fail("changing how a mount propagates");
}

/// Whenever another test starts a program, the new process has all descriptors of this one for a moment,
/// also those of directories on mounts. So what is busy may be free a little later.
fn while_busy<T>(mut attempt: impl FnMut() -> std::io::Result<T>) -> std::io::Result<T> {
    const PATIENCE: Duration = Duration::from_secs(1);
    let start = Instant::now();
    loop {
        match attempt() {
            Err(error) if error.kind() == ErrorKind::ResourceBusy && start.elapsed() < PATIENCE => {
                std::thread::sleep(Duration::from_millis(20));
            }
            result => return result,
        }
    }
}

/// Unmounts what is on top.
pub(crate) fn take_down(point: &Path) {
    let unmounted = while_busy(|| Ok(umount2(point, MntFlags::UMOUNT_NOFOLLOW)?));
    unmounted.or_fail(format_args!("unmounting {}", point.display()));
}

/// The mounts of the own namespace on a point, the lowest first, as the watchdog sees them.
#[track_caller]
pub(crate) fn own_at(point: &Path) -> Vec<Mount> {
    let (_, mounts) = mounts::own().or_fail("reading the own namespace");
    let at: Vec<Mount> =
        mounts.into_iter().filter(|mount| mount.point == point.as_os_str().as_bytes()).collect();
    assert!(!at.is_empty(), "nothing is mounted on {}", point.display());
    at
}

/// The same of another namespace.
#[track_caller]
pub(crate) fn other_at(inode: u64, devices: &[DeviceNumber], point: &Path) -> Vec<Mount> {
    let (_, own) = mounts::own().or_fail("reading the own namespace");
    let wanted = Wanted { devices: devices.iter().copied().collect::<HashSet<_>>() };
    let others = namespaces::others(&own, &wanted, &mut |_| true).or_fail("reading the other namespaces");
    let is_at =
        |mount: &Mount| mount.identity.namespace.0 == inode && mount.point == point.as_os_str().as_bytes();
    let at: Vec<Mount> = others.mounts.into_iter().filter(is_at).collect();
    assert!(!at.is_empty(), "nothing is mounted on {} there", point.display());
    at
}

/// The topmost mount on a point in the namespace of a process.
#[track_caller]
pub(crate) fn in_namespace(namespace: &Namespace, point: &Path) -> Mount {
    let devices: Vec<DeviceNumber> = namespace
        .mounts_below(point)
        .iter()
        .map(|mount| DeviceNumber::parse(&mount.device).or_fail("a device number"))
        .collect();
    other_at(namespace.inode(), &devices, point).pop().or_fail("one at least")
}

/// Unmounts as a worker does, and wants the process to be where it was afterwards.
#[track_caller]
pub(crate) fn unmount_how(mount: &Mount, how: UnmountHow) -> std::io::Result<Unmounted> {
    let home = mounts::namespace_of(None).or_fail("the own namespace");
    let table = probe::mounts().len();
    let result = while_busy(|| unmount::unmount(&mount.identity, mount.short_number, &mount.point, how));
    assert_eq!(mounts::namespace_of(None).or_fail("the own namespace"), home);
    assert_eq!(std::env::current_dir().or_fail("the current directory"), Path::new("/"));
    if mount.identity.namespace != home {
        assert!(probe::mounts().len() <= table);
    }
    result
}

#[track_caller]
pub(crate) fn unmount_plainly(mount: &Mount) -> Unmounted {
    unmount_how(mount, UnmountHow::Plain).or_fail("unmounting")
}
