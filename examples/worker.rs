//! A worker on the library: it pulls messages at its own pace, and goes in good order.
//!
//! Here it shares a file with those who send; with `Postgres::open` it runs on a machine of its own.

use std::sync::Arc;
use std::time::Duration;

use pumphouse::clock::SystemClock;
use pumphouse::model::{Handler, NewMessage, QueueName, QueueSettings, Ticket, Verdict};
use pumphouse::pump::{Pull, Pulled, Pumphouse, WorkersWord};
use pumphouse::store::{Precondition, Sqlite};

type Error = Box<dyn std::error::Error + Send + Sync>;

#[tokio::main]
async fn main() -> Result<(), Error> {
    let folder = std::env::args().nth(1).unwrap_or_else(|| ".".to_owned());
    let store =
        Sqlite::open(&format!("sqlite://{folder}/worker.db"), Arc::new(SystemClock)).await?;
    let pump = Pumphouse::builder(Arc::new(store)).start().await?;
    let jobs = QueueName::parse("jobs")?;
    let settings = QueueSettings { handler: Handler::Pull, ..QueueSettings::default() };
    pump.store().put_queue(&jobs, settings, Precondition::None).await?;
    for job in ["ink", "paper", "lead"] {
        pump.send(NewMessage::new(jobs.clone(), job)).await?;
    }

    let pull = Pull { max: 2, wait: Duration::from_secs(1), duration: None };
    while let Pulled::Leases(leases, _) = pump.pull(&jobs, pull.clone()).await? {
        if leases.is_empty() {
            break; // nothing for a second: this worker goes home
        }
        let done = leases.iter().map(|leased| {
            say(&format!("printed with {}", String::from_utf8_lossy(&leased.message.body)));
            WorkersWord::new(Ticket::from(&leased.lease), Verdict::Ack)
        });
        pump.hear(done.collect()).await?;
    }

    pump.shut_down(Duration::from_secs(10)).await;
    pump.store().close().await;
    Ok(())
}

#[expect(clippy::disallowed_macros, reason = "an example talks to whoever runs it")]
fn say(text: &str) {
    println!("{text}");
}
