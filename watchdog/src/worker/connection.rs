//! The daemon's side of the origin, and of one worker.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as BlockingStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use hostler_protocol::frame::{Decoder, encode};
use rustix::process::Signal;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::message::{ANSWER_LIMIT, Request, Response};
use super::pool::WorkerError;
use crate::descriptors::{receive, send_all};
use crate::kernel::signals;

/// How long the origin may take to take in a request, which it only ever does.
const TAKE_TIME: Duration = Duration::from_secs(10);

/// The process that workers are copies of.
#[derive(Debug)]
pub(super) struct Origin {
    child: Child,
    socket: UnixStream,
}

impl Origin {
    /// Starts `program worker`.
    pub(super) fn start(program: &Path) -> io::Result<Self> {
        let (ours, theirs) = pair()?;
        let child = Command::new(program)
            .arg("worker")
            .env_clear()
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()?;
        Ok(Self { child, socket: ours })
    }

    /// Has it make a worker.
    pub(super) async fn copy(&self) -> Result<Connection, NoCopy> {
        let (ours, theirs) = pair().map_err(NoCopy::Here)?;
        let request = [theirs.as_fd()];
        let asked = timeout(TAKE_TIME, send_all(&self.socket, &[0], &request)).await;
        asked.map_err(|_| NoCopy::There)?.map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => NoCopy::There,
            _ => NoCopy::Here(error),
        })?;
        Ok(Connection {
            pidfd: None,
            socket: ours,
            decoder: Decoder::new(ANSWER_LIMIT),
            passed: Vec::new(),
            doing: "starting".to_owned(),
        })
    }
}

/// Why there is no new worker.
#[derive(Debug)]
pub(super) enum NoCopy {
    /// The origin has ended, or does nothing any more.
    There,
    /// This process is short of something.
    Here(io::Error),
}

impl Drop for Origin {
    fn drop(&mut self) {
        // It does nothing that could keep it from ending. Its copies die with it.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn pair() -> io::Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = BlockingStream::pair()?;
    ours.set_nonblocking(true)?;
    Ok((UnixStream::from_std(ours)?, theirs.into()))
}

/// A worker.
#[derive(Debug)]
pub(super) struct Connection {
    /// It comes with its first word.
    pidfd: Option<OwnedFd>,
    socket: UnixStream,
    decoder: Decoder,
    passed: Vec<OwnedFd>,
    doing: String,
}

impl Connection {
    /// Whether it has said so.
    pub(super) fn is_born(&self) -> bool {
        self.pidfd.is_some()
    }

    /// Kills it; what is returned tells when it is gone. One that has not said anything yet has nothing to do
    /// yet, and ends when its socket is closed.
    pub(super) fn kill(self) -> Option<OwnedFd> {
        let pidfd = self.pidfd?;
        // An error means that it has ended already.
        let _ = signals::send(&pidfd, Signal::KILL);
        Some(pidfd)
    }

    /// Asks it for something; it may not take it for as long as `silence`.
    pub(super) async fn ask(
        &mut self,
        request: &Request,
        descriptors: &[BorrowedFd<'_>],
        silence: Duration,
    ) -> Result<(), WorkerError> {
        let bytes = encode(request).map_err(|error| WorkerError::Nonsense { cause: error.to_string() })?;
        match timeout(silence, send_all(&self.socket, &bytes, descriptors)).await {
            Ok(written) => written.map_err(WorkerError::Socket),
            Err(_) => Err(self.hung(None, silence)),
        }
    }

    /// What it does from now on, until it says so itself.
    pub(super) fn expect(&mut self, doing: String) {
        self.doing = doing;
    }

    /// Its next answer, and what it passed beside it. It has `silence` for each thing that it says that it
    /// touches.
    pub(super) async fn answer(
        &mut self,
        silence: Duration,
    ) -> Result<(Response, Vec<OwnedFd>), WorkerError> {
        let mut touched = None;
        let mut buffer = vec![0u8; 64 * 1024];
        loop {
            while let Some(message) = self.decoder.next_message()? {
                let response = serde_json::from_slice(&message)
                    .map_err(|error| WorkerError::Nonsense { cause: error.to_string() })?;
                match response {
                    // It is said first, and nothing else may come beside it.
                    Response::Born => self.pidfd = std::mem::take(&mut self.passed).into_iter().next(),
                    Response::Touching { device, what } => {
                        self.doing = match device {
                            Some(number) => format!("asking /dev/loop{number}"),
                            None => what,
                        };
                        touched = device;
                    }
                    answer @ (Response::Seen(_) | Response::Acted(_) | Response::Examined(_)) => {
                        return Ok((answer, std::mem::take(&mut self.passed)));
                    }
                }
            }
            match timeout(silence, self.read(&mut buffer)).await {
                Ok(Ok(0)) => return Err(WorkerError::Ended { doing: self.doing.clone() }),
                Ok(Ok(count)) => self.decoder.push(&buffer[..count]),
                Ok(Err(error)) => return Err(WorkerError::Socket(error)),
                Err(_) => return Err(self.hung(touched, silence)),
            }
        }
    }

    async fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let Self { socket, passed, .. } = self;
        socket.async_io(Interest::READABLE, || receive(socket.as_fd(), buffer, passed)).await
    }

    fn hung(&self, device: Option<u32>, silence: Duration) -> WorkerError {
        WorkerError::Hung { doing: self.doing.clone(), device, seconds: silence.as_secs() }
    }
}
