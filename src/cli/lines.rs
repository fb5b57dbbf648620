//! Many messages from standard input, a line each: read as they come, sent in batches, with progress and a summary.
//!
//! Each batch has a key of its own, so that one whose answer was lost is sent again and taken once.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result, bail};
use bytes::Bytes;
use http::Method;
use serde_json::{Value, json};
use uuid::Uuid;

use super::again::Again;
use super::client::{Call, PATIENCE, Refused, call};
use super::input::Input;
use super::{print, tell};

/// How often progress is shown.
const SHOWN_EVERY: Duration = Duration::from_millis(500);
/// Takes what is shown of the progress off a terminal's line.
const CLEAR: &str = "\x1b[K";

/// Sends every line of standard input to this path. Fails where one of them was refused, after all were tried.
pub(super) async fn run(base: &str, path: &str, key: Option<String>) -> Result<()> {
    let input = Input::of_stdin(key.is_none());
    let mut sender = Sender {
        base,
        path,
        is_repeatable: key.is_some(),
        run: key.unwrap_or_else(|| Uuid::now_v7().simple().to_string()),
        busy: Again::for_a_while(),
        full: Again::for_a_while(),
        tally: Tally::new(),
    };
    let done = sender.send_all(input).await;
    sender.tally.finish(done)
}

/// Where to send, and how that went so far.
struct Sender<'a> {
    base: &'a str,
    path: &'a str,
    /// What the keys of all batches begin with, and whether another run may have the same.
    run: String,
    is_repeatable: bool,
    /// Patience with a server that takes nothing, and with one that takes not every line.
    busy: Again,
    full: Again,
    tally: Tally,
}

impl Sender<'_> {
    async fn send_all(&mut self, mut input: Input) -> Result<()> {
        for number in 0_u64.. {
            let batch = input.batch().await;
            if batch.is_empty() {
                break;
            }
            for (line, why) in batch.refused {
                self.tally.refuse(line, why);
            }
            let (first, last) = (batch.lines.first(), batch.lines.last());
            if let Some((first, last)) = first.zip(last).map(|(first, last)| (first.0, last.0)) {
                let done = self.send(number, batch.lines).await;
                done.with_context(|| format!("stopped at the lines {first} to {last}"))?;
            }
        }
        input.end()
    }

    /// Sends a batch until each of its lines is taken, or refused for good or for long enough.
    async fn send(&mut self, number: u64, mut lines: Vec<(u64, String)>) -> Result<()> {
        let mut key = format!("{}-{number}", self.run);
        let mut open = lines.iter().map(|(line, _)| *line).collect::<BTreeSet<_>>();
        for round in 1.. {
            let items = self.ask(&key, &lines).await?;
            let mut left = Vec::new();
            for ((line, _), item) in lines.iter().zip(&items) {
                // What was answered in an earlier round is only repeated here.
                if !open.contains(line) {
                    if item["status"] == 201 {
                        self.tally.tell_of_twice(*line);
                    }
                    continue;
                }
                match Refused::of_item(item) {
                    Some(refused) if refused.is_for_now() => left.push((*line, refused)),
                    Some(refused) => self.tally.refuse(*line, refused),
                    None => self.tally.take(item["status"] == 200),
                }
            }
            self.tally.show();
            if left.len() < open.len() {
                self.full.goes_on();
            }
            let Some((line, why)) = left.first() else {
                if round == 1 {
                    self.full.is_over();
                }
                return Ok(());
            };
            self.tally.clear();
            let why = Error::new(why.clone()).context(format!("line {line} is refused for now"));
            if self.full.after(why).await.is_err() {
                for (line, refused) in left {
                    self.tally.refuse(line, refused);
                }
                return Ok(());
            }
            let may_be_kept = left.iter().any(|(_, refused)| !refused.is_surely_not_kept());
            open = left.into_iter().map(|(line, _)| line).collect();
            // Another run with the same key has to find all of the batch under one key, and only under its key is that
            // taken once of which nobody knows whether it was kept. Else only what is open goes again, so that it does
            // not matter for how long the queue remembers the others.
            if !self.is_repeatable && !may_be_kept {
                lines.retain(|(line, _)| open.contains(line));
                key = format!("{}-{number}-{round}", self.run);
            }
        }
        unreachable!("a round returns, or there is another")
    }

    /// Asks until there is an answer: an item for each line.
    async fn ask(&mut self, key: &str, lines: &[(u64, String)]) -> Result<Vec<Value>> {
        let body = lines.iter().map(|(_, text)| format!("{text}\n")).collect::<String>();
        let body = Bytes::from(body);
        loop {
            let answer = call(Call {
                method: Method::POST,
                base: self.base,
                path: self.path,
                headers: vec![
                    ("content-type".to_owned(), "application/x-ndjson".to_owned()),
                    ("idempotency-key".to_owned(), key.to_owned()),
                ],
                body: body.clone(),
                patience: PATIENCE,
            });
            match answer.await {
                Ok(answer) => {
                    self.busy.is_over();
                    return items(&answer, lines.len());
                }
                Err(error) => {
                    self.tally.clear();
                    self.busy.after(error).await?;
                }
            }
        }
    }
}

fn items(answer: &[u8], count: usize) -> Result<Vec<Value>> {
    let mut answer =
        serde_json::from_slice::<Value>(answer).context("the server's answer is not JSON")?;
    match answer["items"].take() {
        Value::Array(items) if items.len() == count => Ok(items),
        _ => bail!("the server's answer has not an item for each line"),
    }
}

/// What became of the lines so far.
struct Tally {
    began: Instant,
    shown: Instant,
    is_terminal: bool,
    sent: u64,
    duplicates: u64,
    refused: u64,
}

impl Tally {
    fn new() -> Self {
        let now = Instant::now();
        let is_terminal = io::stderr().is_terminal();
        Self { began: now, shown: now, is_terminal, sent: 0, duplicates: 0, refused: 0 }
    }

    fn take(&mut self, is_duplicate: bool) {
        if is_duplicate {
            self.duplicates += 1;
        } else {
            self.sent += 1;
        }
    }

    /// Counts a line as refused, and names it at once: there may be more of them than one wants to remember.
    fn refuse(&mut self, line: u64, why: impl Display) {
        self.refused += 1;
        self.clear();
        tell(&format!("line {line}: {why}\n"));
    }

    /// Says that a line that had been taken was taken once more.
    fn tell_of_twice(&self, line: u64) {
        self.clear();
        let why = "it was sent again with others, and the queue had forgotten its key by then (dedup_window)";
        tell(&format!("line {line} is there twice: {why}\n"));
    }

    /// Shows how far it is, on a terminal and from time to time. What is said next is written over it.
    fn show(&mut self) {
        if self.is_terminal && self.shown.elapsed() >= SHOWN_EVERY {
            self.shown = Instant::now();
            tell(&format!("{CLEAR}{}\r", self.so_far()));
        }
    }

    fn clear(&self) {
        if self.is_terminal {
            tell(CLEAR);
        }
    }

    fn lines(&self) -> u64 {
        self.sent + self.duplicates + self.refused
    }

    fn so_far(&self) -> String {
        let rate = self.lines() as f64 / self.began.elapsed().as_secs_f64().max(0.001);
        format!(
            "{} sent, {} duplicates, {} refused, {rate:.0} a second",
            self.sent, self.duplicates, self.refused
        )
    }

    /// Prints the summary, also of what ended early.
    fn finish(self, done: Result<()>) -> Result<()> {
        if self.is_terminal {
            tell(&format!("{CLEAR}{}\n", self.so_far()));
        }
        let seconds = (self.began.elapsed().as_secs_f64() * 1000.0).round() / 1000.0;
        let summary = json!({"sent": self.sent, "duplicates": self.duplicates, "refused": self.refused, "seconds": seconds});
        print(&summary.to_string())?;
        done?;
        if self.refused > 0 {
            bail!("{} of {} lines were refused; the others are sent", self.refused, self.lines());
        }
        Ok(())
    }
}
