//! Looks at a descriptor that a client passed to its reader.
//!
//! A client can pass anything, and looking at it, or closing it, can hang for as long as its file system
//! likes. So it is fetched from the reader into this process only, and closed before the answer is given:
//! the daemon never has it. What is looked at is this process's own copy, so that a reader that somebody
//! took over cannot exchange it meanwhile.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;

use hostler_protocol::text::{printable, shortened};
use rustix::fs::{Mode, OFlags, open};
use rustix::process::{PidfdGetfdFlags, pidfd_getfd};

use crate::kernel::{calls, directories, loops, processes, signals};
use crate::model::{Proof, ProvenDirectory, ProvenLoop, ProvenProcess, Wanted};

/// How much of a directory's path is kept, which is for people only: it comes back with each look.
pub(super) const PATH_LIMIT: usize = 512;

/// What descriptor `number` of the process of `reader` is of; for a directory without a file handle also
/// one by which it can be kept, whose closing does not hang.
pub(super) fn examine(
    reader: impl AsFd,
    number: i32,
    wanted: Wanted,
) -> io::Result<(Proof, Option<OwnedFd>)> {
    let passed = match pidfd_getfd(reader, number, PidfdGetfdFlags::empty()) {
        Ok(passed) => passed,
        Err(rustix::io::Errno::SRCH | rustix::io::Errno::BADF) => {
            return Ok((Proof::None("the connection was closed meanwhile".to_owned()), None));
        }
        Err(error) => return Err(error.into()),
    };
    match wanted {
        Wanted::Process => Ok((process(&passed)?, None)),
        Wanted::Loop => Ok((loop_device(&passed)?, None)),
        Wanted::Directory => directory(&passed),
    }
}

fn none(why: impl Into<String>) -> Proof {
    Proof::None(why.into())
}

fn process(pidfd: &OwnedFd) -> io::Result<Proof> {
    let process = match signals::process_of(pidfd) {
        Ok(Some(process)) => process,
        Ok(None) => return Ok(none("that process has ended")),
        Err(error) => return Ok(none(error.to_string())),
    };
    let user = match processes::real_user(process.pid) {
        Ok(user) => user,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(none("that process has ended")),
        Err(error) => return Err(error),
    };
    // Read before the check that it is still the same process, so that it is this one's.
    if signals::process_of(pidfd)? == Some(process) {
        Ok(Proof::Process(ProvenProcess { process, user }))
    } else {
        Ok(none("that process has ended"))
    }
}

fn loop_device(device: &OwnedFd) -> io::Result<Proof> {
    let Some(number) = loops::is_loop_device(device)? else {
        return Ok(none("that descriptor is of no loop device"));
    };
    let is_writable = directories::is_writable(device)?;
    if !is_writable {
        return Ok(none(format!("/dev/loop{number} must be opened for writing to prove that it is yours")));
    }
    Ok(match loops::attachment(device, number)? {
        Some(identity) => Proof::Loop(ProvenLoop { identity, is_writable }),
        None => none(format!("/dev/loop{number} is not bound")),
    })
}

fn directory(directory: &OwnedFd) -> io::Result<(Proof, Option<OwnedFd>)> {
    let identity = match directories::identity(directory) {
        Ok(identity) => identity,
        Err(error) => return Ok((none(error.to_string()), None)),
    };
    let path = directories::path(directory)?;
    let handle = calls::file_handle(directory).ok();
    let kept = match handle {
        Some(_) => None,
        None => {
            let own = format!("/proc/self/fd/{}", directory.as_raw_fd());
            Some(open(own, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
        }
    };
    let proven = ProvenDirectory {
        directory: identity,
        owner: directories::owner(directory)?,
        path: shortened(&printable(path.as_os_str().as_encoded_bytes()), PATH_LIMIT),
        is_everybodys: directories::is_everybodys(directory)?,
        is_root: path == Path::new("/"),
        handle,
        mount: directories::mount_of(directory).ok(),
    };
    Ok((Proof::Directory(proven), kept))
}
