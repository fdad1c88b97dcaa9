//! What the kernel tells without being asked: one thread that sleeps in `epoll_wait(2)`.
//!
//! It watches owners' pidfds, control groups' event files, the host's mount table, and the uevents
//! of loop devices, and passes on only *that* something happened. It decides nothing and reads no
//! details: what is lost (a netlink overflow) is reported as "look at everything".

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

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
    /// A loop device was attached or detached.
    LoopChanged,
    /// The host's mount table changed.
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
        // The host's own namespace, in which the daemon lives anyway: this pins nothing.
        let mounts = File::open("/proc/self/mountinfo")?;
        epoll.add(&mounts, EpollEvent::new(EpollFlags::EPOLLPRI, MOUNTS))?;
        let shared = Arc::new(Shared { epoll, owners: Mutex::new(HashMap::new()) });
        let watcher = Self { shared: Arc::clone(&shared) };
        std::thread::Builder::new().name("kernel-events".to_owned()).spawn(move || {
            let _open_while_watched = mounts;
            watch(&shared, &uevents, &tell)
        })?;
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

fn watch(shared: &Shared, uevents: &OwnedFd, tell: &impl Fn(KernelEvent)) -> ! {
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
                UEVENTS => {
                    if let Some(event) = read_uevents(uevents) {
                        tell(event);
                    }
                }
                MOUNTS => tell(KernelEvent::MountsChanged),
                lease => tell(KernelEvent::OwnerEnded(LeaseId(lease))),
            }
        }
    }
}

/// Reads all that waits; says whether any of it was about a loop device.
fn read_uevents(socket: &OwnedFd) -> Option<KernelEvent> {
    let mut buffer = [0u8; 8192];
    let mut found = None;
    loop {
        match recvfrom::<NetlinkAddr>(socket.as_raw_fd(), &mut buffer) {
            // Only the kernel has port 0; any process may send to the group's other members.
            Ok((length, Some(sender))) if sender.pid() == 0 => {
                if is_about_a_loop_device(&buffer[..length]) {
                    found = found.or(Some(KernelEvent::LoopChanged));
                }
            }
            Ok(_) => {}
            Err(nix::errno::Errno::ENOBUFS) => found = Some(KernelEvent::Lost),
            Err(_) => return found,
        }
    }
}

/// A uevent is `ACTION@PATH`, then `KEY=VALUE` pairs, each ended by a NUL.
fn is_about_a_loop_device(message: &[u8]) -> bool {
    let header = message.split(|byte| *byte == 0).next().unwrap_or_default();
    let Some(at) = header.iter().position(|byte| *byte == b'@') else { return false };
    header[at + 1..].starts_with(b"/devices/virtual/block/loop")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_loop_devices_from_others() {
        assert!(is_about_a_loop_device(b"change@/devices/virtual/block/loop7\0ACTION=change\0"));
        assert!(!is_about_a_loop_device(b"change@/devices/virtual/block/dm-0\0"));
        assert!(!is_about_a_loop_device(b"libudev\0"));
        assert!(!is_about_a_loop_device(b""));
    }
}
