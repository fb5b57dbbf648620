//! The way in: an HTTP server, and the POST that waits for its commit.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context as _;
use axum::Router;
use axum::extract::{Path, State};
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::post;
use axum::serve::ListenerExt as _;
use bytes::Bytes;
use clap::Args;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

#[derive(Args)]
pub struct Listen {
    /// Where to listen; port 0 takes a free one
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
}

/// What waits for the next commit.
pub enum Write {
    Insert(Insert),
    Delete(Delete),
}

pub struct Insert {
    pub queue: String,
    pub payload: Bytes,
    pub room: Option<OwnedSemaphorePermit>,
    pub answer: oneshot::Sender<i64>,
}

/// Carries the message's room, which is free again when the delete has been committed.
pub struct Delete {
    pub id: i64,
    #[expect(dead_code, reason = "held, to be dropped")]
    pub room: Option<OwnedSemaphorePermit>,
}

/// Serves until SIGTERM or SIGINT. What was not answered by then was not promised.
pub async fn serve(listen: Listen, router: Router) -> anyhow::Result<()> {
    let listener = TcpListener::bind(listen.listen).await.context("cannot listen")?;
    println!("listening on {}", listener.local_addr()?);
    // A connection that cannot have it is slower, not wrong.
    let listener = listener.tap_io(|stream| drop(stream.set_nodelay(true)));
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        served = async { axum::serve(listener, router).await } => served.context("cannot serve"),
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    }
}

/// Takes messages to the writer; with `room`, only as many as may be on their way at once.
pub fn messages(writes: mpsc::Sender<Write>, room: Option<Arc<Semaphore>>) -> Router {
    Router::new().route("/v1/queues/{queue}/messages", post(enqueue)).with_state((writes, room))
}

async fn enqueue(
    State((writes, room)): State<(mpsc::Sender<Write>, Option<Arc<Semaphore>>)>,
    Path(queue): Path<String>,
    payload: Bytes,
) -> impl IntoResponse {
    let room = match room {
        Some(room) => Some(room.acquire_owned().await.expect("room is never closed")),
        None => None,
    };
    let (answer, committed) = oneshot::channel();
    let insert = Insert { queue, payload, room, answer };
    writes.send(Write::Insert(insert)).await.expect("the writer ends with the process");
    let id = committed.await.expect("the writer ends with the process");
    created(id)
}

pub fn created(id: i64) -> impl IntoResponse {
    let json = [(header::CONTENT_TYPE, "application/json")];
    (StatusCode::CREATED, json, format!(r#"{{"id":"{id}"}}"#))
}

/// The end of the process when anything fails: a bare program has nothing to fall back on.
pub fn give_up(error: anyhow::Error) -> ! {
    eprintln!("error: {error:#}");
    std::process::exit(1)
}

/// How many writes wait for a commit at most.
pub const WRITES_WAITING_MAX: usize = 4096;
/// How many writes go into one commit at most.
pub const BATCH_MAX: usize = 1024;
