//! `bench latency`: how long a message is on its way at a steady pace.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::Result;
use http::HeaderValue;
use serde_json::{Value, json};

use super::arriving::arrived;
use super::generator::{Bodies, Load, open_loop, scheduled};
use super::payload::Stamps;
use super::progress::Progress;
use super::report::{Figures, Unit, thousands};
use super::sink::Sink;
use super::target::Target;
use super::{Common, JSON, QUEUE, Receiving, Span, rate, seconds};

/// What to send.
#[derive(Debug, clap::Args)]
pub(super) struct Latency {
    /// How many messages a second, whatever becomes of those before
    #[arg(long, value_name = "PER_SECOND", default_value = "200", value_parser = rate)]
    rate: f64,
    /// How long to send
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    seconds: Span,
    #[command(flatten)]
    pub(super) receiving: Receiving,
    #[command(flatten)]
    pub(super) common: Common,
}

impl Latency {
    /// What is measured, in a line.
    pub(super) fn what(&self) -> String {
        format!("{} messages/s, {}, ", self.rate, self.seconds)
    }

    /// How it is measured.
    pub(super) fn settings(&self) -> Value {
        json!({
            "rate": self.rate,
            "seconds": self.seconds.0.as_secs_f64(),
            "concurrency": self.receiving.limit(),
        })
    }

    /// Sends on schedule, and waits until everything has arrived.
    pub(super) async fn run(
        &self,
        target: &Target,
        sink: &Sink,
        stamps: &Stamps,
        progress: &Progress,
    ) -> Result<Figures> {
        let taken = Arc::new(AtomicU64::new(0));
        let load = Arc::new(Load {
            base: target.base.clone(),
            path: target.base.path(&format!("/v1/queues/{QUEUE}/messages"))?,
            content_type: HeaderValue::from_static(JSON),
            bodies: Bodies::Stamped(stamps.clone(), self.common.payload),
            taken: Arc::clone(&taken),
        });
        let all = scheduled(self.rate, self.seconds.0);
        let line = |_: Duration| {
            let (sent, arrived) = (taken.load(Ordering::Relaxed), sink.arrived());
            format!("sent {sent} of {}, delivered {arrived}", thousands(all as f64))
        };
        let work = async {
            let found = open_loop(load, self.rate, self.seconds.0).await?;
            arrived(sink, all).await?;
            anyhow::Ok(found)
        };
        let found = progress.during(line, work).await?;

        let arrivals = sink.arrivals();
        let mut figures = Figures::default();
        for (key, label, at) in [
            ("delivered_p50_ms", "due to handler reached, p50", 0.5),
            ("delivered_p90_ms", "due to handler reached, p90", 0.9),
            ("delivered_p99_ms", "due to handler reached, p99", 0.99),
            ("delivered_max_ms", "due to handler reached, max", 1.0),
        ] {
            figures.add_time(key, label, &arrivals.times, at);
        }
        figures.add_time("answered_p50_ms", "due to answered, p50", &found.answered, 0.5);
        figures.add_time("answered_p99_ms", "due to answered, p99", &found.answered, 0.99);
        figures.add_time("late_p50_ms", "of it the generator's, p50", &found.late, 0.5);
        figures.add_time("late_p99_ms", "of it the generator's, p99", &found.late, 0.99);
        let sent = taken.load(Ordering::Relaxed);
        figures.add("sent", "messages sent", Unit::Count, sent as f64);
        figures.add("delivered", "messages delivered", Unit::Count, sink.arrived() as f64);
        figures.add("repeats", "delivered again", Unit::Count, arrivals.repeats as f64);
        Ok(figures)
    }
}
