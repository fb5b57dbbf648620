//! Is the operator's hand obeyed: start, stop, limits, under load, on both databases?

mod stopping;
mod draining;
mod limits;
mod replicas;
mod delays;
