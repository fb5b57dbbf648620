//! How many deliveries at once: a gate that can be widened and narrowed under load.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// A limit on what is open, and a count of it. Cheap to share.
///
/// Widening acts at once; narrowing cancels nothing and lets nobody in until what is open has fallen
/// below the new limit, so that old and new never run together.
///
/// It can let in a few that try whether a handler is well. Those are counted apart from what was open before, so
/// that one of these which hangs does not stand in their way.
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
    /// How many may try, where that is what they do.
    few: Option<u32>,
    /// How many of those that are open began to try since.
    trying: u32,
    /// Which time it is that some try.
    time: u64,
}

/// A place behind a gate, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Slot {
    gate: Arc<Gate>,
    /// The time at which its holder tries; `None` for who does not.
    tries_at: Option<u64>,
}

impl Gate {
    pub(crate) fn new(limit: u32) -> Arc<Self> {
        let count = Mutex::new(Count { limit, open: 0, few: None, trying: 0, time: 0 });
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
        (count.free() > 0).then(|| {
            count.open += 1;
            let tries_at = count.few.map(|_| count.time);
            count.trying += u32::from(tries_at.is_some());
            Slot { gate: Arc::clone(self), tries_at }
        })
    }

    /// Moves the gate; with `few`, only so many more are let in at once to try.
    pub(crate) fn set(&self, limit: u32, few: Option<u32>) {
        let widened = {
            let mut count = self.count();
            let before = count.free();
            if few.is_some() && count.few.is_none() {
                (count.time, count.trying) = (count.time + 1, 0);
            }
            (count.limit, count.few) = (limit, few);
            count.free() > before
        };
        if widened {
            self.freed.notify_waiters();
        }
        self.moved.notify_one();
    }

    /// How many may be open.
    pub(crate) fn limit(&self) -> u32 {
        let count = *self.count();
        count.few.map_or(count.limit, |few| few.min(count.limit))
    }

    /// How many are open that count for [`Gate::limit`].
    pub(crate) fn counted(&self) -> u32 {
        let count = *self.count();
        count.few.map_or(count.open, |_| count.trying)
    }

    pub(crate) fn open(&self) -> u32 {
        self.count().open
    }

    /// How many could enter now.
    pub(crate) fn free(&self) -> usize {
        self.count().free() as usize
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

impl Slot {
    /// Whether its holder tries, or does not, as whoever enters now.
    pub(crate) fn is_current(&self) -> bool {
        let count = *self.gate.count();
        self.tries_at == count.few.map(|_| count.time)
    }
}

impl Count {
    fn free(self) -> u32 {
        let free = self.limit.saturating_sub(self.open);
        self.few.map_or(free, |few| free.min(few.saturating_sub(self.trying)))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        {
            let mut count = self.gate.count();
            count.open -= 1;
            if self.tries_at == Some(count.time) {
                count.trying = count.trying.saturating_sub(1);
            }
        }
        self.gate.freed.notify_one();
        self.gate.moved.notify_one();
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
        gate.set(1, None);
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
        let widens = async { gate.set(2, None) };
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

    #[tokio::test]
    async fn who_tries_is_counted_apart_from_what_was_open_before() {
        let gate = Gate::new(3);
        let before = [gate.enter().await, gate.enter().await];
        gate.set(0, None);
        gate.set(3, Some(1));
        assert_eq!((gate.limit(), gate.free(), gate.counted()), (1, 1, 0));
        let tries = gate.enter().await;
        assert!(gate.enter().now_or_never().is_none(), "one tries, and three are open");
        gate.set(3, Some(2));
        assert!(gate.enter().now_or_never().is_none(), "never more than the limit");
        drop(before);
        let also = gate.enter().await;
        assert!(also.is_current());
        assert!(gate.enter().now_or_never().is_none(), "two try");
        gate.set(0, None);
        gate.set(3, Some(1));
        assert!(!also.is_current(), "it began another time");
        drop(also);
        assert_eq!((gate.free(), gate.counted(), gate.open()), (1, 0, 1), "another time");
        drop(tries);
        gate.set(3, None);
        assert_eq!((gate.limit(), gate.free(), gate.open()), (3, 3, 0));
    }
}
