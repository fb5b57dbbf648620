//! Schedules, as a store is told of them.

use jiff::Timestamp;

use crate::model::{Schedule, ScheduleRecord};

/// What became of a schedule that was to be put.
#[derive(Debug, Clone, PartialEq)]
pub enum PutSchedule {
    /// It is new.
    Created(ScheduleRecord),
    /// It says something else now.
    Replaced(ScheduleRecord),
    /// The precondition did not hold.
    PreconditionFailed,
}

/// When a schedule that was put is due next: as before where it says the same about when, so that a time which has passed
/// and was not sent for yet is not forgotten; else at `next_at`.
pub(super) fn next_of(
    before: Option<&ScheduleRecord>,
    schedule: &Schedule,
    next_at: Option<Timestamp>,
) -> Option<Timestamp> {
    let same = before.filter(|before| {
        before.schedule.timetable == schedule.timetable && before.schedule.paused == schedule.paused
    });
    same.and_then(|before| before.state.next_at).or(next_at)
}
