//! The worker process itself.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use hostler_protocol::frame::{Decoder, FrameError, REPLY_LIMIT, encode};

use super::message::{Request, Response};
use super::{act, examine, observe};
use crate::confine::{self, ConfineError};
use crate::descriptors::{receive, send};

/// Why a worker stopped serving.
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

/// Serves requests on standard input until the daemon closes it. Dies with the daemon.
///
/// # Errors
/// When the socket fails or carries no requests.
pub fn serve() -> Result<(), WorkerFailure> {
    confine::worker()?;
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
