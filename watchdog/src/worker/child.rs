//! The worker process itself.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use hostler_protocol::frame::{Decoder, FrameError, REPLY_LIMIT, encode};
use rustix::process::{Signal, set_parent_process_death_signal};

use super::descriptors::{receive, send};
use super::message::{Request, Response};
use super::{act, observe};

/// Why a worker stopped serving.
#[derive(Debug, thiserror::Error)]
pub enum WorkerFailure {
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

/// Serves requests on standard input until the daemon closes it. Dies with the daemon.
///
/// # Errors
/// When the socket fails or carries no requests.
pub fn serve() -> Result<(), WorkerFailure> {
    set_parent_process_death_signal(Some(Signal::KILL)).map_err(io::Error::from)?;
    let socket = io::stdin();
    let mut decoder = Decoder::new(REPLY_LIMIT);
    let mut buffer = vec![0u8; 64 * 1024];
    let mut passed: Vec<OwnedFd> = Vec::new();
    loop {
        while let Some(message) = decoder.next_message()? {
            let request: Request = serde_json::from_slice(&message)?;
            answer(request, &passed, socket.as_fd())?;
            // Descriptors are of one request only: nothing is held between two.
            passed.clear();
        }
        let count = receive(&socket, &mut buffer, &mut passed)?;
        if count == 0 {
            decoder.finish()?;
            return Ok(());
        }
        decoder.push(&buffer[..count]);
    }
}

fn answer(
    request: Request,
    passed: &[OwnedFd],
    socket: std::os::fd::BorrowedFd<'_>,
) -> Result<(), WorkerFailure> {
    let response = match request {
        Request::Observe { query, skip } => {
            let mut failure = None;
            let mut touching = |device, what: &str| {
                let breadcrumb = Response::Touching { device, what: what.to_owned() };
                if let Err(error) = write(socket, &breadcrumb) {
                    failure.get_or_insert(error);
                }
            };
            let snapshot = observe::observe(&query, &skip, passed, &mut touching);
            if let Some(failure) = failure {
                return Err(failure);
            }
            Response::Seen(Box::new(snapshot))
        }
        Request::Act { step, claim } => {
            write(socket, &Response::Touching { device: None, what: step.sentence() })?;
            Response::Acted(act::act(&step, claim.as_ref(), passed))
        }
    };
    write(socket, &response)
}

fn write(socket: std::os::fd::BorrowedFd<'_>, response: &Response) -> Result<(), WorkerFailure> {
    let bytes = encode(response)?;
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        let sent = send(socket, rest, &[])?;
        rest = &rest[sent..];
    }
    Ok(())
}
