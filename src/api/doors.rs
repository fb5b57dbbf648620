//! The accept loop: our own, because the ready-made one knows no time limit for a request's head, no cap on
//! connections and no end to its draining.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use hyper_util::server::graceful::{GracefulShutdown, Watcher};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Answers requests until `closing` is cancelled; then lets open ones go on for `deadline`, and cuts what
/// is left.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    closing: CancellationToken,
    deadline: Duration,
) {
    let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let graceful = GracefulShutdown::new();
    let tasks = TaskTracker::new();
    let cut = CancellationToken::new();
    let mut server = auto::Builder::new(TokioExecutor::new());
    // It counts from the end of the last request too, so that it also ends idle connections.
    server.http1().timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT);
    server
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEP_ALIVE)
        .max_concurrent_streams(256);
    loop {
        let accepted = async {
            let permit = Arc::clone(&connections).acquire_owned().await;
            (permit.expect("the semaphore is never closed"), listener.accept().await)
        };
        let Some((permit, accepted)) = closing.run_until_cancelled(accepted).await else { break };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                // Out of descriptors, most likely: others have to close first.
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let watcher = graceful.watcher();
        let open = connection(server.clone(), stream, router.clone(), watcher, closing.clone());
        let cut = cut.clone();
        tasks.spawn(async move {
            // Ended, or cut at the end of the draining: either way its place is free.
            let _ = cut.run_until_cancelled(open).await;
            drop(permit);
        });
    }
    drop(listener);
    tasks.close();
    let drained = async {
        graceful.shutdown().await;
        tasks.wait().await;
    };
    if tokio::time::timeout(deadline, drained).await.is_err() {
        tracing::warn!(open = tasks.len(), "requests were still open when the doors closed");
        cut.cancel();
        tasks.wait().await;
    }
}

/// One connection, from its first byte to its last.
async fn connection(
    server: auto::Builder<TokioExecutor>,
    stream: TcpStream,
    router: Router,
    watcher: Watcher,
    closing: CancellationToken,
) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "a connection without TCP_NODELAY");
    }
    let begins = tokio::time::timeout(HEAD_TIMEOUT, begins(&stream));
    if !matches!(closing.run_until_cancelled(begins).await, Some(Ok(Ok(())))) {
        return;
    }
    let service = TowerToHyperService::new(router);
    let connection = server.serve_connection(TokioIo::new(stream), service).into_owned();
    if let Err(error) = watcher.watch(connection).await {
        tracing::debug!(%error, "a connection ended early");
    }
}

/// Waits until it is clear which version of HTTP a connection speaks. The server would wait for that
/// without an end, and a client that says nothing would keep its place for ever.
async fn begins(stream: &TcpStream) -> io::Result<()> {
    let mut said = [0; HTTP2_PREFACE.len()];
    loop {
        let length = stream.peek(&mut said).await?;
        let is_clear = length == said.len() || !HTTP2_PREFACE.starts_with(&said[..length]);
        if length == 0 || is_clear {
            return Ok(());
        }
        // What was peeked at stays readable, so there is nothing to wait for but time.
        tokio::time::sleep(PREFACE_PAUSE).await;
    }
}

/// What an HTTP/2 connection begins with (RFC 9113, section 3.4).
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const PREFACE_PAUSE: Duration = Duration::from_millis(20);
/// How many connections are open at once; more wait to be accepted.
const CONNECTIONS_MAX: usize = 1024;
/// How long a request's head may take.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// How often an HTTP/2 connection shows that it is alive.
const KEEP_ALIVE: Duration = Duration::from_secs(20);
