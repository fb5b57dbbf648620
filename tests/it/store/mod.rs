//! Not written yet.

mod cluster;
mod plans_postgres;
