//! Waiting for what was sent to arrive.

use std::time::Instant;

use anyhow::{Result, bail};
use tokio::time::sleep;

use super::sink::Sink;
use super::target::{POLL, STANDSTILL_MAX};

/// Waits until so many messages have arrived at the sink. Fails where nothing moves.
pub(super) async fn arrived(sink: &Sink, messages: u64) -> Result<()> {
    let mut before = (0, Instant::now());
    loop {
        let now = sink.arrived();
        if now >= messages {
            return Ok(());
        }
        if now != before.0 {
            before = (now, Instant::now());
        } else if before.1.elapsed() > STANDSTILL_MAX {
            bail!(
                "{now} of {messages} messages arrived at the sink {}, and none for {STANDSTILL_MAX:?}: can \
                 the server reach it? See --sink",
                sink.url()
            );
        }
        sleep(POLL).await;
    }
}
