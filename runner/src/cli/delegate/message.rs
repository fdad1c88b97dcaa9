//! What root's process and the building one say to each other.
//!
//! One packet each, over the socket that is the building process' standard input. Its end means that
//! the other process is gone.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use hostler_runner::passing;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// From the building process.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum FromBuilder {
    /// A finished file, whose descriptor comes beside this. It is answered.
    Finished {
        /// Its name.
        name: String,
        /// The folder in the output directory that it goes to.
        folder: Option<String>,
    },
}

/// From root's process.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum FromRoot {
    /// The recipe, opened; the first message to a build.
    Recipe,
    /// The folder that it lies in, opened; the second.
    Beside,
    /// The lock to keep to, opened; the third, where there is one.
    Lock,
    /// The file for a line per event, opened.
    Events,
    /// The file for the JUnit report, opened.
    Junit,
    /// The build has all it needs.
    Go,
    /// The file is copied to this path.
    Taken(PathBuf),
    /// The file could not be copied, and why.
    NotTaken(String),
    /// Someone sent this signal.
    Stop(u8),
}

/// Sends a message with at most one descriptor.
pub(super) fn send(
    socket: impl AsFd,
    message: &impl Serialize,
    descriptor: Option<BorrowedFd<'_>>,
) -> io::Result<()> {
    let bytes = serde_json::to_vec(message).map_err(io::Error::other)?;
    let descriptors: Vec<BorrowedFd<'_>> = descriptor.into_iter().collect();
    Ok(passing::send(socket.as_fd(), &bytes, &descriptors)?)
}

/// Receives a message within `patience`; `None` once the other is gone.
pub(super) fn receive<M: DeserializeOwned>(
    socket: impl AsFd,
    patience: Duration,
) -> io::Result<Option<(M, Option<OwnedFd>)>> {
    let Some((bytes, descriptors)) = passing::receive(socket.as_fd(), patience)? else {
        return Ok(None);
    };
    let message = serde_json::from_slice(&bytes)?;
    Ok(Some((message, descriptors.into_iter().next())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_arrives_with_its_descriptor_and_the_end_after_it() {
        let (root, builder) = passing::packet_pair().unwrap();
        let file = std::fs::File::open("/dev/null").unwrap();
        let sent = FromBuilder::Finished { name: "x.qcow2".to_owned(), folder: None };
        send(&builder, &sent, Some(file.as_fd())).unwrap();
        drop(builder);
        let patience = Duration::from_secs(5);
        let (received, descriptor) = receive::<FromBuilder>(&root, patience).unwrap().unwrap();
        assert_eq!(received, sent);
        assert!(descriptor.is_some());
        assert!(receive::<FromBuilder>(&root, patience).unwrap().is_none());
    }

    #[test]
    fn nonsense_is_an_error() {
        let (root, builder) = passing::packet_pair().unwrap();
        passing::send(builder.as_fd(), b"{\"Delete\":\"/\"}", &[]).unwrap();
        assert!(receive::<FromBuilder>(&root, Duration::from_secs(5)).is_err());
    }
}
