//! Who wants what is published, and clocks that send.

use jiff::Timestamp;

use crate::model::{
    Schedule, ScheduleName, ScheduleRecord, ScheduleState, Subscription, SubscriptionName,
    TopicName,
};

use super::super::schedules::next_of;
use super::super::{Precondition, PutSchedule, PutSubscription};
use super::books::Books;

impl Books {
    pub(super) fn subscriptions(&self) -> Vec<Subscription> {
        self.subscriptions.values().cloned().collect()
    }

    pub(super) fn put_subscription(&mut self, subscription: Subscription) -> PutSubscription {
        if !self.queues.contains_key(&subscription.queue) {
            return PutSubscription::NoSuchQueue;
        }
        let name = (subscription.topic.clone(), subscription.name.clone());
        self.settings_changed();
        match self.subscriptions.insert(name, subscription) {
            Some(_) => PutSubscription::Replaced,
            None => PutSubscription::Created,
        }
    }

    pub(super) fn delete_subscription(
        &mut self,
        topic: &TopicName,
        name: &SubscriptionName,
    ) -> bool {
        let found = self.subscriptions.remove(&(topic.clone(), name.clone())).is_some();
        if found {
            self.settings_changed();
        }
        found
    }

    pub(super) fn schedules(&self) -> Vec<ScheduleRecord> {
        self.schedules.values().cloned().collect()
    }

    pub(super) fn put_schedule(
        &mut self,
        name: &ScheduleName,
        schedule: Schedule,
        next_at: Option<Timestamp>,
        precondition: &Precondition,
        now: Timestamp,
    ) -> PutSchedule {
        let before = self.schedules.get(name);
        if !precondition.holds(before.map(|before| before.schedule.etag()).as_deref()) {
            return PutSchedule::PreconditionFailed;
        }
        let is_new = before.is_none();
        let next_at = next_of(before, &schedule, next_at);
        // Never one that an earlier schedule of this name had.
        let version = before.map_or(0, |before| before.version + 1).max(now.as_microsecond());
        let state = before.map(|before| before.state.clone()).unwrap_or_default();
        let state = ScheduleState { next_at, ..state };
        let record = ScheduleRecord { name: name.clone(), schedule, state, version };
        self.schedules.insert(name.clone(), record.clone());
        self.settings_changed();
        if is_new { PutSchedule::Created(record) } else { PutSchedule::Replaced(record) }
    }

    pub(super) fn turn_schedule(
        &mut self,
        name: &ScheduleName,
        version: i64,
        state: ScheduleState,
    ) -> bool {
        let Some(record) = self.schedules.get_mut(name).filter(|it| it.version == version) else {
            return false;
        };
        record.state = state;
        record.version += 1;
        true
    }

    pub(super) fn delete_schedule(&mut self, name: &ScheduleName) -> bool {
        let found = self.schedules.remove(name).is_some();
        if found {
            self.settings_changed();
        }
        found
    }
}
