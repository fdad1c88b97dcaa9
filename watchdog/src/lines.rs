//! How the daemon talks to a process that it does not trust: a child of its own that reads what others
//! write.
//!
//! What the child is told goes over a socket, as its standard input, with descriptors beside it. What it
//! says comes through a pipe, its standard output, which cannot carry any: a descriptor that somebody else
//! made would be closed by whoever takes it in, and that can hang.

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream as BlockingStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use tokio::net::UnixStream;
use tokio::net::unix::pipe;

/// The daemon's ends.
#[derive(Debug)]
pub struct Lines {
    /// What the child reads.
    pub to_child: UnixStream,
    /// What it wrote.
    pub from_child: pipe::Receiver,
}

/// Starts `program` with these arguments, and nothing else of the daemon's.
///
/// # Errors
/// When it cannot be started.
pub fn start(program: &Path, arguments: &[&str]) -> io::Result<(Child, Lines)> {
    let (ours, theirs) = BlockingStream::pair()?;
    ours.set_nonblocking(true)?;
    // From here on the child cannot send anything over the socket.
    ours.shutdown(Shutdown::Read)?;
    let (our_pipe, their_pipe) = io::pipe()?;
    let lines = Lines {
        to_child: UnixStream::from_std(ours)?,
        from_child: pipe::Receiver::from_owned_fd(our_pipe.into())?,
    };
    let child = Command::new(program)
        .args(arguments)
        .env_clear()
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::from(their_pipe))
        // Until it is confined it can say what keeps it from that; see [`own`].
        .spawn()?;
    Ok((child, lines))
}

/// The child's ends of its own lines: the socket, and the pipe. Nothing it says goes to the log any more.
///
/// # Errors
/// When they are not there: it was started by hand.
pub fn own() -> io::Result<(BlockingStream, OwnedFd)> {
    let copy = |descriptor: BorrowedFd<'_>| rustix::io::fcntl_dupfd_cloexec(descriptor, 3);
    // What it says from here on may be what others put into its mouth.
    rustix::stdio::dup2_stderr(std::fs::File::options().write(true).open("/dev/null")?)?;
    let socket = copy(io::stdin().as_fd())?;
    rustix::net::sockopt::socket_type(&socket)?;
    Ok((BlockingStream::from(socket), copy(io::stdout().as_fd())?))
}
