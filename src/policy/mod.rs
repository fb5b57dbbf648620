//! Decisions: values in, a value out. Time and chance are arguments.

mod backoff;
mod batching;
mod recovery;

pub use backoff::wait;
pub use batching::{LEASE_BATCH_MAX, Usual, prefetch};
pub use recovery::{Decision, after_failure, after_verdict};
