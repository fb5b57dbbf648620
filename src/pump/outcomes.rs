//! Who waits for a message to be settled.
//!
//! What this process settles it tells at once; what happens elsewhere (another replica, a sweep, an operator) is found
//! by looking from time to time.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::model::{DeliveryRecord, MessageId, Record};
use crate::store::{self, Store};

use super::house::Pumphouse;

/// Those who wait, by message.
#[derive(Debug, Default)]
pub(super) struct Outcomes {
    /// How many wait in all, so that whoever settles need not look where nobody does.
    waiting: AtomicUsize,
    by_message: Mutex<HashMap<MessageId, Waiter>>,
}

#[derive(Debug, Default)]
struct Waiter {
    told: Arc<Told>,
    count: usize,
}

/// Whether a message has come to its end since somebody began to wait.
#[derive(Debug, Default)]
struct Told {
    has_ended: AtomicBool,
    now: Notify,
}

impl Outcomes {
    /// Tells whoever waits for a message that it has come to its end.
    pub(super) fn tell(&self, id: MessageId) {
        if self.waiting.load(Ordering::Acquire) > 0
            && let Some(waiter) = self.lock().get(&id)
        {
            waiter.told.has_ended.store(true, Ordering::Release);
            waiter.told.now.notify_waiters();
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<MessageId, Waiter>> {
        self.by_message.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Somebody who waits for a message to be settled. Made before the message is sent, it misses nothing.
#[derive(Debug)]
pub struct Watch {
    outcomes: Arc<Outcomes>,
    store: Arc<dyn Store>,
    id: MessageId,
    told: Arc<Told>,
    /// After how long it is looked for the first time.
    first_look: Duration,
    leaving: CancellationToken,
}

impl Watch {
    fn new(pump: &Pumphouse, id: MessageId) -> Self {
        let outcomes = pump.outcomes();
        outcomes.waiting.fetch_add(1, Ordering::Release);
        let told = {
            let mut all = outcomes.lock();
            let waiter = all.entry(id).or_default();
            waiter.count += 1;
            Arc::clone(&waiter.told)
        };
        let (outcomes, store) = (Arc::clone(outcomes), Arc::clone(pump.store()));
        let first_look = if pump.house().is_alone() { LAST_LOOK } else { FIRST_LOOK };
        Self { outcomes, store, id, told, first_look, leaving: pump.leaving().clone() }
    }

    /// Waits until the message has come to its end, whichever that is, for at most `patience`; then it is shown with
    /// its deliveries. `None` where it has not ended, or is gone, and at the end of this process.
    ///
    /// With `is_new`, for a message that was sent after this was made, it is not looked for at first.
    pub async fn ended(
        self,
        patience: Duration,
        is_new: bool,
    ) -> store::Result<Option<(Record, Vec<DeliveryRecord>)>> {
        let until = Instant::now() + patience;
        let mut look = self.first_look;
        let mut told = std::pin::pin!(self.told.now.notified());
        told.as_mut().enable();
        let mut is_to_be_looked_for = !is_new || self.told.has_ended.load(Ordering::Acquire);
        loop {
            if is_to_be_looked_for {
                match self.store.message(self.id).await? {
                    Some(found) if found.0.finished_at.is_some() => return Ok(Some(found)),
                    Some(_) => (),
                    None => return Ok(None),
                }
            }
            is_to_be_looked_for = true;
            let now = Instant::now();
            if now >= until || self.leaving.is_cancelled() {
                return Ok(None);
            }
            let told_or_not = tokio::time::timeout_at(until.min(now + look), &mut told);
            let _ = self.leaving.run_until_cancelled(told_or_not).await;
            told.set(self.told.now.notified());
            told.as_mut().enable();
            look = (look * 2).min(LAST_LOOK);
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut all = self.outcomes.lock();
        if let Some(waiter) = all.get_mut(&self.id) {
            waiter.count -= 1;
            if waiter.count == 0 {
                all.remove(&self.id);
            }
        }
        drop(all);
        self.outcomes.waiting.fetch_sub(1, Ordering::Release);
    }
}

impl Pumphouse {
    /// Begins to wait for a message to be settled, which may be sent after this.
    pub fn watch(&self, id: MessageId) -> Watch {
        Watch::new(self, id)
    }
}

/// How long to trust what this process settles, at first and then. Where no other process settles anything, so long from
/// the start: at rush hour many would look in vain, and hold up what they wait for.
const FIRST_LOOK: Duration = Duration::from_millis(250);
const LAST_LOOK: Duration = Duration::from_secs(1);
