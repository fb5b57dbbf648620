//! How many deliveries to one host are open, where messages name their hosts themselves.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::model::{Handler, Head, QueueSettings};

use super::QueuePump;

/// The hosts to which something is open, and how much.
#[derive(Debug, Default)]
pub(super) struct Destinations(Mutex<HashMap<String, u32>>);

/// A place among the deliveries to a host, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    destinations: Arc<Destinations>,
    /// `None` where nobody counts.
    host: Option<String>,
}

impl Destinations {
    fn enter(self: &Arc<Self>, host: Option<String>, limit: u32) -> Option<Place> {
        if let Some(host) = &host {
            let mut open = self.lock();
            let count = open.entry(host.clone()).or_default();
            if *count >= limit {
                return None;
            }
            *count += 1;
        }
        Some(Place { destinations: Arc::clone(self), host })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, u32>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let Some(host) = &self.host else { return };
        let mut open = self.destinations.lock();
        if let Some(count) = open.get_mut(host) {
            *count -= 1;
            if *count == 0 {
                open.remove(host);
            }
        }
    }
}

impl QueuePump {
    /// A place for a message among those that go to its host; `None` where it has to wait.
    pub(super) fn enter_destination(&self, head: &Head, settings: &QueueSettings) -> Option<Place> {
        let limit = match &settings.handler {
            Handler::Push(push) => push.per_destination,
            Handler::Http(_) | Handler::Builtin { .. } | Handler::Pull | Handler::Service => None,
        };
        let host = limit.and(head.details.url.as_ref()).map(|url| url.authority().to_owned());
        self.destinations.enter(host, limit.unwrap_or(u32::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_has_so_many_at_once_and_says_nothing_of_others() {
        let all = Arc::new(Destinations::default());
        let enter = |host: &str| all.enter(Some(host.to_owned()), 2);
        let (first, _second) = (enter("a"), enter("a"));
        assert!(enter("a").is_none());
        assert!(enter("b").is_some());
        drop(first);
        assert!(enter("a").is_some());
        assert_eq!(all.lock().len(), 1, "what is not in use is forgotten");
    }
}
