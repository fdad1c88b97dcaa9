//! What a process holds: where it stands, its open files, what it has mapped.
//!
//! Files of the kernel's own (sockets, pipes, `anon_inode`s) lie on no mount and hold none, so they
//! are left out: they are most of what processes have open. What a thread holds that shares neither
//! files nor place with its process is not looked for.

use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};

use rustix::buffer::spare_capacity;
use rustix::fs::{
    AtFlags, FileType, Mode, OFlags, RawDir, Statx, StatxFlags, openat, readlinkat, readlinkat_raw, statx,
};

use super::processes::is_gone;
use crate::model::{DeviceNumber, FileHold, MountNamespace, Place, Process};

/// The mount namespace of the process whose folder this is; `None` when it may not be read.
pub(super) fn namespace(process: BorrowedFd<'_>) -> Option<MountNamespace> {
    // Reading the link opens nothing, so it pins nothing.
    let text = readlinkat(process, "ns/mnt", Vec::with_capacity(64)).ok()?;
    namespace_in(text.to_bytes())
}

/// `mnt:[INODE]`, as an nsfs file of a mount namespace shows itself.
fn namespace_in(text: &[u8]) -> Option<MountNamespace> {
    let inode = text.strip_prefix(b"mnt:[")?.strip_suffix(b"]")?;
    std::str::from_utf8(inode).ok()?.parse().ok().map(MountNamespace)
}

/// Reads all that a process holds into `process`. What cannot be read does not spare the rest; the
/// first such thing is told at the end.
pub(super) fn read(directory: BorrowedFd<'_>, process: &mut Process, buffer: &mut Vec<u8>) -> io::Result<()> {
    let mut failure = None;
    let mut keep = |result: io::Result<()>| {
        if let Err(error) = result {
            // That the process has ended is the better cause: then nothing was missed.
            let is_first = failure.is_none() || is_gone(&error);
            if is_first {
                failure = Some(error);
            }
        }
    };
    keep(read_file(directory, "cgroup", buffer).map(|()| process.unit = unit(buffer)));
    keep(place(directory, c"cwd").map(|found| process.current_directory = found));
    keep(place(directory, c"root").map(|found| process.root_directory = found));
    keep(place(directory, c"exe").map(|found| process.program = found));
    keep(read_files(directory, &mut process.files));
    keep(read_file(directory, "maps", buffer).map(|()| process.mapped = mapped(buffer)));
    failure.map_or(Ok(()), Err)
}

/// The path in version 2's hierarchy (`0::/…`), or in systemd's own one of version 1.
pub(super) fn unit(cgroup: &[u8]) -> String {
    let mut named = cgroup.split(|byte| *byte == b'\n').filter_map(|line| {
        let mut fields = line.splitn(3, |byte| *byte == b':').skip(1);
        Some((fields.next()?, fields.next()?))
    });
    let found = named.find(|(controllers, _)| controllers.is_empty());
    found.map(|(_, path)| hostler_protocol::text::printable(path)).unwrap_or_default()
}

/// Asks no file system for anything, so a stopped FUSE server does not hang it.
fn look(directory: impl AsFd, name: &CStr, flags: AtFlags) -> io::Result<Option<Statx>> {
    let wanted = StatxFlags::TYPE | StatxFlags::MNT_ID;
    let flags = flags | AtFlags::STATX_DONT_SYNC | AtFlags::NO_AUTOMOUNT;
    let status = match statx(&directory, name, flags, wanted) {
        // A file of a user's FUSE file system, of which root is told nothing: but for where it is, which is
        // told whoever wants nothing.
        Err(rustix::io::Errno::ACCESS) => statx(&directory, name, flags, StatxFlags::empty()),
        status => status,
    };
    match status {
        Ok(status) => Ok(Some(status)),
        // It leads nowhere: no program, closed meanwhile, or the process has ended.
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::SRCH) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn place_of(status: &Statx) -> Place {
    let device = DeviceNumber { major: status.stx_dev_major, minor: status.stx_dev_minor };
    Place { mount: status.stx_mnt_id, device }
}

/// The mount and file system behind one of `/proc`'s links.
fn place(directory: BorrowedFd<'_>, name: &CStr) -> io::Result<Option<Place>> {
    Ok(look(directory, name, AtFlags::empty())?.as_ref().map(place_of))
}

fn read_files(directory: BorrowedFd<'_>, files: &mut Vec<FileHold>) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let descriptors = openat(directory, "fd", flags, Mode::empty())?;
    let mut names = [MaybeUninit::uninit(); 4096];
    let mut names = RawDir::new(&descriptors, &mut names);
    while let Some(entry) = names.next() {
        let entry = entry?;
        let name = entry.file_name();
        let Some(descriptor) = name.to_str().ok().and_then(|name| name.parse().ok()) else { continue };
        // A path longer than the kernel's limit is none that it shows.
        let mut text = [MaybeUninit::uninit(); libc::PATH_MAX as usize];
        let text = match readlinkat_raw(&descriptors, name, &mut text) {
            Ok((text, _)) => &*text,
            Err(rustix::io::Errno::NOENT) => continue,
            // The path is longer than the kernel tells; where the file is can be told all the same.
            Err(rustix::io::Errno::NAMETOOLONG) => &[],
            Err(error) => return Err(error.into()),
        };
        let namespace = namespace_in(text);
        if namespace.is_none() && is_kernels_own(text) {
            continue;
        }
        let Some(status) = look(&descriptors, name, AtFlags::empty())? else { continue };
        let kind = FileType::from_raw_mode(u32::from(status.stx_mode));
        let node = DeviceNumber { major: status.stx_rdev_major, minor: status.stx_rdev_minor };
        files.push(FileHold {
            descriptor,
            place: place_of(&status),
            block_device: (kind == FileType::BlockDevice).then_some(node),
            // Every process has terminals or `/dev/null` open, and no `open_tree(2)` gives one.
            is_path: kind != FileType::CharacterDevice && is_path(directory, descriptors.as_fd(), name)?,
            namespace,
            text: text.to_vec(),
        });
    }
    Ok(())
}

/// Whether a link's text is what the kernel makes up for files that have no path (`dynamic_dname` and
/// `simple_dname` in `fs/d_path.c`). All other text begins with a slash.
fn is_kernels_own(text: &[u8]) -> bool {
    [b"socket:[".as_slice(), b"pipe:[", b"anon_inode:"].iter().any(|prefix| text.starts_with(prefix))
        || (!text.starts_with(b"/") && text.ends_with(b"]") && text.windows(2).any(|pair| pair == b":["))
}

/// Whether a file was opened with `O_PATH`. The link's own permissions show whether it may be read or
/// written through the descriptor (`tid_fd_update_inode` in `fs/proc/fd.c`); only one that shows
/// neither, which is rare, is worth opening `fdinfo` for.
fn is_path(process: BorrowedFd<'_>, descriptors: BorrowedFd<'_>, name: &CStr) -> io::Result<bool> {
    let Some(link) = look(descriptors, name, AtFlags::SYMLINK_NOFOLLOW)? else { return Ok(false) };
    if link.stx_mode & 0o700 != 0 {
        return Ok(false);
    }
    let mut buffer = Vec::new();
    let path = [b"fdinfo/", name.to_bytes()].concat();
    match read_file(process, path.as_slice(), &mut buffer) {
        Ok(()) => Ok(has_path_flag(&buffer)),
        Err(error) if is_gone(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The octal `flags` of `fdinfo`.
fn has_path_flag(fdinfo: &[u8]) -> bool {
    let mut lines = fdinfo.split(|byte| *byte == b'\n');
    let flags = lines
        .find_map(|line| line.strip_prefix(b"flags:"))
        .and_then(|flags| i32::from_str_radix(std::str::from_utf8(flags.trim_ascii()).ok()?, 8).ok());
    flags.is_some_and(|flags| flags & libc::O_PATH != 0)
}

/// The devices in the fourth column of `maps`, each once. What maps no file has device 0:0.
fn mapped(maps: &[u8]) -> Vec<DeviceNumber> {
    let mut found = Vec::new();
    // Lines of one file follow each other, and most are of none.
    let mut last: &[u8] = b"00:00";
    for line in maps.split(|byte| *byte == b'\n') {
        let Some(device) = line.split(|byte| *byte == b' ').nth(3) else { continue };
        if device == last || device == b"00:00" {
            continue;
        }
        last = device;
        found.extend(hexadecimal_device(device));
    }
    found.sort_unstable();
    found.dedup();
    found
}

fn hexadecimal_device(text: &[u8]) -> Option<DeviceNumber> {
    let (major, minor) = std::str::from_utf8(text).ok()?.split_once(':')?;
    let number = |digits| u32::from_str_radix(digits, 16).ok();
    Some(DeviceNumber { major: number(major)?, minor: number(minor)? })
}

/// Reads a file of the kernel's whole. Its buffer keeps its room.
fn read_file(
    directory: BorrowedFd<'_>,
    name: impl rustix::path::Arg,
    buffer: &mut Vec<u8>,
) -> io::Result<()> {
    const CHUNK: usize = 64 * 1024;
    let file = openat(directory, name, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
    buffer.clear();
    loop {
        buffer.reserve(CHUNK);
        if rustix::io::read(&file, spare_capacity(buffer))? == 0 {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture::device_number as number;
    use super::*;

    #[test]
    fn a_namespaces_file_shows_which() {
        assert_eq!(namespace_in(b"mnt:[4026531841]"), Some(MountNamespace(4_026_531_841)));
        assert_eq!(namespace_in(b"net:[4026531840]"), None);
        assert_eq!(namespace_in(b"/mnt:[4026531841]"), None);
    }

    #[test]
    fn only_what_has_no_path_is_the_kernels_own() {
        for text in ["socket:[7]", "pipe:[7]", "anon_inode:[eventpoll]", "anon_inode:inotify", "net:[7]"] {
            assert!(is_kernels_own(text.as_bytes()), "{text}");
        }
        for text in ["/socket:[7]", "/a/pipe:[7]", "/memfd:x (deleted)", "/", "", "unheard of"] {
            assert!(!is_kernels_own(text.as_bytes()), "{text}");
        }
    }

    #[test]
    fn flags_tell_a_path_from_an_open_file() {
        // `fdinfo` of 6.18: of `open(O_PATH)`, and of `open(O_RDONLY | O_CLOEXEC)`.
        assert!(has_path_flag(b"pos:\t0\nflags:\t012000000\nmnt_id:\t43\nino:\t2\n"));
        assert!(!has_path_flag(b"pos:\t0\nflags:\t02100000\nmnt_id:\t43\nino:\t2\n"));
        assert!(!has_path_flag(b"pos:\t0\n"));
    }

    #[test]
    fn each_device_that_files_are_mapped_of_is_told_once() {
        let maps = b"55d0c8a00000-55d0c8a02000 r--p 00000000 fe:00 131 /usr/bin/a b\n\
            55d0c8a02000-55d0c8a04000 r-xp 00002000 fe:00 131 /usr/bin/a b\n\
            55d0ca000000-55d0ca021000 rw-p 00000000 00:00 0 [heap]\n\
            7f0000000000-7f0000001000 r--s 00000000 103:0002 12 /mnt/x (deleted)\n\
            7f0000001000-7f0000002000 r--p 00000000 fe:00 140 /lib/y\n\
            7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0 [stack]\n";
        assert_eq!(mapped(maps), [number(0xfe, 0), number(0x103, 2)]);
        assert_eq!(mapped(b""), []);
    }

    #[test]
    fn a_process_belongs_to_a_unit() {
        let hybrid = b"2:pids:/x\n1:name=systemd:/system.slice/a.service\n0::/system.slice/a:b.service\n";
        assert_eq!(unit(hybrid), "/system.slice/a:b.service");
        assert_eq!(unit(b"1:cpu:/\n"), "");
    }
}
