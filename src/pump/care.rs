//! Approaches messages with care whose attempts have ended in crashes: few of them are open at once in this
//! process, and in the end one. See `policy/care.rs` for how many.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::model::{Leased, Settlement};
use crate::policy;
use crate::store::Settle;

use super::QueuePump;
use super::round::Round;

/// Who is open in this process of those that are approached with care: how much company each of them bears.
#[derive(Debug, Default)]
pub(super) struct Care(Mutex<Vec<usize>>);

/// A place among them, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    care: Arc<Care>,
    /// `None` for a message that needs no care.
    company: Option<usize>,
}

impl Care {
    /// A place for one that bears so much company; `None` as long as it would be too much for it, or for one of
    /// those that are open.
    fn enter(self: &Arc<Self>, company: Option<usize>) -> Option<Place> {
        if let Some(company) = company {
            let mut open = self.open();
            let least = open.iter().copied().min().unwrap_or(company).min(company);
            if open.len() >= least {
                return None;
            }
            open.push(company);
        }
        Some(Place { care: Arc::clone(self), company })
    }

    fn open(&self) -> MutexGuard<'_, Vec<usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some(company) = self.company else { return };
        let mut open = self.care.open();
        if let Some(at) = open.iter().position(|other| *other == company) {
            open.swap_remove(at);
        }
    }
}

impl QueuePump {
    /// A place for a message among those that are approached with care; `None` where it has to wait.
    pub(super) fn approach(&self, leased: &Leased, crashes_max: u32) -> Option<Place> {
        self.care.enter(policy::company(leased.tries.crashes, crashes_max))
    }

    /// Gives back a message that has to wait for others before it is tried, for a moment in which nobody
    /// leases it. Nothing is counted.
    pub(super) async fn let_wait(self: Arc<Self>, leased: Leased, round: Arc<Round>) {
        let (queue, message) = (&self.queue, leased.lease.id);
        tracing::info!(%queue, %message, crashes = leased.tries.crashes, "approached with care: it waits for others");
        round.count_released();
        let settlement = Settlement::Postpone { after: WAIT.mul_f64(1.0 + self.clock.chance()) };
        let settle = Settle { lease: leased.lease, settlement, delivery: None, sent: Vec::new() };
        self.settle(settle, &round).await;
    }
}

/// How long one waits at least before it is looked at again; at most twice that.
const WAIT: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_gets_more_company_than_they_bear() {
        let care = Arc::new(Care::default());
        let many = (0..16).map(|_| care.enter(Some(16)).unwrap()).collect::<Vec<_>>();
        assert!(care.enter(Some(16)).is_none(), "the seventeenth");
        assert!(care.enter(Some(1)).is_none(), "it wants to be alone");
        assert!(care.enter(None).is_some(), "what needs no care waits for nobody");
        drop(many);
        let alone = care.enter(Some(1)).unwrap();
        assert!(care.enter(Some(16)).is_none(), "the one that is open wants to be alone");
        drop(alone);
        assert!(care.enter(Some(4)).is_some());
        assert_eq!(care.open().len(), 0, "each place was given back");
    }
}
