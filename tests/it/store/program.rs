//! Random programs of operations, for stores to be tried with. What they must then be like, the callers say.
//!
//! A program is a list of [`Step`]s, made and shrunk by `proptest`. A [`Director`] makes each an
//! [`Action`] with names and bodies, so that several stores can be given the very same one.

use std::time::Duration;

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use pumphouse::model::{
    Details, GroupOnDead, Idempotency, MessageId, NewMessage, OnExpiry, QueueName, QueueSettings,
    Settlement, State, When,
};
use pumphouse::store::{Amendment, Enqueue, Filter};

use crate::support::stage::{ALL, LONG, dead_letter, discard, queue_name};

/// A queue without `max_messages`.
const NEVER_FULL: u8 = 0;

/// One operation, with small numbers in place of names.
#[derive(Debug, Clone)]
pub(crate) enum Step {
    Send { drafts: Vec<Draft>, atomic: bool, batch: Option<(u8, u8)> },
    Claim { queue: u8, max: usize, duration: Duration, urgent_only: bool },
    Settle { lease: usize, settlement: Settlement, sent: Vec<Draft>, with_record: bool },
    Renew { leases: Vec<usize>, duration: Duration },
    Promote { max: usize },
    Reap,
    Sweep,
    Amend { message: usize, amendment: Amendment },
    Redrive { queue: Option<u8>, max: usize },
    DeleteDead { message: usize },
    Purge { queue: u8 },
    PutQueue { queue: u8, settings: u8 },
    DeleteQueue { queue: u8, force: bool },
    List { queue: Option<u8>, state: Option<State>, limit: usize },
    Pass { time: Duration },
}

/// A message that is to be sent.
#[derive(Debug, Clone)]
pub(crate) struct Draft {
    queue: u8,
    wait: Option<Duration>,
    life: Option<Duration>,
    priority: i8,
    keys: Vec<(u8, u8)>,
    group: Option<u8>,
    fairness_key: Option<u8>,
    unique: Option<u8>,
    /// Takes the name of a message that was sent before.
    named_like: Option<usize>,
}

/// One operation as a store is told it. Leases go by the order in which they were taken.
#[derive(Debug, Clone)]
pub(crate) enum Action {
    Send(Enqueue),
    Claim { queue: QueueName, max: usize, duration: Duration, urgent_only: bool },
    Settle { lease: usize, settlement: Settlement, sent: Vec<NewMessage>, with_record: bool },
    Renew { leases: Vec<usize>, duration: Duration },
    Promote { max: usize },
    Reap,
    Sweep,
    Amend { id: MessageId, amendment: Amendment },
    Redrive { filter: Filter, max: usize },
    DeleteDead { id: MessageId },
    Purge { queue: QueueName },
    PutQueue { queue: QueueName, settings: Box<QueueSettings> },
    DeleteQueue { queue: QueueName, force: bool },
    List { filter: Filter, limit: usize },
    Pass(Duration),
}

/// A program of so many steps. It begins with two queues; a third comes and goes, a fourth never comes.
pub(crate) fn program(steps: std::ops::Range<usize>) -> impl Strategy<Value = Vec<Step>> {
    let queues = (0..2).map(|queue| Step::PutQueue { queue, settings: 0 }).collect::<Vec<_>>();
    vec(step(), steps).prop_map(move |steps| queues.iter().cloned().chain(steps).collect())
}

fn step() -> impl Strategy<Value = Step> {
    let keyed = option::weighted(0.2, (0..2u8, 0..2u8));
    let send = (vec(draft(), 1..4), any::<bool>(), keyed);
    let claim = (0..4u8, 0..4usize, span(), proptest::bool::weighted(0.2));
    let sent = vec(draft(), 0..3);
    let settle = (0..8usize, settlement(), sent, any::<bool>());
    prop_oneof![
        6 => send.prop_map(|(drafts, atomic, batch)| Step::Send { drafts, atomic, batch }),
        6 => claim.prop_map(|(queue, max, duration, urgent_only)| {
            Step::Claim { queue, max, duration, urgent_only }
        }),
        8 => settle.prop_map(|(lease, settlement, sent, with_record)| {
            Step::Settle { lease, settlement, sent, with_record }
        }),
        2 => (vec(0..8usize, 0..4), span())
            .prop_map(|(leases, duration)| Step::Renew { leases, duration }),
        3 => prop_oneof![Just(1), Just(ALL)].prop_map(|max| Step::Promote { max }),
        3 => Just(Step::Reap),
        3 => Just(Step::Sweep),
        3 => (0..8usize, amendment())
            .prop_map(|(message, amendment)| Step::Amend { message, amendment }),
        2 => (option::of(0..4u8), 0..4usize)
            .prop_map(|(queue, max)| Step::Redrive { queue, max }),
        1 => (0..8usize).prop_map(|message| Step::DeleteDead { message }),
        1 => (0..4u8).prop_map(|queue| Step::Purge { queue }),
        2 => (0..3u8, 0..3u8).prop_map(|(queue, settings)| Step::PutQueue { queue, settings }),
        1 => (0..4u8, proptest::bool::weighted(0.3))
            .prop_map(|(queue, force)| Step::DeleteQueue { queue, force }),
        2 => (option::of(0..4u8), option::of(proptest::sample::select(&State::ALL[..])), 1..5usize)
            .prop_map(|(queue, state, limit)| Step::List { queue, state, limit }),
        5 => prop_oneof![Just(1), Just(20), Just(60)]
            .prop_map(|time| Step::Pass { time: Duration::from_millis(time) }),
    ]
}

fn draft() -> impl Strategy<Value = Draft> {
    let keys = vec((0..4u8, 0..2u8), 0..3);
    let often = prop_oneof![9 => 0..2u8, 2 => Just(2u8), 1 => Just(3u8)];
    let named_like = option::weighted(0.1, 0..8usize);
    let times = (option::weighted(0.4, span()), option::weighted(0.3, span()));
    let orders = (option::weighted(0.5, 0..2u8), option::weighted(0.2, 0..4u8));
    let unique = option::weighted(0.1, 0..3u8);
    (often, times, -1..2i8, keys, named_like, orders, unique).prop_map(
        |(queue, (wait, life), priority, keys, named_like, (group, fairness_key), unique)| Draft {
            queue,
            wait: wait.filter(|_| group.is_none()),
            life,
            priority: if group.is_some() { 0 } else { priority },
            keys,
            group,
            fairness_key,
            unique,
            named_like,
        },
    )
}

fn span() -> impl Strategy<Value = Duration> {
    let millis = |millis| Just(Duration::from_millis(millis));
    prop_oneof![1 => millis(0), 3 => millis(20), 3 => millis(50), 3 => Just(LONG)]
}

fn settlement() -> impl Strategy<Value = Settlement> {
    prop_oneof![
        3 => Just(Settlement::Ack),
        3 => span().prop_map(|after| Settlement::Retry { after }),
        2 => Just(dead_letter("it was not to be")),
        1 => Just(discard("nobody needs it")),
        2 => Just(Settlement::Release),
        2 => span().prop_map(|after| Settlement::Postpone { after }),
        2 => (0..4u8).prop_map(|queue| Settlement::Move {
            to_queue: queue_of(queue),
            reason: "it belongs elsewhere".to_owned(),
        }),
    ]
}

fn amendment() -> impl Strategy<Value = Amendment> {
    prop_oneof![
        Just(Amendment::Cancel),
        Just(Amendment::RunNow),
        Just(Amendment::Reschedule(When::Now)),
        span().prop_map(|wait| Amendment::Reschedule(When::In(wait))),
    ]
}

/// Gives names to what a program speaks of.
#[derive(Debug, Default)]
pub(crate) struct Director {
    sent: Vec<MessageId>,
}

impl Director {
    /// What a store is to be told.
    pub(crate) fn direct(&mut self, step: &Step) -> Action {
        match step.clone() {
            Step::Send { drafts, atomic, batch } => {
                let messages = if atomic { self.write_anew(drafts) } else { self.write(drafts) };
                let batch = batch.map(|(name, print)| key("batch", name, print));
                Action::Send(Enqueue { messages, atomic, batch })
            }
            Step::Claim { queue, max, duration, urgent_only } => {
                Action::Claim { queue: queue_of(queue), max, duration, urgent_only }
            }
            Step::Settle { lease, settlement, sent, with_record } => {
                Action::Settle { lease, settlement, sent: self.write_anew(sent), with_record }
            }
            Step::Renew { leases, duration } => Action::Renew { leases, duration },
            Step::Promote { max } => Action::Promote { max },
            Step::Reap => Action::Reap,
            Step::Sweep => Action::Sweep,
            Step::Amend { message, amendment } => {
                Action::Amend { id: self.recent(message), amendment }
            }
            Step::Redrive { queue, max } => Action::Redrive { filter: filter(queue, None), max },
            Step::DeleteDead { message } => Action::DeleteDead { id: self.recent(message) },
            Step::Purge { queue } => Action::Purge { queue: queue_of(queue) },
            Step::PutQueue { queue, settings } => {
                let mut settings = settings_of(settings);
                if queue == NEVER_FULL {
                    settings.max_messages = None;
                }
                Action::PutQueue { queue: queue_of(queue), settings: Box::new(settings) }
            }
            Step::DeleteQueue { queue, force } => {
                Action::DeleteQueue { queue: queue_of(queue), force }
            }
            Step::List { queue, state, limit } => {
                Action::List { filter: filter(queue, state), limit }
            }
            Step::Pass { time } => Action::Pass(time),
        }
    }

    /// Every name that was ever given to a message.
    pub(crate) fn names(&self) -> &[MessageId] {
        &self.sent
    }

    /// Messages with names of their own. Only a key promises that a repeat is told from something new
    /// before anything else is; a name that is known is noticed where the message would go in, which is
    /// too late where another one is refused.
    fn write_anew(&mut self, drafts: Vec<Draft>) -> Vec<NewMessage> {
        let anew = |draft| Draft { named_like: None, ..draft };
        self.write(drafts.into_iter().map(anew).collect())
    }

    fn write(&mut self, drafts: Vec<Draft>) -> Vec<NewMessage> {
        drafts.into_iter().map(|draft| self.write_one(draft)).collect()
    }

    fn write_one(&mut self, draft: Draft) -> NewMessage {
        let id = draft.named_like.map_or_else(MessageId::new, |back| self.recent(back));
        // For the same reason to the queue that is never full.
        let queue = if draft.named_like.is_some() { NEVER_FULL } else { draft.queue };
        self.sent.push(id);
        let body = format!("message {}", self.sent.len());
        let keys = draft.keys.into_iter().map(|(name, print)| key("message", name, print));
        let unique = draft.unique.map(|name| Idempotency::while_pending(&name.to_string()));
        let details = Details {
            group: draft.group.map(|number| format!("group {number}")),
            fairness_key: draft.fairness_key.map(|number| format!("tenant {number}")),
            ..Details::default()
        };
        NewMessage {
            id,
            details,
            deliver: draft.wait.map_or(When::Now, When::In),
            expires: draft.life.map(When::In),
            priority: draft.priority,
            keys: keys.chain(unique).collect(),
            ..NewMessage::new(queue_of(queue), body)
        }
    }

    /// The message sent so many messages ago; one that nobody knows where there is none.
    fn recent(&self, back: usize) -> MessageId {
        self.sent.iter().rev().nth(back).copied().unwrap_or_default()
    }
}

fn filter(queue: Option<u8>, state: Option<State>) -> Filter {
    Filter { queue: queue.map(queue_of), state, ..Filter::default() }
}

fn queue_of(number: u8) -> QueueName {
    queue_name(&format!("queue-{number}"))
}

fn key(scope: &str, name: u8, print: u8) -> Idempotency {
    Idempotency::new(scope, &name.to_string(), [print; 32])
}

fn settings_of(number: u8) -> QueueSettings {
    let mut settings = QueueSettings::default();
    match number {
        0 => (),
        1 => {
            settings.max_messages = Some(3);
            settings.recovery.max_crashes = 1;
            settings.dedup_window = Duration::from_millis(30);
        }
        _ => {
            settings.recovery.max_crashes = 2;
            settings.retention.completed = Duration::from_millis(20);
            settings.retention.dead = Duration::from_millis(50);
            settings.on_expiry = OnExpiry::DeadLetter;
            settings.group_on_dead = GroupOnDead::Block;
        }
    }
    settings
}
