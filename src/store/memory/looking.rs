//! Looking at messages; changes nothing.

use bytes::Bytes;
use jiff::Timestamp;

use crate::model::{DeliveryRecord, MessageId, QueueName, Record, State};

use super::super::{Depth, Filter, Listed, Page, ROWS_LOOKED_AT_MAX};
use super::books::{Books, Queue, since};

impl Books {
    pub(super) fn message(&self, id: MessageId) -> Option<(Record, Vec<DeliveryRecord>)> {
        let row = self.row(self.seq(id)?)?;
        Some((row.record.clone(), row.deliveries.iter().rev().cloned().collect()))
    }

    pub(super) fn payload(&self, id: MessageId) -> Option<Bytes> {
        Some(self.row(self.seq(id)?)?.body.clone())
    }

    pub(super) fn messages(&self, filter: &Filter, page: Page) -> Listed {
        let mut items = Vec::new();
        let mut last = None;
        let mut rows = self.rows_before(page.after.unwrap_or(i64::MAX)).rev().peekable();
        for (seq, row) in rows.by_ref().take(ROWS_LOOKED_AT_MAX as usize) {
            last = Some(seq);
            if filter.matches(&row.record) {
                items.push(row.record.clone());
            }
            if items.len() >= page.limit {
                break;
            }
        }
        Listed { items, next: last.filter(|_| rows.peek().is_some()) }
    }

    pub(super) fn depths(&self, now: Timestamp) -> Vec<Depth> {
        self.queues.iter().map(|(name, queue)| self.depth(name, queue, now)).collect()
    }

    fn depth(&self, name: &QueueName, queue: &Queue, now: Timestamp) -> Depth {
        Depth {
            queue: name.clone(),
            ready: queue.count(State::Ready),
            behind: queue.behind,
            scheduled: queue.count(State::Scheduled),
            leased: queue.count(State::Leased),
            dead: queue.count(State::Dead),
            oldest_ready: queue.oldest_due().map(|due| since(due, now)),
        }
    }
}
