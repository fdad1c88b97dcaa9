//! Messages with descriptors over a unix `SOCK_SEQPACKET` pair, each with a deadline.
//!
//! Deliberately absent: what the messages mean. One message is one packet of at most
//! [`LARGEST_MESSAGE`] bytes with at most [`MOST_DESCRIPTORS`] descriptors; received descriptors
//! are close-on-exec from the start.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

/// The largest message in bytes; qemu's arguments take a few kilobytes.
pub const LARGEST_MESSAGE: usize = 128 * 1024;
/// How long a peer may take to make room for a message.
const SEND_TIME: Duration = Duration::from_secs(30);
/// The most descriptors beside one message.
pub const MOST_DESCRIPTORS: usize = 8;

/// A message, and the descriptors beside it.
pub type Received = (Vec<u8>, Vec<OwnedFd>);

/// A packet socket and its peer, both close-on-exec.
///
/// # Errors
/// When there are no descriptors left.
pub fn packet_pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
}

/// A stream socket and its peer, both close-on-exec; the first does not block.
///
/// # Errors
/// When there are no descriptors left.
pub fn stream_pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    Ok((ours, theirs))
}

/// Sends one message. A peer that takes nothing has half a minute to begin.
///
/// # Errors
/// `MSGSIZE` when it is too large, `PIPE` when the peer has closed, `TIMEDOUT` when it takes nothing.
pub fn send(socket: BorrowedFd<'_>, message: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    send_within(socket, message, descriptors, SEND_TIME)
}

fn send_within(
    socket: BorrowedFd<'_>,
    message: &[u8],
    descriptors: &[BorrowedFd<'_>],
    within: Duration,
) -> Result<(), Errno> {
    if message.len() > LARGEST_MESSAGE || descriptors.len() > MOST_DESCRIPTORS {
        return Err(Errno::MSGSIZE);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(Errno::MSGSIZE);
    }
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    let deadline = Instant::now() + within;
    let sent = loop {
        match sendmsg(socket, &[IoSlice::new(message)], &mut ancillary, flags) {
            Err(Errno::AGAIN) => {
                wait_for(socket, PollFlags::OUT, deadline.saturating_duration_since(Instant::now()))?;
            }
            Err(Errno::INTR) => {}
            sent => break sent?,
        }
    };
    if sent == message.len() { Ok(()) } else { Err(Errno::MSGSIZE) }
}

/// Sends bytes on a stream with a descriptor beside them.
///
/// # Errors
/// `MSGSIZE` when not all of them fit at once, `PIPE` when the peer has closed.
pub fn send_with(stream: BorrowedFd<'_>, bytes: &[u8], descriptor: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let descriptors = [descriptor];
    if !ancillary.push(SendAncillaryMessage::ScmRights(&descriptors)) {
        return Err(Errno::MSGSIZE);
    }
    let sent = sendmsg(stream, &[IoSlice::new(bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
    if sent == bytes.len() { Ok(()) } else { Err(Errno::MSGSIZE) }
}

/// Receives one message, or `None` once the peer has closed.
///
/// # Errors
/// `TIMEDOUT` after `within`, `MSGSIZE` when more came than a message may have.
pub fn receive(socket: BorrowedFd<'_>, within: Duration) -> Result<Option<Received>, Errno> {
    wait_readable(socket, within)?;
    let mut message = vec![0; LARGEST_MESSAGE];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received = match recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut message)],
        &mut ancillary,
        RecvFlags::CMSG_CLOEXEC,
    ) {
        Ok(received) => received,
        Err(Errno::CONNRESET) => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut descriptors = Vec::new();
    for entry in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = entry {
            descriptors.extend(passed);
        }
    }
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(Errno::MSGSIZE);
    }
    if received.bytes == 0 {
        return Ok(None);
    }
    message.truncate(received.bytes);
    Ok(Some((message, descriptors)))
}

/// Waits until `descriptor` is readable or hung up.
///
/// # Errors
/// `TIMEDOUT` after `within`.
pub fn wait_readable(descriptor: BorrowedFd<'_>, within: Duration) -> Result<(), Errno> {
    wait_for(descriptor, PollFlags::IN, within)
}

fn wait_for(descriptor: BorrowedFd<'_>, what: PollFlags, within: Duration) -> Result<(), Errno> {
    let deadline = Instant::now() + within;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).map_err(|_| Errno::INVAL)?;
        let mut polled = [PollFd::from_borrowed_fd(descriptor.as_fd(), what)];
        match poll(&mut polled, Some(&timeout)) {
            Ok(0) => return Err(Errno::TIMEDOUT),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};

    use super::*;

    #[test]
    fn a_message_brings_its_descriptors() {
        let (left, right) = packet_pair().unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        send(left.as_fd(), b"hello", &[writer.as_fd()]).unwrap();
        drop(writer);
        let (message, descriptors) = receive(right.as_fd(), Duration::from_secs(5)).unwrap().unwrap();
        assert_eq!(message, b"hello");
        let mut passed = std::fs::File::from(descriptors.into_iter().next().unwrap());
        passed.write_all(b"through").unwrap();
        drop(passed);
        let mut text = String::new();
        std::io::BufReader::new(reader).read_to_string(&mut text).unwrap();
        assert_eq!(text, "through");
    }

    #[test]
    fn a_peer_that_takes_nothing_is_a_timeout() {
        let (left, _right) = packet_pair().unwrap();
        let message = vec![0; LARGEST_MESSAGE];
        let sent = |_| send_within(left.as_fd(), &message, &[], Duration::from_millis(10));
        assert_eq!((0..100).map(sent).find_map(Result::err), Some(Errno::TIMEDOUT));
    }

    #[test]
    fn a_closed_peer_is_no_message_and_silence_is_a_timeout() {
        let (left, right) = packet_pair().unwrap();
        let silence = receive(right.as_fd(), Duration::from_millis(10));
        assert_eq!(silence.unwrap_err(), Errno::TIMEDOUT);
        drop(left);
        assert!(receive(right.as_fd(), Duration::from_secs(5)).unwrap().is_none());
    }
}
