//! Claiming messages, and keeping the claim.

use std::time::{Duration, Instant};

use jiff::Timestamp;

use crate::model::{self, Lease, Leased, Message, State, Ticket, Token};

use super::super::Claim;
use super::books::{Books, Hold, Place, Row, after};

impl Books {
    /// Claims in the order of lease. `asked` is the monotonic time at which the caller asked.
    pub(super) fn lease(&mut self, claim: &Claim, asked: Instant, now: Timestamp) -> Vec<Leased> {
        let Some(queue) = self.queues.get(&claim.queue) else { return Vec::new() };
        let out = queue.count(State::Leased);
        let free = claim.out_max.map_or(u64::MAX, |most| u64::from(most).saturating_sub(out));
        let max = claim.max.min(usize::try_from(free).unwrap_or(usize::MAX));
        if max == 0 {
            return Vec::new();
        }
        let claim = &Claim { max, ..claim.clone() };
        let in_turn = !claim.urgent_only && queue.ready.iter().any(|(_, lane, ..)| *lane != 0);
        let chosen = if in_turn { self.in_turn(claim, now) } else { self.in_order(claim, now) };
        let until = asked + claim.duration;
        let take = |seq| self.change(seq, |row| row.claim(seq, claim, until, now));
        chosen.into_iter().filter_map(take).collect()
    }

    fn in_order(&self, claim: &Claim, now: Timestamp) -> Vec<i64> {
        let Some(queue) = self.queues.get(&claim.queue) else { return Vec::new() };
        let wanted = |row: &Row| !row.is_expired(now) && (row.urgent || !claim.urgent_only);
        let seqs = queue.ready.iter().map(|(.., seq)| *seq);
        seqs.filter(|seq| self.row(*seq).is_some_and(wanted)).take(claim.max).collect()
    }

    /// Of the highest priority, round the fairness keys, on from where the last claim ended.
    fn in_turn(&mut self, claim: &Claim, now: Timestamp) -> Vec<i64> {
        let Some(queue) = self.queues.get(&claim.queue) else { return Vec::new() };
        let wanted = |place: &&Place| self.row(place.3).is_some_and(|row| !row.is_expired(now));
        let mut ready = queue.ready.iter().filter(wanted).copied().collect::<Vec<_>>();
        let Some((highest, ..)) = ready.first().copied() else { return Vec::new() };
        ready.retain(|(priority, ..)| *priority == highest);
        let last = self.last_lanes.get(&claim.queue).copied().unwrap_or(0);
        let mut lanes = ready.iter().map(|(_, lane, ..)| *lane).collect::<Vec<_>>();
        lanes.dedup();
        let before = lanes.iter().filter(|lane| **lane <= last).count() % lanes.len();
        lanes.rotate_left(before);
        lanes.truncate(claim.max);
        let mut chosen = Vec::new();
        for (turn, lane) in lanes.iter().enumerate() {
            let its_own = ready.iter().filter(|(_, its, ..)| its == lane).enumerate();
            let its_own = its_own.take(claim.max.div_ceil(lanes.len()));
            chosen.extend(its_own.map(|(round, place)| (round, turn, place.3)));
        }
        chosen.sort_unstable();
        chosen.truncate(claim.max);
        if let Some((_, turn, _)) = chosen.last() {
            self.last_lanes.insert(claim.queue.clone(), lanes[*turn]);
        }
        chosen.into_iter().map(|(.., seq)| seq).collect()
    }

    /// What is known of these leases, in order; `None` for those that are lost.
    pub(super) fn held(&self, tickets: &[Ticket], now: Timestamp) -> Vec<Option<model::Held>> {
        let held = |ticket: &Ticket| {
            let row = self.row(ticket.seq)?;
            let hold = row.hold.as_ref()?;
            (hold.token == ticket.token && now < hold.until).then(|| model::Held {
                head: row.record.head.clone(),
                tries: row.record.tries,
                leased_at: hold.since,
                now,
            })
        };
        tickets.iter().map(held).collect()
    }

    /// Prolongs what is still held.
    pub(super) fn renew(
        &mut self,
        leases: &[Lease],
        duration: Duration,
        now: Timestamp,
    ) -> Vec<bool> {
        // All are judged before any is prolonged, because all are asked about one moment.
        let is_held =
            |lease: &Lease| self.row(lease.seq).is_some_and(|row| row.is_held_by(lease, now));
        let held = leases.iter().map(is_held).collect::<Vec<_>>();
        for (lease, _) in leases.iter().zip(&held).filter(|(_, held)| **held) {
            self.change(lease.seq, |row| row.prolong(after(now, duration)));
        }
        held
    }
}

impl Row {
    /// Whether this lease is the current one and has not run out.
    pub(super) fn is_held_by(&self, lease: &Lease, now: Timestamp) -> bool {
        let current = |hold: &Hold| hold.token == lease.token && now < hold.until;
        self.record.head.id == lease.id && self.hold.as_ref().is_some_and(current)
    }

    fn claim(&mut self, seq: i64, claim: &Claim, until: Instant, now: Timestamp) -> Leased {
        let token = new_token();
        self.hold = Some(Hold {
            token,
            replica: claim.replica.clone(),
            since: now,
            until: after(now, claim.duration),
        });
        self.record.state = State::Leased;
        // Counted here and not when it is settled, so that a crash in between counts too.
        self.record.tries.attempts += 1;
        self.urgent = false;
        let head = self.record.head.clone();
        Leased {
            lease: Lease { seq, id: head.id, token, until },
            message: Message { head, body: self.body.clone() },
            tries: self.record.tries,
            due_at: self.record.deliver_at,
            leased_at: now,
        }
    }

    fn prolong(&mut self, until: Timestamp) {
        if let Some(hold) = &mut self.hold {
            hold.until = until;
        }
    }
}

fn new_token() -> Token {
    let bits = getrandom::u64().expect("the operating system has random numbers");
    Token(i64::try_from(bits >> 1).expect("63 bits are left"))
}
