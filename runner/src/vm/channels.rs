//! A machine's channels: which there are, reading from one, waiting for all of them at once.

use std::io::{self, Read as _};
use std::net::UdpSocket;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::launch::Machine;

/// What is polled, in this order.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Channel {
    Console = 0,
    Control = 1,
    Qmp = 2,
    Log = 3,
    Syslog = 4,
}

pub(super) const CHANNELS: [Channel; 5] =
    [Channel::Console, Channel::Control, Channel::Qmp, Channel::Log, Channel::Syslog];

/// For each channel, by its place in [`CHANNELS`].
pub(super) type Each = [bool; CHANNELS.len()];

/// Reads once from a channel; `WouldBlock` where it does not exist.
pub(super) fn read(machine: &mut Machine, channel: Channel, buffer: &mut [u8]) -> io::Result<usize> {
    match channel {
        Channel::Console => machine.console.read(buffer),
        Channel::Control => machine.control.read(buffer),
        Channel::Qmp => machine.qmp.read(buffer),
        Channel::Log => match &mut machine.log {
            Some(log) => log.read(buffer),
            None => Err(io::ErrorKind::WouldBlock.into()),
        },
        // An empty datagram is no end.
        Channel::Syslog => match machine.syslog.as_ref().map(|syslog| syslog.recv(buffer)) {
            Some(Ok(0)) | None => Err(io::ErrorKind::WouldBlock.into()),
            Some(result) => result,
        },
    }
}

/// Waits until one of the `open` channels, the process or one of `others` has something, or for so long. Which
/// channels have something, and whether the process ended.
pub(super) fn wait<'a>(
    machine: &'a Machine,
    open: &Each,
    others: impl Iterator<Item = BorrowedFd<'a>>,
    within: Duration,
) -> io::Result<(Each, bool)> {
    let timeout = Timespec::try_from(within).map_err(io::Error::other)?;
    let mut polled = vec![PollFd::from_borrowed_fd(machine.pidfd(), PollFlags::IN)];
    let mut channels = Vec::new();
    for channel in CHANNELS.into_iter().filter(|&channel| open[channel as usize]) {
        let descriptor = match channel {
            Channel::Console => Some(machine.console.as_fd()),
            Channel::Control => Some(machine.control.as_fd()),
            Channel::Qmp => Some(machine.qmp.as_fd()),
            Channel::Log => machine.log.as_ref().map(UnixStream::as_fd),
            Channel::Syslog => machine.syslog.as_ref().map(UdpSocket::as_fd),
        };
        if let Some(descriptor) = descriptor {
            polled.push(PollFd::from_borrowed_fd(descriptor, PollFlags::IN));
            channels.push(channel);
        }
    }
    polled.extend(others.map(|other| PollFd::from_borrowed_fd(other, PollFlags::IN)));
    match poll(&mut polled, Some(&timeout)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let mut ready = Each::default();
    for (channel, polled) in channels.into_iter().zip(polled.iter().skip(1)) {
        ready[channel as usize] = !polled.revents().is_empty();
    }
    Ok((ready, polled.first().is_some_and(|process| !process.revents().is_empty())))
}
