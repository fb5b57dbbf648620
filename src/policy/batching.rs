//! How many messages to lease ahead of the deliveries that can start now, and how many to publish at once.

use std::time::Duration;

use crate::model::{Destination, NewMessage, QueueName, Subscription, TopicName, wanted_by};

/// The most messages one claim takes.
pub const LEASE_BATCH_MAX: usize = 1000;

/// What was seen of a queue's messages lately.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Usual {
    /// How long a delivery takes.
    pub delivery: Duration,
    /// How many bytes of payload a message has.
    pub size: u64,
}

/// How many messages to hold beyond the open slots, so that the next delivery need not wait for a claim.
///
/// As many as will be started within 100 ms at the pace of the last deliveries, so that a slow
/// handler holds nothing that another replica could be delivering; at most as many as two claims take, and
/// about 16 MiB of payload. None before anything was seen. Where messages take turns, as many as will be started
/// within 15 ms: what is held here goes before whoever comes next.
pub fn prefetch(limit: u32, usual: Option<Usual>, in_turn: bool) -> usize {
    let Some(usual) = usual else { return 0 };
    let horizon = if in_turn { HORIZON_IN_TURN } else { HORIZON };
    if usual.delivery > HORIZON {
        return 0;
    }
    let rounds = horizon.as_secs_f64() / usual.delivery.as_secs_f64().max(1e-4);
    let ahead = f64::from(limit) * rounds;
    let fitting = AHEAD_BYTES_MAX / usual.size.max(1);
    (ahead as usize).min(2 * LEASE_BATCH_MAX).min(usize::try_from(fitting).unwrap_or(usize::MAX))
}

/// How many copies one transaction makes of what is published, so that nobody waits long behind it.
const COPIES_MAX: usize = 10_000;

/// How many messages to a topic go into one transaction, so that they become at most 10,000 copies if every
/// subscription wants each of them.
pub fn published_at_once(topic: &TopicName, subscriptions: &[Subscription]) -> usize {
    let copies = subscriptions.iter().filter(|it| it.topic == *topic).count();
    (COPIES_MAX / copies.max(1)).max(1)
}

/// Why these messages cannot leave together with an ack, whatever stands in their queues: there are too many copies of
/// what they publish, or a queue for an answer is not there.
pub fn unsendable<'a, S>(
    sent: &[NewMessage],
    subscriptions: impl Fn(&TopicName) -> S,
    is_there: impl Fn(&QueueName) -> bool,
) -> Option<String>
where
    S: IntoIterator<Item = &'a Subscription>,
{
    let mut copies = 0;
    for (place, message) in sent.iter().enumerate() {
        if let Some(queue) = message.details.reply_to.as_ref().filter(|queue| !is_there(queue)) {
            return Some(format!(
                "/messages/{place} is not sent: there is no queue {queue} for its answer"
            ));
        }
        if let Destination::Topic { topic, .. } = &message.to {
            copies += wanted_by(message, subscriptions(topic)).len();
        }
        if copies > COPIES_MAX {
            return Some(format!(
                "what is published with one ack becomes at most {COPIES_MAX} copies in queues, and this becomes more; \
                 send fewer messages with it, and the others before it as a batch to their topic, with a key"
            ));
        }
    }
    None
}

/// How many bytes of payload are held ahead, as far as messages are as large as they usually are.
const AHEAD_BYTES_MAX: u64 = 16 << 20;
/// How far ahead messages are held.
const HORIZON: Duration = Duration::from_millis(100);
/// The same where messages take turns: about what a claim takes.
const HORIZON_IN_TURN: Duration = Duration::from_millis(15);

#[cfg(test)]
mod tests {
    use super::*;

    fn prefetch(limit: u32, usual: Option<Usual>) -> usize {
        super::prefetch(limit, usual, false)
    }

    fn usual(delivery: Duration) -> Option<Usual> {
        Some(Usual { delivery, size: 256 })
    }

    #[test]
    fn a_fast_handler_has_the_next_messages_at_hand() {
        assert_eq!(prefetch(16, usual(Duration::from_millis(20))), 80);
        assert_eq!(prefetch(16, usual(Duration::ZERO)), 2 * LEASE_BATCH_MAX);
        assert_eq!(prefetch(10_000, usual(Duration::ZERO)), 2 * LEASE_BATCH_MAX);
    }

    #[test]
    fn where_messages_take_turns_less_is_at_hand() {
        assert_eq!(super::prefetch(16, usual(Duration::from_millis(20)), true), 12);
        assert_eq!(super::prefetch(8, usual(Duration::from_millis(50)), true), 2);
    }

    #[test]
    fn a_slow_or_unknown_handler_holds_nothing_ahead() {
        assert_eq!(prefetch(16, usual(Duration::from_secs(1))), 0);
        assert_eq!(prefetch(16, None), 0);
        assert_eq!(prefetch(0, usual(Duration::from_millis(1))), 0);
        assert_eq!(super::prefetch(16, usual(Duration::from_secs(1)), true), 0);
    }

    #[test]
    fn large_messages_are_held_by_their_bytes() {
        let large = |size| Some(Usual { delivery: Duration::ZERO, size });
        assert_eq!(prefetch(16, large(1 << 20)), 16);
        assert_eq!(prefetch(16, large(1 << 30)), 0);
        assert_eq!(prefetch(16, large(0)), 2 * LEASE_BATCH_MAX);
    }
}
