//! Reads the kernel's files that hold what a look tells, each once and with as few calls as it takes, and
//! throws away what they say. No look can be cheaper than that.
//!
//! Mounts are read as mountinfo, of each namespace once through any process in it. Statx takes the place
//! of what a look asks of a descriptor; ioctls and numbers of mounts are left out.

use std::collections::HashSet;
use std::ffi::CStr;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, Dir, Mode, OFlags, StatxFlags, openat, readlinkat, statx};
use rustix::path::Arg;

/// How much is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Depth {
    /// Loop devices, mounts, and who the processes are.
    Ownership,
    /// Also what each process holds.
    Holders,
}

/// Reads everything; says how many bytes that were.
#[must_use]
pub fn read(depth: Depth) -> usize {
    let mut reader = Reader { buffer: vec![0; 256 * 1024], bytes: 0 };
    reader.block_devices();
    reader.processes(depth);
    reader.bytes
}

struct Reader {
    buffer: Vec<u8>,
    bytes: usize,
}

/// What has gone meanwhile is not there, and what is not there is quickly read.
fn open(directory: impl AsFd, name: impl Arg, flags: OFlags) -> Option<OwnedFd> {
    openat(directory, name, flags | OFlags::CLOEXEC, Mode::empty()).ok()
}

fn names(directory: impl AsFd) -> Vec<std::ffi::CString> {
    let entries = Dir::read_from(directory).into_iter().flatten().flatten();
    let names = entries.map(|entry| entry.file_name().to_owned());
    names.filter(|name| name.as_c_str() != c"." && name.as_c_str() != c"..").collect()
}

impl Reader {
    fn file(&mut self, directory: impl AsFd, name: impl Arg) -> bool {
        let Some(file) = open(directory, name, OFlags::RDONLY) else { return false };
        while let Ok(count @ 1..) = rustix::io::read(&file, self.buffer.as_mut_slice()) {
            self.bytes += count;
        }
        true
    }

    fn status(&self, directory: impl AsFd, name: &CStr) {
        let wanted = StatxFlags::TYPE | StatxFlags::MNT_ID;
        // Only that it was asked counts.
        let _ = statx(directory, name, AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT, wanted);
    }

    fn block_devices(&mut self) {
        for file in ["/proc/swaps", "/proc/thread-self/mountinfo"] {
            self.file(CWD, file);
        }
        let Some(block) = open(CWD, "/sys/block", OFlags::DIRECTORY) else { return };
        for name in names(&block) {
            if !name.as_bytes().starts_with(b"loop") {
                continue;
            }
            let Some(device) = open(&block, name.as_c_str(), OFlags::DIRECTORY | OFlags::PATH) else {
                continue;
            };
            if !self.file(&device, "loop/backing_file") {
                continue;
            }
            for file in ["loop/autoclear", "dev", "diskseq"] {
                self.file(&device, file);
            }
            // Partitions.
            if let Some(device) = open(&block, name.as_c_str(), OFlags::DIRECTORY) {
                let _ = names(&device);
            }
            // Asked of the device itself by the look.
            let node = [b"/dev/", name.as_bytes()].concat();
            drop(open(CWD, node.as_slice(), OFlags::RDONLY | OFlags::NONBLOCK));
        }
    }

    fn processes(&mut self, depth: Depth) {
        let Some(proc) = open(CWD, "/proc", OFlags::DIRECTORY) else { return };
        let own = readlinkat(CWD, "/proc/thread-self/ns/mnt", Vec::new()).ok();
        let mut namespaces: HashSet<_> = own.into_iter().collect();
        for name in names(&proc) {
            if !name.as_bytes().iter().all(u8::is_ascii_digit) {
                continue;
            }
            let Some(process) = open(&proc, name.as_c_str(), OFlags::DIRECTORY | OFlags::PATH) else {
                continue;
            };
            self.status(&process, c"");
            self.file(&process, "stat");
            if let Ok(namespace) = readlinkat(&process, "ns/mnt", Vec::new())
                && namespaces.insert(namespace)
            {
                self.file(&process, "mountinfo");
            }
            if depth == Depth::Holders {
                self.holds(&process);
            }
        }
    }

    fn holds(&mut self, process: &OwnedFd) {
        // A kernel thread has none of these.
        if readlinkat(process, "exe", Vec::new()).is_err() {
            return;
        }
        for file in ["cgroup", "maps"] {
            self.file(process, file);
        }
        for link in [c"cwd", c"root", c"exe"] {
            self.status(process, link);
        }
        let Some(descriptors) = open(process, "fd", OFlags::DIRECTORY) else { return };
        for name in names(&descriptors) {
            let text = readlinkat(&descriptors, name.as_c_str(), Vec::new());
            if text.is_ok_and(|text| text.as_bytes().starts_with(b"/")) {
                self.status(&descriptors, &name);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_is_read_of_what_processes_hold() {
        let (less, more) = (read(Depth::Ownership), read(Depth::Holders));
        assert!(less > 0 && more > less, "{less} and {more} bytes");
    }
}
