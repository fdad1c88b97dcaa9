//! Finds and reads files in an ISO 9660 image (ECMA-119), with Rock Ridge's names where it has them.
//!
//! Only what is needed to boot an installer from one: the volume's label, and plain files by their path.
//! Deliberately absent: Joliet, links, files in several parts, UDF. An image may come from anywhere, so
//! each number in it is checked before it is used, and each loop has an end.

use std::io::{self, Read, Seek, SeekFrom};

/// Bytes of a sector.
const SECTOR: u64 = 2048;
/// The largest folder that is read, in bytes.
const LARGEST_FOLDER: u64 = 4 << 20;

/// Why a file cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IsoError {
    /// It cannot be read.
    #[error("cannot read the image")]
    Read(#[source] io::Error),
    /// It is no image.
    #[error("it is no ISO 9660 image: it has no volume descriptor; is it complete, and not compressed?")]
    NotAnImage,
    /// A path does not exist.
    #[error("the image has no {path}")]
    Missing {
        /// The path.
        path: String,
    },
    /// Something in it contradicts itself.
    #[error("the image is damaged at sector {sector}; check its digest, and download it again")]
    Damaged {
        /// Where.
        sector: u64,
    },
}

/// A file or folder of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    name: String,
    sector: u64,
    size: u64,
    is_folder: bool,
    is_in_parts: bool,
}

/// An image.
#[derive(Debug)]
pub struct Iso<R> {
    input: R,
    label: String,
    root: Entry,
}

impl<R: Read + Seek> Iso<R> {
    /// Reads the volume descriptor.
    ///
    /// # Errors
    /// It has none, or cannot be read.
    pub fn open(mut input: R) -> Result<Self, IsoError> {
        // ECMA-119, 6.7.1: descriptors from sector 16 on, each one sector, ended by one of type 255.
        for sector in 16..32 {
            let mut bytes = [0; SECTOR as usize];
            match read_at(&mut input, sector * SECTOR, &mut bytes) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => break,
                result => result.map_err(IsoError::Read)?,
            }
            if &bytes[1..6] != b"CD001" || bytes[0] == 255 {
                break;
            }
            if bytes[0] == 1 {
                let label = String::from_utf8_lossy(&bytes[40..72]);
                let label = label.trim_end_matches(['\0', ' ']).to_owned();
                // It goes into a command line.
                if label.contains(char::is_control) {
                    return Err(IsoError::Damaged { sector });
                }
                let root = record(&bytes[156..190]).ok_or(IsoError::Damaged { sector })?;
                return Ok(Self { input, label, root });
            }
        }
        Err(IsoError::NotAnImage)
    }

    /// The volume's label.
    #[must_use]
    pub fn label(&self) -> &str {
        &self.label
    }

    /// A reader of the plain file at `path`, and its size. Letters are compared without case where the image
    /// has no names but ISO 9660's own.
    ///
    /// # Errors
    /// It is not there, or the image is damaged.
    pub fn file(&mut self, path: &str) -> Result<(impl Read + '_, u64), IsoError> {
        let missing = || IsoError::Missing { path: path.to_owned() };
        let mut entry = self.root.clone();
        for part in path.split('/').filter(|part| !part.is_empty()) {
            if !entry.is_folder {
                return Err(missing());
            }
            entry = self.folder(&entry)?.into_iter().find(|one| one.name == part).ok_or_else(missing)?;
        }
        if entry.is_folder || entry.is_in_parts {
            return Err(missing());
        }
        let end = self.input.seek(SeekFrom::End(0)).map_err(IsoError::Read)?;
        let start = entry.sector.saturating_mul(SECTOR);
        if start.saturating_add(entry.size) > end {
            return Err(IsoError::Damaged { sector: entry.sector });
        }
        self.input.seek(SeekFrom::Start(start)).map_err(IsoError::Read)?;
        Ok(((&mut self.input).take(entry.size), entry.size))
    }

    fn folder(&mut self, folder: &Entry) -> Result<Vec<Entry>, IsoError> {
        let damaged = IsoError::Damaged { sector: folder.sector };
        if folder.size > LARGEST_FOLDER {
            return Err(damaged);
        }
        let mut bytes = vec![0; usize::try_from(folder.size).unwrap_or(0)];
        match read_at(&mut self.input, folder.sector.saturating_mul(SECTOR), &mut bytes) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Err(damaged),
            result => result.map_err(IsoError::Read)?,
        }
        let mut entries = Vec::new();
        // A record does not cross a sector's end: a length of 0 means that the rest is padding.
        for sector in bytes.chunks(SECTOR as usize) {
            let mut at = 0;
            while let Some(length) =
                sector.get(at).map(|byte| usize::from(*byte)).filter(|length| *length > 0)
            {
                let bytes = sector.get(at..at + length).ok_or(IsoError::Damaged { sector: folder.sector })?;
                entries.extend(record(bytes));
                at += length;
            }
        }
        Ok(entries)
    }
}

fn read_at(input: &mut (impl Read + Seek), at: u64, bytes: &mut [u8]) -> io::Result<()> {
    input.seek(SeekFrom::Start(at))?;
    input.read_exact(bytes)
}

/// A directory record; ECMA-119, 9.1.
fn record(bytes: &[u8]) -> Option<Entry> {
    let number = |at: usize| -> Option<u64> {
        let bytes: [u8; 4] = bytes.get(at..at + 4)?.try_into().ok()?;
        Some(u64::from(u32::from_le_bytes(bytes)))
    };
    let flags = *bytes.get(25)?;
    let length = usize::from(*bytes.get(32)?);
    let name = bytes.get(33..33 + length)?;
    // The name is padded to an even offset; what follows is for systems' own use.
    let system = bytes.get(33 + length + usize::from(length % 2 == 0)..).unwrap_or(&[]);
    let name = rock_ridge_name(system).unwrap_or_else(|| plain_name(name));
    Some(Entry {
        name,
        sector: number(2)?.saturating_add(u64::from(*bytes.get(1)?)),
        size: number(10)?,
        is_folder: flags & 2 != 0,
        is_in_parts: flags & 0x80 != 0,
    })
}

/// Without version and trailing dot, in small letters: as Linux shows such names.
fn plain_name(name: &[u8]) -> String {
    let name = String::from_utf8_lossy(name);
    name.split(';').next().unwrap_or("").trim_end_matches('.').to_ascii_lowercase()
}

/// The name that Rock Ridge's `NM` entries spell (IEEE P1282, 4.1.4).
fn rock_ridge_name(mut system: &[u8]) -> Option<String> {
    let mut name = Vec::new();
    while let [first, second, length, _version, ..] = *system {
        let length = usize::from(length);
        if length < 4 || length > system.len() {
            break;
        }
        if [first, second] == *b"NM" {
            let flags = *system.get(4)?;
            // The folder itself and the one above have no name here.
            if flags & 6 != 0 {
                return None;
            }
            name.extend_from_slice(system.get(5..length)?);
        }
        system = &system[length..];
    }
    (!name.is_empty()).then(|| String::from_utf8_lossy(&name).into_owned())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::Cursor;
    use std::process::Command;

    use super::*;

    /// A record with a plain name, and Rock Ridge's where there is one.
    fn entry(name: &[u8], rock_ridge: &str, sector: u32, size: u32, flags: u8) -> Vec<u8> {
        let mut bytes = vec![0; 33];
        bytes[2..6].copy_from_slice(&sector.to_le_bytes());
        bytes[10..14].copy_from_slice(&size.to_le_bytes());
        bytes[25] = flags;
        bytes[32] = u8::try_from(name.len()).unwrap();
        bytes.extend(name);
        if name.len().is_multiple_of(2) {
            bytes.push(0);
        }
        if !rock_ridge.is_empty() {
            bytes.extend([b'N', b'M', u8::try_from(rock_ridge.len() + 5).unwrap(), 1, 0]);
            bytes.extend(rock_ridge.as_bytes());
        }
        bytes[0] = u8::try_from(bytes.len()).unwrap();
        bytes
    }

    /// Sector 18: the root with a folder at 19 and a file at 20; in the folder, a file at 20.
    fn image() -> Vec<u8> {
        let mut image = vec![0; 21 * 2048];
        let mut put = |sector: usize, at: usize, bytes: &[u8]| {
            image[sector * 2048 + at..sector * 2048 + at + bytes.len()].copy_from_slice(bytes);
        };
        put(16, 0, b"\x01CD001\x01");
        put(16, 40, b"MY LABEL                        ");
        put(16, 156, &entry(b"\0", "", 18, 2048, 2));
        put(17, 0, b"\xffCD001\x01");
        let root = [
            entry(b"\0", "", 18, 2048, 2),
            entry(b"\x01", "", 18, 2048, 2),
            entry(b"BOOT", "boot", 19, 2048, 2),
        ]
        .concat();
        put(18, 0, &root);
        put(18, root.len(), &entry(b"README.TXT;1", "", 20, 5, 0));
        put(19, 0, &entry(b"VMLINUZ_.;1", "vmlinuz-6.1", 20, 5, 0));
        put(20, 0, b"hello");
        image
    }

    fn read(image: Vec<u8>, path: &str) -> Result<String, IsoError> {
        let mut iso = Iso::open(Cursor::new(image))?;
        let (mut file, size) = iso.file(path)?;
        let mut text = String::new();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text.len() as u64, size);
        Ok(text)
    }

    #[test]
    fn files_are_found_by_either_kind_of_name() {
        assert_eq!(Iso::open(Cursor::new(image())).unwrap().label(), "MY LABEL");
        assert_eq!(read(image(), "/boot/vmlinuz-6.1").unwrap(), "hello");
        assert_eq!(read(image(), "readme.txt").unwrap(), "hello");
        for path in ["boot", "boot/none", "readme.txt/x", "boot/../readme.txt"] {
            let error = read(image(), path).unwrap_err();
            assert!(matches!(error, IsoError::Missing { .. }), "{path}: {error}");
        }
    }

    #[test]
    fn an_image_of_another_program_is_read_with_and_without_long_names() {
        let folder = tempfile::tempdir().unwrap();
        let tree = folder.path().join("tree");
        fs::create_dir_all(tree.join("images/pxeboot")).unwrap();
        let kernel: Vec<u8> = (0..100_000_u32).flat_map(u32::to_le_bytes).collect();
        fs::write(tree.join("images/pxeboot/vmlinuz"), &kernel).unwrap();
        // More entries than fit a sector, and names longer than ISO 9660's own.
        for number in 0..200 {
            let name = format!("a-file-with-a-long-name-in-small-letters-{number}.rpm");
            fs::write(tree.join("images").join(name), number.to_string()).unwrap();
        }
        let make = |name: &str, more: &[&str]| {
            let path = folder.path().join(name);
            let mut command = Command::new("xorriso");
            command.args(["-as", "mkisofs", "-quiet", "-V", "Release 12 x86_64"]).args(more);
            let made = command.arg("-o").arg(&path).arg(&tree).output();
            let made = made.expect("Debian's xorriso is installed");
            assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
            fs::read(path).unwrap()
        };
        let named = make("named.iso", &["-R", "-J"]);
        for image in [&named, &make("plain.iso", &["--norock"])] {
            let mut iso = Iso::open(Cursor::new(image)).unwrap();
            assert_eq!(iso.label(), "Release 12 x86_64");
            let mut read = Vec::new();
            iso.file("images/pxeboot/vmlinuz").unwrap().0.read_to_end(&mut read).unwrap();
            assert!(read == kernel, "{} bytes instead of {}", read.len(), kernel.len());
        }
        let path = "images/a-file-with-a-long-name-in-small-letters-199.rpm";
        assert_eq!(read(named, path).unwrap(), "199");
    }

    #[test]
    fn what_is_no_image_or_is_cut_off_is_told() {
        assert!(matches!(Iso::open(Cursor::new(b"PK\x03\x04".to_vec())), Err(IsoError::NotAnImage)));
        assert!(matches!(Iso::open(Cursor::new(vec![0; 1 << 20])), Err(IsoError::NotAnImage)));
        let mut cut = image();
        cut.truncate(20 * 2048);
        assert!(matches!(read(cut, "readme.txt"), Err(IsoError::Damaged { sector: 20 })));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic(
            at in 0_usize..21 * 2048,
            bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 1..64),
        ) {
            let mut image = image();
            let end = (at + bytes.len()).min(image.len());
            image[at..end].copy_from_slice(&bytes[..end - at]);
            if let Ok(mut iso) = Iso::open(Cursor::new(image)) {
                for path in ["boot/vmlinuz-6.1", "readme.txt"] {
                    let _ = iso.file(path).map(|(mut file, _)| file.read_to_end(&mut Vec::new()));
                }
            }
        }
    }
}
