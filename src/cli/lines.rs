//! Many messages from standard input, a line each: read as they come, sent in batches, with progress and a summary.
//!
//! Each batch has a key of its own, so that one whose answer was lost is sent again and taken once.

use std::io::{self, BufRead, IsTerminal, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http::Method;
use serde_json::{Value, json};
use tokio::sync::mpsc;
use uuid::Uuid;

use super::client::{Call, PATIENCE, Refused, call};
use super::print;

/// How many lines, and how many bytes, go into one batch.
const BATCH_LINES: usize = 500;
const BATCH_BYTES: usize = 4 << 20;
/// How long a batch waits for more lines.
const GATHERED_FOR: Duration = Duration::from_millis(200);
/// How many lines are read ahead.
const AHEAD: usize = 2 * BATCH_LINES;
/// How often a batch is tried, and how long apart at first.
const TRIES: u32 = 8;
const PAUSE: Duration = Duration::from_millis(250);
/// How often progress is shown.
const SHOWN_EVERY: Duration = Duration::from_millis(500);
/// How many refusals are shown one by one.
const REFUSALS_SHOWN: u64 = 20;

/// Sends every line of standard input to this path. Fails where one of them was refused, after all were tried.
pub(super) async fn run(base: &str, path: &str, key: Option<String>) -> Result<()> {
    let run = key.unwrap_or_else(|| Uuid::now_v7().simple().to_string());
    let mut lines = read();
    let mut tally = Tally::new();
    for number in 0_u64.. {
        let batch = gather(&mut lines).await?;
        if batch.is_empty() {
            break;
        }
        let body = batch.iter().map(|line| format!("{line}\n")).collect::<String>();
        let answer = send(base, path, &format!("{run}-{number}"), body.into()).await;
        let answer = answer.with_context(|| tally.so_far())?;
        tally.add(&answer)?;
    }
    tally.finish()
}

/// What became of the lines so far.
struct Tally {
    began: Instant,
    shown: Instant,
    lines: u64,
    sent: u64,
    duplicates: u64,
    refused: u64,
}

impl Tally {
    fn new() -> Self {
        let now = Instant::now();
        Self { began: now, shown: now, lines: 0, sent: 0, duplicates: 0, refused: 0 }
    }

    fn add(&mut self, answer: &[u8]) -> Result<()> {
        let answer = serde_json::from_slice::<Value>(answer);
        let answer = answer.context("the server's answer is not JSON")?;
        let items = answer["items"].as_array().context("the server's answer has no items")?;
        for item in items {
            self.lines += 1;
            match item["status"].as_u64() {
                Some(201) => self.sent += 1,
                Some(200) => self.duplicates += 1,
                _ => {
                    self.refused += 1;
                    if self.refused <= REFUSALS_SHOWN {
                        let detail = item["problem"]["detail"].as_str().unwrap_or("refused");
                        self.tell(&format!("line {}: {detail}\n", self.lines));
                    }
                }
            }
        }
        if self.shown.elapsed() >= SHOWN_EVERY && io::stderr().is_terminal() {
            self.shown = Instant::now();
            self.tell(&format!("\r{}", self.so_far()));
        }
        Ok(())
    }

    fn so_far(&self) -> String {
        let rate = self.lines as f64 / self.began.elapsed().as_secs_f64().max(0.001);
        format!(
            "{} sent, {} duplicates, {} refused, {rate:.0} a second",
            self.sent, self.duplicates, self.refused
        )
    }

    /// Says something on standard error. Where that is closed there is nobody left to tell.
    fn tell(&self, text: &str) {
        let mut to = io::stderr().lock();
        let _ = to.write_all(text.as_bytes()).and_then(|()| to.flush());
    }

    fn finish(self) -> Result<()> {
        if io::stderr().is_terminal() {
            self.tell(&format!("\r{}\n", self.so_far()));
        }
        let seconds = (self.began.elapsed().as_secs_f64() * 1000.0).round() / 1000.0;
        let summary = json!({"sent": self.sent, "duplicates": self.duplicates, "refused": self.refused, "seconds": seconds});
        print(&summary.to_string())?;
        if self.refused > 0 {
            bail!("{} of {} lines were refused; the others are sent", self.refused, self.lines);
        }
        Ok(())
    }
}

/// The lines of standard input, from a thread of its own, because reading them cannot be interrupted.
fn read() -> mpsc::Receiver<io::Result<String>> {
    let (lines, read) = mpsc::channel(AHEAD);
    std::thread::spawn(move || {
        for line in io::stdin().lock().lines() {
            let is_bad = line.is_err();
            if lines.blocking_send(line).is_err() || is_bad {
                return;
            }
        }
    });
    read
}

/// Some lines: those that are there, or come soon. None at the end.
async fn gather(lines: &mut mpsc::Receiver<io::Result<String>>) -> Result<Vec<String>> {
    let mut batch = Vec::new();
    let mut bytes = 0;
    let mut until = None;
    while batch.len() < BATCH_LINES && bytes < BATCH_BYTES {
        let next = match until {
            None => lines.recv().await,
            Some(until) => match tokio::time::timeout_at(until, lines.recv()).await {
                Ok(next) => next,
                Err(_) => break,
            },
        };
        let Some(line) = next else { break };
        let line = line.context("cannot read standard input")?;
        if line.trim().is_empty() {
            continue;
        }
        until.get_or_insert_with(|| tokio::time::Instant::now() + GATHERED_FOR);
        bytes += line.len();
        batch.push(line);
    }
    Ok(batch)
}

/// Sends a batch, and again where nobody knows what became of it or the server is busy.
async fn send(base: &str, path: &str, key: &str, body: Bytes) -> Result<Bytes> {
    let mut pause = PAUSE;
    for attempt in 1.. {
        let answer = call(Call {
            method: Method::POST,
            base,
            path,
            headers: vec![
                ("content-type".to_owned(), "application/x-ndjson".to_owned()),
                ("idempotency-key".to_owned(), key.to_owned()),
            ],
            body: body.clone(),
            patience: PATIENCE,
        });
        match answer.await {
            Ok(answer) => return Ok(answer),
            Err(error) => {
                let refused = error.downcast_ref::<Refused>();
                if attempt >= TRIES || refused.is_some_and(|refused| !refused.is_for_now()) {
                    return Err(error);
                }
            }
        }
        tokio::time::sleep(pause).await;
        pause *= 2;
    }
    unreachable!("the last try returns")
}
