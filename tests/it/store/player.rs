//! Plays the actions of a program on one store, and says what it saw, in words that can be compared.

use std::collections::BTreeMap;
use std::fmt::Debug;

use pumphouse::model::{DeliveryRecord, Head, Leased, MessageId, Outcome, Record, State};
use pumphouse::store::{Claim, Depth, Error, Filter, Precondition, Settle, Swept};

use super::program::Action;
use crate::support::stage::{ALL, Stage, claim, delivery};

/// A store, and the leases that were taken on it.
pub(crate) struct Player<'a> {
    stage: &'a Stage,
    leases: Vec<Leased>,
}

/// All that a store shows.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Sight {
    /// All messages, newest first.
    pub(crate) messages: Vec<Record>,
    /// All queues, by name.
    pub(crate) depths: Vec<Depth>,
}

impl<'a> Player<'a> {
    /// A player who has done nothing yet.
    pub(crate) fn new(stage: &'a Stage) -> Self {
        Self { stage, leases: Vec::new() }
    }

    /// Does it, and says what came back, but for what is random.
    pub(crate) async fn play(&mut self, action: Action) -> String {
        let store = &self.stage.store;
        match action {
            Action::Send(enqueue) => words(store.enqueue(enqueue).await),
            Action::Claim { queue, max, duration, urgent_only } => {
                let claim = Claim { urgent_only, ..claim(&queue, max, duration) };
                self.claim(claim).await
            }
            Action::Settle { lease, settlement, sent, with_record } => {
                let Some(leased) = self.recent(lease) else { return String::new() };
                let record = delivery(leased, Outcome::from(&settlement));
                let delivery = with_record.then_some(record);
                let lease = leased.lease.clone();
                words(store.settle(Settle { lease, settlement, delivery, sent }).await)
            }
            Action::Renew { leases, duration } => {
                let leases = leases.into_iter().filter_map(|back| self.recent(back));
                let leases = leases.map(|leased| leased.lease.clone()).collect();
                words(store.renew(leases, duration).await)
            }
            Action::Promote { max } => words(store.promote(max).await),
            Action::Reap => words(store.reap(ALL).await.map(|mut reaped| {
                reaped.sort_by_key(|reaped| reaped.id);
                reaped
            })),
            Action::Sweep => words(store.sweep(ALL).await.map(|mut swept: Swept| {
                swept.expired.sort();
                swept.set_aside.sort();
                swept
            })),
            Action::Amend { id, amendment } => words(store.amend(id, amendment).await),
            Action::Redrive { filter, max } => words(store.redrive(filter, max).await),
            Action::DeleteDead { id } => words(store.delete_dead(id).await),
            Action::Purge { queue } => words(store.purge(&queue, ALL).await),
            Action::PutQueue { queue, settings } => {
                words(store.put_queue(&queue, *settings, Precondition::None).await)
            }
            Action::DeleteQueue { queue, force } => {
                words(store.delete_queue(&queue, force, Precondition::None).await)
            }
            Action::List { filter, limit } => {
                format!("{:?}", self.stage.list(&filter, limit).await)
            }
            Action::Pass(time) => {
                self.stage.pass(time).await;
                String::new()
            }
        }
    }

    /// What the store shows now.
    pub(crate) async fn look(&self) -> Sight {
        let messages = self.stage.list(&Filter::default(), ALL).await;
        let mut depths = self.stage.store.depths().await.unwrap();
        depths.sort_by(|one, other| one.queue.cmp(&other.queue));
        Sight { messages, depths }
    }

    /// The payloads and deliveries of these messages.
    pub(crate) async fn look_closely(
        &self,
        ids: &[MessageId],
    ) -> Vec<(MessageId, Option<Vec<DeliveryRecord>>, Option<bytes::Bytes>)> {
        let mut seen = Vec::new();
        for id in ids {
            let deliveries = self.stage.look(*id).await.map(|(_, deliveries)| deliveries);
            let deliveries = deliveries.map(|all| all.into_iter().map(comparable).collect());
            seen.push((*id, deliveries, self.stage.store.payload(*id).await.unwrap()));
        }
        seen
    }

    async fn claim(&mut self, claim: Claim) -> String {
        let leased = match self.stage.store.lease(claim).await {
            Ok(leased) => leased,
            Err(error) => return words::<()>(Err(error)),
        };
        let seen = leased.iter().map(|leased| {
            (&leased.message, leased.tries, leased.due_at, leased.leased_at, leased.lease.id)
        });
        let seen = format!("{:?}", seen.collect::<Vec<_>>());
        self.leases.extend(leased);
        seen
    }

    /// The lease taken so many leases ago.
    fn recent(&self, back: usize) -> Option<&Leased> {
        self.leases.iter().rev().nth(back)
    }
}

/// Insists on what must hold after every step, whatever the step was.
pub(crate) fn check(before: &Sight, after: &Sight) {
    let old = before.messages.iter().map(|record| (record.head.id, record));
    let old = old.collect::<BTreeMap<_, _>>();
    for new in &after.messages {
        if let Some(old) = old.get(&new.head.id) {
            check_move(old, new);
        }
        let ended = !new.state.lives();
        assert_eq!(new.finished_at.is_some(), ended, "what has ended says when: {new:?}");
    }
    for depth in &after.depths {
        check_depth(depth, &after.messages);
    }
    check_groups(&after.messages);
}

/// One at a time: whatever happened, no group has two messages out.
fn check_groups(messages: &[Record]) {
    let mut out = BTreeMap::new();
    for record in messages.iter().filter(|record| record.state == State::Leased) {
        let Some(group) = &record.head.details.group else { continue };
        let other = out.insert((&record.head.queue, group), record.head.id);
        assert_eq!(other, None, "two messages of one group are leased: {record:?}");
    }
}

fn check_move(old: &Record, new: &Record) {
    let redriven = old.state == State::Dead && new.state.waits();
    // A redrive clears an expiry that has passed.
    let expires_at = old.head.expires_at.filter(|_| !redriven || new.head.expires_at.is_some());
    // A move takes it to another queue.
    let moved = old.state == State::Leased && new.state == State::Ready && new.tries.failures == 0;
    let queue = if moved { new.head.queue.clone() } else { old.head.queue.clone() };
    let head = Head { expires_at, queue, ..old.head.clone() };
    assert_eq!(head, new.head, "this never changes");
    let legal = old.state == new.state || pumphouse::model::may_move(old.state, new.state);
    assert!(legal, "no message moves like this: {old:?} {new:?}");
    assert!(new.tries.attempts >= old.tries.attempts, "a number came again: {old:?} {new:?}");
    let claimed = old.state != State::Leased && new.state == State::Leased;
    let counted = new.tries.attempts - old.tries.attempts;
    assert_eq!(counted, u32::from(claimed), "a claim counts one attempt: {old:?} {new:?}");
}

fn check_depth(depth: &Depth, messages: &[Record]) {
    let count = |state| {
        let its_own = messages.iter().filter(|record| record.head.queue == depth.queue);
        its_own.filter(|record| record.state == state).count() as u64
    };
    assert_eq!(depth.ready, count(State::Ready), "ready: {depth:?}");
    assert_eq!(depth.scheduled, count(State::Scheduled), "scheduled: {depth:?}");
    assert_eq!(depth.leased, count(State::Leased), "leased: {depth:?}");
    assert_eq!(depth.dead, count(State::Dead), "dead: {depth:?}");
    assert_eq!(depth.oldest_ready.is_some(), depth.ready > 0, "{depth:?}");
}

/// Of an error its sort, because its text is each store's own.
fn words<T: Debug>(result: Result<T, Error>) -> String {
    match result {
        Ok(value) => format!("{value:?}"),
        Err(Error::Rejected { .. }) => "rejected".to_owned(),
        Err(error) => panic!("a healthy store failed: {error:?}"),
    }
}

/// A record of a delivery without the sentence, which is each store's own.
fn comparable(record: DeliveryRecord) -> DeliveryRecord {
    DeliveryRecord { error: None, ..record }
}
