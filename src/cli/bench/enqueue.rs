//! `bench enqueue`: how many messages are taken, each synced before it is answered.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Result, bail};
use http::HeaderValue;
use serde_json::{Value, json};

use super::generator::{Bodies, Load, Window, closed_loop};
use super::payload::{ENVELOPE_LEN, ndjson, plain};
use super::progress::Progress;
use super::report::{Figures, Unit, thousands};
use super::target::Target;
use super::{Common, JSON, NDJSON, QUEUE, Span, count, seconds, seconds_or_none};

/// The largest body of a batch that a server takes.
const BATCH_LEN_MAX: usize = 16 << 20;

/// What to send.
#[derive(Debug, clap::Args)]
pub(super) struct Enqueue {
    /// How many connections send, each its next request when the last was answered
    #[arg(long, value_name = "N", default_value = "64", value_parser = count(1..=4096))]
    connections: u64,
    /// How long to measure
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = seconds)]
    seconds: Span,
    /// How long to send before that, uncounted
    #[arg(long, value_name = "SECONDS", default_value = "0.5", value_parser = seconds_or_none)]
    warm_up: Span,
    /// Send NDJSON batches of so many messages, instead of a message a request
    #[arg(long, value_name = "N", value_parser = count(1..=10_000))]
    batch: Option<u64>,
    #[command(flatten)]
    pub(super) common: Common,
}

/// Nobody handles the queue, so that only the way in is measured.
pub(super) fn queue() -> Value {
    json!({ "handler": { "kind": "pull" } })
}

impl Enqueue {
    /// Says what is wrong when the arguments are seen together.
    pub(super) fn check(&self) -> Result<(), String> {
        let line = self.common.payload + ENVELOPE_LEN;
        let most = BATCH_LEN_MAX / line;
        match self.batch {
            Some(batch) if batch as usize > most => Err(format!(
                "a batch is at most 16 MiB, which is {most} messages of {} bytes: --batch {batch} is more",
                self.common.payload
            )),
            _ => Ok(()),
        }
    }

    /// What is measured, in a line.
    pub(super) fn what(&self) -> String {
        let batch = self.batch.map(|n| format!("batches of {n}, ")).unwrap_or_default();
        format!("{} connections, {}, {batch}", self.connections, self.seconds)
    }

    /// How it is measured.
    pub(super) fn settings(&self) -> Value {
        json!({
            "connections": self.connections,
            "seconds": self.seconds.0.as_secs_f64(),
            "warm_up": self.warm_up.0.as_secs_f64(),
            "batch": self.batch,
        })
    }

    /// Sends, and looks whether everything that was answered is there.
    pub(super) async fn run(&self, target: &Target, progress: &Progress) -> Result<Figures> {
        let payload = plain(self.common.payload);
        let (path, media, body, each) = match self.batch {
            None => ("messages", JSON, payload, 1),
            Some(batch) => {
                let lines = ndjson((0..batch).map(|_| payload.clone()));
                ("messages/batch", NDJSON, lines, batch)
            }
        };
        let taken = Arc::new(AtomicU64::new(0));
        let load = Arc::new(Load {
            base: target.base.clone(),
            path: target.base.path(&format!("/v1/queues/{QUEUE}/{path}"))?,
            content_type: HeaderValue::from_static(media),
            bodies: Bodies::Same(body, each),
            taken: Arc::clone(&taken),
        });
        let window = Window { warm_up: self.warm_up.0, counted: self.seconds.0 };
        let line = |elapsed: Duration| {
            let so_far = taken.load(Ordering::Relaxed) as f64;
            let rate = so_far / elapsed.as_secs_f64().max(1e-9);
            let all = (window.warm_up + window.counted).as_secs_f64();
            let (so_far, rate) = (thousands(so_far), thousands(rate));
            format!("sent {so_far}, {rate}/s, {:.0} of {all:.0} s", elapsed.as_secs_f64())
        };
        let work = closed_loop(load, self.connections as usize, window);
        let found = progress.during(line, work).await?;

        let all = taken.load(Ordering::Relaxed);
        let counted = found.times.len() * each;
        let mut figures = Figures::default();
        figures.add_rate("messages_per_second", "messages taken", counted, window.counted);
        figures.add_time("request_p50_ms", "request, p50", &found.times, 0.5);
        figures.add_time("request_p99_ms", "request, p99", &found.times, 0.99);
        figures.add("requests", "requests counted", Unit::Count, found.times.len() as f64);
        figures.add("sent", "messages sent", Unit::Count, all as f64);
        if !target.bare {
            let stored = target.depth().await?.ready;
            if stored != all {
                bail!("{all} messages were sent and acknowledged, and the queue holds {stored}");
            }
            figures.add("stored", "messages stored", Unit::Count, stored as f64);
        }
        Ok(figures)
    }
}
