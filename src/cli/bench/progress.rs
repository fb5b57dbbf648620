//! How it goes while it runs, on standard error: one line that is redrawn on a terminal, a line every few
//! seconds elsewhere.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use tokio::time::{MissedTickBehavior, interval};

const REDRAW_EVERY: Duration = Duration::from_millis(250);
const LINE_EVERY: Duration = Duration::from_secs(3);

/// Where progress is shown, if at all.
#[derive(Debug)]
pub(super) struct Progress {
    quiet: bool,
    terminal: bool,
    label: String,
}

impl Progress {
    /// Shown, if not quiet.
    pub(super) fn new(quiet: bool) -> Self {
        Self { quiet, terminal: io::stderr().is_terminal(), label: String::new() }
    }

    /// What is put before every line from now on, as `run 2 of 5: `.
    pub(super) fn label(&mut self, label: String) {
        self.label = label;
    }

    /// Does the work, and says `line` of the time since its start while it lasts.
    pub(super) async fn during<T>(
        &self,
        line: impl Fn(Duration) -> String,
        work: impl Future<Output = T>,
    ) -> T {
        if self.quiet {
            return work.await;
        }
        let start = Instant::now();
        let mut ticks = interval(if self.terminal { REDRAW_EVERY } else { LINE_EVERY });
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut work = std::pin::pin!(work);
        let done = loop {
            tokio::select! {
                biased;
                done = &mut work => break done,
                _ = ticks.tick() => self.show(&line(start.elapsed())),
            }
        };
        if self.terminal {
            write("\r\x1b[K");
        }
        done
    }

    /// A line that stays.
    pub(super) fn note(&self, line: &str) {
        if !self.quiet {
            write(&format!("{line}\n"));
        }
    }

    fn show(&self, line: &str) {
        let label = &self.label;
        if self.terminal {
            write(&format!("\r{label}{line}\x1b[K"));
        } else {
            write(&format!("{label}{line}\n"));
        }
    }
}

fn write(text: &str) {
    let mut out = io::stderr().lock();
    // Where nobody looks, the measurement goes on.
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}
