//! Queues, and whether they and the pump are to run.

use jiff::Timestamp;

use crate::model::{
    GroupOnDead, Guard, GuardChange, QueueName, QueueRecord, QueueSettings, RunState, State,
};

use super::super::{DeleteQueue, Precondition, PutQueue};
use super::books::{Books, Queue, Row, Standing};

impl Books {
    pub(super) fn queues(&self) -> Vec<QueueRecord> {
        self.queues.keys().filter_map(|name| self.queue(name)).collect()
    }

    pub(super) fn queue(&self, name: &QueueName) -> Option<QueueRecord> {
        let Queue { settings, state, guard, .. } = self.queues.get(name)?;
        Some(QueueRecord {
            name: name.clone(),
            settings: settings.clone(),
            state: state.clone(),
            guard: guard.clone(),
        })
    }

    pub(super) fn put_queue(
        &mut self,
        name: &QueueName,
        settings: QueueSettings,
        precondition: &Precondition,
    ) -> PutQueue {
        if !precondition.holds(self.etag(name).as_deref()) {
            return PutQueue::PreconditionFailed;
        }
        self.settings_changed();
        let unblocks = settings.group_on_dead == GroupOnDead::Next;
        let before = self.queue(name);
        let known = self.queues.get_mut(name).map(|queue| {
            queue.guard = before.map(|before| before.guard_under(&settings)).unwrap_or_default();
            queue.settings = settings.clone();
        });
        if known.is_none() {
            self.queues.insert(name.clone(), Queue::new(settings));
        }
        if unblocks {
            self.unblock_groups(name);
        }
        let record = self.queue(name).expect("it was put there a moment ago");
        if known.is_some() { PutQueue::Replaced(record) } else { PutQueue::Created(record) }
    }

    /// Lets the next ones go where a dead letter holds them up.
    fn unblock_groups(&mut self, name: &QueueName) {
        let blocks = |row: &Row| {
            let record = &row.record;
            record.head.queue == *name
                && record.state == State::Dead
                && row.standing == Standing::Head
        };
        let blocking = self.rows().filter(|(_, row)| blocks(row)).map(|(seq, _)| seq);
        for seq in blocking.collect::<Vec<_>>() {
            self.change(seq, |row| row.standing = Standing::None);
        }
    }

    pub(super) fn delete_queue(
        &mut self,
        name: &QueueName,
        force: bool,
        precondition: &Precondition,
    ) -> DeleteQueue {
        let Some(queue) = self.queues.get(name) else { return DeleteQueue::NoSuchQueue };
        if !precondition.holds(Some(&queue.settings.etag())) {
            return DeleteQueue::PreconditionFailed;
        }
        if !force && queue.unsettled() + queue.count(State::Dead) > 0 {
            return DeleteQueue::NotEmpty;
        }
        let its_own = self.rows().filter(|(_, row)| row.record.head.queue == *name);
        for seq in its_own.map(|(seq, _)| seq).collect::<Vec<_>>() {
            self.remove(seq);
        }
        self.keys.retain(|(queue, _), _| queue.as_ref() != Some(name));
        self.subscriptions.retain(|_, subscription| subscription.queue != *name);
        self.last_lanes.remove(name);
        self.queues.remove(name);
        self.settings_changed();
        DeleteQueue::Deleted
    }

    pub(super) fn set_run_state(
        &mut self,
        queue: Option<&QueueName>,
        state: RunState,
        from: Option<&RunState>,
    ) -> bool {
        let stands = match queue.map(|name| self.queues.get_mut(name)) {
            None => &mut self.pump.state,
            Some(Some(queue)) => &mut queue.state,
            Some(None) => return false,
        };
        if from.is_some_and(|from| from != stands) {
            return false;
        }
        *stands = state;
        self.settings_changed();
        true
    }

    pub(super) fn guard(
        &mut self,
        name: &QueueName,
        change: &GuardChange,
        now: Timestamp,
    ) -> Option<Guard> {
        let queue = self.queues.get_mut(name)?;
        let guard = queue.guard.after(change, now);
        if guard != queue.guard {
            queue.guard = guard.clone();
            self.settings_changed();
        }
        Some(guard)
    }

    pub(super) fn set_ceiling(&mut self, ceiling: u32) {
        self.pump.ceiling = ceiling;
        self.settings_changed();
    }

    fn etag(&self, name: &QueueName) -> Option<String> {
        self.queues.get(name).map(|queue| queue.settings.etag())
    }
}
