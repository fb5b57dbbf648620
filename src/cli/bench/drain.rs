//! `bench drain`: how fast a backlog goes to a handler.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use http::HeaderValue;
use serde_json::{Value, json};
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::arriving::arrived;
use super::connection::{Base, Connection};
use super::generator::PATIENCE;
use super::payload::{ENVELOPE_LEN, Stamps, ndjson};
use super::progress::Progress;
use super::report::{Figures, Unit, thousands};
use super::sink::Sink;
use super::target::Target;
use super::{Common, NDJSON, QUEUE, Receiving, count};

/// How many messages are filled in at once.
pub(super) const FILL_BATCH: u64 = 1000;
const FILL_CONNECTIONS: u64 = 4;
/// The longest body that is filled in at once.
const FILL_LEN_MAX: usize = 8 << 20;

/// What to drain.
#[derive(Debug, clap::Args)]
pub(super) struct Drain {
    /// How many messages wait when the queue is started
    #[arg(long, value_name = "N", default_value = "200000", value_parser = count(1..=100_000_000))]
    pub(super) messages: u64,
    /// Who handles them [default: service; with --url: http]
    #[arg(long, value_name = "KIND")]
    handler: Option<Kind>,
    #[command(flatten)]
    pub(super) receiving: Receiving,
    #[command(flatten)]
    pub(super) common: Common,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// A function in this process that does nothing: the pump as a library, without a server
    Service,
    /// A server, and an HTTP handler in this process that answers 200
    Http,
}

/// What a drain found.
#[derive(Debug)]
pub(super) struct Filled {
    /// How many waited.
    pub(super) messages: u64,
    /// How long it took to fill them in.
    pub(super) fill: Duration,
    /// From the start to the last one handled.
    pub(super) handled: Duration,
    /// From the start to the moment when nothing was left to settle.
    pub(super) settled: Duration,
    /// How many were handled.
    pub(super) delivered: u64,
    /// How many deliveries were repeats.
    pub(super) repeats: u64,
}

/// The same figures for every handler.
pub(super) fn figures(filled: &Filled) -> Figures {
    let mut figures = Figures::default();
    let messages = filled.messages;
    figures.add_rate("messages_per_second", "messages handled", messages, filled.handled);
    figures.add_rate("settled_per_second", "messages settled", messages, filled.settled);
    figures.add("seconds", "start to last handled", Unit::Seconds, filled.handled.as_secs_f64());
    figures.add_rate("filled_per_second", "filled before", messages, filled.fill);
    figures.add("sent", "messages sent", Unit::Count, messages as f64);
    figures.add("delivered", "messages delivered", Unit::Count, filled.delivered as f64);
    figures.add("repeats", "delivered again", Unit::Count, filled.repeats as f64);
    figures
}

impl Drain {
    /// Whether a function of this process handles them.
    pub(super) fn in_process(&self) -> bool {
        match self.handler {
            Some(kind) => kind == Kind::Service,
            None => !self.common.which.is_remote(),
        }
    }

    /// The queue's limit, if it is not to be the default.
    pub(super) fn concurrency(&self) -> Option<u32> {
        self.receiving.concurrency
    }

    /// Says what is wrong when the arguments are seen together.
    pub(super) fn check(&self) -> Result<(), String> {
        let which = &self.common.which;
        if which.bare {
            return Err(
                "a bare program has no queue to be stopped and started: drain needs a server"
                    .to_owned(),
            );
        }
        if self.in_process() && which.is_remote() {
            return Err(
                "--handler service is a function in this process, without a server: leave out \
                        --url, or say --handler http"
                    .to_owned(),
            );
        }
        Ok(())
    }

    /// What is measured, in a line.
    pub(super) fn what(&self) -> String {
        let handler = match (self.in_process(), self.concurrency()) {
            (true, None) => "a function, default settings".to_owned(),
            (true, Some(limit)) => format!("a function, {limit} at once"),
            (false, _) => format!("an HTTP handler, {} at once", self.receiving.limit()),
        };
        format!("{} messages into {handler}, ", thousands(self.messages as f64))
    }

    /// How it is measured.
    pub(super) fn settings(&self) -> Value {
        let concurrency = match self.in_process() {
            true => self.concurrency(),
            false => Some(self.receiving.limit()),
        };
        json!({
            "messages": self.messages,
            "handler": if self.in_process() { "service" } else { "http" },
            "concurrency": concurrency,
        })
    }

    /// Fills the stopped queue, starts it, and times until the last message reached the sink.
    pub(super) async fn run(
        &self,
        target: &Target,
        sink: &Sink,
        stamps: &Stamps,
        progress: &Progress,
    ) -> Result<Figures> {
        target.stop_queue().await?;
        let filling = Instant::now();
        let filled = Arc::new(AtomicU64::new(0));
        let messages = self.messages;
        let line = |_| format!("filled {} of {messages}", filled.load(Ordering::Relaxed));
        progress.during(line, self.fill(target, stamps, &filled)).await?;
        let fill = filling.elapsed();
        let waiting = target.depth().await?;
        if waiting.ready != messages {
            bail!("{messages} messages were filled in, and what waits is {waiting:?}");
        }

        let start = Instant::now();
        target.start_queue().await?;
        let line = |elapsed: Duration| {
            let so_far = sink.arrived() as f64;
            let rate = so_far / elapsed.as_secs_f64().max(1e-9);
            format!("handled {} of {messages}, {}/s", thousands(so_far), thousands(rate))
        };
        let settled = async {
            arrived(sink, messages).await?;
            target.settled().await
        };
        let settled = progress.during(line, settled).await?;
        let arrivals = sink.arrivals();
        let last = arrivals.last.context("nothing arrived")?;
        Ok(figures(&Filled {
            messages,
            fill,
            handled: last.saturating_duration_since(start),
            settled: settled - start,
            delivered: sink.arrived(),
            repeats: arrivals.repeats,
        }))
    }

    async fn fill(&self, target: &Target, stamps: &Stamps, filled: &Arc<AtomicU64>) -> Result<()> {
        let line = self.common.payload + ENVELOPE_LEN;
        let batch = FILL_BATCH.min((FILL_LEN_MAX / line) as u64).max(1);
        let mut tasks = JoinSet::new();
        for number in 0..FILL_CONNECTIONS {
            // What does not divide evenly goes to the first connections.
            let share = self.messages / FILL_CONNECTIONS
                + u64::from(number < self.messages % FILL_CONNECTIONS);
            let part = Part { share, batch, payload: self.common.payload };
            let (stamps, filled) = (stamps.clone(), Arc::clone(filled));
            tasks.spawn(fill_part(target.base.clone(), part, stamps, filled));
        }
        while let Some(done) = tasks.join_next().await {
            done??;
        }
        Ok(())
    }
}

#[derive(Debug, Clone, Copy)]
struct Part {
    share: u64,
    batch: u64,
    payload: usize,
}

async fn fill_part(base: Base, part: Part, stamps: Stamps, filled: Arc<AtomicU64>) -> Result<()> {
    let path = base.path(&format!("/v1/queues/{QUEUE}/messages/batch"))?;
    let media = HeaderValue::from_static(NDJSON);
    let mut connection = Connection::open(&base).await?;
    let mut left = part.share;
    while left > 0 {
        let some = left.min(part.batch);
        let body = ndjson((0..some).map(|_| stamps.payload(Instant::now(), part.payload)));
        let taken = timeout(PATIENCE, connection.post(&path, &media, body)).await;
        taken.context("the server does not answer a batch")??;
        left -= some;
        filled.fetch_add(some, Ordering::Relaxed);
    }
    Ok(())
}
