//! Decisions: values in, a value out. Time and chance are arguments.

mod adaptive;
mod backoff;
mod batching;
mod care;
mod rate;
#[cfg(test)]
mod props;
mod recovery;
mod simulate;
mod timetable;

pub use adaptive::{Adaptive, Load, Sample};
pub use backoff::wait;
pub use batching::{LEASE_BATCH_MAX, Usual, prefetch, published_at_once, unsendable};
pub use care::company;
pub use rate::{Bucket, Rate};
pub use recovery::{Decision, after_failure, after_probe, after_verdict, after_word, says_ill};
pub use simulate::{Step, simulate};
pub use timetable::{Due, Times};
