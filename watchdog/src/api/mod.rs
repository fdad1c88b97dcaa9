//! The socket that clients use.
//!
//! The daemon accepts a connection, asks the kernel who connected, and hands it to that user's reader
//! ([`crate::reader`]): no byte that a client wrote and no descriptor that it passed is ever in this
//! process. What a reader asks for is done as its user's wish, at most so often a second and so much at
//! once; a reader that hangs, or says what no reader says, is ended with the connections that it has.

mod answer;
mod conversation;
mod rate;
mod readers;

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::sys::socket::{getsockopt, sockopt::PeerPidfd};
use tokio::net::{UnixListener, UnixStream};

use crate::engine::{Caller, Engine};
use crate::kernel::{processes, signals};
use crate::model::ProcessIdentity;
use readers::Readers;

/// Accepts connections for as long as the daemon lives, and has readers started from `program`.
pub async fn serve(listener: UnixListener, engine: Engine, program: std::path::PathBuf) {
    /// Without descriptors left, accepting fails at once, again and again.
    const PAUSE: Duration = Duration::from_millis(100);
    let readers = Readers::new(engine, program);
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                let known = introduce(&stream);
                match (stream.into_std(), known) {
                    (Ok(stream), Ok((caller, group))) => readers.serve(caller, group, stream.into()),
                    (Ok(stream), Err(error)) => {
                        tracing::warn!("a connection was dropped: who connected is unknown: {error}");
                        readers.close(stream.into());
                    }
                    (Err(error), _) => tracing::warn!("a connection was dropped: {error}"),
                }
                // It is sent on before the next one is accepted.
                tokio::task::yield_now().await;
            }
            Err(error) => {
                tracing::warn!("a connection could not be accepted: {error}");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

/// Who connected, as the kernel tells.
fn introduce(stream: &UnixStream) -> io::Result<(Caller, u32)> {
    // It has this from the listener, unless it was there before the daemon was.
    rustix::net::sockopt::set_socket_passcred(stream, true)?;
    let credentials = stream.peer_cred()?;
    let process = peer(stream, credentials.pid())?;
    Ok((Caller { uid: credentials.uid(), process }, credentials.gid()))
}

/// The process that connected, while it lives.
fn peer(stream: impl AsFd, pid: Option<i32>) -> io::Result<Option<ProcessIdentity>> {
    match getsockopt(&stream, PeerPidfd) {
        Ok(pidfd) => signals::process_of(&pidfd),
        // Before Linux 6.5 there is only the number. Should it be given again between connect and
        // here, the lease would be that process's: of the same user, and ended with it.
        Err(nix::errno::Errno::ENOPROTOOPT) => {
            let Some(pid) = pid.and_then(|pid| u32::try_from(pid).ok()) else { return Ok(None) };
            Ok(processes::start_time(pid).ok().map(|start| ProcessIdentity { pid, start }))
        }
        // The process was waited for before its connection was accepted.
        Err(nix::errno::Errno::ESRCH | nix::errno::Errno::ENODATA | nix::errno::Errno::EINVAL) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
