//! Is this a kernel, an initial file system, a disk? Told by what a file begins with.

/// What is wrong with a file, for whoever named it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotBootable {
    /// No kernel.
    #[error("it is no Linux kernel for this kind of machine: it has no boot header (a bzImage is needed)")]
    Kernel,
    /// No initial file system.
    #[error("it is no initial file system: it begins with neither a cpio archive nor one that is compressed")]
    Initrd,
    /// A disk that is none.
    #[error("it is no disk that can be used: neither qcow2 nor one with a boot record")]
    Disk,
    /// A qcow2 file that leads to others.
    #[error(
        "this qcow2 file needs another one behind it, or keeps its data elsewhere: make one file of it with qemu-img convert"
    )]
    Backed,
}

/// How many bytes of a file's beginning these functions look at.
pub const LOOKED_AT: usize = 1024;

/// Whether a file that begins so is a kernel for a PC (Linux, Documentation/arch/x86/boot.rst).
///
/// # Errors
/// It is not.
pub fn kernel(start: &[u8]) -> Result<(), NotBootable> {
    let is_sector = start.get(0x1fe..0x200) == Some(b"\x55\xaa");
    let has_header = start.get(0x202..0x206) == Some(b"HdrS");
    if is_sector && has_header { Ok(()) } else { Err(NotBootable::Kernel) }
}

/// Whether a file that begins so is what a kernel unpacks (Linux, usr/Kconfig).
///
/// # Errors
/// It is not.
pub fn initrd(start: &[u8]) -> Result<(), NotBootable> {
    const MAGIC: [&[u8]; 9] = [
        b"070701",
        b"070702",
        b"\x1f\x8b",
        b"BZh",
        b"\xfd7zXZ\0",
        b"\x5d\0\0",
        b"\x89LZO",
        b"\x02\x21\x4c\x18",
        b"\x28\xb5\x2f\xfd",
    ];
    if MAGIC.iter().any(|magic| start.starts_with(magic)) { Ok(()) } else { Err(NotBootable::Initrd) }
}

/// How a disk is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Sector by sector.
    Raw,
    /// qemu's own, alone in its file.
    Qcow2 {
        /// How large it makes the disk, in bytes: its file may be small.
        size: u64,
    },
}

/// The layout of a disk that begins so.
///
/// # Errors
/// It is none, or leads to other files: a disk that somebody else made must not show the host's.
pub fn disk(start: &[u8]) -> Result<Layout, NotBootable> {
    if start.starts_with(b"QFI\xfb") {
        // qemu, docs/interop/qcow2.txt: version, offset of the backing file's name, incompatible features.
        let number =
            |at: usize| -> Option<u64> { Some(u64::from_be_bytes(start.get(at..at + 8)?.try_into().ok()?)) };
        let version =
            start.get(4..8).map(|bytes| u32::from_be_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]));
        let features = if version == Some(2) { Some(0) } else { number(72) };
        return match (version, number(8), features, number(24)) {
            // Bit 2: data in another file.
            (Some(2 | 3), Some(0), Some(features), Some(size)) if features & 4 == 0 => {
                Ok(Layout::Qcow2 { size })
            }
            _ => Err(NotBootable::Backed),
        };
    }
    if start.get(0x1fe..0x200) == Some(b"\x55\xaa") { Ok(Layout::Raw) } else { Err(NotBootable::Disk) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_nothing_that_boots() {
        let text = b"#!/bin/sh\n".repeat(200);
        assert_eq!(kernel(&text), Err(NotBootable::Kernel));
        assert_eq!(initrd(&text), Err(NotBootable::Initrd));
        assert_eq!(disk(&text), Err(NotBootable::Disk));
        assert_eq!(kernel(b""), Err(NotBootable::Kernel));
    }

    #[test]
    fn a_boot_header_makes_a_kernel_and_a_boot_sector_alone_does_not() {
        let mut start = vec![0; 1024];
        start[0x1fe..0x200].copy_from_slice(b"\x55\xaa");
        assert_eq!(kernel(&start), Err(NotBootable::Kernel));
        assert_eq!(disk(&start), Ok(Layout::Raw));
        start[0x202..0x206].copy_from_slice(b"HdrS");
        assert_eq!(kernel(&start), Ok(()));
    }

    #[test]
    fn a_disk_that_leads_to_the_hosts_files_is_refused() {
        let mut start = vec![0; 1024];
        start[..8].copy_from_slice(b"QFI\xfb\0\0\0\x03");
        start[24..32].copy_from_slice(&(5_u64 << 30).to_be_bytes());
        assert_eq!(disk(&start), Ok(Layout::Qcow2 { size: 5 << 30 }));
        start[79] = 4;
        assert_eq!(disk(&start), Err(NotBootable::Backed));
        start[79] = 0;
        start[15] = 104;
        assert_eq!(disk(&start), Err(NotBootable::Backed));
        assert_eq!(disk(b"QFI\xfb"), Err(NotBootable::Backed));
    }
}
