//! The partition table of an image.
//!
//! An MBR with one partition: GRUB for BIOS embeds itself in the first MiB behind it, and every
//! kernel reads it. GPT was considered; it would need a second partition for GRUB and buys nothing
//! below 2 TiB. Pure.

/// Bytes of a sector.
const SECTOR: u64 = 512;

/// Where the partition begins: room for GRUB, and aligned for every kind of disk.
pub const OFFSET: u64 = 1 << 20;

/// Where the root file system lies on a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Its number, from 1.
    pub number: u32,
    /// Its first byte on the disk.
    pub offset: u64,
    /// Its bytes.
    pub length: u64,
    /// The disk's signature; with the number it makes the partition's PARTUUID.
    pub disk_signature: u32,
}

impl Partition {
    /// The partition of a disk of `size` bytes, a multiple of 1 MiB and more than one.
    #[must_use]
    pub fn whole(size: u64, disk_signature: u32) -> Self {
        Self { number: 1, offset: OFFSET, length: size.saturating_sub(OFFSET), disk_signature }
    }

    /// Its PARTUUID, as the kernel takes it in `root=`.
    #[must_use]
    pub fn partuuid(&self) -> String {
        format!("{:08x}-{:02x}", self.disk_signature, self.number)
    }

    /// The first sector of the disk.
    #[must_use]
    pub fn boot_record(&self) -> [u8; 512] {
        let sectors = |bytes: u64| u32::try_from(bytes / SECTOR).unwrap_or(u32::MAX).to_le_bytes();
        let mut record = [0; 512];
        record[440..444].copy_from_slice(&self.disk_signature.to_le_bytes());
        // Active, and with the cylinder numbers that mean "see the sector numbers".
        record[446..450].copy_from_slice(&[0x80, 0xfe, 0xff, 0xff]);
        record[450..454].copy_from_slice(&[0x83, 0xfe, 0xff, 0xff]);
        record[454..458].copy_from_slice(&sectors(self.offset));
        record[458..462].copy_from_slice(&sectors(self.length));
        record[510..].copy_from_slice(&[0x55, 0xaa]);
        record
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_active_linux_partition_from_the_first_mebibyte_on() {
        let partition = Partition::whole(2 << 30, 0x1234_abcd);
        assert_eq!(partition.partuuid(), "1234abcd-01");
        let record = partition.boot_record();
        assert_eq!(record[440..444], [0xcd, 0xab, 0x34, 0x12]);
        assert_eq!((record[446], record[450]), (0x80, 0x83));
        assert_eq!(record[454..458], 2048_u32.to_le_bytes());
        assert_eq!(record[458..462], (4_194_304_u32 - 2048).to_le_bytes());
        assert_eq!(record[510..], [0x55, 0xaa]);
        assert!(record[..440].iter().all(|byte| *byte == 0));
    }
}
