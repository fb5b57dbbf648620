//! The log: one line an event, on standard error, for people or for machines.

use std::io::{self, IsTerminal};

use anyhow::{Result, anyhow};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt;

use super::config::Logging;

/// Begins to log. Fails where somebody else in this process did already.
pub(super) fn begin(logging: &Logging) -> Result<()> {
    let filter = EnvFilter::try_new(&logging.filter)?;
    let lines = fmt().with_env_filter(filter).with_writer(io::stderr);
    let begun = if logging.json {
        // Flat, so that `address` is a key of the line and not of something inside it.
        lines.json().flatten_event(true).try_init()
    } else {
        lines.with_ansi(io::stderr().is_terminal()).try_init()
    };
    begun.map_err(|error| anyhow!("cannot begin to log: {error}"))
}
