//! The handlers that come with the house: one that shows messages, one that drops them.

use std::convert::Infallible;
use std::io::{self, Write};

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
    let line = line(&delivery.message, delivery.attempt);
    let mut out = io::stdout().lock();
    out.write_all(line.as_bytes())?;
    out.flush()
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
