//! One binary, rooms as modules: every question that the outside may ask.
//!
//! `store` asks whether each store keeps its promises; `http` whether the protocol is what
//! `docs/protocol.md` says; `journey` whether a message gets from A to B; `crash` what a kill leaves
//! behind; `gate` whether the operator's hand is obeyed; `recovery` what follows a failure; `order` who comes when;
//! `once` whether what was meant once is done once; `ways` whether every way in and out works; `pages` whether the examples in the docs are true; `snapshots` and `tidy` whether a face of the
//! house changed and whether its rules are kept.

mod support;
mod store;
mod http;
mod journey;
mod gate;
mod crash;
mod recovery;
mod order;
mod once;
mod ways;
mod pages;
mod snapshots;
mod tidy;
mod cli;
