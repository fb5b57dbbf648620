//! Is the protocol what `docs/protocol.md` says? Asked of the running program, on a port of its own.
//!
//! Which database lies below does not matter here: `store` asks that, and `journey`, `gate` and `crash` run
//! on both.

mod sending;
mod batches;
mod repeats;
mod answers;
mod bad_input;
mod strangers;
mod reading;
mod queues;
mod delivery;
mod handlers;
mod dead_letters;
mod operations;
