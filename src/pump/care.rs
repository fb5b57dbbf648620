//! Approaches messages with care whose attempts have ended in crashes: few of them are open at once in this
//! process, and in the end one. See `policy/care.rs` for how many.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::model::{Leased, QueueSettings, Settlement};
use crate::policy;
use crate::store::Settle;

use super::QueuePump;
use super::round::{Mode, Round};

/// Who is open in this process of those that are approached with care.
#[derive(Debug, Default)]
pub(super) struct Care(Mutex<Vec<Open>>);

#[derive(Debug, Clone, Copy, PartialEq)]
struct Open {
    /// How much company it bears.
    company: usize,
    since: Instant,
}

/// A place among them, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    care: Arc<Care>,
    /// `None` for a message that needs no care.
    open: Option<Open>,
}

impl Care {
    /// A place for one that bears so much company; `None` as long as it would be too much for it, or for one of
    /// those that are open. Who is open for longer than [`DANGEROUS_FOR`] counts no more, so that a handler that hangs holds up
    /// nobody else's messages.
    fn enter(self: &Arc<Self>, company: Option<usize>, now: Instant) -> Option<Place> {
        let Some(company) = company else {
            return Some(Place { care: Arc::clone(self), open: None });
        };
        let mut all = self.open();
        let dangerous = all.iter().filter(|open| now.duration_since(open.since) < DANGEROUS_FOR);
        let companies = dangerous.map(|open| open.company).collect::<Vec<_>>();
        let least = companies.iter().copied().min().unwrap_or(company).min(company);
        if companies.len() >= least {
            return None;
        }
        let open = Open { company, since: now };
        all.push(open);
        Some(Place { care: Arc::clone(self), open: Some(open) })
    }

    fn open(&self) -> MutexGuard<'_, Vec<Open>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some(mine) = self.open else { return };
        let mut all = self.care.open();
        if let Some(at) = all.iter().position(|open| *open == mine) {
            all.swap_remove(at);
        }
    }
}

impl QueuePump {
    /// A place for a message among those that are approached with care; `None` where it has to wait. What an
    /// operator wants run now waits for nobody.
    pub(super) fn approach(
        &self,
        leased: &Leased,
        settings: &QueueSettings,
        mode: Mode,
    ) -> Option<Place> {
        let company = match mode {
            Mode::All => policy::company(leased.tries.crashes, settings.recovery.max_crashes),
            Mode::UrgentOnly => None,
        };
        self.care.enter(company, Instant::now())
    }

    /// Of those of one claim that have met crashes, keeps as many as bear each other's company, and gives the others back
    /// before any is started: whoever is only held while another one kills the process would meet a crash as well.
    pub(super) async fn sort_out(
        self: &Arc<Self>,
        leased: Vec<Leased>,
        round: &Arc<Round>,
    ) -> Vec<Leased> {
        let crashes_max = self.setup().settings.recovery.max_crashes;
        let (mut together, mut least) = (0, usize::MAX);
        let bears = |leased: &Leased| {
            let company = match round.mode {
                Mode::All => policy::company(leased.tries.crashes, crashes_max),
                Mode::UrgentOnly => None,
            };
            let Some(company) = company else { return true };
            if together >= least.min(company) {
                return false;
            }
            least = least.min(company);
            together += 1;
            true
        };
        let (start, wait): (Vec<_>, Vec<_>) = leased.into_iter().partition(bears);
        let wait =
            wait.into_iter().map(|next| Arc::clone(self).let_wait(next, None, Arc::clone(round)));
        futures::future::join_all(wait).await;
        start
    }

    /// Gives back a message that has to wait for others before it is tried, for a moment in which nobody
    /// leases it, or for as long as its host is busy. Nothing is counted.
    pub(super) async fn let_wait(
        self: Arc<Self>,
        leased: Leased,
        busy_for: Option<Duration>,
        round: Arc<Round>,
    ) {
        let (queue, message) = (&self.queue, leased.lease.id);
        match busy_for {
            None => {
                tracing::info!(%queue, %message, crashes = leased.tries.crashes, "approached with care: it waits for others");
            }
            Some(wait) => tracing::debug!(%queue, %message, ?wait, "its host has enough to do"),
        }
        round.count_released();
        let chance = self.clock.chance();
        // Who was told when to come is a little late, so that not all come together.
        let after = busy_for
            .map_or_else(|| WAIT.mul_f64(1.0 + chance), |wait| wait.mul_f64(1.0 + chance / 8.0));
        let settlement = Settlement::Postpone { after };
        let settle = Settle { lease: leased.lease, settlement, delivery: None, sent: Vec::new() };
        let _nothing_was_sent = self.settle(settle, &round).await;
    }
}

/// For how long a message that is open may kill its process, as far as this is about others: whoever kills does so
/// soon.
const DANGEROUS_FOR: Duration = Duration::from_secs(60);
/// How long one waits at least before it is looked at again; at most twice that.
const WAIT: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_gets_more_company_than_they_bear() {
        let care = Arc::new(Care::default());
        let now = Instant::now();
        let enter = |company, now| care.enter(company, now);
        let many = (0..16).map(|_| enter(Some(16), now).unwrap()).collect::<Vec<_>>();
        assert!(enter(Some(16), now).is_none(), "the seventeenth");
        assert!(enter(Some(1), now).is_none(), "it wants to be alone");
        assert!(enter(None, now).is_some(), "what needs no care waits for nobody");
        drop(many);
        let alone = enter(Some(1), now).unwrap();
        assert!(enter(Some(16), now).is_none(), "the one that is open wants to be alone");
        assert!(enter(Some(1), now + DANGEROUS_FOR).is_some(), "it has not killed for a minute");
        drop(alone);
        assert!(enter(Some(4), now).is_some());
        assert_eq!(care.open().len(), 0, "each place was given back");
    }
}
