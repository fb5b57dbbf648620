//! What has to be done from time to time: promote, reap, sweep, attend.

use std::collections::BTreeMap;

use bytes::Bytes;
use jiff::Timestamp;

use crate::model::{DeliveryRecord, ErrorKind, OnExpiry, Outcome, QueueName, State};

use super::super::{Attendance, Attended, Chores, EXPIRED, Promoted, Reaped, Swept};
use super::books::{Books, Hold, Row, after, since};

impl Books {
    pub(super) fn promote(&mut self, max: usize, now: Timestamp) -> Promoted {
        let due = self.due(max, now);
        for seq in &due {
            self.change(*seq, |row| row.record.state = State::Ready);
        }
        let next = self.next_due().map(|due| since(now, due));
        Promoted { count: due.len(), next }
    }

    pub(super) fn reap(&mut self, max: usize, now: Timestamp) -> Vec<Reaped> {
        let run_out = self.run_out(max, now);
        run_out.into_iter().filter_map(|seq| self.take_back(seq, now)).collect()
    }

    /// Ends a lease for which nobody answers any more.
    fn take_back(&mut self, seq: i64, now: Timestamp) -> Option<Reaped> {
        let name = self.row(seq)?.record.head.queue.clone();
        let crashes_max = self.queues.get(&name)?.settings.recovery.max_crashes;
        self.change(seq, |row| {
            row.lose_its_lease(crashes_max, now);
            Reaped { id: row.record.head.id, queue: name, state: row.record.state }
        })
    }

    pub(super) fn sweep(&mut self, max: usize, now: Timestamp) -> Swept {
        let expired = self.choose(max, |row| row.record.state.waits() && row.is_expired(now));
        let mut by_queue = BTreeMap::<QueueName, u64>::new();
        let mut set_aside = by_queue.clone();
        for seq in &expired {
            let Some(queue) = self.row(*seq).map(|row| row.record.head.queue.clone()) else {
                continue;
            };
            match self.queues[&queue].settings.on_expiry {
                OnExpiry::Expire => self.change(*seq, |row| row.end(State::Expired, None, now)),
                OnExpiry::DeadLetter => {
                    *set_aside.entry(queue.clone()).or_default() += 1;
                    let why = Some(EXPIRED.to_owned());
                    self.change(*seq, |row| row.end(State::Dead, why, now))
                }
            };
            *by_queue.entry(queue).or_default() += 1;
        }
        let kept_too_long = self.choose(max, |row| self.is_past_retention(row, now));
        for seq in &kept_too_long {
            self.remove(*seq);
        }
        let keys = self.forget_keys(max, now);
        Swept {
            expired: by_queue.into_iter().collect(),
            set_aside: set_aside.into_iter().collect(),
            deleted: kept_too_long.len() as u64,
            keys: keys as u64,
            more: [expired.len(), kept_too_long.len(), keys].contains(&max),
        }
    }

    /// With one process alone, each share is what was asked for, and nobody else can have died.
    pub(super) fn attend(&self, attendance: &Attendance, now: Timestamp) -> Attended {
        let share = |limit| if attendance.leaving { 0 } else { limit };
        let present = (!attendance.leaving).then(|| attendance.replica.clone());
        Attended {
            shares: attendance.wants.iter().map(|want| share(want.of_one())).collect(),
            reaped: Vec::new(),
            replicas: present.into_iter().collect(),
            chores: Chores::ALL,
            revision: self.revision,
            now,
        }
    }

    fn choose(&self, max: usize, wanted: impl Fn(&Row) -> bool) -> Vec<i64> {
        self.rows().filter(|(_, row)| wanted(row)).take(max).map(|(seq, _)| seq).collect()
    }

    fn is_past_retention(&self, row: &Row, now: Timestamp) -> bool {
        let Some(finished_at) = row.record.finished_at else { return false };
        let retention = &self.queues[&row.record.head.queue].settings.retention;
        let kept =
            if row.record.state == State::Dead { retention.dead } else { retention.completed };
        after(finished_at, kept) <= now
    }

    fn forget_keys(&mut self, max: usize, now: Timestamp) -> usize {
        let idle = self.keys.iter().filter(|(_, key)| !self.key_counts(key, now));
        let idle = idle.take(max).map(|(name, _)| name.clone()).collect::<Vec<_>>();
        for name in &idle {
            self.keys.remove(name);
        }
        idle.len()
    }
}

impl Row {
    fn lose_its_lease(&mut self, crashes_max: u32, now: Timestamp) {
        let Some(hold) = self.hold.take() else { return };
        self.record.tries.crashes += 1;
        self.remember(lost_delivery(self.record.tries.attempts, hold, now));
        let crashes = self.record.tries.crashes;
        if crashes < crashes_max {
            return self.wait(now, now);
        }
        let reason = format!(
            "{crashes} attempts ended with nobody answering for them; recovery.max_crashes is {crashes_max}"
        );
        self.end(State::Dead, Some(reason), now);
    }
}

fn lost_delivery(number: u32, hold: Hold, now: Timestamp) -> DeliveryRecord {
    DeliveryRecord {
        number,
        replica: hold.replica,
        started_at: hold.since,
        duration: since(hold.since, now),
        outcome: Outcome::LeaseLost,
        status: None,
        error_kind: Some(ErrorKind::LeaseLost),
        error: Some("the lease ran out before an answer was written".to_owned()),
        answer: Bytes::new(),
    }
}
