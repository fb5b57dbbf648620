//! The handlers that come with the house: one that shows messages, one that drops them.

use std::convert::Infallible;
use std::io::{self, Write};
use std::sync::LazyLock;

use tokio::sync::{mpsc, oneshot};
use tower::service_fn;

use crate::model::{Builtin, Message};

use super::{Delivery, Handler, handler};

/// The built-in handler of this name.
pub fn builtin(name: Builtin) -> Handler {
    match name {
        Builtin::Log => handler(service_fn(show)),
        Builtin::Discard => handler(service_fn(async |_: Delivery| Ok::<_, Infallible>(()))),
    }
}

/// Shows a message on standard output, and acks.
///
/// This is the one place that prints a payload, because that is what an operator asked for by choosing
/// this handler. It goes to standard output, never to the log.
async fn show(delivery: Delivery) -> Result<(), io::Error> {
    static PRINTER: LazyLock<mpsc::Sender<Line>> = LazyLock::new(printer);
    let gone = |_| io::Error::other("nobody writes to standard output any more");
    let (printed, done) = oneshot::channel();
    let line = Line { text: line(&delivery.message, delivery.attempt), printed };
    PRINTER.send(line).await.map_err(|_| gone(()))?;
    done.await.map_err(|_| gone(()))?
}

/// A line to be printed, and who waits for that.
struct Line {
    text: String,
    printed: oneshot::Sender<io::Result<()>>,
}

/// A thread of its own for standard output: whoever reads it may stop reading (`| less`), and then only
/// the deliveries to this handler wait, until their time is up.
fn printer() -> mpsc::Sender<Line> {
    let (lines, mut waiting) = mpsc::channel::<Line>(LINES_WAITING_MAX);
    std::thread::spawn(move || {
        while let Some(line) = waiting.blocking_recv() {
            let mut out = io::stdout().lock();
            let printed = out.write_all(line.text.as_bytes()).and_then(|()| out.flush());
            let _ = line.printed.send(printed); // whoever gave up waiting has failed already
        }
    });
    lines
}

/// One line for one message: queue, id, attempt, type, size and the beginning of the payload.
fn line(message: &Message, attempt: u32) -> String {
    let head = &message.head;
    let kind = head.kind.as_deref().or(head.details.content_type.as_deref()).unwrap_or("-");
    let kind = kind.escape_debug();
    let size = message.body.len();
    let start = &message.body[..size.min(SHOWN)];
    // Escaped, because a payload may hold sequences that take over a terminal.
    let text = String::from_utf8_lossy(start).escape_debug().to_string();
    let more = if size > SHOWN { " …" } else { "" };
    format!("{} {} attempt {attempt} {kind} {size} bytes: {text}{more}\n", head.queue, head.id)
}

/// How many bytes of a payload are shown.
const SHOWN: usize = 200;
/// How many lines may wait to be printed.
const LINES_WAITING_MAX: usize = 64;
