//! `/metrics` for Prometheus.
//!
//! Whoever can reach the port can write to it, so what reads it has no rights: it is this same program,
//! started as `hostlerd metrics-server`, which becomes nobody before it accepts the first connection. It
//! asks the daemon for text and gets text.

use std::io;
use std::net::{SocketAddr, TcpListener as BlockingListener};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hostler_protocol::frame::{Decoder, REPLY_LIMIT};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::net::{TcpListener, UnixStream};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use crate::confine::{self, ConfineError};
use crate::descriptors::{receive, send_all};
use crate::engine::Engine;
use crate::lines;

/// A wish for the metrics' text.
type Wish = oneshot::Sender<String>;

/// How long a scrape may wait. Prometheus's own limit is 10 s unless it is told otherwise.
const PATIENCE: Duration = Duration::from_secs(9);
/// What the server writes when it wants the text, and what it is sent first, with the listener beside it.
const WISH: u8 = b'?';

/// Binds the address.
///
/// # Errors
/// When it is in use or not the host's.
pub fn bind(address: SocketAddr) -> io::Result<BlockingListener> {
    let listener = BlockingListener::bind(address)?;
    listener.set_nonblocking(true)?;
    Ok(listener)
}

/// Has `program` serve for as long as the daemon lives; a server that ends is started anew.
pub async fn keep_serving(listener: BlockingListener, engine: Engine, program: PathBuf) {
    const PAUSE: Duration = Duration::from_secs(1);
    loop {
        let error = match lines::start(&program, &["metrics-server"]) {
            Ok((mut child, lines)) => {
                let error = converse(&listener, &engine, lines).await;
                // It may have ended by itself.
                let _ = child.kill();
                let _ = child.wait();
                error
            }
            Err(error) => error,
        };
        tracing::warn!("the metrics' server ended, and another is started: {error}");
        tokio::time::sleep(PAUSE).await;
    }
}

async fn converse(listener: &BlockingListener, engine: &Engine, mut lines: lines::Lines) -> io::Error {
    if let Err(error) = send_all(&lines.to_child, &[WISH], &[listener.as_fd()]).await {
        return error;
    }
    loop {
        match lines.from_child.read_u8().await {
            Ok(WISH) => {}
            Ok(_) => return io::ErrorKind::InvalidData.into(),
            Err(error) => return error,
        }
        let mut text = engine.metrics_text().await.unwrap_or_else(|error| {
            tracing::error!("the metrics could not be encoded: {error}");
            String::new()
        });
        text.push('\0');
        match timeout(PATIENCE, send_all(&lines.to_child, text.as_bytes(), &[])).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => return error,
            Err(late) => return late.into(),
        }
    }
}

/// Why the server stopped.
#[derive(Debug, thiserror::Error)]
pub enum ServerFailure {
    /// It has too many rights.
    #[error(transparent)]
    Confine(#[from] ConfineError),
    /// Its lines to the daemon, or the port.
    #[error("serving the metrics failed; this is started by hostlerd only, never by hand")]
    Io(#[from] io::Error),
}

/// The server itself.
///
/// # Errors
/// When it cannot give up root, and when the daemon or the port cannot be used.
pub fn serve() -> Result<(), ServerFailure> {
    confine::become_nobody()?;
    let (daemon, pipe) = lines::own()?;
    let mut passed = Vec::new();
    receive(&daemon, &mut [0], &mut passed)?;
    let listener = passed.pop().ok_or(io::ErrorKind::InvalidData).map_err(io::Error::from)?;
    daemon.set_nonblocking(true)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_io().enable_time().build()?;
    let (listener, daemon, pipe) = {
        let _entered = runtime.enter();
        (
            TcpListener::from_std(listener.into())?,
            UnixStream::from_std(daemon)?,
            pipe::Sender::from_owned_fd(pipe)?,
        )
    };
    // Nobody has been talked to so far.
    confine::seal_server()?;
    runtime.block_on(async {
        let (wishes, wished) = mpsc::channel(16);
        tokio::select! {
            asked = ask(wished, daemon, pipe) => Ok(asked?),
            served = axum::serve(listener, router(wishes)).into_future() => Ok(served?),
        }
    })
}

fn router(wishes: mpsc::Sender<Wish>) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/", get(|| async { "hostlerd: see /metrics\n" }))
        .with_state(wishes)
}

/// Has the daemon fulfil wishes, one after the other, until it ends.
async fn ask(
    mut wished: mpsc::Receiver<Wish>,
    mut daemon: UnixStream,
    mut pipe: pipe::Sender,
) -> io::Result<()> {
    let mut decoder = Decoder::new(REPLY_LIMIT);
    let mut buffer = vec![0u8; 64 * 1024];
    loop {
        let wish = tokio::select! {
            wish = wished.recv() => wish,
            // It says nothing unasked: this is its end.
            _ = daemon.read(&mut buffer) => return Ok(()),
        };
        let Some(wish) = wish else { return Ok(()) };
        pipe.write_u8(WISH).await?;
        let text = loop {
            match decoder.next_message().map_err(io::Error::other)? {
                Some(text) => break text,
                None => match daemon.read(&mut buffer).await? {
                    0 => return Ok(()),
                    count => decoder.push(&buffer[..count]),
                },
            }
        };
        // Whoever asked may have gone.
        let _ = wish.send(String::from_utf8_lossy(&text).into_owned());
    }
}

async fn metrics(State(wishes): State<mpsc::Sender<Wish>>) -> Response {
    let (wish, text) = oneshot::channel();
    let asked = async {
        wishes.send(wish).await.ok()?;
        text.await.ok()
    };
    match timeout(PATIENCE, asked).await {
        Ok(Some(text)) => {
            ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response()
        }
        Ok(None) => (StatusCode::SERVICE_UNAVAILABLE, "hostlerd is stopping\n").into_response(),
        Err(_) => (StatusCode::GATEWAY_TIMEOUT, "the host did not answer in time\n").into_response(),
    }
}
