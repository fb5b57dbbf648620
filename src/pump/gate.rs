//! How many deliveries at once: a gate that can be widened and narrowed under load.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// A limit on what is open, and a count of it. Cheap to share.
///
/// Widening acts at once; narrowing cancels nothing and lets nobody in until what is open has fallen
/// below the new limit, so that old and new never run together.
#[derive(Debug)]
pub(crate) struct Gate {
    count: Mutex<Count>,
    /// Wakes one who waits at the gate.
    freed: Notify,
    /// Wakes the one who watches for room.
    moved: Notify,
}

#[derive(Debug, Clone, Copy)]
struct Count {
    limit: u32,
    open: u32,
}

/// A place behind a gate, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Slot(Arc<Gate>);

impl Gate {
    pub(crate) fn new(limit: u32) -> Arc<Self> {
        let count = Mutex::new(Count { limit, open: 0 });
        Arc::new(Self { count, freed: Notify::new(), moved: Notify::new() })
    }

    /// Waits for a place. A future that is dropped while it waits takes none.
    pub(crate) async fn enter(self: &Arc<Self>) -> Slot {
        loop {
            let mut freed = std::pin::pin!(self.freed.notified());
            // Before looking, so that a place freed in between is not missed.
            freed.as_mut().enable();
            if let Some(slot) = self.try_enter() {
                return slot;
            }
            freed.await;
        }
    }

    fn try_enter(self: &Arc<Self>) -> Option<Slot> {
        let mut count = self.count();
        (count.open < count.limit).then(|| {
            count.open += 1;
            Slot(Arc::clone(self))
        })
    }

    /// Moves the gate.
    pub(crate) fn set_limit(&self, limit: u32) {
        let before = std::mem::replace(&mut self.count().limit, limit);
        if limit > before {
            self.freed.notify_waiters();
        }
        self.moved.notify_one();
    }

    pub(crate) fn limit(&self) -> u32 {
        self.count().limit
    }

    pub(crate) fn open(&self) -> u32 {
        self.count().open
    }

    /// How many could enter now.
    pub(crate) fn free(&self) -> usize {
        let count = *self.count();
        count.limit.saturating_sub(count.open) as usize
    }

    /// Waits until a place was freed or the gate was moved. For one watcher; a change in between counts.
    pub(crate) async fn moved(&self) {
        self.moved.notified().await;
    }

    /// Wakes the watcher, because something else that it counts has changed.
    pub(crate) fn nudge(&self) {
        self.moved.notify_one();
    }

    fn count(&self) -> MutexGuard<'_, Count> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.0.count().open -= 1;
        self.0.freed.notify_one();
        self.0.moved.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt;

    use super::*;

    #[tokio::test]
    async fn narrowing_never_runs_old_plus_new() {
        let gate = Gate::new(3);
        let mut slots = vec![gate.enter().await, gate.enter().await, gate.enter().await];
        gate.set_limit(1);
        slots.pop();
        slots.pop();
        assert!(gate.enter().now_or_never().is_none(), "one is still open, and one is the limit");
        slots.pop();
        assert!(gate.enter().now_or_never().is_some());
    }

    #[tokio::test]
    async fn widening_lets_in_who_waits() {
        let gate = Gate::new(0);
        let waits = gate.enter();
        let widens = async { gate.set_limit(2) };
        let (slot, ()) = tokio::join!(waits, widens);
        assert_eq!(gate.open(), 1);
        drop(slot);
        assert_eq!((gate.open(), gate.free()), (0, 2));
    }

    #[tokio::test]
    async fn who_gives_up_waiting_takes_no_place() {
        let gate = Gate::new(1);
        let slot = gate.enter().await;
        assert!(gate.enter().now_or_never().is_none());
        drop(slot);
        assert!(gate.enter().now_or_never().is_some());
    }
}
