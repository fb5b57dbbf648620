//! The handler that does nothing: an HTTP server in this process that takes deliveries, tells each
//! message from its repeats, and knows how long it was on its way.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context, Result};
use bytes::Bytes;
use hdrhistogram::Histogram;
use http::{Method, Request, Response};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::generator::nanos;
use super::payload::{STAMP_LEN, Stamp, Stamps};
use super::report::histogram;

/// The highest number of a message that is told from its repeats: a bit each, so 125 MB at most.
const NUMBER_MAX: u64 = 1_000_000_000;

/// A running sink. Dropped, it listens no more.
#[derive(Debug)]
pub(super) struct Sink {
    address: SocketAddr,
    book: Arc<Book>,
    _open: DropGuard,
}

/// What arrived.
#[derive(Debug)]
pub(super) struct Book {
    stamps: Stamps,
    arrived: AtomicU64,
    pages: Mutex<Pages>,
}

#[derive(Debug)]
struct Pages {
    seen: Vec<u64>,
    repeats: u64,
    last: Option<Instant>,
    times: Histogram<u64>,
}

/// What had arrived by a moment.
#[derive(Debug)]
pub(super) struct Arrivals {
    /// Deliveries of messages that had been delivered before.
    pub(super) repeats: u64,
    /// When the last message arrived for the first time.
    pub(super) last: Option<Instant>,
    /// From each message's stamp to its first arrival, in nanoseconds.
    pub(super) times: Histogram<u64>,
}

impl Sink {
    /// Listens there for messages with these stamps.
    pub(super) async fn open(address: SocketAddr, stamps: Stamps) -> Result<Self> {
        let listener = TcpListener::bind(address).await;
        let listener = listener.with_context(|| format!("the sink cannot listen on {address}"))?;
        let address = listener.local_addr()?;
        let book = Arc::new(Book::new(stamps));
        let open = CancellationToken::new();
        TaskTracker::new().spawn(accept(listener, Arc::clone(&book), open.clone()));
        Ok(Self { address, book, _open: open.drop_guard() })
    }

    /// What is to be the URL of the queue's handler.
    pub(super) fn url(&self) -> String {
        format!("http://{}/", self.address)
    }

    /// How many messages arrived, without repeats.
    pub(super) fn arrived(&self) -> u64 {
        self.book.arrived.load(Ordering::Relaxed)
    }

    /// What arrived.
    pub(super) fn arrivals(&self) -> Arrivals {
        let pages = self.book.pages.lock().unwrap_or_else(PoisonError::into_inner);
        Arrivals { repeats: pages.repeats, last: pages.last, times: pages.times.clone() }
    }
}

async fn accept(listener: TcpListener, book: Arc<Book>, open: CancellationToken) {
    let tasks = TaskTracker::new();
    while let Some(accepted) = open.run_until_cancelled(listener.accept()).await {
        // One that failed is tried again by the server: it is a delivery like any other.
        let Ok((stream, _)) = accepted else { continue };
        // A connection that cannot have it is slower, not wrong.
        let _ = stream.set_nodelay(true);
        let (book, open) = (Arc::clone(&book), open.clone());
        tasks.spawn(async move {
            let service = service_fn(move |request| answer(request, Arc::clone(&book)));
            let serve = http1::Builder::new().serve_connection(TokioIo::new(stream), service);
            // How a connection ended, its other side knows.
            let _ = open.run_until_cancelled(serve).await;
        });
    }
}

async fn answer(
    request: Request<Incoming>,
    book: Arc<Book>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    if request.method() != Method::POST {
        let count = book.arrived.load(Ordering::Relaxed).to_string();
        return Ok(Response::new(Full::from(count)));
    }
    let reached = Instant::now();
    let mut body = request.into_body();
    let mut front = [0; STAMP_LEN];
    let mut filled = 0;
    while let Some(Ok(frame)) = body.frame().await {
        let Some(data) = frame.data_ref() else { continue };
        let more = data.len().min(STAMP_LEN - filled);
        front[filled..filled + more].copy_from_slice(&data[..more]);
        filled += more;
    }
    if let Some(stamp) = book.stamps.read(&front[..filled]) {
        book.enter(stamp, reached);
    }
    Ok(Response::new(Full::default()))
}

impl Book {
    fn new(stamps: Stamps) -> Self {
        let pages = Pages { seen: Vec::new(), repeats: 0, last: None, times: histogram() };
        Self { stamps, arrived: AtomicU64::new(0), pages: Mutex::new(pages) }
    }

    fn enter(&self, stamp: Stamp, reached: Instant) {
        if stamp.number >= NUMBER_MAX {
            return;
        }
        let (word, bit) = ((stamp.number / 64) as usize, 1 << (stamp.number % 64));
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        if pages.seen.len() <= word {
            pages.seen.resize(word + 1, 0);
        }
        if pages.seen[word] & bit != 0 {
            pages.repeats += 1;
            return;
        }
        pages.seen[word] |= bit;
        pages.last = Some(reached);
        pages.times.saturating_record(nanos(reached.saturating_duration_since(stamp.sent)));
        self.arrived.fetch_add(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_counts_once() {
        let stamps = Stamps::new();
        let book = Book::new(stamps.clone());
        let sent = Instant::now();
        for number in [0, 1, 200, 1] {
            book.enter(Stamp { number, sent }, sent);
        }
        let pages = book.pages.lock().unwrap();
        assert_eq!((book.arrived.load(Ordering::Relaxed), pages.repeats), (3, 1));
        assert_eq!(pages.times.len(), 3);
    }
}
