//! What has to be done from time to time: due messages made ready, lost leases taken back, old rows forgotten.
//!
//! Every replica does it, without a leader: two that meet at one row do no harm, because each step is one
//! transaction that takes what is free.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::store::{self, Store, Swept};
use crate::telemetry::metrics;

use super::shares::count_reaped;

/// Makes ready what comes due, in time: asks when the next is due, and sleeps until then.
pub(super) async fn keep_schedule(store: Arc<dyn Store>, leaving: CancellationToken) {
    let mut news = store.news().of_schedule();
    loop {
        news.mark_unchanged(); // before looking, so that nothing slips in between
        let wait = match store.promote(BATCH).await {
            Ok(promoted) if promoted.count >= BATCH => Duration::ZERO,
            Ok(promoted) => promoted.next.map_or(LOOK_EVERY, |next| next.min(LOOK_EVERY)),
            Err(error) => complain("cannot make ready what is due", &error),
        };
        let wait = tokio::time::timeout(wait.max(SHORTEST), news.changed());
        if leaving.run_until_cancelled(wait).await.is_none() {
            return;
        }
    }
}

/// Takes back leases that have run out.
pub(super) async fn take_back_leases(store: Arc<dyn Store>, leaving: CancellationToken) {
    loop {
        let wait = match store.reap(BATCH).await {
            Ok(reaped) => {
                count_reaped(&reaped);
                if reaped.len() >= BATCH { Duration::ZERO } else { REAP_EVERY }
            }
            Err(error) => complain("cannot take back leases", &error),
        };
        if leaving.run_until_cancelled(tokio::time::sleep(wait)).await.is_none() {
            return;
        }
    }
}

/// Expires and deletes what nobody needs any more, a little at a time.
pub(super) async fn sweep(store: Arc<dyn Store>, leaving: CancellationToken) {
    loop {
        let wait = match store.sweep(BATCH).await {
            Ok(swept) => {
                count_expired(&swept);
                // Breathes between batches, so that a large clean-up does not hold back the messages.
                if swept.more { Duration::from_millis(20) } else { SWEEP_EVERY }
            }
            Err(error) => complain("cannot sweep", &error),
        };
        if leaving.run_until_cancelled(tokio::time::sleep(wait)).await.is_none() {
            return;
        }
    }
}

fn count_expired(swept: &Swept) {
    for (queue, count) in &swept.expired {
        metrics::expired(queue).increment(*count);
        tracing::info!(%queue, count, "messages expired");
    }
    for (queue, count) in &swept.set_aside {
        metrics::dead(queue).increment(*count);
        tracing::info!(%queue, count, "dead letters, because they expired");
    }
}

/// Logs what went wrong, and says how long to wait before trying again.
fn complain(what: &'static str, error: &store::Error) -> Duration {
    tracing::warn!(error = error as &dyn std::error::Error, "{what}; trying again");
    LOOK_EVERY
}

/// How many rows one step takes.
const BATCH: usize = 500;
/// How often the schedule is looked at although nothing is known to be due: another replica may have
/// scheduled something and gone.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// The shortest sleep, so that a clock that stands still does not make a busy loop.
const SHORTEST: Duration = Duration::from_millis(1);
const REAP_EVERY: Duration = Duration::from_secs(1);
const SWEEP_EVERY: Duration = Duration::from_secs(1);
