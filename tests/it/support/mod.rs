//! What tests share: stores to test against, a stage to stand on, and waiting for a state.

pub(crate) mod postgres;
pub(crate) mod stage;
pub(crate) mod stores;

use std::time::{Duration, Instant};

use tokio::sync::watch;

/// How long anything may take to come true on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often it is looked at.
const GLANCE: Duration = Duration::from_millis(10);

/// Waits until `is_so` says yes; panics with `what` it waited for where that takes too long.
pub(crate) async fn eventually(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !is_so().await {
        assert!(start.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain until {what}");
        tokio::time::sleep(GLANCE).await;
    }
}

/// Waits until a listener was told something, and marks it as seen.
pub(crate) async fn heard(news: &mut watch::Receiver<()>) {
    eventually("the news has come", async || news.has_changed().expect("the board is there")).await;
    news.mark_unchanged();
}
