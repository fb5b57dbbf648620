//! Not written yet.

mod cluster;
