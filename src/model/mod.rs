//! The nouns of the house, and nothing else.
//!
//! No async, no I/O, no clock, no randomness: everything here is a value that can be made, compared
//! and printed. What is checked at the door is parsed into these types, and trusted from there on.
//!
//! - **message**: bytes, a content type and metadata ([`Message`], as sent [`NewMessage`]).
//! - **queue**: where messages wait, and how they are treated ([`QueueSettings`]).
//! - **lease**: a claim on a message, for a time, with a token that changes at every claim ([`Lease`]).
//! - **verdict**: what a handler says ([`Verdict`]); **failure**: what went wrong ([`Failure`]).
//! - **settlement**: what is written ([`Settlement`]).
//! - **dead letter**: a message in the state [`State::Dead`], kept with its history until somebody acts.

mod names;
mod invalid;
mod span;
mod attribute;
mod message;
mod lifecycle;
mod lineage;
mod lease;
mod outcome;
mod possible;
mod rules;
mod topic;
mod schedule;
mod envelope;
mod event;
mod guard;
mod queue;

pub use attribute::Attribute;
pub use envelope::{
    Envelope, Form, check_forwarded, check_key, check_text, moment, priority, reply_to,
};
pub(crate) use event::event_attributes;
pub use event::{EVENT_TYPES, Event, event_json};
pub use guard::{Breaker, BreakerSettings, Guard, GuardChange, Hold};
pub use invalid::Invalid;
pub use lease::{Held, Lease, Leased, Ticket, Token};
pub use lifecycle::{State, may_move};
pub use lineage::{children, reply_to as answer_to};
pub use message::{
    DELAY_MAX, Details, Head, IDEMPOTENCY_KEY_MAX, Idempotency, Lasts, Message, MessageId,
    NewMessage, PRIORITY_MAX, PRIORITY_MIN, Record, TEXT_MAX, Tries, When, group_number,
};
pub use names::{QueueName, ReplicaName, ScheduleName, SubscriptionName, TopicName};
pub use outcome::{
    ANSWER_HEADERS_KEPT, ANSWER_KEPT, Answer, DELIVERIES_KEPT, DeliveryRecord, ErrorKind, Failure,
    Outcome, Reply, Settlement, Verdict,
};
pub use queue::{
    Backoff, Bounds, Builtin, Concurrency, Curve, Format, GroupOnDead, Handler, HttpHandler,
    Jitter, LEASE_MARGIN, LIMIT_MAX, MASK, OnExpiry, PushHandler, QueueRecord, QueueSettings,
    RateLimit, Recovery, Retention, RetryStatuses, RunState, Scope, Stopped,
};
pub use rules::{Action, Match, Numbers, RULES_MAX, Rule};
pub use schedule::{
    FIRINGS_KEPT, Firing, MISSED_MAX, Missed, Schedule, ScheduleRecord, ScheduleState, Timetable,
};
pub use span::{parse_span, span_text};
pub use topic::{Condition, Destination, Subscription, SubscriptionFilter, copy_for, wanted_by};
