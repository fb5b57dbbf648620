//! Writing what became of a leased message, if the lease still holds.

use jiff::Timestamp;

use crate::model::{NewMessage, QueueName, Settlement, State, TopicName, Tries};
use crate::policy;

use super::super::{Enqueued, Error, Result, Settle, Settled, not_sent, target_gone};
use super::books::{Books, Row, Standing, after, since};

impl Books {
    pub(super) fn settle(&mut self, settle: Settle, now: Timestamp) -> Result<Settled> {
        let Settle { lease, settlement, delivery, sent } = settle;
        let held = |row: &&Row| row.is_held_by(&lease, now);
        let Some(row) = self.row(lease.seq).filter(held) else { return Ok(Settled::LeaseLost) };
        let age = since(row.record.head.enqueued_at, now);
        if settlement == Settlement::Ack {
            self.send(sent, now)?;
        }
        let settlement = match settlement {
            Settlement::Move { to_queue, reason } if !self.queues.contains_key(&to_queue) => {
                Settlement::DeadLetter { reason: target_gone(&reason, &to_queue) }
            }
            other => other,
        };
        self.change(lease.seq, |row| {
            row.settle(settlement, now);
            delivery.into_iter().for_each(|delivery| row.remember(delivery));
        });
        Ok(Settled::Done { age })
    }

    /// Takes in what a handler sent: all of it or nothing.
    fn send(&mut self, sent: Vec<NewMessage>, now: Timestamp) -> Result<()> {
        let of_topic = |topic: &TopicName| {
            let topic = topic.clone();
            self.subscriptions.values().filter(move |it| it.topic == topic)
        };
        let is_there = |queue: &QueueName| self.queues.contains_key(queue);
        if let Some(what) = policy::unsendable(&sent, of_topic, is_there) {
            return Err(Error::Rejected { what });
        }
        let mark = self.mark();
        for (place, message) in sent.into_iter().enumerate() {
            if let Enqueued::Refused(refusal) = self.take_in(message, now) {
                self.undo(mark);
                self.untell();
                return Err(Error::Rejected { what: not_sent(place, &refusal) });
            }
        }
        Ok(())
    }
}

impl Row {
    fn settle(&mut self, settlement: Settlement, now: Timestamp) {
        match settlement {
            Settlement::Ack => self.end(State::Completed, None, now),
            Settlement::Retry { after: pause } => {
                self.record.tries.failures += 1;
                self.wait(after(now, pause), now);
            }
            Settlement::Postpone { after: pause } => self.wait(after(now, pause), now),
            Settlement::DeadLetter { reason } => {
                self.record.tries.failures += 1;
                self.end(State::Dead, Some(reason), now);
            }
            Settlement::Discard { reason } => self.end(State::Discarded, Some(reason), now),
            Settlement::Move { to_queue, .. } => {
                self.record.head.queue = to_queue;
                self.standing = Standing::None;
                self.line_up();
                self.record.tries =
                    Tries { attempts: self.record.tries.attempts, ..Tries::default() };
                self.wait(now, now);
            }
            // It keeps its due time, so that it goes first again; the attempt keeps its number, so
            // that no number is used twice.
            Settlement::Release => {
                self.record.state = State::Ready;
                self.hold = None;
            }
        }
    }
}
