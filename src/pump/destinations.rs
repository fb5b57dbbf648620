//! How many deliveries to one host are open, where messages name their hosts themselves.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::model::{Handler, Head, QueueSettings};

use super::QueuePump;

/// The hosts to which something is open or wants to go.
#[derive(Debug, Default)]
pub(super) struct Destinations(Mutex<HashMap<String, Host>>);

#[derive(Debug, Default, Clone, Copy)]
struct Host {
    /// How many deliveries are open.
    open: u32,
    /// How many were turned away and have not been let in since, more or less.
    turned_away: u32,
}

/// A place among the deliveries to a host, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    destinations: Arc<Destinations>,
    /// `None` where nobody counts.
    host: Option<String>,
}

impl Destinations {
    /// A place, or how long to stay away: the longer, the more were turned away before, so that a backlog for one host
    /// that is slow costs little.
    fn enter(self: &Arc<Self>, host: Option<String>, limit: u32) -> Result<Place, Duration> {
        if let Some(name) = &host {
            let mut hosts = self.lock();
            let host = hosts.entry(name.clone()).or_default();
            if host.open >= limit {
                host.turned_away = host.turned_away.saturating_add(1);
                let wait = WAIT.saturating_mul(host.turned_away / limit.max(1));
                return Err(wait.clamp(WAIT, WAIT_MAX));
            }
            host.open += 1;
            host.turned_away = host.turned_away.saturating_sub(1);
        }
        Ok(Place { destinations: Arc::clone(self), host })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Host>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some(name) = &self.host else { return };
        let mut hosts = self.destinations.lock();
        if let Some(host) = hosts.get_mut(name) {
            host.open -= 1;
            if host.open == 0 && host.turned_away == 0 {
                hosts.remove(name);
            } else if host.open == 0 {
                // Those who were turned away may be gone by now: expired, purged, with another process.
                host.turned_away /= 2;
            }
        }
    }
}

impl QueuePump {
    /// A place for a message among those that go to its host, or how long it has to wait.
    pub(super) fn enter_destination(
        &self,
        head: &Head,
        settings: &QueueSettings,
    ) -> Result<Place, Duration> {
        let limit = match &settings.handler {
            Handler::Push(push) => push.per_destination,
            Handler::Http(_) | Handler::Builtin { .. } | Handler::Pull | Handler::Service => None,
        };
        let host = limit.and(head.details.url.as_ref()).map(|url| url.authority().to_owned());
        self.destinations.enter(host, limit.unwrap_or(u32::MAX))
    }
}

/// How long one that is turned away stays away at least, and at most.
const WAIT: Duration = Duration::from_secs(1);
const WAIT_MAX: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_has_so_many_at_once_and_says_nothing_of_others() {
        let all = Arc::new(Destinations::default());
        let enter = |host: &str| all.enter(Some(host.to_owned()), 2);
        let (first, second) = (enter("a").unwrap(), enter("a").unwrap());
        assert_eq!(enter("a").unwrap_err(), WAIT);
        drop(enter("b").unwrap());
        let mut longest = WAIT;
        for _ in 0..1000 {
            let wait = enter("a").unwrap_err();
            assert!(wait >= longest);
            longest = wait;
        }
        assert_eq!(longest, WAIT_MAX);
        drop(first);
        drop(enter("a").unwrap());
        drop(second);
        for _ in 0..20 {
            drop(enter("a").unwrap());
        }
        assert_eq!(all.lock().len(), 0, "what is not in use is forgotten");
    }
}
