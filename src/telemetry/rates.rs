//! How much is published to each topic just now, in this process.

use std::collections::HashMap;
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::model::TopicName;

/// Over how long a rate is taken.
pub const OVER: Duration = Duration::from_secs(60);
/// How many topics are watched; who publishes to ever new names does not fill the memory.
const TOPICS_MAX: usize = 10_000;

/// For each topic how much was published, second by second.
static RATES: LazyLock<Mutex<HashMap<TopicName, Seconds>>> = LazyLock::new(Mutex::default);
static START: LazyLock<Instant> = LazyLock::new(Instant::now);

const SLOTS: usize = OVER.as_secs() as usize;

/// The last seconds, each with its number.
#[derive(Debug)]
struct Seconds([(u64, u64); SLOTS]);

/// Notes that something was published.
pub fn note(topic: &TopicName) {
    let second = START.elapsed().as_secs();
    let mut rates = lock();
    if rates.len() >= TOPICS_MAX && !rates.contains_key(topic) {
        rates.retain(|_, seconds| seconds.sum(second) > 0);
        if rates.len() >= TOPICS_MAX {
            return;
        }
    }
    let seconds = rates.entry(topic.clone()).or_insert_with(|| Seconds([(0, 0); SLOTS]));
    let slot = &mut seconds.0[second as usize % SLOTS];
    *slot = if slot.0 == second { (second, slot.1 + 1) } else { (second, 1) };
}

/// How much was published in the last minute, for each topic to which something was.
pub fn last_minute() -> HashMap<TopicName, u64> {
    let second = START.elapsed().as_secs();
    let rates = lock();
    let sums = rates.iter().map(|(topic, seconds)| (topic.clone(), seconds.sum(second)));
    sums.filter(|(_, sum)| *sum > 0).collect()
}

impl Seconds {
    fn sum(&self, now: u64) -> u64 {
        let recent = self.0.iter().filter(|(second, _)| second + SLOTS as u64 > now);
        recent.map(|(_, count)| count).sum()
    }
}

fn lock() -> MutexGuard<'static, HashMap<TopicName, Seconds>> {
    RATES.lock().unwrap_or_else(PoisonError::into_inner)
}
