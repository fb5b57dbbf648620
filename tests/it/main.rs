//! One binary, rooms as modules: every question that the outside may ask.
//!
//! `store` asks whether each store keeps its promises; `http` whether the protocol is what
//! `docs/protocol.md` says; `journey` whether a message gets from A to B; `crash` what a kill leaves
//! behind; `gate` whether the operator's hand is obeyed; `snapshots` and `tidy` whether a face of the
//! house changed and whether its rules are kept.

mod support;
mod store;
mod http;
mod journey;
mod gate;
mod crash;
mod recovery;
mod snapshots;
mod tidy;
mod cli;
