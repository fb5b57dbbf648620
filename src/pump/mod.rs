//! The engine: leases messages, delivers them, settles them, and lets an operator hold the gate.
//!
//! It does not know whether a handler is HTTP or a function, nor which database runs below.

mod house;

pub use house::{Builder, Overview, Pumphouse, QueueOverview, Stop, StopReport};
