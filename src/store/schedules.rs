//! Schedules, as a store is told of them.

use crate::model::ScheduleRecord;

/// What became of a schedule that was to be put.
#[derive(Debug, Clone, PartialEq)]
#[expect(clippy::large_enum_variant, reason = "made once for a call of an operator, never in bulk")]
pub enum PutSchedule {
    /// It is new.
    Created(ScheduleRecord),
    /// It says something else now.
    Replaced(ScheduleRecord),
    /// The precondition did not hold.
    PreconditionFailed,
}
