//! How a handler behaves towards one delivery: well, late, never, or badly.

use std::future::pending;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::Semaphore;
use tokio::time::sleep;

use super::Delivery;
use crate::support::chance::mix;

/// How to behave.
#[derive(Clone)]
pub(crate) enum Mood {
    /// Answers at once.
    Answer(Reply),
    /// Answers after a while.
    Slow(Duration, Reply),
    /// Answers once its gate lets it.
    Held(Gate, Reply),
    /// Serves so many at once as this has places, each for a while, and lets the others wait: a handler with a knee.
    Counter(Arc<Semaphore>, Duration),
    /// Never answers, and keeps the connection.
    Hang,
    /// Sends a good head, and then its body a byte at a time, without an end.
    Drip,
    /// Closes the connection without a word.
    Close,
    /// Announces ten bytes, sends three and closes.
    HalfAnswer,
    /// Sends what is no HTTP.
    Garbage,
    /// Acks with a body of so many bytes.
    Huge(usize),
    /// Whatever this says for the delivery.
    By(Arc<dyn Fn(&Delivery) -> Mood + Send + Sync>),
}

/// An answer.
#[derive(Debug, Clone)]
pub(crate) struct Reply {
    status: u16,
    headers: Vec<(String, String)>,
    body: String,
}

/// Holds deliveries until it is told to let some through.
#[derive(Clone)]
pub(crate) struct Gate(Arc<Semaphore>);

impl Mood {
    /// 200, without a body.
    pub(crate) fn ack() -> Self {
        Self::status(200)
    }

    /// This status, without a body.
    pub(crate) fn status(status: u16) -> Self {
        Self::Answer(Reply::new(status))
    }

    /// Acks after a while.
    pub(crate) fn slow(span: Duration) -> Self {
        Self::Slow(span, Reply::new(200))
    }

    /// Acks once the gate lets it.
    pub(crate) fn held(gate: &Gate) -> Self {
        Self::Held(gate.clone(), Reply::new(200))
    }

    /// Serves so many at once, each for so long, and acks.
    pub(crate) fn counter(places: usize, span: Duration) -> Self {
        Self::Counter(Arc::new(Semaphore::new(places)), span)
    }

    /// What this function says for each delivery.
    pub(crate) fn by(choose: impl Fn(&Delivery) -> Self + Send + Sync + 'static) -> Self {
        Self::By(Arc::new(choose))
    }

    /// Fails one delivery in five with a 500: always the same ones for the same ids.
    pub(crate) fn one_in_five_fails() -> Self {
        Self::by(|delivery| if fails(delivery) { Self::status(500) } else { Self::ack() })
    }

    pub(super) fn for_delivery(self, delivery: &Delivery) -> Self {
        match self {
            Self::By(choose) => choose(delivery).for_delivery(delivery),
            Self::Answer(_)
            | Self::Slow(..)
            | Self::Held(..)
            | Self::Counter(..)
            | Self::Hang
            | Self::Drip
            | Self::Close
            | Self::HalfAnswer
            | Self::Garbage
            | Self::Huge(_) => self,
        }
    }

    /// Does it; calls `end` right before the last byte. `true` if the connection may go on.
    pub(super) async fn act(
        self,
        to: &mut (impl AsyncWrite + Unpin),
        mut end: impl FnMut(Option<u16>),
    ) -> io::Result<bool> {
        let reply = match self {
            Self::Answer(reply) => reply,
            Self::Slow(span, reply) => {
                sleep(span).await;
                reply
            }
            Self::Held(gate, reply) => {
                gate.pass().await;
                reply
            }
            Self::Counter(places, span) => {
                let _place = places.acquire().await.expect("nobody closes it");
                sleep(span).await;
                Reply::new(200)
            }
            Self::Hang => pending().await,
            Self::Drip => return drip(to).await,
            Self::Close => return Ok(false),
            Self::HalfAnswer => {
                to.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc").await?;
                return Ok(false);
            }
            Self::Garbage => {
                to.write_all(b"\x16\x03\x01 this is no HTTP\r\n\r\n").await?;
                return Ok(false);
            }
            Self::Huge(size) => return huge(to, size, end).await,
            Self::By(_) => unreachable!("`for_delivery` has chosen"),
        };
        end(Some(reply.status));
        to.write_all(reply.bytes().as_bytes()).await?;
        Ok(true)
    }
}

/// Whether this delivery is one of the five.
fn fails(delivery: &Delivery) -> bool {
    let fold = |sum: u64, byte: u8| mix(sum ^ u64::from(byte));
    let mixed = delivery.id.bytes().fold(u64::from(delivery.attempt), fold);
    mixed % 5 == 0
}

async fn drip(to: &mut (impl AsyncWrite + Unpin)) -> io::Result<bool> {
    to.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 1000000\r\n\r\n").await?;
    loop {
        to.write_all(b".").await?;
        sleep(Duration::from_millis(20)).await;
    }
}

async fn huge(
    to: &mut (impl AsyncWrite + Unpin),
    size: usize,
    mut end: impl FnMut(Option<u16>),
) -> io::Result<bool> {
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {size}\r\n\r\n");
    to.write_all(head.as_bytes()).await?;
    // The pump may hang up once it has read as much as it wants: for it, this was an answer.
    end(Some(200));
    let block = vec![b'x'; 64 * 1024];
    let mut left = size;
    while left > 0 {
        let part = left.min(block.len());
        to.write_all(&block[..part]).await?;
        left -= part;
    }
    Ok(true)
}

impl Reply {
    /// An answer of this status, with no header and no body.
    pub(crate) fn new(status: u16) -> Self {
        Self { status, headers: Vec::new(), body: String::new() }
    }

    /// The same with a header more.
    #[must_use]
    pub(crate) fn header(mut self, name: &str, value: &str) -> Self {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The same with this body.
    #[must_use]
    pub(crate) fn body(mut self, body: impl Into<String>) -> Self {
        self.body = body.into();
        self
    }

    fn bytes(&self) -> String {
        let mut text = format!("HTTP/1.1 {} Whatever\r\n", self.status);
        for (name, value) in &self.headers {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        // A 204 and a 304 have no body, and no length of one.
        if !matches!(self.status, 204 | 304) {
            text.push_str(&format!("content-length: {}\r\n", self.body.len()));
        }
        text + "\r\n" + &self.body
    }
}

impl From<Reply> for Mood {
    fn from(reply: Reply) -> Self {
        Self::Answer(reply)
    }
}

impl Gate {
    /// A gate that lets nothing through.
    pub(crate) fn closed() -> Self {
        Self(Arc::new(Semaphore::new(0)))
    }

    /// Lets this many deliveries through, those that wait and those that come.
    pub(crate) fn let_through(&self, count: usize) {
        self.0.add_permits(count);
    }

    /// Lets everything through from now on.
    pub(crate) fn open(&self) {
        self.0.close();
    }

    /// A closed semaphore is an open gate: then there is nothing to wait for.
    async fn pass(&self) {
        if let Ok(permit) = self.0.acquire().await {
            permit.forget();
        }
    }
}
