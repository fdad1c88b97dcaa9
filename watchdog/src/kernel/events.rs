//! What the kernel tells without being asked: one thread that sleeps in `epoll_wait(2)`.
//!
//! It watches owners' pidfds, control groups' event files, the host's mount table, and the uevents
//! of loop devices, and passes on only *that* something happened. It decides nothing and reads no
//! details: what is lost (a netlink overflow) is reported as "look at everything".

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::mount_events::{Change, MountEvent, MountEvents};
use hostler_protocol::lease::LeaseId;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{
    AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recvfrom, socket,
};

/// Something happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KernelEvent {
    /// An owner's process ended.
    OwnerEnded(LeaseId),
    /// This loop device was attached or detached.
    LoopChanged(u32),
    /// This mount was made, or moved: its number that is never given again.
    MountMade(u64),
    /// A mount went.
    MountGone,
    /// The host's mount table changed, and it is not known where.
    MountsChanged,
    /// Events were lost.
    Lost,
}

/// The watching thread, and what can be added to it.
#[derive(Clone, Debug)]
pub struct Watcher {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    epoll: Epoll,
    owners: Mutex<HashMap<u64, OwnedFd>>,
}

const UEVENTS: u64 = u64::MAX;
const MOUNTS: u64 = u64::MAX - 1;
/// The kernel's own multicast group of uevents; group 2 is udev's.
const KERNEL_GROUP: u32 = 1;

impl Watcher {
    /// Starts the thread; `tell` is called from it for each event and must not block.
    ///
    /// # Errors
    /// When the netlink socket, the mount table or the thread cannot be had.
    pub fn start(tell: impl Fn(KernelEvent) + Send + 'static) -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let uevents = uevent_socket()?;
        epoll.add(&uevents, EpollEvent::new(EpollFlags::EPOLLIN, UEVENTS))?;
        let mounts = MountEvents::start()?;
        epoll.add(&mounts, EpollEvent::new(mounts.flags(), MOUNTS))?;
        let shared = Arc::new(Shared { epoll, owners: Mutex::new(HashMap::new()) });
        let watcher = Self { shared: Arc::clone(&shared) };
        std::thread::Builder::new()
            .name("kernel-events".to_owned())
            .spawn(move || watch(&shared, &uevents, &mounts, &tell))?;
        Ok(watcher)
    }

    /// Tells when the process of `pidfd` ends, once.
    ///
    /// # Errors
    /// What `epoll_ctl(2)` says.
    pub fn watch_owner(&self, lease: LeaseId, pidfd: OwnedFd) -> io::Result<()> {
        let mut owners = self.shared.owners.lock().unwrap_or_else(PoisonError::into_inner);
        let flags = EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT;
        self.shared.epoll.add(&pidfd, EpollEvent::new(flags, lease.0))?;
        owners.insert(lease.0, pidfd);
        Ok(())
    }

    /// Forgets an owner.
    pub fn forget_owner(&self, lease: LeaseId) {
        let mut owners = self.shared.owners.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pidfd) = owners.remove(&lease.0) {
            // Closing it is not enough: a client that passed it may have it open still, and the next
            // one with its number would find it taken. An error means that it was not in the set.
            let _ = self.shared.epoll.delete(&pidfd);
        }
    }
}

fn uevent_socket() -> io::Result<OwnedFd> {
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let protocol = SockProtocol::NetlinkKObjectUEvent;
    let socket = socket(AddressFamily::Netlink, SockType::Datagram, flags, protocol)?;
    bind(socket.as_raw_fd(), &NetlinkAddr::new(0, KERNEL_GROUP))?;
    Ok(socket)
}

fn watch(shared: &Shared, uevents: &OwnedFd, mounts: &MountEvents, tell: &impl Fn(KernelEvent)) -> ! {
    let mut events = [EpollEvent::empty(); 64];
    loop {
        let count = match shared.epoll.wait(&mut events, EpollTimeout::NONE) {
            Ok(count) => count,
            Err(nix::errno::Errno::EINTR) => continue,
            Err(error) => {
                // Only a bug of ours makes this fail. The sweep finds all that events would tell,
                // later; do not spin.
                tracing::error!("waiting for the kernel's events failed: {error}");
                std::thread::sleep(Duration::from_secs(10));
                continue;
            }
        };
        for event in &events[..count] {
            match event.data() {
                UEVENTS => read_uevents(uevents, tell),
                MOUNTS => read_mounts(mounts, tell),
                lease => tell(KernelEvent::OwnerEnded(LeaseId(lease))),
            }
        }
    }
}

fn read_mounts(mounts: &MountEvents, tell: &impl Fn(KernelEvent)) {
    let events = mounts.read_events().unwrap_or_else(|error| {
        tracing::warn!("the mount events could not be read: {error}");
        vec![MountEvent::Any]
    });
    for event in events {
        tell(match event {
            MountEvent::One { number, change: Change::Attached | Change::Moved, .. } => {
                KernelEvent::MountMade(number)
            }
            MountEvent::One { change: Change::Detached, .. } => KernelEvent::MountGone,
            MountEvent::Any => KernelEvent::MountsChanged,
        });
    }
}

/// Reads all that waits, and tells each loop device that it is about, once.
fn read_uevents(socket: &OwnedFd, tell: &impl Fn(KernelEvent)) {
    let mut buffer = [0u8; 8192];
    let mut devices = BTreeSet::new();
    loop {
        match recvfrom::<NetlinkAddr>(socket.as_raw_fd(), &mut buffer) {
            // Only the kernel has port 0; any process may send to the group's other members.
            Ok((length, Some(sender))) if sender.pid() == 0 => devices.extend(loop_device(&buffer[..length])),
            Ok(_) => {}
            Err(nix::errno::Errno::ENOBUFS) => tell(KernelEvent::Lost),
            Err(_) => break,
        }
    }
    devices.into_iter().map(KernelEvent::LoopChanged).for_each(tell);
}

/// N of the `/dev/loopN` that a uevent is about. A uevent is `ACTION@PATH`, then `KEY=VALUE` pairs, each
/// ended by a NUL.
fn loop_device(message: &[u8]) -> Option<u32> {
    let header = message.split(|byte| *byte == 0).next()?;
    let at = header.iter().position(|byte| *byte == b'@')?;
    let name = header[at + 1..].strip_prefix(b"/devices/virtual/block/loop")?;
    // What follows a slash is a partition of it.
    let number = name.split(|byte| *byte == b'/').next()?;
    std::str::from_utf8(number).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_loop_devices_from_others() {
        assert_eq!(loop_device(b"change@/devices/virtual/block/loop7\0ACTION=change\0"), Some(7));
        assert_eq!(loop_device(b"add@/devices/virtual/block/loop12/loop12p1\0ACTION=add\0"), Some(12));
        assert_eq!(loop_device(b"change@/devices/virtual/block/dm-0\0"), None);
        assert_eq!(loop_device(b"libudev\0"), None);
        assert_eq!(loop_device(b""), None);
    }
}
