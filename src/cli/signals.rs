//! SIGTERM and SIGINT: the first asks the process to end, the second ends it.

use std::process;

use anyhow::{Context, Result};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Listens from now on; the token is cancelled at the first signal.
pub(super) fn listen(tasks: &TaskTracker) -> Result<CancellationToken> {
    let stop = CancellationToken::new();
    let mut signals = Signals::new()?;
    let told = stop.clone();
    tasks.spawn(async move {
        let first = signals.next().await;
        tracing::info!(signal = first.name, "draining; a second signal cuts");
        told.cancel();
        let second = signals.next().await;
        tracing::warn!(signal = second.name, "cut by a second signal");
        process::exit(128 + second.number);
    });
    Ok(stop)
}

/// The same for a command that tidies up: one token is cancelled at the first signal, the other at the second.
pub(super) fn listen_for_two() -> Result<(CancellationToken, CancellationToken)> {
    let (stop, cut) = (CancellationToken::new(), CancellationToken::new());
    let mut signals = Signals::new()?;
    let told = (stop.clone(), cut.clone());
    TaskTracker::new().spawn(async move {
        signals.next().await;
        told.0.cancel();
        signals.next().await;
        told.1.cancel();
    });
    Ok((stop, cut))
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

struct Received {
    name: &'static str,
    number: i32,
}

impl Signals {
    fn new() -> Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?,
            interrupt: signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?,
        })
    }

    async fn next(&mut self) -> Received {
        tokio::select! {
            _ = self.terminate.recv() => Received { name: "SIGTERM", number: 15 },
            _ = self.interrupt.recv() => Received { name: "SIGINT", number: 2 },
        }
    }
}
