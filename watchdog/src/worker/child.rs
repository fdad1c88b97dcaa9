//! The origin and the worker processes themselves.

use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use hostler_protocol::frame::{Decoder, FrameError, encode};

use rustix::fs::{Mode, OFlags, open};
use rustix::process::{PidfdFlags, getpid, getppid, pidfd_open};

use super::fit::fit;
use super::message::{REQUEST_LIMIT, Request, Response};
use super::{act, examine, observe};
use crate::confine::{self, ConfineError};
use crate::descriptors::{receive, send};
use crate::kernel::calls::{self, Forked};

/// Why an origin or a worker stopped.
#[derive(Debug, thiserror::Error)]
pub enum WorkerFailure {
    /// It has too many rights.
    #[error(transparent)]
    Confine(#[from] ConfineError),
    /// The socket to the daemon.
    #[error("the worker's socket failed; it is started by hostlerd only, never by hand")]
    Socket(#[from] io::Error),
    /// What came over it is no message.
    #[error("the daemon sent what is no message")]
    Frame(#[from] FrameError),
    /// What came over it is no request.
    #[error("the daemon sent what is no request")]
    Request(#[from] serde_json::Error),
}

/// Makes a worker for each socket that comes over standard input, until the daemon closes that. Dies with the
/// daemon.
///
/// # Errors
/// When the socket fails. In a worker, what [`WorkerFailure`] says.
pub fn serve() -> Result<(), WorkerFailure> {
    let confinement = confine::origin()?;
    calls::never_wait();
    let requests = io::stdin();
    let nothing =
        open("/dev/null", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(io::Error::from)?;
    let origin = getpid();
    let mut sockets: Vec<OwnedFd> = Vec::new();
    loop {
        if receive(&requests, &mut [0; 1], &mut sockets)? == 0 {
            return Ok(());
        }
        for socket in sockets.drain(..) {
            match calls::fork() {
                Ok(Forked::Child) => {
                    // A copy that hangs must not keep the origin's socket: its end tells the daemon that the
                    // origin has died.
                    rustix::stdio::dup2_stdin(&nothing).map_err(io::Error::from)?;
                    confinement.confine_copy()?;
                    // Had the origin died before that, nobody would end this process with the daemon.
                    if getppid() != Some(origin) {
                        return Ok(());
                    }
                    return serve_one(socket.as_fd());
                }
                Ok(Forked::Parent) => {}
                // The host is short of something. The end of the socket tells the daemon, which tries again.
                Err(error) => {
                    // Standard error may be closed; the daemon tells what came of it.
                    let _ = writeln!(io::stderr(), "hostlerd worker: making a worker failed: {error}");
                }
            }
        }
    }
}

/// Takes one request and answers it.
fn serve_one(socket: BorrowedFd<'_>) -> Result<(), WorkerFailure> {
    let own = pidfd_open(getpid(), PidfdFlags::empty()).map_err(io::Error::from)?;
    write_beside(socket, &Response::Born, &[own.as_fd()])?;
    drop(own);
    let mut decoder = Decoder::new(REQUEST_LIMIT);
    let mut buffer = vec![0u8; 64 * 1024];
    let mut passed: Vec<OwnedFd> = Vec::new();
    loop {
        if let Some(message) = decoder.next_message()? {
            return answer(serde_json::from_slice(&message)?, &passed, socket);
        }
        let count = match receive(socket, &mut buffer, &mut passed) {
            // The daemon wants nothing any more, and has not even read that this process is there.
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => 0,
            received => received?,
        };
        if count == 0 {
            decoder.finish()?;
            return Ok(());
        }
        decoder.push(&buffer[..count]);
    }
}

fn answer(request: Request, passed: &[OwnedFd], socket: BorrowedFd<'_>) -> Result<(), WorkerFailure> {
    let mut kept = None;
    let response = match request {
        Request::Observe { query, skip } => {
            let mut failure = None;
            let mut touching = |device, what: &str| {
                let breadcrumb = Response::Touching { device, what: what.to_owned() };
                if let Err(error) = write(socket, &breadcrumb) {
                    failure.get_or_insert(error);
                }
            };
            let mut snapshot = observe::observe(&query, &skip, passed, &mut touching);
            if let Some(failure) = failure {
                return Err(failure);
            }
            fit(&mut snapshot);
            Response::Seen(Box::new(snapshot))
        }
        Request::Act(tasks) => {
            for task in &tasks {
                let result = act::act(&task.step, task.claim.as_ref(), passed);
                write(socket, &Response::Acted(result))?;
            }
            return Ok(());
        }
        Request::Examine { number, wanted } => {
            write(
                socket,
                &Response::Touching { device: None, what: "looking at that descriptor".to_owned() },
            )?;
            let examined = match passed.first() {
                Some(reader) => examine::examine(reader, number, wanted),
                None => Err(io::Error::new(io::ErrorKind::InvalidInput, "no pidfd came with the request")),
            };
            Response::Examined(match examined {
                Ok((proof, descriptor)) => {
                    kept = descriptor;
                    Ok(proof)
                }
                Err(error) => Err(error.to_string()),
            })
        }
    };
    write_beside(socket, &response, kept.as_ref().map(AsFd::as_fd).as_slice())
}

fn write(socket: BorrowedFd<'_>, response: &Response) -> Result<(), WorkerFailure> {
    write_beside(socket, response, &[])
}

fn write_beside(
    socket: BorrowedFd<'_>,
    response: &Response,
    mut descriptors: &[BorrowedFd<'_>],
) -> Result<(), WorkerFailure> {
    let bytes = encode(response)?;
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        let sent = send(socket, rest, descriptors)?;
        rest = &rest[sent..];
        descriptors = &[];
    }
    Ok(())
}
