//! The names of what we count and of what we trace. It measures nothing by itself.

pub mod metrics;
pub mod rates;
pub mod traces;
