//! Drain into a function of this process: the pump as a library, as any program would embed it.

use std::convert::Infallible;
use std::future::ready;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tower::service_fn;

use crate::cli::config::Logging;
use crate::cli::log;
use crate::deliver::Delivery;
use crate::model::{NewMessage, QueueName};
use crate::pump::{Pumphouse, Queue, Stop};
use crate::store::{Enqueue, EnqueueOutcome, Enqueued, Precondition, Store};

use super::QUEUE;
use super::drain::{Drain, FILL_BATCH, Filled, figures};
use super::payload::plain;
use super::place::Place;
use super::progress::Progress;
use super::report::{Figures, thousands};
use super::target::{POLL, STANDSTILL_MAX};

/// How long the pump may take to end.
const GOODBYE_MAX: Duration = Duration::from_secs(10);

/// Fills a stopped queue, starts it, and times until the last message was handled.
pub(super) async fn run(
    drain: &Drain,
    place: &Place,
    progress: &Progress,
    stop: &CancellationToken,
) -> Result<Option<Figures>> {
    // A delivery or a write that fails is told; a second run in this process finds that it is told already.
    let _ = log::begin(&Logging { filter: "warn".to_owned(), json: false });
    let store = place.store().await?;
    let measured = measure(drain, &store, progress, stop).await;
    store.close().await;
    measured
}

async fn measure(
    drain: &Drain,
    store: &Arc<dyn Store>,
    progress: &Progress,
    stop: &CancellationToken,
) -> Result<Option<Figures>> {
    let handled = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&handled);
    let handler = service_fn(move |_: Delivery| {
        count.fetch_add(1, Ordering::Relaxed);
        ready(Ok::<(), Infallible>(()))
    });
    let mut queue = Queue::new(QUEUE, handler)?;
    if let Some(limit) = drain.concurrency() {
        queue = queue.concurrency(limit);
    }
    let name = QueueName::parse(QUEUE)?;
    let pump = Pumphouse::builder(Arc::clone(store)).queue(queue).start().await;
    let pump = pump.context("cannot start the pump")?;
    let measured =
        stop.run_until_cancelled(fill_and_drain(drain, &pump, &name, &handled, progress));
    let measured = measured.await.transpose();
    pump.shut_down(GOODBYE_MAX).await;
    let deleted = store.delete_queue(&name, true, Precondition::None).await;
    deleted.with_context(|| format!("cannot delete the queue {QUEUE}"))?;
    measured
}

async fn fill_and_drain(
    drain: &Drain,
    pump: &Pumphouse,
    name: &QueueName,
    handled: &AtomicU64,
    progress: &Progress,
) -> Result<Figures> {
    let messages = drain.messages;
    let halt = Stop { deadline: Duration::ZERO, by: "bench".to_owned(), reason: None, until: None };
    pump.stop_queue(name, halt).await?;
    let filling = Instant::now();
    let sent = AtomicU64::new(0);
    let line = |_| format!("filled {} of {messages}", sent.load(Ordering::Relaxed));
    progress.during(line, fill(drain, pump, name, &sent)).await?;
    let filled = filling.elapsed();

    let start = Instant::now();
    pump.start_queue(name).await?;
    let line = |elapsed: Duration| {
        let so_far = handled.load(Ordering::Relaxed) as f64;
        let rate = so_far / elapsed.as_secs_f64().max(1e-9);
        format!("handled {} of {messages}, {}/s", thousands(so_far), thousands(rate))
    };
    let (last, settled) = progress.during(line, all_handled(pump, name, handled, messages)).await?;
    let delivered = handled.load(Ordering::Relaxed);
    Ok(figures(&Filled {
        messages,
        fill: filled,
        handled: last - start,
        settled: settled - start,
        delivered: messages,
        repeats: delivered.saturating_sub(messages),
    }))
}

async fn fill(drain: &Drain, pump: &Pumphouse, name: &QueueName, sent: &AtomicU64) -> Result<()> {
    let body = plain(drain.common.payload);
    while sent.load(Ordering::Relaxed) < drain.messages {
        let left = drain.messages - sent.load(Ordering::Relaxed);
        let some = left.min(FILL_BATCH);
        let messages = (0..some).map(|_| NewMessage::new(name.clone(), body.clone())).collect();
        let taken = pump.enqueue(Enqueue { messages, atomic: true, batch: None }).await?;
        match taken {
            EnqueueOutcome::Done(all) if all.iter().all(|one| matches!(one, Enqueued::New(_))) => {
                sent.fetch_add(some, Ordering::Relaxed);
            }
            other => bail!("the store did not take a batch: {other:?}"),
        }
    }
    Ok(())
}

/// When the last message was handled, and when nothing was left to settle.
async fn all_handled(
    pump: &Pumphouse,
    name: &QueueName,
    handled: &AtomicU64,
    messages: u64,
) -> Result<(Instant, Instant)> {
    let mut before = (0, Instant::now());
    let last = loop {
        let now = handled.load(Ordering::Relaxed);
        if now >= messages {
            break Instant::now();
        }
        if now != before.0 {
            before = (now, Instant::now());
        } else if before.1.elapsed() > STANDSTILL_MAX {
            bail!("nothing was handled for {STANDSTILL_MAX:?}, at {now} of {messages}");
        }
        sleep(LOOK).await;
    };
    let start = Instant::now();
    loop {
        let depths = pump.store().depths().await?;
        let waits = |depth: &&crate::store::Depth| depth.queue == *name;
        let left = depths.iter().find(waits).map_or(0, |d| d.ready + d.scheduled + d.leased);
        if left == 0 {
            return Ok((last, Instant::now()));
        }
        if start.elapsed() > STANDSTILL_MAX {
            bail!("{left} messages were not settled within {STANDSTILL_MAX:?}");
        }
        sleep(POLL).await;
    }
}

/// How often handled messages are counted: what a drain's time can be wrong by.
const LOOK: Duration = Duration::from_millis(1);
