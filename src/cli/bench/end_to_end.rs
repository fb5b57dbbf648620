//! `bench end-to-end`: messages come in and go out at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use http::HeaderValue;
use serde_json::{Value, json};

use super::arriving::arrived;
use super::generator::{Bodies, Load, Window, closed_loop};
use super::payload::Stamps;
use super::progress::Progress;
use super::report::{Figures, Unit, thousands};
use super::sink::Sink;
use super::target::Target;
use super::{Common, JSON, QUEUE, Receiving, Span, count, seconds};

/// What to send.
#[derive(Debug, clap::Args)]
pub(super) struct EndToEnd {
    /// How many connections send, each its next message when the last was answered
    #[arg(long, value_name = "N", default_value = "64", value_parser = count(1..=4096))]
    connections: u64,
    /// How long to send; the time that is counted ends when the last message is settled
    #[arg(long, value_name = "SECONDS", default_value = "10", value_parser = seconds)]
    seconds: Span,
    #[command(flatten)]
    pub(super) receiving: Receiving,
    #[command(flatten)]
    pub(super) common: Common,
}

impl EndToEnd {
    /// What is measured, in a line.
    pub(super) fn what(&self) -> String {
        format!("{} connections, {}, ", self.connections, self.seconds)
    }

    /// How it is measured.
    pub(super) fn settings(&self) -> Value {
        json!({
            "connections": self.connections,
            "seconds": self.seconds.0.as_secs_f64(),
            "concurrency": self.receiving.limit(),
        })
    }

    /// Sends until the time is over, and waits until everything is delivered and settled.
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
        let window = Window { warm_up: Duration::ZERO, counted: self.seconds.0 };
        let line = |elapsed: Duration| {
            let (sent, arrived) = (taken.load(Ordering::Relaxed), sink.arrived());
            let rate = arrived as f64 / elapsed.as_secs_f64().max(1e-9);
            let (sent, arrived) = (thousands(sent as f64), thousands(arrived as f64));
            format!("sent {sent}, delivered {arrived}, {}/s", thousands(rate))
        };
        let work = async {
            let found = closed_loop(load, self.connections as usize, window).await?;
            let sent = taken.load(Ordering::Relaxed);
            arrived(sink, sent).await?;
            // A bare program does not tell when it has settled.
            let settled = if target.bare { None } else { Some(target.settled().await?) };
            anyhow::Ok((found, sent, settled))
        };
        let (found, sent, settled) = progress.during(line, work).await?;

        let arrivals = sink.arrivals();
        let end: Instant = match settled {
            Some(settled) => settled,
            None => arrivals.last.context("nothing arrived")?,
        };
        let took = end.saturating_duration_since(found.begin);
        let (label, span) = match settled {
            Some(_) => ("messages delivered and settled", "first sent to last settled"),
            None => ("messages delivered", "first sent to last delivered"),
        };
        let mut figures = Figures::default();
        figures.add_rate("messages_per_second", label, sent, took);
        figures.add_time("delivered_p50_ms", "sent to handler reached, p50", &arrivals.times, 0.5);
        figures.add_time("delivered_p99_ms", "sent to handler reached, p99", &arrivals.times, 0.99);
        figures.add_time("request_p50_ms", "request, p50", &found.times, 0.5);
        figures.add_time("request_p99_ms", "request, p99", &found.times, 0.99);
        figures.add("seconds", span, Unit::Seconds, took.as_secs_f64());
        figures.add("sent", "messages sent", Unit::Count, sent as f64);
        figures.add("delivered", "messages delivered", Unit::Count, sink.arrived() as f64);
        figures.add("repeats", "delivered again", Unit::Count, arrivals.repeats as f64);
        Ok(figures)
    }
}
