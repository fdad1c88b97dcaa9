//! The volume from which cloud-init takes its configuration: a FAT file system labelled `CIDATA`
//! (cloud-init, NoCloud data source).
//!
//! The same contents make the same bytes.

use std::io::{self, Cursor, Write as _};

/// Bytes of the smallest volume.
const SIZE: usize = 1 << 20;
/// The most that is put on one.
const MOST: usize = 64 << 20;

/// A volume with these files in its root. It is the whole disk, without partitions.
///
/// # Errors
/// There is too much to put on it, or a name that FAT cannot have.
pub fn volume(files: &[(&str, &[u8])]) -> io::Result<Vec<u8>> {
    let needed: usize = files.iter().map(|(_, bytes)| bytes.len()).sum();
    if needed > MOST {
        return Err(io::Error::other("cloud-init's configuration has more than 64 MiB"));
    }
    let mut volume = Cursor::new(vec![0; (SIZE + needed * 2).next_multiple_of(SIZE)]);
    let options = fatfs::FormatVolumeOptions::new().volume_label(*b"CIDATA     ").volume_id(0x6369_6461);
    fatfs::format_volume(&mut volume, options)?;
    {
        let options = fatfs::FsOptions::new();
        let system = fatfs::FileSystem::new(&mut volume, options)?;
        let root = system.root_dir();
        for (name, bytes) in files {
            let mut file = root.create_file(name)?;
            file.write_all(bytes)?;
            file.flush()?;
        }
        drop(root);
        system.unmount()?;
    }
    Ok(volume.into_inner())
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::process::Command;

    use super::*;

    #[test]
    fn a_volume_has_its_files_and_the_label_that_cloud_init_looks_for() {
        let data = b"#cloud-config\n".repeat(1000);
        let files: [(&str, &[u8]); 2] = [("user-data", &data), ("meta-data", b"instance-id: x\n")];
        let bytes = volume(&files).unwrap();
        assert_eq!(bytes, volume(&files).unwrap());
        let mut copy = Cursor::new(bytes.clone());
        let system = fatfs::FileSystem::new(&mut copy, fatfs::FsOptions::new()).unwrap();
        for (name, expected) in files {
            let mut read = Vec::new();
            system.root_dir().open_file(name).unwrap().read_to_end(&mut read).unwrap();
            assert_eq!(read, expected);
        }
        // As the system that boots with it sees it.
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("seed");
        std::fs::write(&path, bytes).unwrap();
        let told = Command::new("/sbin/blkid").args(["-o", "export", "-p"]).arg(&path).output().unwrap();
        let told = String::from_utf8(told.stdout).unwrap();
        assert!(told.contains("LABEL=CIDATA\n") && told.contains("TYPE=vfat\n"), "{told}");
    }
}
