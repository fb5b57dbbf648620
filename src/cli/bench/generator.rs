//! The load: requests one after another on each of many connections, or requests at their scheduled times.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};
use bytes::Bytes;
use hdrhistogram::Histogram;
use http::{HeaderValue, Uri};
use tokio::sync::mpsc;
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::timeout;

use super::connection::{Base, Connection};
use super::payload::Stamps;
use super::report::histogram;

/// How long answers are waited for that should have come by the end.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// How many requests of an open loop may be open at once; more wait, and their latency counts on.
const OPEN_MAX: usize = 1024;
/// How many connections an open loop has before it starts.
const READY_MIN: usize = 8;

/// Where to send, and what.
#[derive(Debug)]
pub(super) struct Load {
    /// Which server.
    pub(super) base: Base,
    /// Which path of it.
    pub(super) path: Uri,
    /// The media type of all bodies.
    pub(super) content_type: HeaderValue,
    /// The bodies.
    pub(super) bodies: Bodies,
    /// How many messages were taken so far.
    pub(super) taken: Arc<AtomicU64>,
}

/// What the requests carry.
#[derive(Debug)]
pub(super) enum Bodies {
    /// The same bytes, so many messages each time.
    Same(Bytes, u64),
    /// One message of this size, stamped.
    Stamped(Stamps, usize),
}

impl Bodies {
    fn next(&self, at: Instant) -> (Bytes, u64) {
        match self {
            Self::Same(body, messages) => (body.clone(), *messages),
            Self::Stamped(stamps, size) => (stamps.payload(at, *size), 1),
        }
    }
}

/// When requests are sent, and which of them count.
#[derive(Debug, Clone, Copy)]
pub(super) struct Window {
    /// How long they are sent before they count.
    pub(super) warm_up: Duration,
    /// How long they count.
    pub(super) counted: Duration,
}

/// What a closed loop found.
#[derive(Debug)]
pub(super) struct Closed {
    /// When it began to count.
    pub(super) begin: Instant,
    /// How long each counted request took, in nanoseconds.
    pub(super) times: Histogram<u64>,
}

/// Each connection sends its next request when the last one was answered.
///
/// A request counts if it was answered within the window. Fails at the first refusal: a load that was
/// refused is no measurement.
pub(super) async fn closed_loop(
    load: Arc<Load>,
    connections: usize,
    window: Window,
) -> Result<Closed> {
    let mut open = Vec::new();
    for _ in 0..connections {
        open.push(Connection::open(&load.base).await?);
    }
    let begin = Instant::now() + window.warm_up;
    let end = begin + window.counted;
    let mut tasks = JoinSet::new();
    for connection in open {
        tasks.spawn(one_after_another(connection, Arc::clone(&load), begin, end));
    }
    let all = async {
        let mut times = histogram();
        while let Some(done) = tasks.join_next().await {
            times.add(done??)?;
        }
        Ok(Closed { begin, times })
    };
    within(window.warm_up + window.counted, all).await
}

async fn one_after_another(
    mut connection: Connection,
    load: Arc<Load>,
    begin: Instant,
    end: Instant,
) -> Result<Histogram<u64>> {
    let mut times = histogram();
    loop {
        let sent = Instant::now();
        if sent >= end {
            return Ok(times);
        }
        let (body, messages) = load.bodies.next(sent);
        connection.post(&load.path, &load.content_type, body).await?;
        load.taken.fetch_add(messages, Ordering::Relaxed);
        let answered = Instant::now();
        if answered >= begin && answered < end {
            times.saturating_record(nanos(answered - sent));
        }
    }
}

/// What an open loop found.
#[derive(Debug)]
pub(super) struct Open {
    /// From the scheduled time to the answer, in nanoseconds.
    pub(super) answered: Histogram<u64>,
    /// From the scheduled time to the moment of sending: the generator's own share.
    pub(super) late: Histogram<u64>,
}

/// Starts each request at its scheduled time, whatever became of those before it.
///
/// Latency counts from the scheduled time. A generator that waits for an answer before it sends the next
/// request sends none while the server stalls, and so measures the stall once instead of once for each
/// request that would have met it: Gil Tene named this coordinated omission, and his wrk2 and
/// HdrHistogram are where the remedy comes from (https://github.com/giltene/wrk2, "acknowledging
/// coordinated omission").
pub(super) async fn open_loop(load: Arc<Load>, rate: f64, span: Duration) -> Result<Open> {
    let mut idle = Vec::new();
    for _ in 0..READY_MIN {
        idle.push(Connection::open(&load.base).await?);
    }
    within(span, on_schedule(load, idle, schedule(rate, span))).await
}

async fn on_schedule(
    load: Arc<Load>,
    mut idle: Vec<Connection>,
    mut due: mpsc::Receiver<Instant>,
) -> Result<Open> {
    let mut open = Open { answered: histogram(), late: histogram() };
    let mut tasks = JoinSet::new();
    while let Some(at) = due.recv().await {
        while let Some(done) = tasks.try_join_next() {
            idle.push(open.count(done??));
        }
        if tasks.len() >= OPEN_MAX
            && let Some(done) = tasks.join_next().await
        {
            idle.push(open.count(done??));
        }
        tasks.spawn(send_scheduled(idle.pop(), Arc::clone(&load), at));
    }
    while let Some(done) = tasks.join_next().await {
        open.count(done??);
    }
    Ok(open)
}

struct Sent {
    connection: Connection,
    late: Duration,
    answered: Duration,
}

async fn send_scheduled(
    connection: Option<Connection>,
    load: Arc<Load>,
    at: Instant,
) -> Result<Sent> {
    let mut connection = match connection {
        Some(connection) => connection,
        None => Connection::open(&load.base).await?,
    };
    let (body, messages) = load.bodies.next(at);
    let late = at.elapsed();
    connection.post(&load.path, &load.content_type, body).await?;
    load.taken.fetch_add(messages, Ordering::Relaxed);
    Ok(Sent { connection, late, answered: at.elapsed() })
}

impl Open {
    fn count(&mut self, sent: Sent) -> Connection {
        self.late.saturating_record(nanos(sent.late));
        self.answered.saturating_record(nanos(sent.answered));
        sent.connection
    }
}

/// How many requests there are at this rate in this span.
pub(super) fn scheduled(rate: f64, span: Duration) -> u64 {
    (rate * span.as_secs_f64()).round().max(1.0) as u64
}

/// Says when each request is due, at that moment. From a thread: the runtime's timers only know whole
/// milliseconds, which is as long as what is to be measured. It ends when nobody listens.
fn schedule(rate: f64, span: Duration) -> mpsc::Receiver<Instant> {
    let (tell, due) = mpsc::channel(OPEN_MAX);
    let start = Instant::now();
    spawn_blocking(move || {
        for number in 0..scheduled(rate, span) {
            // From the number, so that no error adds up.
            let at = start + Duration::from_secs_f64(number as f64 / rate);
            wait_until(at);
            if tell.blocking_send(at).is_err() {
                return;
            }
        }
    });
    due
}

fn wait_until(at: Instant) {
    loop {
        let left = at.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        thread::park_timeout(left);
    }
}

/// The span itself and [`PATIENCE`]: a server that has gone silent ends the measurement.
async fn within<T>(span: Duration, work: impl Future<Output = Result<T>>) -> Result<T> {
    let done = timeout(span + PATIENCE, work).await;
    done.map_err(|_| anyhow!("answers did not come within {PATIENCE:?} after the last request"))?
}

pub(super) fn nanos(span: Duration) -> u64 {
    u64::try_from(span.as_nanos()).unwrap_or(u64::MAX)
}
