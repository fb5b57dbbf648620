//! Standard input as lines, and lines as batches. What no batch can carry is refused here, with its number.

use std::io::{self, BufRead, Read};
use std::time::Duration;

use anyhow::{Error, Result};
use tokio::sync::mpsc;
use tokio::time::{Instant, timeout_at};

/// How many lines, and how many bytes, go into one batch. A line that is longer is a batch by itself.
const BATCH_LINES: usize = 500;
const BATCH_BYTES: usize = 4 << 20;
/// The most bytes that a server takes in one request.
const REQUEST_MAX: usize = 16 << 20;
/// How long a batch waits for more lines.
const GATHERED_FOR: Duration = Duration::from_millis(200);
/// How many lines are read ahead; few, because each may be as long as a request.
const AHEAD: usize = 8;

/// Standard input, in batches.
#[derive(Debug)]
pub(super) struct Input {
    lines: mpsc::Receiver<Result<Line>>,
    /// One for which the last batch had no room.
    next: Option<Line>,
    /// Why there is no more, if that is not the end.
    broken: Option<Error>,
    /// Whether batches are cut by time too.
    is_timed: bool,
}

/// A line that is not blank.
#[derive(Debug)]
struct Line {
    /// Its place in the input, from 1; blank lines count.
    number: u64,
    /// The line without its break, or why no batch can carry it.
    text: Result<String, &'static str>,
}

/// Some lines, each with its place in the input.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// Those that can be sent.
    pub(super) lines: Vec<(u64, String)>,
    /// Those that cannot, and why.
    pub(super) refused: Vec<(u64, &'static str)>,
    bytes: usize,
}

impl Input {
    /// Begins to read it, in a thread of its own, because reading cannot be interrupted. Where batches are not cut by
    /// time, the same input gives the same batches, however fast it comes.
    pub(super) fn of_stdin(is_timed: bool) -> Self {
        let (sender, lines) = mpsc::channel(AHEAD);
        std::thread::spawn(move || read(io::stdin().lock(), &sender));
        Self { lines, next: None, broken: None, is_timed }
    }

    /// The next batch: lines that are there, or come soon. An empty one at the end.
    pub(super) async fn batch(&mut self) -> Batch {
        let mut batch = Batch::default();
        let mut until = None;
        while let Some(line) = self.line(until).await {
            if !batch.has_room_for(&line) {
                self.next = Some(line);
                break;
            }
            batch.add(line);
            if self.is_timed {
                until.get_or_insert_with(|| Instant::now() + GATHERED_FOR);
            }
        }
        batch
    }

    /// Fails if the input broke off before its end.
    pub(super) fn end(self) -> Result<()> {
        self.broken.map_or(Ok(()), Err)
    }

    async fn line(&mut self, until: Option<Instant>) -> Option<Line> {
        if self.next.is_some() {
            return self.next.take();
        }
        let line = match until {
            None => self.lines.recv().await,
            Some(until) => timeout_at(until, self.lines.recv()).await.ok().flatten(),
        };
        match line? {
            Ok(line) => Some(line),
            Err(error) => {
                self.broken = Some(error);
                None
            }
        }
    }
}

impl Batch {
    /// Whether there is nothing in it.
    pub(super) fn is_empty(&self) -> bool {
        self.lines.is_empty() && self.refused.is_empty()
    }

    fn has_room_for(&self, line: &Line) -> bool {
        let bytes = line.text.as_ref().map_or(0, |text| text.len() + 1);
        self.lines.len() + self.refused.len() < BATCH_LINES
            && (self.lines.is_empty() || self.bytes + bytes <= BATCH_BYTES)
    }

    fn add(&mut self, line: Line) {
        match line.text {
            Ok(text) => {
                self.bytes += text.len() + 1;
                self.lines.push((line.number, text));
            }
            Err(why) => self.refused.push((line.number, why)),
        }
    }
}

/// Reads lines until there are no more, or nobody wants them.
fn read(mut from: impl BufRead, to: &mpsc::Sender<Result<Line>>) {
    for number in 1.. {
        let line =
            match read_line(&mut from) {
                Ok(Some(Ok(text))) if is_blank(&text) => continue,
                Ok(Some(text)) => Ok(Line { number, text }),
                Ok(None) => return,
                Err(error) => Err(Error::new(error)
                    .context(format!("cannot read line {number} of standard input"))),
            };
        let is_broken = line.is_err();
        if to.blocking_send(line).is_err() || is_broken {
            return;
        }
    }
}

/// Reads one line; nothing at the end. Of one that is too long no more is kept than it takes to know.
fn read_line(from: &mut impl BufRead) -> io::Result<Option<Result<String, &'static str>>> {
    let mut line = Vec::new();
    from.take(REQUEST_MAX as u64).read_until(b'\n', &mut line)?;
    if line.is_empty() {
        return Ok(None);
    }
    if line.last() == Some(&b'\n') {
        line.pop();
    } else if line.len() == REQUEST_MAX {
        from.skip_until(b'\n')?;
        return Ok(Some(Err("a line has less than 16 MiB, the most that a request carries")));
    }
    Ok(Some(String::from_utf8(line).map_err(|_| "this is not UTF-8")))
}

/// What a server does not count as a line either.
fn is_blank(line: &str) -> bool {
    line.trim_ascii().is_empty()
}
