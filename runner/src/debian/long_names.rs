//! Refuses what in a package's tar archive would have its reader take any amount of memory.
//!
//! A tar archive may name a file in an entry of its own in front of it, which readers take into memory as a whole;
//! compressed, gigabytes of that are small. This looks at the headers that pass by.

use std::io::{self, Read};

use tar::Header;

const BLOCK: usize = 512;

/// Generous for the longest name or target that Linux knows, 4096 bytes.
const LONGEST: u64 = 64 << 10;

/// A tar archive on its way to its reader.
pub(super) struct LongNames<R> {
    from: R,
    header: [u8; BLOCK],
    /// Bytes of the header that have come.
    filled: usize,
    /// Bytes until the next header.
    left: u64,
}

impl<R> LongNames<R> {
    pub(super) fn new(from: R) -> Self {
        Self { from, header: [0; BLOCK], filled: 0, left: 0 }
    }

    fn pass(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let skipped = bytes.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
            self.left -= skipped as u64;
            bytes = &bytes[skipped..];
            let taken = bytes.len().min(BLOCK - self.filled);
            self.header[self.filled..self.filled + taken].copy_from_slice(&bytes[..taken]);
            self.filled += taken;
            bytes = &bytes[taken..];
            if self.filled == BLOCK {
                self.filled = 0;
                self.left = following(&self.header)?;
            }
        }
        Ok(())
    }
}

/// Bytes between this header and the next one.
fn following(header: &[u8; BLOCK]) -> io::Result<u64> {
    if header.iter().all(|byte| *byte == 0) {
        return Ok(0);
    }
    let header = Header::from_byte_slice(header);
    let (kind, size) = (header.entry_type(), header.entry_size()?);
    // dpkg knows neither, and both would say something else about where the next header is.
    if kind.is_pax_local_extensions() || kind.is_pax_global_extensions() || kind.is_gnu_sparse() {
        return Err(wrong("it has a kind of entry that no package has"));
    }
    if (kind.is_gnu_longname() || kind.is_gnu_longlink()) && size > LONGEST {
        return Err(wrong("it has a name that is longer than any file's"));
    }
    size.checked_next_multiple_of(BLOCK as u64).ok_or_else(|| wrong("it has an entry of an impossible size"))
}

fn wrong(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

impl<R: Read> Read for LongNames<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.from.read(buffer)?;
        self.pass(&buffer[..count])?;
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use tar::EntryType;

    use super::*;

    fn entry(builder: &mut tar::Builder<Vec<u8>>, kind: EntryType, content: impl Read, size: u64) {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_path("x").expect("short");
        header.set_cksum();
        builder.append(&header, content).expect("memory");
    }

    fn paths(archive: &[u8]) -> io::Result<Vec<usize>> {
        let mut archive = tar::Archive::new(LongNames::new(archive));
        archive.entries()?.map(|entry| Ok(entry?.path_bytes().len())).collect()
    }

    #[test]
    fn a_name_is_as_long_as_names_are() {
        let mut builder = tar::Builder::new(Vec::new());
        entry(&mut builder, EntryType::Regular, &b"content"[..], 7);
        let long = "a/".repeat(2000);
        let mut empty = Header::new_gnu();
        empty.set_size(0);
        builder.append_data(&mut empty, &long, io::empty()).expect("memory");
        entry(&mut builder, EntryType::Regular, io::repeat(1).take(100_000), 100_000);
        assert_eq!(paths(&builder.into_inner().expect("finished")).expect("valid"), [1, 4000, 1]);
        for kind in [EntryType::GNULongName, EntryType::GNULongLink] {
            let mut builder = tar::Builder::new(Vec::new());
            entry(&mut builder, EntryType::Regular, &b"content"[..], 7);
            entry(&mut builder, kind, io::repeat(b'a').take(LONGEST + 1), LONGEST + 1);
            entry(&mut builder, EntryType::Regular, io::empty(), 0);
            let error = paths(&builder.into_inner().expect("finished")).expect_err("too long");
            assert!(error.to_string().contains("longer than any file's"), "{error}");
        }
        for kind in [EntryType::XHeader, EntryType::XGlobalHeader, EntryType::GNUSparse] {
            let mut builder = tar::Builder::new(Vec::new());
            entry(&mut builder, kind, &b"11 size=9\n"[..], 10);
            let error = paths(&builder.into_inner().expect("finished")).expect_err("unknown");
            assert!(error.to_string().contains("no package has"), "{error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn nothing_panics_and_nothing_is_changed(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..3000)) {
            let mut read = Vec::new();
            if LongNames::new(bytes.as_slice()).read_to_end(&mut read).is_ok() {
                proptest::prop_assert_eq!(read, bytes);
            }
        }
    }
}
