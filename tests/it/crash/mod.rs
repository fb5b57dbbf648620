//! What does a kill leave behind, what a signal, and what a database that goes away?

mod chain;
mod kills;
mod signals;
mod outage;
mod poison;
