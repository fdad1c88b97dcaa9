//! Network block devices: what sysfs shows of them, and disconnecting one.

use std::io;
use std::path::{Path, PathBuf};

use super::{Acted, Found, block, block_calls, processes};
use crate::model::{DeviceNumber, Nbd, NbdIdentity, ProcessIdentity};

/// All that are, or may be, in use. `sys` and `proc` are where sysfs and procfs are mounted.
///
/// Neither an absent `pid` file nor a size of zero alone says that a device is free: the file comes
/// with the start of a connection and the size after it, and a device whose server died keeps its size
/// until the last user closes it (`nbd_config_put` in `drivers/block/nbd.c`).
///
/// # Errors
/// When sysfs cannot be read.
pub fn list(sys: &Path, proc: &Path) -> io::Result<Vec<Nbd>> {
    let mut found = Vec::new();
    for (name, directory) in block::disks(sys)? {
        let Some(number) = name.strip_prefix("nbd").and_then(|number| number.parse().ok()) else { continue };
        found.extend(block::unless_gone(&directory, || describe(&directory, proc, number))?);
    }
    found.sort_by_key(|nbd| nbd.number);
    Ok(found)
}

fn describe(directory: &Path, proc: &Path, number: u32) -> io::Result<Option<Nbd>> {
    let pid = pid(directory)?;
    let size = block::read_if_there(&directory.join("size"))?;
    let is_empty = size.is_none_or(|size| size.trim_ascii() == b"0");
    let partitions = block::partitions(directory)?;
    if pid.is_none() && is_empty && partitions.is_empty() {
        return Ok(None);
    }
    let device = block::device(directory)?;
    let server = pid.and_then(|pid| server(proc, pid, device));
    let identity = server.map(|server| NbdIdentity { number, server });
    Ok(Some(Nbd { number, device, identity, partitions }))
}

fn pid(directory: &Path) -> io::Result<Option<u32>> {
    let Some(text) = block::read_if_there(&directory.join("pid"))? else { return Ok(None) };
    // 0 stands for none: a process that this pid namespace does not see.
    Ok(String::from_utf8_lossy(&text).trim().parse().ok().filter(|pid| *pid != 0))
}

/// The process that sysfs names, when it is the one that connected the device. What sysfs has is the
/// number of a thread (`nbd_start_device` takes that of its caller, and `qemu-nbd` has a thread for it),
/// and may be another's by now: `nbd-client` ends once it has set a connection up over netlink. Only
/// whoever stays for the device's sake, in `NBD_DO_IT`, has it open.
fn server(proc: &Path, thread: u32, device: DeviceNumber) -> Option<ProcessIdentity> {
    let pid = processes::of_thread(proc, thread).ok()?;
    let start = processes::start_time_in(proc, pid).ok()?;
    let is_it = processes::has_open(proc, pid, device).ok()?;
    is_it.then_some(ProcessIdentity { pid, start })
}

/// The number of `/dev/nbdN`'s device.
///
/// # Errors
/// `NotFound` when there is none.
pub fn device(sys: &Path, number: u32) -> io::Result<DeviceNumber> {
    block::device(&directory(sys, number))
}

/// Opens exactly this connection's device, and holds it.
///
/// The device is opened before its server is looked at. While it is open it cannot be connected again
/// over netlink, and by ioctl only by one who has it open too.
///
/// # Errors
/// What opening says.
pub fn hold(sys: &Path, proc: &Path, identity: &NbdIdentity) -> io::Result<Found> {
    let device = match device(sys, identity.number) {
        Ok(device) => device,
        Err(error) if block::is_gone(&error) => return Ok(Found::Gone),
        Err(error) => return Err(error),
    };
    let node = block::open_node(sys, device)?;
    let Some(pid) = pid(&directory(sys, identity.number))? else { return Ok(Found::Gone) };
    match server(proc, pid, device) {
        Some(server) if server == identity.server => Ok(Found::It(node)),
        Some(_) => Ok(Found::Replaced),
        // It has ended, and its connection ends with it.
        None => Ok(Found::Gone),
    }
}

/// Ends exactly this connection.
///
/// The ioctls are used for every device: the kernel takes these two, and no others, on a device that
/// was connected over netlink as well (`nbd_ioctl` in `drivers/block/nbd.c`). `NBD_DISCONNECT` tells
/// the server, `NBD_CLEAR_SOCK` then ends the connection even if the server does not hear.
///
/// # Errors
/// What opening or the calls say.
pub fn disconnect(sys: &Path, proc: &Path, identity: &NbdIdentity) -> io::Result<Acted> {
    let node = match hold(sys, proc, identity)? {
        Found::It(node) => node,
        Found::Gone => return Ok(Acted::Gone),
        Found::Replaced => return Ok(Acted::Replaced),
    };
    let told = block_calls::nbd_disconnect(&node);
    block_calls::nbd_clear_socket(&node)?;
    told?;
    Ok(Acted::Done)
}

fn directory(sys: &Path, number: u32) -> PathBuf {
    sys.join(format!("block/nbd{number}"))
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{Tree, device_number as number};
    use super::*;
    use crate::model::{Partition, StartTime};

    const STAT: &str = "812 (qemu-nbd) S 1 811 811 0 -1 4194368 1 0 0 0 0 0 0 0 20 0 3 0 4711 1000 10 0\n";

    /// Debian 12 (6.1): nbd0 by `qemu-nbd -c`, nbd1 never used, nbd2 by `nbd-client`, which has ended,
    /// nbd3 with its server dead while a file system on it is still mounted.
    fn tree() -> Tree {
        let mut tree = Tree::new()
            .file("proc/812/stat", STAT)
            .file("proc/812/status", "Name:\tqemu-nbd\nTgid:\t812\nPid:\t812\n")
            // No such tree can hold a device's node, so this server is found not to have it open.
            .directory("proc/812/fd")
            .file("sys/block/nbd0/pid", "812\n")
            .file("sys/block/nbd0/size", "16384\n")
            .file("sys/block/nbd0/nbd0p1/dev", "43:1\n")
            .file("sys/block/nbd0/nbd0p1/partition", "1\n")
            .file("sys/block/nbd1/size", "0\n")
            .file("sys/block/nbd2/pid", "4000\n")
            .file("sys/block/nbd2/size", "0\n")
            .file("sys/block/nbd3/size", "2048\n");
        for (index, minor) in [(0, 0), (1, 32), (2, 64), (3, 96)] {
            tree = tree.file(&format!("sys/block/nbd{index}/dev"), format!("43:{minor}\n"));
        }
        tree
    }

    #[test]
    fn what_may_be_in_use_is_listed_and_only_a_server_that_is_seen_gives_an_identity() {
        let tree = tree();
        let nbd = |index, minor, partitions: &[_]| Nbd {
            number: index,
            device: number(43, minor),
            identity: None,
            partitions: partitions.to_vec(),
        };
        assert_eq!(
            list(&tree.path().join("sys"), &tree.path().join("proc")).expect("readable"),
            [nbd(0, 0, &[Partition { number: 1, device: number(43, 1) }]), nbd(2, 64, &[]), nbd(3, 96, &[]),]
        );
    }

    #[test]
    fn one_that_is_not_there_is_gone() {
        let server = ProcessIdentity { pid: 812, start: StartTime(4711) };
        let identity = NbdIdentity { number: 9, server };
        let tree = tree();
        let gone = disconnect(&tree.path().join("sys"), &tree.path().join("proc"), &identity);
        assert_eq!(gone.expect("nothing there"), Acted::Gone);
    }
}
