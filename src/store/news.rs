//! Who is told when there is something to do.
//!
//! News is a hint, never the truth: it may come late, twice or for nothing, and who was told looks into
//! the store. A listener marks the news as seen before it looks, so that nothing slips in between.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use tokio::sync::watch;

use crate::model::QueueName;

/// A board on which a store says what changed.
#[derive(Debug)]
pub struct News {
    queues: Mutex<HashMap<QueueName, watch::Sender<()>>>,
    schedule: watch::Sender<()>,
    settings: watch::Sender<()>,
}

impl Default for News {
    fn default() -> Self {
        Self {
            queues: Mutex::default(),
            schedule: watch::Sender::new(()),
            settings: watch::Sender::new(()),
        }
    }
}

impl News {
    /// Told when a queue has something to lease.
    pub fn of_queue(&self, queue: &QueueName) -> watch::Receiver<()> {
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        queues.entry(queue.clone()).or_insert_with(|| watch::Sender::new(())).subscribe()
    }

    /// Told when something was scheduled that may be due before all else.
    pub fn of_schedule(&self) -> watch::Receiver<()> {
        self.schedule.subscribe()
    }

    /// Told when a queue or the pump was changed.
    pub fn of_settings(&self) -> watch::Receiver<()> {
        self.settings.subscribe()
    }

    /// Says that a queue has something to lease.
    pub fn queue_has_messages(&self, queue: &QueueName) {
        let queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(listeners) = queues.get(queue) {
            listeners.send_replace(());
        }
    }

    /// Says that something was scheduled.
    pub fn schedule_changed(&self) {
        self.schedule.send_replace(());
    }

    /// Says that a queue or the pump was changed.
    pub fn settings_changed(&self) {
        self.settings.send_replace(());
    }

    /// Forgets queues to which nobody listens any more.
    pub fn forget_unheard(&self) {
        let mut queues = self.queues.lock().unwrap_or_else(PoisonError::into_inner);
        queues.retain(|_, listeners| listeners.receiver_count() > 0);
    }
}
