//! `/metrics` for Prometheus.
//!
//! The handlers see the daemon only through a channel: they ask for text and get text.

use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

/// A wish for the metrics' text.
pub type Wish = oneshot::Sender<String>;

/// How long a scrape may wait. Prometheus's own limit is 10 s unless it is told otherwise.
const PATIENCE: Duration = Duration::from_secs(9);

/// Binds the address.
///
/// # Errors
/// When it is in use or not the host's.
pub async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Serves for as long as the daemon lives.
///
/// # Errors
/// When accepting fails for good.
pub async fn serve(listener: TcpListener, wishes: mpsc::Sender<Wish>) -> std::io::Result<()> {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/", get(|| async { "hostlerd: see /metrics\n" }))
        .with_state(wishes);
    axum::serve(listener, router).await
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
