//! A whole program with a queue of its own: SQLite, a handler, a layer of its own, a graceful stop.

use std::sync::Arc;
use std::time::Duration;

use pumphouse::clock::SystemClock;
use pumphouse::deliver::{BoxError, Delivery};
use pumphouse::model::{NewMessage, QueueName, Verdict};
use pumphouse::pump::{Pumphouse, Queue};
use pumphouse::store::Sqlite;
use tower::{ServiceBuilder, service_fn};

/// An error means: try again by the queue's recovery. A verdict means: I decided.
async fn welcome(delivery: Delivery) -> Result<Verdict, BoxError> {
    let user = std::str::from_utf8(&delivery.message.body)?;
    if user.is_empty() {
        return Ok(Verdict::DeadLetter { reason: "a welcome needs a user".to_owned() });
    }
    say(&format!("welcome, {user} (attempt {})", delivery.attempt));
    Ok(Verdict::Ack)
}

#[tokio::main]
async fn main() -> Result<(), BoxError> {
    let folder = std::env::args().nth(1).unwrap_or_else(|| ".".to_owned());
    let store = Sqlite::open(&format!("sqlite://{folder}/embed.db"), Arc::new(SystemClock)).await?;
    // Any tower layer goes around a handler; this one looks at each delivery before it is handled.
    let look = |delivery: Delivery| {
        say(&format!("{} has a message", delivery.message.head.queue));
        delivery
    };
    let handler = ServiceBuilder::new().map_request(look).service(service_fn(welcome));
    let queue = Queue::new("welcome", handler)?.concurrency(8);
    let pump = Pumphouse::builder(Arc::new(store)).queue(queue).start().await?;
    for user in ["ada", "grace"] {
        let message = NewMessage::new(QueueName::parse("welcome")?, user);
        let watch = pump.watch(message.id);
        pump.send(message).await?;
        watch.ended(Duration::from_secs(10), true).await?;
    }
    pump.shut_down(Duration::from_secs(30)).await;
    pump.store().close().await;
    Ok(())
}

#[expect(clippy::disallowed_macros, reason = "an example talks to whoever runs it")]
fn say(text: &str) {
    println!("{text}");
}
