//! Writes a guest's initial file system: a newc cpio archive, the same bytes for the same content.
//!
//! Entries are plain data, parents are added by themselves, times are 0 and inode numbers count up.
//! Deliberately absent: compression (the kernel takes it as it is, and under emulation unpacking
//! costs more than reading), and any file of the host that was not given.

use std::collections::BTreeMap;
use std::io::{self, Write};

use cpio::newc::{Builder, trailer};

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const DEVICE: u32 = 0o020_000;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Entry {
    Directory,
    File { mode: u32, bytes: Vec<u8> },
    CharacterDevice { major: u32, minor: u32 },
}

/// An initial file system under construction.
#[derive(Clone, Debug, Default)]
pub struct Initramfs {
    entries: BTreeMap<String, Entry>,
}

impl Initramfs {
    /// One with busybox, `init` as its first process, and the console's device.
    #[must_use]
    pub fn new(busybox: Vec<u8>, init: &str) -> Self {
        let mut initramfs = Self::default();
        initramfs.file("bin/busybox", 0o755, busybox);
        initramfs.file("init", 0o755, init.as_bytes().to_vec());
        initramfs.insert("dev/console", Entry::CharacterDevice { major: 5, minor: 1 });
        initramfs
    }

    /// Adds an empty folder.
    pub fn directory(&mut self, path: &str) -> &mut Self {
        self.insert(path, Entry::Directory)
    }

    /// Adds a file of root's; `path` has no leading slash.
    pub fn file(&mut self, path: &str, mode: u32, bytes: impl Into<Vec<u8>>) -> &mut Self {
        let bytes = bytes.into();
        self.insert(path, Entry::File { mode, bytes })
    }

    fn insert(&mut self, path: &str, entry: Entry) -> &mut Self {
        for (at, _) in path.match_indices('/') {
            self.entries.entry(path[..at].to_owned()).or_insert(Entry::Directory);
        }
        self.entries.insert(path.to_owned(), entry);
        self
    }

    /// Writes the archive. Parents come before their children, because `/` sorts before names.
    ///
    /// # Errors
    /// When writing fails, or a file has 4 GiB or more.
    pub fn write(&self, mut output: impl Write) -> io::Result<()> {
        for (inode, (path, entry)) in (1..).zip(&self.entries) {
            let builder = Builder::new(path).ino(inode).mtime(0).uid(0).gid(0).nlink(1);
            let (builder, bytes): (Builder, &[u8]) = match entry {
                Entry::Directory => (builder.mode(DIRECTORY | 0o755), &[]),
                Entry::File { mode, bytes } => (builder.mode(FILE | mode), bytes),
                Entry::CharacterDevice { major, minor } => {
                    (builder.mode(DEVICE | 0o600).rdev_major(*major).rdev_minor(*minor), &[])
                }
            };
            let size = u32::try_from(bytes.len()).map_err(io::Error::other)?;
            let mut writer = builder.write(output, size);
            writer.write_all(bytes)?;
            output = writer.finish()?;
        }
        trailer(output)?.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(initramfs: &Initramfs) -> Vec<u8> {
        let mut bytes = Vec::new();
        initramfs.write(&mut bytes).unwrap();
        bytes
    }

    #[test]
    fn an_archive_reads_back_with_parents_first() {
        let mut initramfs = Initramfs::new(b"busybox".to_vec(), "#!/bin/busybox sh\n");
        initramfs.file("hostler/steps/10-x", 0o400, "step");
        let bytes = archive(&initramfs);
        let mut rest = bytes.as_slice();
        let mut seen = Vec::new();
        loop {
            let reader = cpio::newc::Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            let entry = reader.entry();
            seen.push((entry.name().to_owned(), entry.mode(), entry.mtime()));
            rest = reader.finish().unwrap();
        }
        assert_eq!(
            seen,
            [
                ("bin".to_owned(), 0o040_755, 0),
                ("bin/busybox".to_owned(), 0o100_755, 0),
                ("dev".to_owned(), 0o040_755, 0),
                ("dev/console".to_owned(), 0o020_600, 0),
                ("hostler".to_owned(), 0o040_755, 0),
                ("hostler/steps".to_owned(), 0o040_755, 0),
                ("hostler/steps/10-x".to_owned(), 0o100_400, 0),
                ("init".to_owned(), 0o100_755, 0),
            ]
        );
    }

    #[test]
    fn the_order_of_adding_does_not_matter() {
        let mut one = Initramfs::default();
        one.file("a", 0o644, "1").file("b/c", 0o644, "2");
        let mut other = Initramfs::default();
        other.file("b/c", 0o644, "2").file("a", 0o644, "1");
        assert_eq!(archive(&one), archive(&other));
    }
}
