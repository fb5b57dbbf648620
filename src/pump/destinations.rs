//! How many deliveries to one host are open, where messages name their hosts themselves.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::model::{Handler, Head, QueueSettings};

use super::QueuePump;

/// The hosts to which something is open or wants to go.
#[derive(Debug, Default)]
pub(super) struct Destinations(Mutex<Hosts>);

#[derive(Debug, Default)]
struct Hosts {
    by_name: HashMap<String, Host>,
    /// When there are so many, it is looked which are in use.
    crowd: usize,
}

#[derive(Debug)]
struct Host {
    /// How many deliveries are open.
    open: u32,
    /// How long a place is usually held; a guess before the first was given back.
    usual: Option<Duration>,
    /// When the last place was taken: all that are open are held for at least as long as that is ago.
    entered_at: Instant,
    /// When the next who comes in vain may come again: one after the other, as places are usually given back.
    free_at: Instant,
    /// How long a place was taken to be held when that was reckoned last.
    reckoned: Duration,
}

/// A place among the deliveries to a host, given back when it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    destinations: Arc<Destinations>,
    /// `None` where nobody counts.
    host: Option<String>,
    since: Instant,
}

impl Destinations {
    /// A place, or how long to stay away: until it should be its turn, so that a backlog for one host that is slow costs
    /// little, and one for a host that is fast is soon done.
    fn enter(
        self: &Arc<Self>,
        host: Option<String>,
        limit: u32,
        now: Instant,
    ) -> Result<Place, Duration> {
        if let Some(name) = &host {
            let mut hosts = self.lock();
            let host = hosts.of(name, now);
            if host.open >= limit {
                let held = now.saturating_duration_since(host.entered_at);
                host.reckoned = host.usual.unwrap_or(GUESS).max(held);
                let each = host.reckoned / limit.max(1);
                host.free_at = (host.free_at.max(now) + each).min(now + WAIT_MAX);
                return Err((host.free_at - now).max(WAIT_MIN));
            }
            host.open += 1;
            host.entered_at = now;
        }
        Ok(Place { destinations: Arc::clone(self), host, since: now })
    }

    fn leave(&self, host: &str, since: Instant, now: Instant) {
        let mut hosts = self.lock();
        let Some(host) = hosts.by_name.get_mut(host) else { return };
        host.open -= 1;
        let held = now.saturating_duration_since(since);
        let usual = host.usual.map_or(held, |usual| (usual * 3 + held) / 4);
        host.usual = Some(usual);
        // It is faster than it was taken to be, so that the next who come need not line up behind so long a time.
        if usual < host.reckoned && host.free_at > now {
            let faster = usual.as_secs_f64() / host.reckoned.as_secs_f64();
            host.free_at = now + (host.free_at - now).mul_f64(faster);
            host.reckoned = usual;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Hosts> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hosts {
    /// What is known of a host. What is known of those that nobody comes to any more is forgotten, now and then.
    fn of(&mut self, name: &str, now: Instant) -> &mut Host {
        if self.by_name.len() > self.crowd && !self.by_name.contains_key(name) {
            self.by_name.retain(|_, host| host.open > 0 || host.free_at > now);
            self.crowd = (self.by_name.len() * 2).max(CROWD_MIN);
        }
        let new = || Host { open: 0, usual: None, entered_at: now, free_at: now, reckoned: GUESS };
        self.by_name.entry(name.to_owned()).or_insert_with(new)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(host) = &self.host {
            self.destinations.leave(host, self.since, Instant::now());
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
        self.destinations.enter(host, limit.unwrap_or(u32::MAX), Instant::now())
    }
}

/// How long a place is held, as long as nobody knows.
const GUESS: Duration = Duration::from_millis(250);
/// How long one that is turned away stays away at least, and at most.
const WAIT_MIN: Duration = Duration::from_millis(50);
const WAIT_MAX: Duration = Duration::from_secs(60);
/// So many hosts are remembered in any case.
const CROWD_MIN: usize = 1000;

#[cfg(test)]
mod tests {
    use super::*;

    fn enter(all: &Arc<Destinations>, host: &str, now: Instant) -> Result<Place, Duration> {
        all.enter(Some(host.to_owned()), 2, now)
    }

    /// Gives a place back at a moment.
    fn leave(mut place: Place, now: Instant) {
        let host = place.host.take().expect("it has a host");
        place.destinations.leave(&host, place.since, now);
    }

    #[test]
    fn a_host_has_so_many_at_once_and_says_nothing_of_others() {
        let (all, now) = (Arc::new(Destinations::default()), Instant::now());
        let (first, second) = (enter(&all, "a", now).unwrap(), enter(&all, "a", now).unwrap());
        assert_eq!(enter(&all, "a", now).unwrap_err(), GUESS / 2);
        leave(enter(&all, "b", now).unwrap(), now);
        leave(first, now);
        let third = enter(&all, "a", now).unwrap();
        assert!(enter(&all, "a", now).is_err());
        leave(second, now);
        leave(third, now);
    }

    #[test]
    fn who_comes_in_vain_comes_again_when_it_should_be_its_turn() {
        let (all, start) = (Arc::new(Destinations::default()), Instant::now());
        let held = Duration::from_millis(200);
        let places = [enter(&all, "a", start).unwrap(), enter(&all, "a", start).unwrap()];
        places.into_iter().for_each(|place| leave(place, start + held));
        let _places = [enter(&all, "a", start).unwrap(), enter(&all, "a", start).unwrap()];
        let waits = (0..1000).map(|_| enter(&all, "a", start).unwrap_err()).collect::<Vec<_>>();
        // Two places, each given back after 200 ms: ten in a second.
        assert_eq!(waits[..3], [held / 2, held, held * 3 / 2]);
        assert_eq!(waits[99], Duration::from_secs(10));
        assert_eq!(waits[999], WAIT_MAX);
        // As time passes, those who were told to come have come, or are gone.
        let later = start + WAIT_MAX;
        assert_eq!(
            enter(&all, "a", later).unwrap_err(),
            WAIT_MAX / 2,
            "the places are held for so long by now"
        );
    }

    #[test]
    fn a_host_that_is_fast_again_is_soon_taken_for_fast() {
        let (all, start) = (Arc::new(Destinations::default()), Instant::now());
        let places = [enter(&all, "a", start).unwrap(), enter(&all, "a", start).unwrap()];
        let mut now = start + Duration::from_secs(30);
        (0..100).for_each(|_| assert!(enter(&all, "a", now).is_err()));
        assert_eq!(enter(&all, "a", now).unwrap_err(), WAIT_MAX);
        places.into_iter().for_each(|place| leave(place, now));
        for _ in 0..40 {
            let place = enter(&all, "a", now).unwrap();
            now += Duration::from_millis(10);
            leave(place, now);
        }
        let _places = [enter(&all, "a", now).unwrap(), enter(&all, "a", now).unwrap()];
        assert!(enter(&all, "a", now).unwrap_err() < Duration::from_secs(1));
    }

    #[test]
    fn what_is_known_of_hosts_has_a_bound() {
        let (all, now) = (Arc::new(Destinations::default()), Instant::now());
        let kept = enter(&all, "kept", now).unwrap();
        for n in 0..10 * CROWD_MIN {
            leave(enter(&all, &n.to_string(), now).unwrap(), now);
        }
        assert!(all.lock().by_name.len() <= CROWD_MIN + 1);
        assert!(all.lock().by_name.contains_key("kept"));
        leave(kept, now);
    }
}
