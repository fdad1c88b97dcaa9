//! Areas that the kernel swaps to: `/proc/swaps` and `swapoff(2)`.

use std::ffi::{CString, OsStr};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, openat2};

use super::{Acted, block, block_calls, mountinfo};
use crate::model::{BackingFile, DeviceNumber, Swap, SwapIdentity};

/// What kind of thing an area is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    /// A block device, whole or a partition: the kernel calls both so.
    Partition,
    File,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    path: Vec<u8>,
    kind: Kind,
    kibibytes: u64,
}

/// All areas, in the kernel's order. `proc` is where procfs is mounted. `may_look_up` is told each path
/// before it is looked up, which may hang with a file system on the way, and can refuse: then that area
/// is not known.
///
/// # Errors
/// When the list cannot be read, or is not as the kernel writes it.
pub fn list(proc: &Path, may_look_up: &mut dyn FnMut(&[u8]) -> bool) -> io::Result<Vec<Swap>> {
    let Some(bytes) = block::read_if_there(&proc.join("swaps"))? else {
        // A kernel without swap.
        return Ok(Vec::new());
    };
    let entries = parse(&bytes).map_err(|line| {
        io::Error::new(io::ErrorKind::InvalidData, format!("line {line} of /proc/swaps is not as documented"))
    })?;
    let identified = entries.into_iter().zip(0..).map(|(entry, place)| {
        let identity = may_look_up(&entry.path).then(|| identify(&entry)).flatten();
        Swap { identity: identity.unwrap_or(SwapIdentity::Unreachable(place)), path: entry.path }
    });
    Ok(identified.collect())
}

/// Parses the file; an error is the number of the line that is wrong, from 1. The path comes first,
/// with blanks, newlines and backslashes in octal (`swap_show` in `mm/swapfile.c`).
fn parse(bytes: &[u8]) -> Result<Vec<Entry>, usize> {
    let lines = bytes.split(|byte| *byte == b'\n').zip(1..).skip(1).filter(|(line, _)| !line.is_empty());
    lines.map(|(line, number)| parse_line(line).ok_or(number)).collect()
}

fn parse_line(line: &[u8]) -> Option<Entry> {
    let is_blank = |byte: &u8| matches!(byte, b' ' | b'\t');
    let mut fields = line.split(is_blank).filter(|field| !field.is_empty());
    let path = mountinfo::unescape(fields.next()?);
    let kind = match fields.next()? {
        b"partition" => Kind::Partition,
        b"file" => Kind::File,
        _ => return None,
    };
    let kibibytes = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    Some(Entry { path, kind, kibibytes })
}

/// Which area it is, when its path leads to it. The path is as the kernel sees the file from this
/// process's root. When the file is on a mount that is no more, or in another namespace, the same text
/// leads nowhere or to something else, and then the area is not known.
fn identify(entry: &Entry) -> Option<SwapIdentity> {
    let file = open(CWD, OsStr::from_bytes(&entry.path)).ok()?;
    match (entry.kind, identity(&file).ok()?) {
        (Kind::Partition, it @ SwapIdentity::Device(_)) => Some(it),
        // The area is a page smaller than the file at least, which holds its header (`swapon`). A
        // smaller file is another one.
        (Kind::File, it @ SwapIdentity::File(_)) => {
            let size = u64::try_from(fstat(&file).ok()?.st_size).ok()?;
            (size / 1024 > entry.kibibytes).then_some(it)
        }
        _ => None,
    }
}

fn open(directory: impl AsFd, path: &OsStr) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let how = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    Ok(openat2(directory, path, flags, Mode::empty(), how)?)
}

fn identity(file: impl AsFd) -> io::Result<SwapIdentity> {
    let status = fstat(file)?;
    let number = |device| DeviceNumber { major: rustix::fs::major(device), minor: rustix::fs::minor(device) };
    match FileType::from_raw_mode(status.st_mode) {
        FileType::BlockDevice => Ok(SwapIdentity::Device(number(status.st_rdev))),
        FileType::RegularFile => {
            Ok(SwapIdentity::File(BackingFile { device: number(status.st_dev), inode: status.st_ino }))
        }
        _ => Err(io::Error::new(io::ErrorKind::InvalidData, "neither a block device nor a file")),
    }
}

/// Stops swapping to exactly this area. `path` is where it was listed.
///
/// `swapoff(2)` wants a path. It is given one through the descriptor that the identity was read from,
/// so that nothing can take the place of the file in between. That the file is a swap area at all the
/// kernel checks itself: it compares what is behind the path, not the path.
///
/// # Errors
/// What `swapoff(2)` says, and `Unsupported` for an area that no path leads to.
pub fn off(proc: &Path, wanted: SwapIdentity, path: &[u8]) -> io::Result<Acted> {
    match wanted {
        SwapIdentity::Device(_) | SwapIdentity::File(_) => {}
        SwapIdentity::Unreachable(_) => {
            let cause = "no path leads to that swap file any more, and swapoff(2) takes nothing else; \
                         it ends with the file system it is on";
            return Err(io::Error::new(io::ErrorKind::Unsupported, cause));
        }
    }
    // Where it was is looked at first, so that nothing else's file system is waited for.
    let in_its_place = list(proc, &mut |listed| listed == path)?;
    let is_it = |swap: &Swap| swap.identity == wanted;
    let swap = match in_its_place.into_iter().find(is_it) {
        Some(swap) => swap,
        None => match list(proc, &mut |_| true)?.into_iter().find(is_it) {
            Some(swap) => swap,
            None => return Ok(Acted::Gone),
        },
    };
    let file = open(CWD, OsStr::from_bytes(&swap.path))?;
    if identity(&file)? != wanted {
        return Ok(Acted::Replaced);
    }
    off_by_descriptor(&file)
}

/// Stops swapping to whatever of these files there is below a directory, on its own file system, and
/// says how many that were.
///
/// For a file system that is mounted nowhere: the path of a swap file on it begins at the root of a
/// mount that is no more, or at the root of the host when it was recorded earlier, so each of a path's
/// ends is tried. That an end leads to some other file does no harm, since the kernel takes none but a
/// swap area, and any that is on this file system is what is looked for.
///
/// # Errors
/// What `swapoff(2)` says of a file that is a swap area.
pub fn off_below(directory: impl AsFd, paths: &[Vec<u8>]) -> io::Result<usize> {
    let mut ended = 0;
    for path in paths {
        let mut end = path.as_slice();
        while let Some(place) = end.iter().position(|byte| *byte == b'/') {
            end = &end[place + 1..];
            let Some(file) = file_below(&directory, OsStr::from_bytes(end)) else { continue };
            match off_by_descriptor(&file) {
                Ok(Acted::Done) => {
                    ended += 1;
                    break;
                }
                Ok(Acted::Gone | Acted::Replaced) => {}
                // swapoff(2) opens what it is given for writing first, which every swap area could be.
                Err(error) if is_not_writable(&error) => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(ended)
}

fn is_not_writable(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EROFS | libc::EACCES | libc::EPERM | libc::ETXTBSY))
}

fn file_below(directory: impl AsFd, path: &OsStr) -> Option<OwnedFd> {
    let how = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = openat2(directory, path, flags, Mode::empty(), how).ok()?;
    match identity(&file) {
        Ok(SwapIdentity::File(_)) => Some(file),
        Ok(SwapIdentity::Device(_) | SwapIdentity::Unreachable(_)) | Err(_) => None,
    }
}

fn off_by_descriptor(file: &OwnedFd) -> io::Result<Acted> {
    let path = CString::new(format!("/proc/thread-self/fd/{}", file.as_raw_fd()));
    match block_calls::swap_off(&path.expect("a number holds no NUL")) {
        Ok(()) => Ok(Acted::Done),
        // It is no swap area, any more or at all.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(Acted::Gone),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::MetadataExt;

    use super::super::fixture::Tree;
    use super::*;

    const HEADER: &[u8] = b"Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n";

    #[test]
    fn reads_the_list_as_the_kernel_writes_it() {
        // 6.18: a loop device, a file with a blank in its name, and a device whose node was removed.
        let mut text = HEADER.to_vec();
        text.extend_from_slice(
            b"/dev/loop0                              partition\t20476\t\t0\t\t-2\n\
              /srv/m/deep/sw\\040ap                     file\t\t8180\t\t12\t\t-3\n\
              /srv/node\\040(deleted)                   partition\t20476\t\t0\t\t-4\n",
        );
        let entry = |path: &[u8], kind, kibibytes| Entry { path: path.to_vec(), kind, kibibytes };
        assert_eq!(
            parse(&text),
            Ok(vec![
                entry(b"/dev/loop0", Kind::Partition, 20476),
                entry(b"/srv/m/deep/sw ap", Kind::File, 8180),
                entry(b"/srv/node (deleted)", Kind::Partition, 20476),
            ])
        );
    }

    #[test]
    fn a_path_longer_than_its_column_is_read_whole() {
        let path = format!("/{}", "x".repeat(80));
        let text = [HEADER, path.as_bytes(), b" file\t\t8180\t\t0\t\t-2\n"].concat();
        assert_eq!(parse(&text).map(|entries| entries[0].path.clone()), Ok(path.into_bytes()));
    }

    #[test]
    fn a_list_of_another_shape_is_refused_and_not_half_read() {
        assert_eq!(parse(HEADER), Ok(Vec::new()));
        assert_eq!(parse(b""), Ok(Vec::new()));
        assert_eq!(parse(&[HEADER, b"/dev/vda2 disk 1 0 -2\n"].concat()), Err(2));
        assert_eq!(parse(&[HEADER, b"/dev/vda2\n"].concat()), Err(2));
    }

    #[test]
    fn a_file_is_known_by_what_its_path_leads_to() {
        let tree = Tree::new()
            .file("swap", [0; 8192])
            .file("small", [0; 4096])
            .file("hangs", [0; 8192])
            .link("link", "swap");
        let line = |name: &str| format!("{}/{name} file\t\t4\t\t0\t\t-2\n", tree.path().display());
        let text = [line("swap"), line("small"), line("link"), line("absent"), line("hangs")].concat();
        fs::create_dir(tree.path().join("proc")).expect("fresh");
        fs::write(tree.path().join("proc/swaps"), [HEADER, text.as_bytes()].concat()).expect("fresh");
        let swaps = list(&tree.path().join("proc"), &mut |path| !path.ends_with(b"hangs"));
        let found: Vec<_> = swaps.expect("readable").iter().map(|swap| swap.identity).collect();
        let file = fs::metadata(tree.path().join("swap")).expect("there");
        let device =
            DeviceNumber { major: rustix::fs::major(file.dev()), minor: rustix::fs::minor(file.dev()) };
        assert_eq!(
            found,
            [
                SwapIdentity::File(BackingFile { device, inode: file.ino() }),
                // Too small to be the area that is listed under this path.
                SwapIdentity::Unreachable(1),
                // Never followed.
                SwapIdentity::Unreachable(2),
                SwapIdentity::Unreachable(3),
                // Not to be looked up.
                SwapIdentity::Unreachable(4),
            ]
        );
    }

    #[test]
    fn an_area_that_is_not_listed_is_gone() {
        let tree = Tree::new().file("swaps", HEADER);
        let device = SwapIdentity::Device(DeviceNumber { major: 7, minor: 3 });
        assert_eq!(off(tree.path(), device, b"/dev/loop3").expect("nothing to do"), Acted::Gone);
        let error = off(tree.path(), SwapIdentity::Unreachable(0), b"/swap").expect_err("no path");
        assert_eq!(error.kind(), io::ErrorKind::Unsupported);
    }

    #[test]
    fn a_kernel_without_swap_has_no_areas() {
        assert_eq!(list(Tree::new().path(), &mut |_| true).expect("none"), []);
    }
}
