//! Schedules, as a store is told of them.

use crate::model::ScheduleRecord;

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
