//! The operator's hand on single messages: amend, redrive, delete, purge.

use jiff::Timestamp;

use crate::model::{MessageId, QueueName, State};

use super::super::{Amended, Amendment, Filter};
use super::books::{Books, Row};
use super::enqueue::moment;

impl Books {
    pub(super) fn amend(&mut self, id: MessageId, amendment: Amendment, now: Timestamp) -> Amended {
        let Some(seq) = self.seq(id) else { return Amended::NoSuchMessage };
        let amended = self.change(seq, |row| {
            if !row.record.state.waits() {
                return Amended::Not(row.record.state);
            }
            let in_group = row.record.head.details.group.is_some();
            if amendment != Amendment::Cancel && in_group && row.record.state == State::Ready {
                return Amended::InGroup;
            }
            row.amend(amendment, now);
            Amended::Done(row.record.clone())
        });
        amended.unwrap_or(Amended::NoSuchMessage)
    }

    pub(super) fn redrive(
        &mut self,
        filter: &Filter,
        max: usize,
        now: Timestamp,
    ) -> Vec<MessageId> {
        let filter = Filter { state: Some(State::Dead), ..filter.clone() };
        let dead = self.rows().filter(|(_, row)| filter.matches(&row.record)).take(max);
        let dead = dead.map(|(seq, _)| seq).collect::<Vec<_>>();
        let redrive = |seq| self.change(seq, |row| row.redrive(now));
        dead.into_iter().filter_map(redrive).collect()
    }

    pub(super) fn delete_dead(&mut self, id: MessageId) -> Amended {
        let Some((seq, row)) = self.seq(id).and_then(|seq| Some((seq, self.row(seq)?))) else {
            return Amended::NoSuchMessage;
        };
        if row.record.state != State::Dead {
            return Amended::Not(row.record.state);
        }
        self.remove(seq).map_or(Amended::NoSuchMessage, |row| Amended::Done(row.record))
    }

    pub(super) fn purge(&mut self, queue: &QueueName, max: usize) -> u64 {
        let waits = |row: &Row| row.record.head.queue == *queue && row.record.state.waits();
        let waiting = self.rows().filter(|(_, row)| waits(row)).take(max);
        let waiting = waiting.map(|(seq, _)| seq).collect::<Vec<_>>();
        waiting.iter().filter(|seq| self.remove(**seq).is_some()).count() as u64
    }
}

impl Row {
    fn amend(&mut self, amendment: Amendment, now: Timestamp) {
        match amendment {
            Amendment::Cancel => {
                let reason = "cancelled while it waited".to_owned();
                self.end(State::Cancelled, Some(reason), now);
            }
            Amendment::RunNow => {
                // What is ready keeps its place in the order.
                if self.record.state == State::Scheduled {
                    self.wait(now, now);
                }
                self.urgent = true;
            }
            Amendment::Reschedule(when) => {
                self.wait(moment(when, now), now);
                self.urgent = false;
            }
        }
    }

    fn redrive(&mut self, now: Timestamp) -> MessageId {
        self.record.tries.failures = 0;
        self.record.tries.crashes = 0;
        self.record.reason = None;
        self.record.finished_at = None;
        // Whoever redrives a message wants it delivered, and not expired by the next sweep.
        if self.is_expired(now) {
            self.record.head.expires_at = None;
        }
        self.wait(now, now);
        self.line_up();
        self.record.head.id
    }
}
