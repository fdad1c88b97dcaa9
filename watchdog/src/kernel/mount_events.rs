//! Which mounts come and go in the own namespace, as the kernel tells.
//!
//! fanotify tells each by its unique number, and who did it (Linux 6.14). Before, mountinfo polls as
//! changed, which tells only that something did. Nothing is decided here, and nothing read besides.

use std::fs::File;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::sys::epoll::EpollFlags;
use rustix::fs::{Mode, OFlags, open};

use super::namespace_calls;

/// What became of a mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It is mounted now.
    Attached,
    /// It is not any more. A mount that is gone can be asked for nothing.
    Detached,
    /// It is mounted elsewhere than before.
    Moved,
}

/// Something happened to the mounts.
#[derive(Debug)]
pub enum MountEvent {
    /// To one of them.
    One {
        /// The number that is never given again.
        number: u64,
        /// What became of it.
        change: Change,
        /// The process that did it, as far as it is in the daemon's own process namespace or below; 0
        /// for any other. It may be gone.
        pid: u32,
        /// The same, held so that the number stays its own; absent when it is gone.
        process: Option<OwnedFd>,
    },
    /// It is not known which, or more than could be told: all are to be looked at.
    Any,
}

/// Tells what happens to the mounts of the own namespace.
#[derive(Debug)]
pub enum MountEvents {
    /// One by one.
    Told(OwnedFd),
    /// Only that it did. Of the own namespace, in which the daemon lives anyway: this pins nothing.
    Noticed(File),
}

impl MountEvents {
    /// Of the own namespace, beginning with what happens from now on.
    ///
    /// # Errors
    /// When neither way is to be had.
    pub fn start() -> io::Result<Self> {
        let own = open("/proc/thread-self/ns/mnt", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        match Self::of(own) {
            // Unknown to this kernel, or built without it; also where a service's system call filter
            // forbids it, it is not missed.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS | libc::EPERM)) => {
                Self::start_noticing()
            }
            result => result,
        }
    }

    /// Of any namespace, one by one (Linux 6.14). It may be closed afterwards, and ends when it would.
    ///
    /// # Errors
    /// `EINVAL` on older kernels.
    pub fn of(namespace: impl AsFd) -> io::Result<Self> {
        namespace_calls::watch_mounts(namespace).map(Self::Told)
    }

    /// The way of older kernels.
    ///
    /// # Errors
    /// What opening mountinfo says.
    pub fn start_noticing() -> io::Result<Self> {
        Ok(Self::Noticed(File::open("/proc/thread-self/mountinfo")?))
    }

    /// What the descriptor is to be polled for. What only notices is to be polled once for each change:
    /// with `epoll(7)` that is so by itself, as polling takes the change.
    #[must_use]
    pub fn flags(&self) -> EpollFlags {
        match self {
            Self::Told(_) => EpollFlags::EPOLLIN,
            Self::Noticed(_) => EpollFlags::EPOLLPRI,
        }
    }

    /// All that waits. Never blocks. To be called when polling says that there is something.
    ///
    /// # Errors
    /// What `read(2)` says.
    pub fn read_events(&self) -> io::Result<Vec<MountEvent>> {
        let group = match self {
            Self::Told(group) => group,
            Self::Noticed(_) => return Ok(vec![MountEvent::Any]),
        };
        let mut events = Vec::new();
        let mut buffer = [0u8; 16 * 1024];
        loop {
            match rustix::io::read(group, &mut buffer) {
                Ok(0) | Err(rustix::io::Errno::AGAIN) => return Ok(events),
                Ok(length) => events.extend(parse(&buffer[..length]).into_iter().map(Told::into_event)),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for MountEvents {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Told(group) => group.as_fd(),
            Self::Noticed(table) => table.as_fd(),
        }
    }
}

/// An event as the kernel wrote it, its descriptor not yet taken over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Told {
    mount: Option<(u64, Change)>,
    pid: u32,
    pidfd: i32,
}

impl Told {
    fn into_event(self) -> MountEvent {
        let process = namespace_calls::from_event(self.pidfd);
        match self.mount {
            Some((number, change)) => MountEvent::One { number, change, pid: self.pid, process },
            None => MountEvent::Any,
        }
    }
}

/// `FAN_MNT_ATTACH` and `FAN_MNT_DETACH`, newer than the libc crate.
const ATTACH: u64 = 0x0100_0000;
const DETACH: u64 = 0x0200_0000;
/// `FAN_EVENT_INFO_TYPE_MNT`, and where its number stands.
const INFO_MOUNT: u8 = 7;
const INFO_MOUNT_NUMBER: usize = 8;

/// Pure: the events in a buffer, as `fanotify(7)` lays them out. What is not understood, such as an event
/// of overflow, is one that tells nothing: then everything has to be looked at.
fn parse(bytes: &[u8]) -> Vec<Told> {
    const HEADER: usize = size_of::<libc::fanotify_event_metadata>();
    let mut events = Vec::new();
    let mut rest = bytes;
    while !rest.is_empty() {
        let length = long::<4>(rest, 0).map(u32::from_ne_bytes).unwrap_or(0) as usize;
        let (Some(event), true) = (rest.get(..length), length >= HEADER) else {
            events.push(Told { mount: None, pid: 0, pidfd: -1 });
            return events;
        };
        rest = &rest[length..];
        events.push(parse_event(event));
    }
    events
}

fn parse_event(event: &[u8]) -> Told {
    type Header = libc::fanotify_event_metadata;
    let mask = long(event, offset_of!(Header, mask)).map(u64::from_ne_bytes).unwrap_or(0);
    let pid = long(event, offset_of!(Header, pid)).map(i32::from_ne_bytes).unwrap_or(0);
    let begin = long(event, offset_of!(Header, metadata_len)).map(u16::from_ne_bytes).unwrap_or(u16::MAX);
    let change = match (mask & ATTACH != 0, mask & DETACH != 0) {
        (true, false) => Some(Change::Attached),
        (false, true) => Some(Change::Detached),
        (true, true) => Some(Change::Moved),
        (false, false) => None,
    };
    let mut told = Told { mount: None, pid: pid.max(0).unsigned_abs(), pidfd: -1 };
    // Each piece of information has a kind, and its length with that.
    let mut infos = event.get(usize::from(begin)..).unwrap_or_default();
    while let Some(header) = infos.get(..4) {
        let length = usize::from(u16::from_ne_bytes([header[2], header[3]]));
        let Some(info) = infos.get(..length).filter(|info| info.len() >= 4) else { break };
        match header[0] {
            libc::FAN_EVENT_INFO_TYPE_PIDFD => {
                told.pidfd = long(info, 4).map(i32::from_ne_bytes).unwrap_or(-1);
            }
            INFO_MOUNT => {
                let number = long(info, INFO_MOUNT_NUMBER).map(u64::from_ne_bytes);
                told.mount = number.zip(change);
            }
            _ => {}
        }
        infos = &infos[length..];
    }
    told
}

fn long<const LENGTH: usize>(bytes: &[u8], offset: usize) -> Option<[u8; LENGTH]> {
    bytes.get(offset..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Linux 6.18 wrote it for a mount that process 5078 made.
    fn event(mask: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(48u32.to_ne_bytes());
        bytes.extend([3, 0]);
        bytes.extend(24u16.to_ne_bytes());
        bytes.extend(mask.to_ne_bytes());
        bytes.extend((-1i32).to_ne_bytes());
        bytes.extend(5078i32.to_ne_bytes());
        bytes.extend([4, 0]);
        bytes.extend(8u16.to_ne_bytes());
        bytes.extend(9i32.to_ne_bytes());
        bytes.extend([7, 0]);
        bytes.extend(16u16.to_ne_bytes());
        bytes.extend([0; 4]);
        bytes.extend(2_147_484_413u64.to_ne_bytes());
        bytes
    }

    fn told(mount: Option<(u64, Change)>) -> Told {
        Told { mount, pid: 5078, pidfd: 9 }
    }

    #[test]
    fn reads_events_as_the_kernel_writes_them() {
        let mut bytes = event(ATTACH);
        bytes.extend(event(ATTACH | DETACH));
        bytes.extend(event(DETACH));
        assert_eq!(
            parse(&bytes),
            [Change::Attached, Change::Moved, Change::Detached]
                .map(|change| told(Some((2_147_484_413, change))))
        );
    }

    #[test]
    fn what_tells_no_mount_is_about_any() {
        // FAN_Q_OVERFLOW, without any information.
        let mut bytes = event(0x4000)[..24].to_vec();
        bytes[..4].copy_from_slice(&24u32.to_ne_bytes());
        assert_eq!(parse(&bytes), [Told { mount: None, pid: 5078, pidfd: -1 }]);
        assert_eq!(parse(&event(0x4000)), [told(None)]);
        assert_eq!(parse(&[1, 2, 3]), [Told { mount: None, pid: 0, pidfd: -1 }]);
        assert_eq!(parse(&event(ATTACH)[..40]), [Told { mount: None, pid: 0, pidfd: -1 }]);
        assert_eq!(parse(&[]), []);
    }

    proptest::proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..200)) {
            let _ = parse(&bytes);
        }
    }
}
