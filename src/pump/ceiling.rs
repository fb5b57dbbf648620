//! How many deliveries at once over all queues of this process, and a place for each of them.
//!
//! A handler that hangs keeps its places until the deadline. So a queue that has a delivery open already may
//! open another one only while as many places are free as there are queues that have none open, up to a
//! quarter of all: those can open one as soon as they want to.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

/// A limit over all queues, and a count of what is open below it.
#[derive(Debug)]
pub(crate) struct Ceiling {
    count: Mutex<Count>,
    /// Wakes those who wait: one for each queue.
    freed: Notify,
}

#[derive(Debug, Clone, Copy)]
struct Count {
    limit: u32,
    open: u32,
    /// How many queues there are, and how many of them have something open.
    queues: u32,
    busy: u32,
}

/// What a queue has open below the ceiling. Changed only while the ceiling's count is locked.
pub(crate) type Below = Arc<AtomicU32>;

/// A place below the ceiling, given back when it is dropped.
#[derive(Debug)]
pub(crate) struct Place {
    ceiling: Arc<Ceiling>,
    of: Below,
}

impl Ceiling {
    pub(crate) fn new(limit: u32) -> Arc<Self> {
        let count = Mutex::new(Count { limit, open: 0, queues: 0, busy: 0 });
        Arc::new(Self { count, freed: Notify::new() })
    }

    /// Waits for a place for the queue that has this open. A future that is dropped while it waits takes none.
    pub(crate) async fn enter(self: &Arc<Self>, of: &Below) -> Place {
        loop {
            let mut freed = std::pin::pin!(self.freed.notified());
            // Before looking, so that a place freed in between is not missed.
            freed.as_mut().enable();
            if let Some(place) = self.try_enter(of) {
                return place;
            }
            freed.await;
        }
    }

    fn try_enter(self: &Arc<Self>, of: &Below) -> Option<Place> {
        let mut count = self.count();
        let is_first = of.load(Ordering::Relaxed) == 0;
        let kept = if is_first { 0 } else { count.kept() };
        (count.open + kept < count.limit).then(|| {
            count.open += 1;
            count.busy += u32::from(is_first);
            of.fetch_add(1, Ordering::Relaxed);
            Place { ceiling: Arc::clone(self), of: Arc::clone(of) }
        })
    }

    /// Moves it, for so many queues.
    pub(crate) fn set(&self, limit: u32, queues: usize) {
        {
            let mut count = self.count();
            count.limit = limit;
            count.queues = u32::try_from(queues).unwrap_or(u32::MAX);
        }
        self.freed.notify_waiters();
    }

    pub(crate) fn limit(&self) -> u32 {
        self.count().limit
    }

    pub(crate) fn open(&self) -> u32 {
        self.count().open
    }

    fn count(&self) -> MutexGuard<'_, Count> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Count {
    /// How many places are kept for queues that have none.
    fn kept(self) -> u32 {
        self.queues.saturating_sub(self.busy).min(self.limit / 4)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        {
            let mut count = self.ceiling.count();
            count.open -= 1;
            if self.of.fetch_sub(1, Ordering::Relaxed) == 1 {
                count.busy -= 1;
            }
        }
        self.ceiling.freed.notify_waiters();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fill(ceiling: &Arc<Ceiling>, of: &Below) -> Vec<Place> {
        std::iter::from_fn(|| ceiling.try_enter(of)).collect()
    }

    #[test]
    fn queues_that_hang_leave_a_place_for_each_of_the_others() {
        let ceiling = Ceiling::new(20);
        ceiling.set(20, 3);
        let [one, two, three] = [(); 3].map(|()| Below::default());
        let first = fill(&ceiling, &one);
        assert_eq!(first.len(), 18, "two are kept for two others");
        let second = fill(&ceiling, &two);
        assert_eq!(second.len(), 1, "one is kept for the third");
        let third = fill(&ceiling, &three);
        assert_eq!(third.len(), 1);
        drop((first, second, third));
        assert_eq!(fill(&ceiling, &two).len(), 18, "all were given back");
    }

    #[test]
    fn many_queues_keep_a_quarter_free_and_one_alone_nothing() {
        let ceiling = Ceiling::new(20);
        let one = Below::default();
        ceiling.set(20, 1000);
        assert_eq!(fill(&ceiling, &one).len(), 15);
        ceiling.set(20, 1);
        assert_eq!(fill(&ceiling, &one).len(), 20);
        ceiling.set(1, 2);
        assert_eq!(fill(&ceiling, &one).len(), 1, "a ceiling of one serves one after another");
    }

    #[tokio::test]
    async fn who_waits_enters_when_a_place_is_free() {
        let ceiling = Ceiling::new(1);
        let (one, two) = (Below::default(), Below::default());
        let place = ceiling.enter(&one).await;
        let waits = ceiling.enter(&two);
        let (entered, ()) = tokio::join!(waits, async { drop(place) });
        assert_eq!((ceiling.open(), ceiling.limit()), (1, 1));
        drop(entered);
    }
}
