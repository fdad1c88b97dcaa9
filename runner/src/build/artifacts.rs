//! What comes out of a throwaway machine: a tar archive on a disk of its own.
//!
//! No file system of a guest's is ever read by the host. The archive was written by whoever had root in the
//! guest: only the files that were asked for are taken from it, and only plain ones, into names that the host
//! chose. Deliberately absent: the guest's side, which is in `guest/`.

use std::fs::File;
use std::io::{self, BufReader, Read, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use super::workspace::WorkspaceError;
use crate::stop::Stop;

/// The largest file that is taken, in bytes; a hole takes time to read too.
const LARGEST_FILE: u64 = 1 << 40;
/// The most entries that are looked at.
const MOST_ENTRIES: usize = 100_000;
/// The longest name, or list of a file's attributes, in bytes. They are read into memory.
const LONGEST_HEADER: u64 = 1 << 20;
/// What is read at a time; a part of a file that has nothing but zeros this long becomes a hole.
const BLOCK: usize = 64 * 1024;

/// Takes the files called `wanted` out of the archive at the start of the disk `results`, into the folder
/// `into`, which has none of them. Their paths, in the order of `wanted`.
///
/// # Errors
/// See [`WorkspaceError`].
pub(super) fn take(
    results: &Path,
    wanted: &[String],
    into: &Path,
    stop: &Stop,
) -> Result<Vec<PathBuf>, WorkspaceError> {
    let unreadable = |source| WorkspaceError::Read { path: results.to_owned(), source };
    let mut file = File::open(results).map_err(unreadable)?;
    walk(&mut file, stop)?;
    file.rewind().map_err(unreadable)?;
    // Also what is passed over takes time.
    let input = BufReader::with_capacity(1 << 20, stop.reading(file));
    let mut archive = tar::Archive::new(input);
    let mut taken = Vec::new();
    for entry in archive.entries().map_err(WorkspaceError::Archive)?.take(MOST_ENTRIES) {
        let mut entry = entry.map_err(WorkspaceError::Archive)?;
        let path = entry.path_bytes().into_owned();
        let Some(name) = wanted.iter().find(|name| name.as_bytes() == path) else {
            continue;
        };
        let kind = entry.header().entry_type();
        if !(kind.is_file() || kind.is_gnu_sparse()) || taken.contains(&name) {
            continue;
        }
        if entry.size() > LARGEST_FILE {
            return Err(WorkspaceError::TooLarge { name: name.clone() });
        }
        copy_with_holes(&mut entry, &into.join(name), stop)?;
        taken.push(name);
    }
    match wanted.iter().find(|name| !taken.contains(name)) {
        Some(name) => Err(WorkspaceError::Missing { name: name.clone() }),
        None => Ok(wanted.iter().map(|name| into.join(name)).collect()),
    }
}

/// Goes over the headers of an archive, and says where its last file ends. What follows a header, and what a
/// name or attribute may take, is its writer's word: no reader is to believe it before this has.
fn walk(file: &mut File, stop: &Stop) -> Result<u64, WorkspaceError> {
    let damaged = |text: &str| WorkspaceError::Archive(io::Error::new(io::ErrorKind::InvalidData, text));
    let mut block = [0; 512];
    let (mut at, mut end) = (0, 0);
    // A file of 8 GiB or more has its size only in the extended header before its own.
    let mut size_before = None;
    loop {
        stop.check().map_err(WorkspaceError::Stopped)?;
        file.seek(SeekFrom::Start(at)).map_err(WorkspaceError::Archive)?;
        let length = fill(file, &mut block).map_err(WorkspaceError::Archive)?;
        if length < block.len() || block.iter().all(|&byte| byte == 0) {
            return Ok(end);
        }
        let header = tar::Header::from_byte_slice(&block);
        let sum: u32 = block
            .iter()
            .enumerate()
            .map(|(at, &byte)| u32::from(if (148..156).contains(&at) { b' ' } else { byte }))
            .sum();
        if !header.cksum().is_ok_and(|said| said == sum) {
            return Err(damaged("something in it is no header"));
        }
        let kind = header.entry_type();
        let size = match size_before.take() {
            Some(size) => size,
            None => header.entry_size().map_err(WorkspaceError::Archive)?,
        };
        at += 512;
        if kind.is_gnu_longname()
            || kind.is_gnu_longlink()
            || kind.is_pax_global_extensions()
            || kind.is_pax_local_extensions()
        {
            if size > LONGEST_HEADER {
                return Err(damaged("a name or a list of attributes in it is too long"));
            }
            let mut text = vec![0; usize::try_from(size).unwrap_or_default()];
            if fill(file, &mut text).map_err(WorkspaceError::Archive)? < text.len() {
                return Err(WorkspaceError::Archive(io::ErrorKind::UnexpectedEof.into()));
            }
            if kind.is_pax_local_extensions() {
                size_before = size_in(&text);
            }
        }
        if kind.is_gnu_sparse() {
            // Further blocks say where its parts are, each whether another follows.
            let mut follows = header.as_gnu().is_some_and(tar::GnuHeader::is_extended);
            let mut parts = 0;
            while follows {
                parts += 1;
                if parts > MOST_ENTRIES || fill(file, &mut block).map_err(WorkspaceError::Archive)? < 512 {
                    return Err(damaged("a file in it has too many parts"));
                }
                at += 512;
                follows = block[504] == 1;
            }
        }
        at = size
            .checked_next_multiple_of(512)
            .and_then(|size| at.checked_add(size))
            .ok_or_else(|| damaged("a size in it is none"))?;
        end = at;
    }
}

/// The size in an extended header: lines of `LENGTH KEY=VALUE`, of which the last one of a key counts.
fn size_in(text: &[u8]) -> Option<u64> {
    let mut found = None;
    let mut left = text;
    while let Some(space) = left.iter().position(|&byte| byte == b' ') {
        let length: usize = std::str::from_utf8(&left[..space]).ok()?.parse().ok()?;
        let record = left.get(space + 1..length.checked_sub(1)?)?;
        if let Some(size) = record.strip_prefix(b"size=") {
            found = Some(std::str::from_utf8(size).ok()?.parse().ok()?);
        }
        left = left.get(length..)?;
    }
    found
}

/// Cuts the archive at the start of a disk off at its end.
///
/// # Errors
/// It is no archive, or cannot be cut; or the build is to stop.
pub(super) fn cut(disk: &Path, stop: &Stop) -> Result<(), WorkspaceError> {
    let unreadable = |source| WorkspaceError::Read { path: disk.to_owned(), source };
    let mut file = File::options().read(true).write(true).open(disk).map_err(unreadable)?;
    let end = walk(&mut file, stop)?;
    let size = file.metadata().map_err(unreadable)?.len();
    if end == 0 || end > size {
        return Err(WorkspaceError::Archive(io::ErrorKind::UnexpectedEof.into()));
    }
    // Two blocks of zeros end an archive, and tar writes twenty at a time.
    let end = (end + 1024).next_multiple_of(20 * 512).min(size);
    file.set_len(end).map_err(|source| WorkspaceError::Write { path: disk.to_owned(), source })
}

fn copy_with_holes(input: &mut dyn Read, target: &Path, stop: &Stop) -> Result<(), WorkspaceError> {
    let failed = |source| WorkspaceError::Write { path: target.to_owned(), source };
    let mut output = File::create_new(target).map_err(failed)?;
    let mut buffer = vec![0; BLOCK];
    let mut size = 0;
    loop {
        stop.check().map_err(WorkspaceError::Stopped)?;
        let length = fill(input, &mut buffer).map_err(WorkspaceError::Archive)?;
        if length == 0 {
            break;
        }
        size += length as u64;
        if buffer[..length].iter().all(|&byte| byte == 0) {
            output.seek(SeekFrom::Start(size)).map_err(failed)?;
        } else {
            output.write_all(&buffer[..length]).map_err(failed)?;
        }
    }
    output.set_len(size).map_err(failed)
}

/// Reads until the buffer is full or the input is at its end.
fn fill(input: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match input.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(length) => filled += length,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt as _;

    use super::*;
    use crate::stop::Stopped;

    fn names(list: &[&str]) -> Vec<String> {
        list.iter().map(|&name| name.to_owned()).collect()
    }

    #[test]
    fn taking_a_large_file_does_not_outlast_the_builds_time() {
        // Zeros that take seconds.
        const LARGE: u64 = 6 << 30;
        let folder = tempfile::tempdir().unwrap();
        // One that nobody wants lies before the one that is.
        let results = folder.path().join("results");
        let mut file = File::create(&results).unwrap();
        for (name, size) in [("large", LARGE), ("small", 0)] {
            let mut header = tar::Header::new_gnu();
            header.set_path(name).unwrap();
            header.set_size(size);
            header.set_mode(0o644);
            header.set_cksum();
            file.write_all(header.as_bytes()).unwrap();
            let end = file.stream_position().unwrap() + size;
            file.seek(SeekFrom::Start(end)).unwrap();
        }
        file.set_len(LARGE + 4096).unwrap();
        let into = folder.path().join("into");
        fs::create_dir(&into).unwrap();
        let when = std::time::Instant::now() + std::time::Duration::from_millis(50);
        let stop = Stop::default().at(when);
        let error = take(&results, &names(&["small"]), &into, &stop).unwrap_err();
        assert_eq!(Stopped::cause_of(&error), Some(Stopped::Late), "{error}");
        assert!(when.elapsed() < std::time::Duration::from_secs(1), "{:?}", when.elapsed());
    }

    #[test]
    fn only_what_was_asked_for_is_taken_whatever_else_an_archive_holds() {
        let folder = tempfile::tempdir().unwrap();
        let mut builder = tar::Builder::new(Vec::new());
        let mut add = |path: &str, kind, link: &str, text: &[u8]| {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_size(text.len() as u64);
            header.as_old_mut().name[..path.len()].copy_from_slice(path.as_bytes());
            header.as_old_mut().linkname[..link.len()].copy_from_slice(link.as_bytes());
            header.set_cksum();
            builder.append(&header, text).unwrap();
        };
        add("../evil", tar::EntryType::Regular, "", b"x");
        add("a.img", tar::EntryType::Symlink, "/etc/shadow", b"");
        add("a.img", tar::EntryType::Regular, "", b"first");
        add("a.img", tar::EntryType::Regular, "", b"second");
        add("/abs", tar::EntryType::Regular, "", b"x");
        let archive = folder.path().join("results");
        let mut bytes = builder.into_inner().unwrap();
        // A disk goes on after the archive's end.
        bytes.extend([0; 4096]);
        bytes.extend([0xff; 4096]);
        fs::write(&archive, bytes).unwrap();
        let into = folder.path().join("into");
        fs::create_dir(&into).unwrap();
        let taken = take(&archive, &names(&["a.img"]), &into, &Stop::default()).unwrap();
        assert_eq!(fs::read(&taken[0]).unwrap(), b"first");
        assert_eq!(fs::read_dir(&into).unwrap().count(), 1);
        let error = take(&archive, &names(&["b.img"]), &into, &Stop::default()).unwrap_err();
        assert_eq!(error.to_string(), "the guest handed over no file b.img");
    }

    #[test]
    fn an_archive_is_cut_where_it_ends() {
        let folder = tempfile::tempdir().unwrap();
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        header.set_size(700);
        builder.append_data(&mut header, "a", &[1; 700][..]).unwrap();
        let bytes = builder.into_inner().unwrap();
        let disk = folder.path().join("disk");
        fs::write(&disk, &bytes).unwrap();
        File::options().write(true).open(&disk).unwrap().set_len(1 << 20).unwrap();
        cut(&disk, &Stop::default()).unwrap();
        let left = fs::read(&disk).unwrap();
        assert_eq!(left.len(), 10_240);
        assert!(left.starts_with(&bytes));
        fs::write(&disk, [0; 4096]).unwrap();
        assert!(cut(&disk, &Stop::default()).is_err(), "an empty disk");
    }

    #[test]
    fn zeros_become_holes() {
        let folder = tempfile::tempdir().unwrap();
        let target = folder.path().join("sparse");
        let mut input = io::repeat(0).take(8 << 20).chain(&b"end"[..]);
        copy_with_holes(&mut input, &target, &Stop::default()).unwrap();
        let data = fs::metadata(&target).unwrap();
        assert_eq!(data.len(), (8 << 20) + 3);
        assert!(data.blocks() * 512 < 1 << 20, "{} blocks", data.blocks());
    }

    #[test]
    fn a_disk_without_an_archive_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let results = folder.path().join("results");
        fs::write(&results, [0x55; 4096]).unwrap();
        let error = take(&results, &names(&["a"]), folder.path(), &Stop::default()).unwrap_err();
        assert!(matches!(error, WorkspaceError::Archive(_)), "{error}");
    }

    fn header(kind: tar::EntryType, name: &str, size: u64) -> [u8; 512] {
        let mut header = tar::Header::new_ustar();
        header.set_path(name).unwrap();
        header.set_entry_type(kind);
        header.set_size(size);
        header.set_mode(0o644);
        header.set_cksum();
        *header.as_bytes()
    }

    fn disk(place: &Path, parts: &[(u64, &[u8])], size: u64) -> PathBuf {
        let path = place.join("disk");
        let mut file = File::create(&path).unwrap();
        for (at, bytes) in parts {
            file.seek(SeekFrom::Start(*at)).unwrap();
            file.write_all(bytes).unwrap();
        }
        file.set_len(size).unwrap();
        path
    }

    #[test]
    fn a_file_whose_size_only_the_extended_header_tells_is_not_cut_off() {
        let place = tempfile::tempdir().unwrap();
        let large = 9_u64 << 30;
        let record = format!("19 size={large}\n");
        let mut extended = record.clone().into_bytes();
        extended.resize(512, 0);
        // As tar writes one: the header itself says 0, and the file's first block may be all zeros.
        let path = disk(
            place.path(),
            &[
                (0, &header(tar::EntryType::XHeader, "x", record.len() as u64)),
                (512, &extended),
                (1024, &header(tar::EntryType::Regular, "swap", 0)),
                (1536 + large, &header(tar::EntryType::Regular, "last", 3)),
                (2048 + large, b"end"),
            ],
            large + (1 << 20),
        );
        cut(&path, &Stop::default()).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().len(), (2560 + large + 1024).next_multiple_of(20 * 512));
    }

    #[test]
    fn a_name_of_many_gigabytes_is_refused_unread() {
        let place = tempfile::tempdir().unwrap();
        for kind in [tar::EntryType::XHeader, tar::EntryType::GNULongName, tar::EntryType::GNULongLink] {
            let path = disk(place.path(), &[(0, &header(kind, "x", 7 << 30))], 8 << 30);
            let wanted = ["file".to_owned()];
            let refused = take(&path, &wanted, place.path(), &Stop::default()).unwrap_err();
            let cause = std::error::Error::source(&refused).map(ToString::to_string).unwrap_or_default();
            assert!(cause.contains("too long"), "{refused}: {cause}");
        }
    }
}
