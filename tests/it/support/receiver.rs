//! A handler on a port of its own that records every delivery, and behaves as it is told.
//!
//! Written on a bare socket, because it must also do what no server library lets one do: answer half,
//! answer garbage, drip. How it can behave is in `mood`.

mod mood;

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use jiff::Timestamp;
use pumphouse::clock::{Clock, SystemClock};
use tokio::io::AsyncReadExt;
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use super::eventually;
use super::wire::{Parsed, read_message};

pub(crate) use mood::{Gate, Mood, Reply};

/// A handler. Dropped, it closes its port and its connections.
pub(crate) struct Receiver {
    address: SocketAddr,
    desk: Arc<Desk>,
    _closed_on_drop: DropGuard,
}

/// One request that came, and how it ended.
#[derive(Debug, Clone)]
pub(crate) struct Delivery {
    /// The path it came to; each queue of a test has its own.
    pub(crate) path: String,
    /// `webhook-id`.
    pub(crate) id: String,
    /// `Pumphouse-Attempt`.
    pub(crate) attempt: u32,
    /// All headers, names in lower case.
    pub(crate) headers: Vec<(String, String)>,
    /// The payload.
    pub(crate) body: Bytes,
    /// When it came, by the clock of this machine.
    pub(crate) at: Timestamp,
    /// When it came.
    pub(crate) started: Instant,
    /// When it was answered, or cut.
    pub(crate) ended: Option<Instant>,
    /// What it was answered; `None` while it is open, and for one without a whole answer.
    pub(crate) answered: Option<u16>,
}

impl Delivery {
    /// A header's value, or nothing.
    pub(crate) fn header(&self, name: &str) -> &str {
        let found = self.headers.iter().find(|(given, _)| given == name);
        found.map_or("", |(_, value)| value)
    }

    /// Whether it was answered with a 2xx.
    pub(crate) fn succeeded(&self) -> bool {
        self.answered.is_some_and(|status| (200..300).contains(&status))
    }
}

/// What all connections of a receiver write to.
#[derive(Default)]
struct Desk {
    moods: Mutex<HashMap<String, Mood>>,
    book: Mutex<Book>,
}

#[derive(Default)]
struct Book {
    deliveries: Vec<Delivery>,
    open: HashMap<String, usize>,
    /// Every change of how many were open on a path, in order.
    history: HashMap<String, Vec<(Instant, usize)>>,
    connections: usize,
}

impl Receiver {
    /// Opens a handler that acks whatever comes.
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let address = listener.local_addr().expect("it has an address");
        let (desk, closed) = (Arc::new(Desk::default()), CancellationToken::new());
        let tasks = TaskTracker::new();
        let accept = accept(listener, desk.clone(), tasks.clone(), closed.clone());
        tasks.spawn(closed.clone().run_until_cancelled_owned(accept));
        Self { address, desk, _closed_on_drop: closed.drop_guard() }
    }

    /// The URL of a path on it.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    /// From now on, deliveries to this path are treated so.
    pub(crate) fn set(&self, path: &str, mood: Mood) {
        self.desk.moods.lock().expect("no test panics with it").insert(path.to_owned(), mood);
    }

    /// Every delivery to this path so far, in the order they came.
    pub(crate) fn deliveries(&self, path: &str) -> Vec<Delivery> {
        let book = self.desk.book();
        book.deliveries.iter().filter(|delivery| delivery.path == path).cloned().collect()
    }

    /// Every delivery of this message so far.
    pub(crate) fn deliveries_of(&self, id: &str) -> Vec<Delivery> {
        let book = self.desk.book();
        book.deliveries.iter().filter(|delivery| delivery.id == id).cloned().collect()
    }

    /// How many deliveries have come to this path.
    pub(crate) fn count(&self, path: &str) -> usize {
        self.desk.book().deliveries.iter().filter(|delivery| delivery.path == path).count()
    }

    /// How many deliveries to this path were answered with a 2xx.
    pub(crate) fn successes(&self, path: &str) -> usize {
        let book = self.desk.book();
        let here = book.deliveries.iter().filter(|delivery| delivery.path == path);
        here.filter(|delivery| delivery.succeeded()).count()
    }

    /// How many are open on this path.
    pub(crate) fn open(&self, path: &str) -> usize {
        self.desk.book().open.get(path).copied().unwrap_or(0)
    }

    /// How many connections have been made to it.
    pub(crate) fn connections(&self) -> usize {
        self.desk.book().connections
    }

    /// How many were open on this path, at every change.
    pub(crate) fn history(&self, path: &str) -> Vec<(Instant, usize)> {
        self.desk.book().history.get(path).cloned().unwrap_or_default()
    }

    /// The most that were ever open on this path at once.
    pub(crate) fn most_open(&self, path: &str) -> usize {
        self.history(path).into_iter().map(|(_, open)| open).max().unwrap_or(0)
    }

    /// Waits until this path has had at least `count` deliveries; gives them.
    pub(crate) async fn wait_for(&self, path: &str, count: usize) -> Vec<Delivery> {
        let what = format!("{count} deliveries to {path}");
        eventually(&what, async || self.count(path) >= count).await;
        self.deliveries(path)
    }

    /// Waits until this message has come at least once; gives its deliveries.
    pub(crate) async fn wait_for_message(&self, id: &str) -> Vec<Delivery> {
        let what = format!("a delivery of {id}");
        eventually(&what, async || !self.deliveries_of(id).is_empty()).await;
        self.deliveries_of(id)
    }

    /// Waits until exactly `count` deliveries to this path are open.
    pub(crate) async fn wait_for_open(&self, path: &str, count: usize) {
        let what = format!("{count} open deliveries to {path}");
        eventually(&what, async || self.open(path) == count).await;
    }
}

impl Desk {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().expect("no test panics with it")
    }

    fn mood(&self, delivery: &Delivery) -> Mood {
        let moods = self.moods.lock().expect("no test panics with it");
        let mood = moods.get(&delivery.path).cloned().unwrap_or_else(Mood::ack);
        drop(moods);
        mood.for_delivery(delivery)
    }

    /// Writes down that a delivery came.
    fn begin(self: &Arc<Self>, request: Parsed) -> (Delivery, Open) {
        let path = request.first_line.split(' ').nth(1).unwrap_or_default().to_owned();
        let delivery = Delivery {
            path: path.clone(),
            id: request.header("webhook-id").to_owned(),
            attempt: request.header("pumphouse-attempt").parse().unwrap_or(0),
            headers: request.headers,
            body: request.body.into(),
            at: SystemClock.now(),
            started: Instant::now(),
            ended: None,
            answered: None,
        };
        let mut book = self.book();
        book.deliveries.push(delivery.clone());
        book.opened(&path);
        let number = book.deliveries.len() - 1;
        drop(book);
        (delivery, Open { desk: self.clone(), path, number, ended: false })
    }
}

impl Book {
    fn opened(&mut self, path: &str) {
        let open = self.open.entry(path.to_owned()).or_default();
        *open += 1;
        self.history.entry(path.to_owned()).or_default().push((Instant::now(), *open));
    }

    fn closed(&mut self, path: &str) {
        let open = self.open.entry(path.to_owned()).or_default();
        *open -= 1;
        self.history.entry(path.to_owned()).or_default().push((Instant::now(), *open));
    }
}

/// An open delivery. It ends when it is answered, and at the latest when its connection does.
struct Open {
    desk: Arc<Desk>,
    path: String,
    number: usize,
    ended: bool,
}

impl Open {
    /// Before the last byte goes out, because the pump may start the next delivery as soon as it has it.
    fn end(&mut self, answered: Option<u16>) {
        if std::mem::replace(&mut self.ended, true) {
            return;
        }
        let mut book = self.desk.book();
        book.closed(&self.path);
        let delivery = &mut book.deliveries[self.number];
        delivery.ended = Some(Instant::now());
        delivery.answered = answered;
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.end(None);
    }
}

async fn accept(
    listener: TcpListener,
    desk: Arc<Desk>,
    tasks: TaskTracker,
    closed: CancellationToken,
) {
    while let Ok((stream, _)) = listener.accept().await {
        desk.book().connections += 1;
        let serve = serve(stream, desk.clone());
        tasks.spawn(closed.clone().run_until_cancelled_owned(serve));
    }
}

/// One connection. Its errors are the other side's leaving, which the tests look at from that side.
async fn serve(mut stream: TcpStream, desk: Arc<Desk>) {
    let mut buffer = BytesMut::new();
    while let Ok(Some(request)) = read_message(&mut stream, &mut buffer).await {
        let (delivery, mut open) = desk.begin(request);
        let mood = desk.mood(&delivery);
        if !matches!(answer(&mut stream, mood, &mut open).await, Ok(true)) {
            return;
        }
    }
}

/// Answers one request; `true` if the connection may go on.
async fn answer(stream: &mut TcpStream, mood: Mood, open: &mut Open) -> io::Result<bool> {
    let (mut from, mut to) = stream.split();
    let mut nothing = [0];
    // Nothing more is sent on it before the answer, so whatever can be read is its end.
    tokio::select! {
        result = mood.act(&mut to, |status| open.end(status)) => result,
        _ = from.read(&mut nothing) => Ok(false),
    }
}

/// The span from a delivery's start to the start of the next one.
pub(crate) fn gaps(deliveries: &[Delivery]) -> Vec<Duration> {
    deliveries.windows(2).map(|pair| pair[1].started - pair[0].started).collect()
}
