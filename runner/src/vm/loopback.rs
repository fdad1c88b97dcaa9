//! Brings up the loopback interface of the calling thread's network namespace.
//!
//! One rtnetlink request, `RTM_NEWLINK` with `IFF_UP` for interface 1, and its acknowledgement;
//! rtnetlink(7). The kernel adds 127.0.0.1/8 by itself when the interface goes up. Deliberately
//! absent: any other interface or address; the machine is to have none.

use std::os::fd::AsFd as _;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, send, socket_with};

use crate::passing::wait_readable;

const NLMSG_ERROR: u16 = 2;
const RTM_NEWLINK: u16 = 16;
const NLM_F_REQUEST_ACK: u16 = 1 | 4;
const IFF_UP: u32 = 1;
/// The loopback interface is the first of every namespace (`LOOPBACK_IFINDEX`).
const LOOPBACK: i32 = 1;

/// Brings `lo` up.
pub(crate) fn bring_up() -> Result<(), Errno> {
    let socket = socket_with(
        AddressFamily::NETLINK,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        // `NETLINK_ROUTE` is 0, the default.
        None,
    )?;
    send(&socket, &request(), SendFlags::empty())?;
    wait_readable(socket.as_fd(), Duration::from_secs(5))?;
    let mut answer = [0_u8; 1024];
    let (_, length) = recv(&socket, &mut answer[..], RecvFlags::empty())?;
    acknowledged(answer.get(..length).unwrap_or_default())
}

/// `struct nlmsghdr` followed by `struct ifinfomsg`, in the host's byte order.
fn request() -> Vec<u8> {
    let mut message = Vec::new();
    message.extend(32_u32.to_ne_bytes());
    message.extend(RTM_NEWLINK.to_ne_bytes());
    message.extend(NLM_F_REQUEST_ACK.to_ne_bytes());
    message.extend(1_u32.to_ne_bytes());
    message.extend(0_u32.to_ne_bytes());
    message.extend([0, 0, 0, 0]);
    message.extend(LOOPBACK.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    message
}

/// Reads `struct nlmsgerr`: 0 is an acknowledgement, a negative number an errno.
fn acknowledged(answer: &[u8]) -> Result<(), Errno> {
    let kind = answer.get(4..6).and_then(|bytes| bytes.try_into().ok()).map(u16::from_ne_bytes);
    let status = answer.get(16..20).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
    match (kind, status) {
        (Some(NLMSG_ERROR), Some(0)) => Ok(()),
        (Some(NLMSG_ERROR), Some(status)) if status < 0 => {
            Err(Errno::from_raw_os_error(status.saturating_neg()))
        }
        _ => Err(Errno::PROTO),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(kind: u16, status: i32) -> Vec<u8> {
        let mut bytes = vec![0; 36];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[16..20].copy_from_slice(&status.to_ne_bytes());
        bytes
    }

    #[test]
    fn the_request_is_as_long_as_it_says() {
        assert_eq!(request().len(), 32);
    }

    #[test]
    fn only_a_zero_error_message_acknowledges() {
        assert_eq!(acknowledged(&answer(NLMSG_ERROR, 0)), Ok(()));
        assert_eq!(acknowledged(&answer(NLMSG_ERROR, -1)), Err(Errno::PERM));
        assert_eq!(acknowledged(&answer(NLMSG_ERROR, 7)), Err(Errno::PROTO));
        assert_eq!(acknowledged(&answer(3, 0)), Err(Errno::PROTO));
        assert_eq!(acknowledged(&[]), Err(Errno::PROTO));
    }
}
