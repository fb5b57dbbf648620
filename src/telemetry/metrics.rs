//! Every metric: name, kind, unit, labels and help, in one list. Nobody else makes one.
//!
//! Labels are bounded: names of queues and topics, and words of this program. Never ids, URLs or keys.
#![expect(clippy::disallowed_macros, reason = "the one place where metrics are made")]

use std::collections::HashMap;
use std::sync::{LazyLock, PoisonError, RwLock};

use metrics::{Counter, Gauge, Histogram, Unit, counter, gauge, histogram};

use crate::model::{Outcome, QueueName, State, TopicName};

/// What there is to know about one metric.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    /// Its whole name, unit at the end where it has one.
    pub name: &'static str,
    /// What kind it is.
    pub kind: Kind,
    /// What it counts in.
    pub unit: Unit,
    /// Which labels it carries.
    pub labels: &'static [&'static str],
    /// What it says, in a sentence.
    pub help: &'static str,
}

/// The kinds of metric.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts values by size.
    Histogram,
}

macro_rules! metrics {
    ($($ident:ident = $name:literal, $kind:ident, $unit:ident, [$($label:literal),*], $help:literal;)*) => {
        $(const $ident: &str = $name;)*
        /// Every metric there is, in the order of a message's journey.
        pub const ALL: &[Metric] = &[$(Metric {
            name: $name, kind: Kind::$kind, unit: Unit::$unit, labels: &[$($label),*], help: $help,
        }),*];
    };
}

metrics! {
    ENQUEUED = "pumphouse_messages_enqueued_total", Counter, Count, ["queue"], "Messages taken in and committed.";
    DUPLICATE = "pumphouse_messages_duplicate_total", Counter, Count, ["queue"], "Repeats answered from an idempotency key.";
    PUBLISHED = "pumphouse_messages_published_total", Counter, Count, ["topic"], "Messages published to a topic; those that no queue wanted have an empty label.";
    PUBLISHED_AGAIN = "pumphouse_publications_duplicate_total", Counter, Count, ["topic"], "Repeated publishes answered from an idempotency key.";
    DELIVERIES = "pumphouse_deliveries_total", Counter, Count, ["queue", "outcome"], "Deliveries settled, by how they ended.";
    COMPLETED = "pumphouse_messages_completed_total", Counter, Count, ["queue"], "Messages a handler acknowledged.";
    DEAD = "pumphouse_messages_dead_total", Counter, Count, ["queue"], "Messages set aside as dead letters.";
    EXPIRED = "pumphouse_messages_expired_total", Counter, Count, ["queue"], "Messages that waited longer than their sender wanted.";
    LEASES_LOST = "pumphouse_leases_lost_total", Counter, Count, ["queue"], "Settlements refused because the lease had run out.";
    DELIVERY_SECONDS = "pumphouse_delivery_duration_seconds", Histogram, Seconds, ["queue"], "How long a delivery took, from start to verdict or failure.";
    QUEUE_WAIT_SECONDS = "pumphouse_queue_wait_seconds", Histogram, Seconds, ["queue"], "How long a message waited from being due to the start of its delivery.";
    CRITICAL_SECONDS = "pumphouse_critical_time_seconds", Histogram, Seconds, ["queue"], "How long a message took from enqueue to completion.";
    QUEUE_MESSAGES = "pumphouse_queue_messages", Gauge, Count, ["queue", "state"], "Messages of a queue, by state.";
    OLDEST_READY = "pumphouse_queue_oldest_ready_age_seconds", Gauge, Seconds, ["queue"], "How long the oldest ready message has been due.";
    IN_FLIGHT = "pumphouse_in_flight", Gauge, Count, ["queue"], "Deliveries open in this process.";
    LIMIT = "pumphouse_concurrency_limit", Gauge, Count, ["queue"], "How many deliveries may be open at once in this process.";
    PUMP_RUNNING = "pumphouse_pump_running", Gauge, Count, ["queue"], "1 while the queue is pumped, 0 while it is stopped.";
    BREAKER_STATE = "pumphouse_breaker_state", Gauge, Count, ["queue"], "0 while the breaker is closed, 1 while it is half-open, 2 while it is open.";
    STORE_COMMIT_SECONDS = "pumphouse_store_commit_seconds", Histogram, Seconds, ["operation"], "How long a transaction of the store took.";
    STORE_BATCH_SIZE = "pumphouse_store_batch_size", Histogram, Count, ["operation"], "How many calls shared one transaction.";
    HTTP_REQUESTS = "pumphouse_http_requests_total", Counter, Count, ["route", "method", "status"], "Requests answered.";
}

/// Tells the recorder unit and help of every metric. Twice does no harm.
pub fn describe() {
    for metric in ALL {
        match metric.kind {
            Kind::Counter => metrics::describe_counter!(metric.name, metric.unit, metric.help),
            Kind::Gauge => metrics::describe_gauge!(metric.name, metric.unit, metric.help),
            Kind::Histogram => metrics::describe_histogram!(metric.name, metric.unit, metric.help),
        }
    }
}

/// The counters of one queue, looked up once and then cheap to use.
#[derive(Clone)]
pub struct QueueMeters {
    /// [`Metric`] `pumphouse_messages_completed_total`.
    pub completed: Counter,
    /// [`Metric`] `pumphouse_messages_dead_total`.
    pub dead: Counter,
    /// [`Metric`] `pumphouse_leases_lost_total`.
    pub leases_lost: Counter,
    /// [`Metric`] `pumphouse_delivery_duration_seconds`.
    pub delivery_seconds: Histogram,
    /// [`Metric`] `pumphouse_queue_wait_seconds`.
    pub queue_wait_seconds: Histogram,
    /// [`Metric`] `pumphouse_critical_time_seconds`.
    pub critical_seconds: Histogram,
    /// [`Metric`] `pumphouse_in_flight`.
    pub in_flight: Gauge,
    /// [`Metric`] `pumphouse_concurrency_limit`.
    pub limit: Gauge,
    /// [`Metric`] `pumphouse_pump_running`.
    pub running: Gauge,
    /// [`Metric`] `pumphouse_breaker_state`.
    pub breaker: Gauge,
    deliveries: [Counter; Outcome::ALL.len()],
}

impl QueueMeters {
    /// The meters of this queue.
    pub fn of(queue: &QueueName) -> Self {
        let name = queue.as_str().to_owned();
        let delivery = |outcome: Outcome| counter!(DELIVERIES, "queue" => name.clone(), "outcome" => outcome.as_str());
        Self {
            completed: counter!(COMPLETED, "queue" => name.clone()),
            dead: counter!(DEAD, "queue" => name.clone()),
            leases_lost: counter!(LEASES_LOST, "queue" => name.clone()),
            delivery_seconds: histogram!(DELIVERY_SECONDS, "queue" => name.clone()),
            queue_wait_seconds: histogram!(QUEUE_WAIT_SECONDS, "queue" => name.clone()),
            critical_seconds: histogram!(CRITICAL_SECONDS, "queue" => name.clone()),
            in_flight: gauge!(IN_FLIGHT, "queue" => name.clone()),
            limit: gauge!(LIMIT, "queue" => name.clone()),
            running: gauge!(PUMP_RUNNING, "queue" => name.clone()),
            breaker: gauge!(BREAKER_STATE, "queue" => name.clone()),
            deliveries: Outcome::ALL.map(delivery),
        }
    }

    /// The deliveries that ended this way.
    pub fn deliveries(&self, outcome: Outcome) -> &Counter {
        &self.deliveries[outcome as usize]
    }
}

/// Messages taken in by a queue.
pub fn enqueued(queue: &QueueName) -> Counter {
    counter!(ENQUEUED, "queue" => queue.as_str().to_owned())
}

/// Repeats that a queue recognised.
pub fn duplicates(queue: &QueueName) -> Counter {
    counter!(DUPLICATE, "queue" => queue.as_str().to_owned())
}

/// Messages that were published to a topic; to any that nobody wanted, without one, because anybody can publish to
/// any name.
pub fn published(topic: Option<&TopicName>) -> Counter {
    counter!(PUBLISHED, "topic" => topic.map_or("", TopicName::as_str).to_owned())
}

/// Repeated publishes that were recognised; see [`published`].
pub fn published_again(topic: Option<&TopicName>) -> Counter {
    counter!(PUBLISHED_AGAIN, "topic" => topic.map_or("", TopicName::as_str).to_owned())
}

/// Messages of a queue that expired.
pub fn expired(queue: &QueueName) -> Counter {
    counter!(EXPIRED, "queue" => queue.as_str().to_owned())
}

/// Messages of a queue that died in the store: crashes used up, or a row that cannot be read.
pub fn dead(queue: &QueueName) -> Counter {
    counter!(DEAD, "queue" => queue.as_str().to_owned())
}

/// Deliveries of a queue that ended this way without this process settling them.
pub fn deliveries(queue: &QueueName, outcome: Outcome) -> Counter {
    counter!(DELIVERIES, "queue" => queue.as_str().to_owned(), "outcome" => outcome.as_str())
}

/// How many messages of a queue are in this state.
pub fn queue_messages(queue: &QueueName, state: State) -> Gauge {
    gauge!(QUEUE_MESSAGES, "queue" => queue.as_str().to_owned(), "state" => state.as_str())
}

/// How long the oldest ready message of a queue has been due.
pub fn oldest_ready(queue: &QueueName) -> Gauge {
    gauge!(OLDEST_READY, "queue" => queue.as_str().to_owned())
}

/// How long this kind of transaction took.
pub fn commit_seconds(operation: &'static str) -> Histogram {
    histogram!(STORE_COMMIT_SECONDS, "operation" => operation)
}

/// How many calls shared one transaction of this kind.
pub fn batch_size(operation: &'static str) -> Histogram {
    histogram!(STORE_BATCH_SIZE, "operation" => operation)
}

/// Requests answered on this route. Looked up once for each combination and then remembered: it is counted for
/// every request, and routes, methods and statuses are few.
pub fn http_requests(route: &str, method: &'static str, status: u16) -> Counter {
    type OfRoute = HashMap<(&'static str, u16), Counter>;
    static KNOWN: LazyLock<RwLock<HashMap<String, OfRoute>>> = LazyLock::new(RwLock::default);
    let known = KNOWN.read().unwrap_or_else(PoisonError::into_inner);
    if let Some(counter) = known.get(route).and_then(|of| of.get(&(method, status))) {
        return counter.clone();
    }
    drop(known);
    let counter = counter!(HTTP_REQUESTS, "route" => route.to_owned(), "method" => method, "status" => status.to_string());
    let mut known = KNOWN.write().unwrap_or_else(PoisonError::into_inner);
    known.entry(route.to_owned()).or_default().insert((method, status), counter.clone());
    counter
}
