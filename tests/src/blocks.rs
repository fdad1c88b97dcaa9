//! Block devices and what they are stacked on, read from sysfs by code of the tests' own.
//!
//! Opens no device and asks no tool. What a device is made of is found from the bottom: a loop device
//! by its backing file, an nbd device by the files that its server has open, and everything else by
//! what it is made of.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::failure::OrFail;

/// What a block device is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Block {
    /// A bound loop device.
    Loop {
        /// The backing file's path, with " (deleted)" where it was removed.
        backing: PathBuf,
    },
    /// A part of another one.
    Partition {
        /// The disk.
        of: String,
    },
    /// A device-mapper map.
    Map {
        /// Its name, as in `/dev/mapper`.
        name: String,
        /// Its UUID, which tells who made it; may be empty.
        uuid: String,
    },
    /// An md array.
    Array {
        /// Its UUID.
        uuid: String,
    },
    /// A connected nbd device.
    Nbd {
        /// The process that serves it.
        server: u32,
    },
}

/// A block device as it was seen. Another one of the same name is not equal to it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct BlockSeen {
    /// Its name below `/sys/class/block`.
    pub name: String,
    /// What it is.
    pub block: Block,
    /// The disk's sequence number; a partition has its disk's.
    pub sequence: u64,
}

impl BlockSeen {
    /// The word that the watchdog's report has for it; partitions are no resources of their own.
    #[must_use]
    pub fn kind(&self) -> Option<&'static str> {
        match self.block {
            Block::Loop { .. } => Some("loop"),
            Block::Partition { .. } => None,
            Block::Map { .. } | Block::Array { .. } => Some("map"),
            Block::Nbd { .. } => Some("nbd"),
        }
    }

    fn folder(&self) -> PathBuf {
        folder(&self.name)
    }

    /// Whether it is still there.
    #[must_use]
    pub fn is_there(&self) -> bool {
        see(&self.name).as_ref() == Some(self)
    }

    /// Takes it away. It is not looked at whether that worked.
    fn remove(&self) {
        let node = format!("/dev/{}", self.name);
        let mut command = match &self.block {
            Block::Loop { .. } => {
                let mut command = Command::new("losetup");
                command.args(["--detach", &node]);
                command
            }
            // It goes with its disk, but for one that was added by hand.
            Block::Partition { of } => {
                let mut command = Command::new("partx");
                command.args(["--delete", &format!("/dev/{of}")]);
                command
            }
            Block::Map { name, .. } => {
                let mut command = Command::new("dmsetup");
                command.args(["remove", "--retry", name]);
                command
            }
            Block::Array { .. } => {
                let mut command = Command::new("mdadm");
                command.args(["--stop", &node]);
                command
            }
            Block::Nbd { .. } => {
                let mut command = Command::new("qemu-nbd");
                command.args(["--disconnect", &node]);
                command
            }
        };
        // Gone already is as good, and what stays is seen by the next look.
        let _ = command.output();
    }
}

fn folder(name: &str) -> PathBuf {
    Path::new("/sys/class/block").join(name)
}

/// The device of that name, when it is one of the kinds of [`Block`] and in use.
fn see(name: &str) -> Option<BlockSeen> {
    let folder = folder(name);
    let text = |below: &str| {
        let text = fs::read_to_string(folder.join(below)).ok()?;
        Some(text.trim_end().to_owned())
    };
    let block = if folder.join("partition").exists() {
        let real = fs::canonicalize(&folder).ok()?;
        Block::Partition { of: real.parent()?.file_name()?.to_str()?.to_owned() }
    } else if let Some(backing) = text("loop/backing_file") {
        Block::Loop { backing: backing.into() }
    } else if let Some(name) = text("dm/name") {
        Block::Map { name, uuid: text("dm/uuid").unwrap_or_default() }
    } else if text("md/array_state").is_some_and(|state| state != "clear") {
        Block::Array { uuid: text("md/uuid").unwrap_or_default() }
    } else if name.starts_with("nbd") {
        Block::Nbd { server: text("pid")?.parse().ok()? }
    } else {
        return None;
    };
    let sequence = match &block {
        Block::Partition { of } => fs::read_to_string(self::folder(of).join("diskseq")).ok(),
        _ => text("diskseq"),
    };
    Some(BlockSeen { name: name.to_owned(), block, sequence: sequence?.trim().parse().ok()? })
}

/// All of the host's.
///
/// # Panics
/// When sysfs cannot be read.
#[must_use]
pub fn blocks() -> Vec<BlockSeen> {
    let names = fs::read_dir("/sys/class/block").or_fail("reading /sys/class/block");
    // Other tests make and remove devices all the time: what went meanwhile is not there.
    let mut found: Vec<_> = names.flatten().filter_map(|entry| see(entry.file_name().to_str()?)).collect();
    found.sort();
    found
}

/// The block devices that are made of files below a directory, by whatever way: what is made of
/// others comes after them.
///
/// # Panics
/// When sysfs cannot be read.
#[must_use]
pub fn made_of_files_below(directory: &Path) -> Vec<BlockSeen> {
    let mut rest = blocks();
    let mut found: Vec<BlockSeen> = Vec::new();
    loop {
        let names: BTreeSet<&str> = found.iter().map(|block| block.name.as_str()).collect();
        let (next, others): (Vec<_>, Vec<_>) = rest.into_iter().partition(|seen| match &seen.block {
            Block::Loop { backing } => backing.starts_with(directory),
            Block::Nbd { server } => has_open_below(*server, directory),
            Block::Partition { of } => names.contains(of.as_str()),
            Block::Map { .. } | Block::Array { .. } => {
                slaves(&seen.folder()).iter().any(|slave| names.contains(slave.as_str()))
            }
        });
        if next.is_empty() {
            return found;
        }
        found.extend(next);
        rest = others;
    }
}

/// What a map or an array is made of.
fn slaves(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder.join("slaves")).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}

/// Whether a process has a file below a directory open.
fn has_open_below(process: u32, directory: &Path) -> bool {
    // The kernel names the thread, whose files are its process's.
    let entries = fs::read_dir(format!("/proc/{process}/fd")).into_iter().flatten().flatten();
    entries.filter_map(|entry| fs::read_link(entry.path()).ok()).any(|file| file.starts_with(directory))
}

/// Takes away what is made of files below a directory, from the top. Tries for as long as that brings
/// anything: udev may look at a device for a moment.
pub fn remove_made_of_files_below(directory: &Path) {
    for _ in 0..20 {
        let found = made_of_files_below(directory);
        if found.is_empty() {
            return;
        }
        for block in found.iter().rev() {
            block.remove();
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
    }
}
