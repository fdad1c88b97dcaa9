//! Bytes and file descriptors over a unix socket.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use tokio::io::Interest;
use tokio::net::UnixStream;

/// The most descriptors that the kernel passes at once (`SCM_MAX_FD`).
const DESCRIPTOR_LIMIT: usize = 253;

/// Sends some of `bytes`, with `descriptors` beside the first of them; returns how many were sent.
///
/// # Errors
/// What `sendmsg(2)` says.
pub fn send(socket: impl AsFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTOR_LIMIT))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "more descriptors than one message can carry",
        ));
    }
    Ok(sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
}

/// Sends all of `bytes` over a socket that does not block, with `descriptors` beside the first of them.
///
/// # Errors
/// What `sendmsg(2)` says.
pub async fn send_all(
    socket: &UnixStream,
    bytes: &[u8],
    mut descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        let sent = socket.async_io(Interest::WRITABLE, || send(socket.as_fd(), rest, descriptors)).await?;
        rest = &rest[sent..];
        descriptors = &[];
    }
    Ok(())
}

/// Receives bytes into `buffer` and descriptors into `descriptors`; returns how many bytes came, 0
/// at the end of the stream. Descriptors are closed on exec from the start.
///
/// # Errors
/// What `recvmsg(2)` says.
pub fn receive(socket: impl AsFd, buffer: &mut [u8], descriptors: &mut Vec<OwnedFd>) -> io::Result<usize> {
    let mut space = vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTOR_LIMIT))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = message {
            descriptors.extend(passed);
        }
    }
    Ok(received.bytes)
}

/// The same, and tells the user who sent the bytes, as the kernel has it: the socket needs `SO_PASSCRED`. A
/// message of another sender is never joined to it.
///
/// # Errors
/// What `recvmsg(2)` says, and `InvalidData` when the kernel did not tell the sender.
pub fn receive_from(
    socket: impl AsFd,
    buffer: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
) -> io::Result<(usize, u32)> {
    let mut space =
        vec![MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTOR_LIMIT), ScmCredentials(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut sender = None;
    for message in control.drain() {
        match message {
            RecvAncillaryMessage::ScmRights(passed) => descriptors.extend(passed),
            RecvAncillaryMessage::ScmCredentials(credentials) => sender = Some(credentials.uid.as_raw()),
            _ => {}
        }
    }
    // The end of the stream has no sender.
    let sender = if received.bytes == 0 { sender.or(Some(0)) } else { sender };
    let unknown = || io::Error::new(io::ErrorKind::InvalidData, "the kernel did not tell who sent a message");
    Ok((received.bytes, sender.ok_or_else(unknown)?))
}
