//! What has to be done from time to time: due messages made ready, lost leases taken back, old rows forgotten.
//!
//! Each report of this process sees whether there is anything to do, and calls for it; so a store in which nothing happens
//! is asked once a second and not by each.
//!
//! Every replica does it, without a leader: two that meet at one row do no harm, because each step is one
//! transaction that takes what is free.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::store::{self, Chores, Swept};
use crate::telemetry::metrics;

use super::house::House;
use super::shares::count_reaped;

/// Those who keep the store in order are called here.
#[derive(Debug, Default)]
pub(super) struct Calls {
    due: Notify,
    lost: Notify,
    past: Notify,
    called: Mutex<Option<Instant>>,
}

impl Calls {
    /// Calls for what is to do, not much more often than once a second, however often reports are made. Who is just at it
    /// looks once more.
    pub(super) fn call(&self, chores: Chores) {
        let mut called = self.called.lock().unwrap_or_else(PoisonError::into_inner);
        if called.is_some_and(|called| called.elapsed() < CALL_PAUSE) {
            return;
        }
        *called = Some(Instant::now());
        let Chores { due, lost, past } = chores;
        for (wanted, call) in [(due, &self.due), (lost, &self.lost), (past, &self.past)] {
            if wanted {
                call.notify_one();
            }
        }
    }
}

/// Makes ready what comes due, in time: asks when the next is due, and sleeps until then.
pub(super) async fn keep_schedule(house: Arc<House>) {
    let store = &house.store;
    let mut news = store.news().of_schedule();
    loop {
        news.mark_unchanged(); // before looking, so that nothing slips in between
        let wait = match store.promote(BATCH).await {
            Ok(promoted) if promoted.count >= BATCH => Duration::ZERO,
            Ok(promoted) => promoted.next.map_or(UNCALLED_MAX, |next| next.min(UNCALLED_MAX)),
            Err(error) => complain("cannot make ready what is due", &error),
        };
        let told = async {
            tokio::select! {
                _ = news.changed() => (),
                () = house.calls.due.notified() => (),
            }
        };
        if !wait_for(told, wait.max(SHORTEST), &house).await {
            return;
        }
    }
}

/// Takes back leases that have run out.
pub(super) async fn take_back_leases(house: Arc<House>) {
    loop {
        let wait = match house.store.reap(BATCH).await {
            Ok(reaped) => {
                count_reaped(&reaped);
                if reaped.len() >= BATCH { Duration::ZERO } else { UNCALLED_MAX }
            }
            Err(error) => complain("cannot take back leases", &error),
        };
        if !wait_for(house.calls.lost.notified(), wait, &house).await {
            return;
        }
    }
}

/// Expires and deletes what nobody needs any more, a little at a time.
pub(super) async fn sweep(house: Arc<House>) {
    loop {
        let wait = match house.store.sweep(BATCH).await {
            Ok(swept) => {
                count_expired(&swept);
                // Breathes between batches, so that a large clean-up does not hold back the messages.
                if swept.more { Duration::from_millis(20) } else { UNCALLED_MAX }
            }
            Err(error) => complain("cannot sweep", &error),
        };
        if !wait_for(house.calls.past.notified(), wait, &house).await {
            return;
        }
    }
}

/// Waits for a call, and no longer than so; `false` where this process leaves.
async fn wait_for(call: impl Future<Output = ()>, wait: Duration, house: &House) -> bool {
    let called = tokio::time::timeout(wait, call);
    house.leaving.run_until_cancelled(called).await.is_some()
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
    TRY_AGAIN_AFTER
}

/// How many rows one step takes.
const BATCH: usize = 500;
/// How long it goes on without a call: whoever reports, or the report itself, may fail.
const UNCALLED_MAX: Duration = Duration::from_secs(30);
/// How long nobody is called after a call; less than the time between two reports.
const CALL_PAUSE: Duration = Duration::from_millis(900);
const TRY_AGAIN_AFTER: Duration = Duration::from_secs(1);
/// The shortest sleep, so that a clock that stands still does not make a busy loop.
const SHORTEST: Duration = Duration::from_millis(1);
