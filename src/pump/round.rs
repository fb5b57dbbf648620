//! One run of a queue's pump, from start to stop, and how it ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::house::StopReport;

/// What a run of a queue's pump delivers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Everything.
    All,
    /// Only what an operator wants run now; the queue is stopped.
    UrgentOnly,
}

/// One run. It ends in two steps: closed, it takes no new lease and starts nothing; cut, it drops what is open.
#[derive(Debug)]
pub(crate) struct Round {
    pub(crate) mode: Mode,
    /// Whether something is leased ahead in it; not where workers come and take.
    pub(crate) takes_in: bool,
    /// Cancelled: take no new lease, start nothing.
    pub(crate) closed: CancellationToken,
    /// Cancelled: drop what is open.
    pub(crate) cut: CancellationToken,
    /// The loop and every delivery; empty when the run is over.
    pub(crate) tasks: TaskTracker,
    drained: AtomicU64,
    aborted: AtomicU64,
    released: AtomicU64,
}

impl Round {
    pub(crate) fn new(mode: Mode, takes_in: bool) -> Self {
        Self {
            mode,
            takes_in,
            closed: CancellationToken::new(),
            cut: CancellationToken::new(),
            tasks: TaskTracker::new(),
            drained: AtomicU64::new(0),
            aborted: AtomicU64::new(0),
            released: AtomicU64::new(0),
        }
    }

    /// Takes no new lease from now on. Twice does no harm.
    pub(crate) fn close(&self) {
        self.closed.cancel();
        self.tasks.close();
    }

    /// Waits until nothing is open, cuts what still is at the deadline, and waits for that.
    ///
    /// Every caller waits for the same end; the earliest deadline of all cuts.
    pub(crate) async fn end(&self, deadline: Instant) -> StopReport {
        self.close();
        if tokio::time::timeout_at(deadline, self.tasks.wait()).await.is_err() {
            self.cut.cancel();
            self.tasks.wait().await;
        }
        self.report()
    }

    /// Does this, unless the round was cut and [`SETTLE_GRACE`] is over as well; then `None`.
    pub(crate) async fn within_grace<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let grace = async {
            self.cut.cancelled().await;
            tokio::time::sleep(SETTLE_GRACE).await;
        };
        tokio::select! {
            biased;
            done = work => Some(done),
            () = grace => None,
        }
    }

    pub(crate) fn count_ended(&self, was_cut: bool) {
        if was_cut {
            self.aborted.fetch_add(1, Ordering::Relaxed);
        } else if self.closed.is_cancelled() {
            self.drained.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn count_released(&self) {
        self.released.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether the run is over, with nothing left open.
    pub(crate) fn is_over(&self) -> bool {
        self.closed.is_cancelled() && self.tasks.is_empty()
    }

    fn report(&self) -> StopReport {
        StopReport {
            drained: self.drained.load(Ordering::Relaxed),
            aborted: self.aborted.load(Ordering::Relaxed),
            released: self.released.load(Ordering::Relaxed),
        }
    }
}

/// Waits for all of them to end; see [`Round::end`].
pub(crate) async fn end_all(rounds: Vec<Arc<Round>>, deadline: Instant) -> StopReport {
    let ends = rounds.iter().map(|round| round.end(deadline));
    let mut total = StopReport::default();
    for report in futures::future::join_all(ends).await {
        total += report;
    }
    total
}

/// How long after the cut a settlement may still be tried, so that a stop ends by its deadline while the
/// database is away. What is not written by then comes back when its lease runs out.
const SETTLE_GRACE: Duration = Duration::from_secs(1);
