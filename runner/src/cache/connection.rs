//! Connections of a mirror's clients: requests are read one after the other, files go out by `sendfile`.
//!
//! Own code, since the library's server copies every byte twice more, through a thread and a buffer; see
//! BENCHMARKS. Every wait has a limit, so a client that does nothing costs little, and not for long.

use std::fs::File;
use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustix::fs::sendfile;
use rustix::net::{SendFlags, send};
use tokio::io::{AsyncReadExt as _, Interest};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::answer::{self, Answer, Asked, Head, Part, Status};

/// Until a request has come as a whole, and between two of them.
const REQUEST_LIMIT: Duration = Duration::from_secs(75);
/// For a client to take another byte.
const TAKE_LIMIT: Duration = Duration::from_secs(120);
/// Of the descriptors that this process may have, a fourth: each connection may have a file as well, and a
/// guest that opens all it can is not to take what the build needs. Those beyond wait to be accepted.
const SHARE: u64 = 4;
/// Connections at a time, whatever the limit is.
const CONNECTIONS: std::ops::RangeInclusive<u64> = 16..=4096;
/// After so many bytes others have a turn.
const TURN: u64 = 1 << 20;
/// From so many bytes on, reading a file may take a while.
const LARGE: u64 = 256 << 10;

/// Answers requests.
pub(super) trait Answers: Send + Sync + 'static {
    /// The answer, with the file that its parts are of.
    fn answer(&self, asked: &Asked) -> impl Future<Output = (Answer, Option<File>)> + Send;

    /// Hears of bytes of a file that were handed out.
    fn count(&self, bytes: u64);

    /// Hears of a request that came and is none.
    fn refuse(&self, status: Status);
}

/// Accepts connections and answers on them until `stop` changes; then those under way come to the end of
/// their answers.
pub(super) async fn serve(listener: TcpListener, answers: Arc<impl Answers>, mut stop: watch::Receiver<()>) {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current;
    let places = Arc::new(Semaphore::new(most_connections(limit)));
    let mut connections = JoinSet::new();
    loop {
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { break };
        let accepted = tokio::select! {
            _ = stop.changed() => break,
            accepted = listener.accept() => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let (answers, stop) = (Arc::clone(&answers), stop.clone());
                connections.spawn(async move {
                    let _place = place;
                    // A client that went away is nobody's failure.
                    let _ = converse(stream, &*answers, stop).await;
                });
            }
            // Mostly there are no descriptors left, and some come back as connections end.
            Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
        }
        while connections.try_join_next().is_some() {}
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// How many connections there may be, if the process may have so many descriptors.
fn most_connections(descriptors: Option<u64>) -> usize {
    let share = descriptors.map_or(*CONNECTIONS.end(), |limit| limit / SHARE);
    usize::try_from(share.clamp(*CONNECTIONS.start(), *CONNECTIONS.end())).unwrap_or(usize::MAX)
}

async fn converse(
    mut stream: TcpStream,
    answers: &impl Answers,
    mut stop: watch::Receiver<()>,
) -> io::Result<()> {
    // Else the end of an answer waits for the client's acknowledgement, up to 40 ms.
    stream.set_nodelay(true)?;
    let mut bytes = Vec::with_capacity(2048);
    loop {
        let asked = tokio::select! {
            biased;
            asked = timeout(REQUEST_LIMIT, next(&mut stream, &mut bytes)) => asked,
            _ = stop.changed() => return Ok(()),
        };
        match asked {
            Ok(Ok(Some(Ok(asked)))) => {
                let (answer, file) = answers.answer(&asked).await;
                send_answer(&stream, &answer, file.as_ref(), answers).await?;
                if !asked.keeps {
                    return finish(stream).await;
                }
            }
            Ok(Ok(Some(Err(status)))) => {
                answers.refuse(status);
                let answer = Asked::default().refuse(status, SystemTime::now());
                send_answer(&stream, &answer, None, answers).await?;
                return finish(stream).await;
            }
            Ok(Ok(None)) | Err(_) => return Ok(()),
            Ok(Err(error)) => return Err(error),
        }
    }
}

/// The next request; none when the client is done, or the status for one that is none.
async fn next(stream: &mut TcpStream, bytes: &mut Vec<u8>) -> io::Result<Option<Result<Box<Asked>, Status>>> {
    loop {
        if !bytes.is_empty() {
            match answer::read(bytes) {
                Head::Whole(asked, length) => {
                    bytes.drain(..length);
                    return Ok(Some(Ok(asked)));
                }
                Head::Wrong(status) => return Ok(Some(Err(status))),
                Head::Begun => {}
            }
        }
        if stream.read_buf(bytes).await? == 0 {
            return Ok(None);
        }
    }
}

/// Ends a connection so that the client gets all of the answer: what it has sent meanwhile would have the
/// kernel throw that away.
async fn finish(mut stream: TcpStream) -> io::Result<()> {
    rustix::net::shutdown(&stream, rustix::net::Shutdown::Write)?;
    let mut rest = [0; 4096];
    let drained = async { while stream.read(&mut rest).await.is_ok_and(|count| count > 0) {} };
    let _ = timeout(Duration::from_secs(1), drained).await;
    Ok(())
}

async fn send_answer(
    stream: &TcpStream,
    answer: &Answer,
    file: Option<&File>,
    answers: &impl Answers,
) -> io::Result<()> {
    let last = answer.parts.len();
    send_text(stream, answer.head.as_bytes(), last > 0).await?;
    for (part, number) in answer.parts.iter().zip(1..) {
        match part {
            Part::Text(text) => send_text(stream, text.as_bytes(), number < last).await?,
            Part::File(start, length) => {
                let file = file.ok_or(io::ErrorKind::NotFound)?;
                send_file(stream, file, *start, *length, answers).await?;
            }
        }
    }
    Ok(())
}

/// Does something that may have to wait for the client.
async fn ready(stream: &TcpStream, mut write: impl FnMut() -> io::Result<usize>) -> io::Result<usize> {
    loop {
        match stream.try_io(Interest::WRITABLE, &mut write) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                timeout(TAKE_LIMIT, stream.writable()).await.map_err(|_| io::ErrorKind::TimedOut)??;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

async fn send_text(stream: &TcpStream, mut text: &[u8], has_more: bool) -> io::Result<()> {
    let more = if has_more { SendFlags::MORE } else { SendFlags::empty() };
    while !text.is_empty() {
        let sent = ready(stream, || Ok(send(stream, text, more | SendFlags::NOSIGNAL)?)).await?;
        text = &text[sent..];
    }
    Ok(())
}

async fn send_file(
    stream: &TcpStream,
    file: &File,
    start: u64,
    length: u64,
    answers: &impl Answers,
) -> io::Result<()> {
    let (mut position, end) = (start, start + length);
    let mut turn = 0;
    while position < end {
        let most = usize::try_from((end - position).min(TURN)).unwrap_or(usize::MAX);
        let sent = ready(stream, || {
            let mut send = || Ok(sendfile(stream, file, Some(&mut position), most)?);
            // What is not in memory comes from the disk, and others are not to wait for that.
            if length >= LARGE { tokio::task::block_in_place(send) } else { send() }
        })
        .await?;
        if sent == 0 {
            // It was cut off on the disk since it was checked.
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        answers.count(sent as u64);
        turn += sent as u64;
        if turn >= TURN {
            turn = 0;
            tokio::task::yield_now().await;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connections_leave_descriptors_for_the_build() {
        assert_eq!([Some(1024), Some(20), None].map(most_connections), [256, 16, 4096]);
    }
}
