//! Pumphouse: a durable message pump.

pub mod model;
pub mod clock;
pub mod policy;
pub mod telemetry;
pub mod store;
pub mod deliver;
pub mod pump;
#[cfg(feature = "server")]
pub mod api;
#[cfg(feature = "server")]
pub mod cli;
