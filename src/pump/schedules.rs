//! Clocks that send: each replica looks at all schedules, and of all replicas one sends.
//!
//! A message for a time has an id and a key that follow from the schedule's name and that time. It is sent first, and then
//! the schedule is turned to its next time, by compare and swap; so a process that dies in between leaves nothing out, and
//! the one after it sends nothing twice, because that collapses onto the first: as long as the first message is there, and
//! for as long as its queue or topic remembers keys. Many missed times for a topic with many subscriptions are sent in
//! parts, and the schedule is turned after each.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;

use crate::model::{
    Destination, Firing, MessageId, Schedule, ScheduleName, ScheduleRecord, ScheduleState, When,
};
use crate::policy::{Due, Times, published_at_once};
use crate::store::{self, Enqueue, EnqueueOutcome, Enqueued, Precondition, PutSchedule, Refusal};

use super::house::{House, Pumphouse};

/// How long at most until the schedules are looked at again, in memory.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// The shortest sleep, so that a clock that stands still does not make a busy loop.
const SHORTEST: Duration = Duration::from_millis(1);
/// How often it is tried to note a firing that somebody wanted, while others turn the schedule.
const NOTE_TRIES: u32 = 5;

impl Pumphouse {
    /// Makes a schedule, or replaces what it says; it is due next at its first time from now on. See
    /// [`Store::put_schedule`](store::Store::put_schedule).
    pub async fn put_schedule(
        &self,
        name: &ScheduleName,
        schedule: Schedule,
        precondition: Precondition,
    ) -> store::Result<PutSchedule> {
        let next_at = self.next_at(&schedule).await?;
        self.store().put_schedule(name, schedule, next_at, precondition).await
    }

    /// The next `count` times at which a schedule is due, paused or not.
    pub async fn next_times(
        &self,
        schedule: &Schedule,
        count: usize,
    ) -> store::Result<Vec<Timestamp>> {
        let now = self.house().store_now().await?;
        let Ok(times) = Times::read(&schedule.timetable) else { return Ok(Vec::new()) };
        let next = std::iter::successors(times.after(now), |last| times.after(*last));
        Ok(next.take(count).collect())
    }

    async fn next_at(&self, schedule: &Schedule) -> store::Result<Option<Timestamp>> {
        if schedule.paused {
            return Ok(None);
        }
        Ok(self.next_times(schedule, 1).await?.first().copied())
    }

    /// Sends a schedule's message now, paused or not; its times stay as they are. `None` where there is no such
    /// schedule.
    pub async fn run_schedule(&self, name: &ScheduleName) -> store::Result<Option<Firing>> {
        let Some(record) = self.schedule(name).await? else { return Ok(None) };
        let now = self.house().store_now().await?;
        let mut firing = Firing {
            due_at: now,
            fired_at: now,
            by_hand: true,
            message_id: None,
            skipped: 0,
            problem: None,
        };
        match record.schedule.message() {
            Ok(message) => {
                let enqueue = Enqueue { messages: vec![message], atomic: false, batch: None };
                let outcome = self.store().enqueue(enqueue).await?;
                note(&mut firing, answers(outcome).first());
            }
            Err(wrong) => firing.problem = Some(said(&wrong)),
        }
        if let Err(error) = self.remember(record, &firing).await {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(schedule = %name, error, "sent, and not noted");
        }
        Ok(Some(firing))
    }

    /// Notes a firing that changed nothing else. One that cannot be noted was sent all the same.
    async fn remember(&self, mut record: ScheduleRecord, firing: &Firing) -> store::Result<()> {
        let name = record.name.clone();
        for _ in 0..NOTE_TRIES {
            record.state.remember(firing.clone());
            if self.store().turn_schedule(&name, record.version, record.state).await? {
                return Ok(());
            }
            let Some(again) = self.schedule(&name).await? else { return Ok(()) };
            record = again;
        }
        tracing::warn!(schedule = %name, "sent, and not noted: others were faster each time");
        Ok(())
    }

    /// Looks at all schedules by the store's clock, and returns once what is due is sent. They are looked at anyway; this
    /// is for whoever moves that clock.
    pub async fn look_at_schedules(&self) -> store::Result<()> {
        self.house().attend(false).await?;
        let mut all = Vec::new();
        while !self.house().fire_what_is_due(&mut all, true).await?.is_done {}
        Ok(())
    }

    /// The schedule of this name.
    pub async fn schedule(&self, name: &ScheduleName) -> store::Result<Option<ScheduleRecord>> {
        let all = self.store().schedules().await?;
        Ok(all.into_iter().find(|record| record.name == *name))
    }
}

/// What came of a look at all schedules.
pub(super) struct Look {
    /// How long to wait until the next.
    wait: Duration,
    /// Whether nothing that is due is left to be sent, but for what finds no place.
    is_done: bool,
}

impl Look {
    const DONE: Self = Self { wait: LOOK_EVERY, is_done: true };
}

/// What came of a schedule that was due.
enum Fired {
    /// All that was due is sent, as far as there is a place for it.
    Whole,
    /// Some of it is.
    Part,
    /// Some of it is, and somebody else was faster.
    Overtaken,
}

impl House {
    /// Sends what schedules want sent, when it is due.
    pub(super) async fn keep_schedules(self: Arc<Self>) {
        let mut news = self.store.news().of_settings();
        let mut known = Vec::<ScheduleRecord>::new();
        let mut is_to_be_read = true;
        loop {
            let wait = match self.fire_what_is_due(&mut known, is_to_be_read).await {
                Ok(look) => {
                    is_to_be_read = false;
                    look.wait
                }
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(error, "cannot look after the schedules; trying again");
                    is_to_be_read = true;
                    LOOK_EVERY
                }
            };
            let wait = tokio::time::timeout(wait.clamp(SHORTEST, LOOK_EVERY), news.changed());
            match self.leaving.run_until_cancelled(wait).await {
                None => return,
                // Marked as seen by that, and read after it, so that nothing slips in between.
                Some(told) => is_to_be_read |= told.is_ok(),
            }
        }
    }

    /// Fires what is due of these schedules, of each at most one part, read again if they are to be or one is due.
    pub(super) async fn fire_what_is_due(
        &self,
        known: &mut Vec<ScheduleRecord>,
        is_to_be_read: bool,
    ) -> store::Result<Look> {
        let Some(now) = self.known().store_now() else { return Ok(Look::DONE) };
        let is_due = |record: &ScheduleRecord| record.state.next_at.is_some_and(|at| at <= now);
        if is_to_be_read || known.iter().any(is_due) {
            // Another replica may have turned them meanwhile.
            *known = self.store.schedules().await?;
        }
        let mut look = Look::DONE;
        for record in known.iter_mut().filter(|record| is_due(record)) {
            // One that cannot be fired holds up no other, and is tried again in a moment.
            match self.fire(record, now).await {
                Ok(Fired::Whole) => (),
                Ok(Fired::Part) => look = Look { wait: Duration::ZERO, is_done: false },
                // Whoever was faster goes on with it, and is not to be hindered.
                Ok(Fired::Overtaken) => look.is_done = false,
                Err(error) => {
                    let error = &error as &dyn std::error::Error;
                    tracing::warn!(schedule = %record.name, error, "cannot send what is due; trying again");
                }
            }
        }
        let next = known.iter().filter_map(|record| record.state.next_at);
        if let Some(next) = next.filter(|next| *next > now).min() {
            look.wait = look.wait.min(next.duration_since(now).unsigned_abs());
        }
        Ok(look)
    }

    /// Fires a schedule for the times that have come, or for as many of them as are sent at once, and turns it to its
    /// next.
    async fn fire(&self, record: &mut ScheduleRecord, now: Timestamp) -> store::Result<Fired> {
        let Some(next_at) = record.state.next_at else { return Ok(Fired::Whole) };
        let (name, schedule) = (&record.name, &record.schedule);
        let mut state = record.state.clone();
        match Times::read(&schedule.timetable) {
            Err(wrong) => {
                tracing::error!(schedule = %name, %wrong, "a schedule ends, because its timetable cannot be read");
                state = ScheduleState { next_at: None, ..state };
            }
            Ok(times) => {
                let due = times.due(next_at, schedule.missed, now);
                let Due { fire, skipped, next_at } = self.at_once(schedule, due).await?;
                if skipped > 0 {
                    tracing::warn!(schedule = %name, missed = skipped, "times were missed, and are not made up for");
                }
                if !self.send(record, &mut state, &fire, (skipped, now)).await? {
                    return Ok(Fired::Whole);
                }
                state.next_at = next_at;
            }
        }
        let is_part = state.next_at.is_some_and(|at| at <= now);
        if self.store.turn_schedule(&record.name, record.version, state.clone()).await? {
            record.version += 1;
            record.state = state;
            Ok(if is_part { Fired::Part } else { Fired::Whole })
        } else {
            // Another replica has, and what was sent here has collapsed onto what was sent there.
            record.state.next_at = state.next_at;
            Ok(if is_part { Fired::Overtaken } else { Fired::Whole })
        }
    }

    /// What is due, as far as one transaction sends it: the rest is due next.
    async fn at_once(&self, schedule: &Schedule, mut due: Due) -> store::Result<Due> {
        if due.fire.len() > 1
            && let Some(Destination::Topic { topic, .. }) = schedule.destination()
        {
            let at_once = published_at_once(&topic, &self.store.subscriptions().await?);
            if let Some(first_left) = due.fire.get(at_once).copied() {
                due.fire.truncate(at_once);
                due.next_at = Some(first_left);
            }
        }
        Ok(due)
    }

    /// Sends the messages for these times, and notes them in the state; `false` where a queue is full, so that it is to
    /// be tried again.
    async fn send(
        &self,
        record: &ScheduleRecord,
        state: &mut ScheduleState,
        times: &[Timestamp],
        (skipped, now): (u32, Timestamp),
    ) -> store::Result<bool> {
        let firing = |due_at| Firing {
            due_at,
            fired_at: now,
            by_hand: false,
            message_id: None,
            skipped: 0,
            problem: None,
        };
        let mut firings = times.iter().map(|due_at| firing(*due_at)).collect::<Vec<_>>();
        if firings.is_empty() {
            let detail = "it was missed".to_owned();
            firings.push(Firing { problem: Some(detail), ..firing(state.next_at.unwrap_or(now)) });
        }
        firings[0].skipped = skipped;
        let mut messages = Vec::with_capacity(times.len());
        for due_at in times {
            match record.schedule.message_at(&record.name, *due_at) {
                Ok(message) => {
                    // Never before its time by the store's clock, of which ours is only an idea.
                    let deliver = if message.details.group.is_some() || message.deliver != When::Now
                    {
                        message.deliver
                    } else {
                        When::At(*due_at)
                    };
                    messages.push(crate::model::NewMessage { deliver, ..message });
                }
                Err(wrong) => firings[0].problem = Some(said(&wrong)),
            }
        }
        let sent = if messages.len() == times.len() && !messages.is_empty() {
            answers(self.store.enqueue(Enqueue { messages, atomic: false, batch: None }).await?)
        } else {
            Vec::new()
        };
        let full = |answer: &Enqueued| matches!(answer, Enqueued::Refused(Refusal::QueueFull(_)));
        if sent.iter().any(full) {
            tracing::debug!(schedule = %record.name, "its queue is full; trying again");
            return Ok(false);
        }
        for (firing, answer) in firings.iter_mut().zip(&sent) {
            note(firing, Some(answer));
        }
        firings.into_iter().for_each(|firing| state.remember(firing));
        Ok(true)
    }

    /// What the store's clock should say now; asked for, where it has said nothing yet.
    pub(super) async fn store_now(&self) -> store::Result<Timestamp> {
        if let Some(now) = self.known().store_now() {
            return Ok(now);
        }
        self.attend(false).await?;
        Ok(self.known().store_now().unwrap_or_else(|| self.clock.now()))
    }
}

fn answers(outcome: EnqueueOutcome) -> Vec<Enqueued> {
    match outcome {
        EnqueueOutcome::Done(answers) => answers,
        EnqueueOutcome::Refused(_) | EnqueueOutcome::BatchKeyReused => Vec::new(),
    }
}

/// Notes what became of a firing's message.
fn note(firing: &mut Firing, answer: Option<&Enqueued>) {
    let id = |id: MessageId| Some(id);
    match answer {
        Some(Enqueued::New(receipt) | Enqueued::Duplicate(receipt)) => {
            firing.message_id = id(receipt.id);
        }
        Some(Enqueued::Published(published)) => firing.message_id = id(published.id),
        Some(Enqueued::Refused(refusal)) => firing.problem = Some(store::why(refusal)),
        None => firing.problem = firing.problem.take().or(Some("it was not taken in".to_owned())),
    }
}

fn said(wrong: &[crate::model::Invalid]) -> String {
    wrong.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}
