//! What the pump does when handlers fail: it neither loses nor hammers.

mod breaker;
mod expiry;
mod isolation;
mod lockstep;
mod memory;
mod pace;
mod rules;
mod stopping;
