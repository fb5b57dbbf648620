//! `pumphouse bench`: what this machine and its disk can do, measured with a load and a handler of its own.
//!
//! ```text
//!   place ─▶ server ─▶ target      a database, a process on it, a queue on that (or a server that was named)
//!                        │
//!   payload ─▶ generator ┴─▶ sink   what is sent, by whom, and where it arrives
//!                                   enqueue, drain, end_to_end, latency, service: one command each
//!   report, progress                what was found, and how it goes
//! ```
//!
//! It makes one queue, `bench`, and refuses where there is one: nothing that it did not make is touched.

mod connection;
mod payload;
mod place;
mod server;
mod target;
mod generator;
mod sink;
mod arriving;
mod enqueue;
mod drain;
mod service;
mod end_to_end;
mod latency;
mod progress;
mod report;

use std::fmt;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::time::Duration;

use anyhow::{Result, anyhow};
use clap::Subcommand;
use clap::error::ErrorKind;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::{print, signals};

use drain::Drain;
use end_to_end::EndToEnd;
use enqueue::Enqueue;
use latency::Latency;
use payload::{PAYLOAD_MAX, PAYLOAD_MIN, Stamps};
use place::Where;
use progress::Progress;
use report::{Figures, Report};
use sink::Sink;
use target::{Target, Which};

/// The only queue that is ever made, and ever deleted.
const QUEUE: &str = "bench";

const JSON: &str = "application/json";
const NDJSON: &str = "application/x-ndjson";

/// How many deliveries are open at once, if nobody says otherwise.
const CONCURRENCY_DEFAULT: u32 = 64;

/// What to measure.
#[derive(Debug, clap::Args)]
pub(super) struct Bench {
    #[command(subcommand)]
    measure: Measure,
}

#[derive(Debug, Subcommand)]
enum Measure {
    /// How many messages a second are taken, each synced to disk before it is answered
    #[command(after_help = ENQUEUE_EXAMPLES)]
    Enqueue(Enqueue),
    /// How fast a backlog goes to a handler that does nothing
    #[command(after_help = DRAIN_EXAMPLES)]
    Drain(Drain),
    /// How many messages a second come in, are delivered over HTTP and are settled, all at once
    #[command(after_help = END_TO_END_EXAMPLES)]
    EndToEnd(EndToEnd),
    /// How long a message is on its way, at a pace that the machine can hold
    #[command(after_help = LATENCY_EXAMPLES)]
    Latency(Latency),
}

/// Help for the command as a whole.
pub(super) const EXAMPLES: &str = "\
For sizing your machine: each command starts a server of its own on a temporary SQLite file,
loads it, and stops it. Nothing that exists is touched.
  pumphouse bench enqueue                     can it take your rush hour?
  pumphouse bench end-to-end                  can it deliver it as fast as it comes?
  pumphouse bench drain                       how long does a backlog last?
  pumphouse bench latency --rate 200          how long does a message take on a normal day?

How to read it: rates are what this machine can do at most, with a load that runs on the same
machine and takes its share. Plan with half of them. If end-to-end is far below enqueue, a
rush hour builds a backlog; drain says how fast it goes away. Figures of two machines or two
disks compare; figures of two moments on a busy machine may not: use --runs 5, and look at the
spread. A debug build says nothing.";

const ENQUEUE_EXAMPLES: &str = "\
Examples:
  pumphouse bench enqueue --dir /var/lib/pumphouse          on the disk of the real database
  pumphouse bench enqueue --connections 1                   one sender: one synced commit each
  pumphouse bench enqueue --batch 1000 --connections 4      bulk
  pumphouse bench enqueue --database postgres://pump@db/empty

How to read it: every message that counts was answered 201, so it was on disk. More
connections share a commit, so the rate rises with them while p50 stays near one sync of the
disk; p99 is what your slowest sender in a hundred waits. If one connection is slow, so is the
disk's sync: no setting helps, another disk does.";

const DRAIN_EXAMPLES: &str = "\
Examples:
  pumphouse bench drain                                     into a function of this process
  pumphouse bench drain --handler http --messages 50000     into an HTTP handler
  pumphouse bench drain --concurrency 256

How to read it: the backlog of a bad hour, divided by this rate, is how long it takes to catch
up when your handler is as fast as this one, which does nothing. A handler that takes 50 ms
with a limit of 16 does 320 messages a second whatever is said here.";

const END_TO_END_EXAMPLES: &str = "\
Examples:
  pumphouse bench end-to-end --seconds 30 --runs 3
  pumphouse bench end-to-end --url http://pump:8080 --sink 10.0.0.7:9000   elsewhere

How to read it: sending and delivering compete for the same machine, so this rate is what it
holds for hours. The time counts until every message is delivered and settled. The time from
sent to reached is under full load, where messages queue; for the time of a message on a
normal day see `bench latency`.";

const LATENCY_EXAMPLES: &str = "\
Examples:
  pumphouse bench latency
  pumphouse bench latency --rate 2000 --seconds 60          at the pace of your rush hour

How to read it: messages are sent at their times, whatever became of those before, and each
counts from the time when it was due: a stall of a second shows in every message that fell
into it, not in one. Of it, the generator's own lateness is shown; where that is large, the
machine is too busy to be measured. Where p99 grows with the duration, the rate is more than
the machine holds.";

/// What all commands share.
#[derive(Debug, clap::Args)]
struct Common {
    #[command(flatten)]
    which: Which,
    /// How many bytes each message has
    #[arg(long, value_name = "BYTES", default_value = "256", value_parser = payload_size)]
    payload: usize,
    /// Measure so many times, each on a fresh queue, and show medians
    #[arg(long, value_name = "N", default_value = "1", value_parser = count(1..=1000))]
    runs: u64,
    /// How many threads of this process send and receive; the rest is left to the server [default: 1 to
    /// send, 2 to send and receive, all for a handler in this process]
    #[arg(long, value_name = "N", value_parser = count(1..=1024))]
    threads: Option<u64>,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
    /// Show no progress
    #[arg(long, short)]
    quiet: bool,
}

/// How deliveries are received.
#[derive(Debug, clap::Args)]
struct Receiving {
    /// How many deliveries may be open at once [default: 64; for --handler service the default of a queue]
    #[arg(long, value_name = "N", value_parser = concurrency)]
    concurrency: Option<u32>,
    /// Where this process takes deliveries: an address that the server can reach
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
    sink: SocketAddr,
}

impl Receiving {
    fn limit(&self) -> u32 {
        self.concurrency.unwrap_or(CONCURRENCY_DEFAULT)
    }

    fn queue(&self, sink: &Sink) -> Value {
        json!({
            "handler": { "kind": "http", "url": sink.url() },
            "concurrency": { "limit": self.limit() },
        })
    }
}

impl Bench {
    /// How many threads the process is to have; `None` for one a core.
    pub(super) fn threads(&self) -> Option<usize> {
        let default = match &self.measure {
            Measure::Enqueue(_) | Measure::Latency(_) => Some(1),
            Measure::Drain(drain) if drain.in_process() => None,
            Measure::Drain(_) | Measure::EndToEnd(_) => Some(2),
        };
        self.measure.common().threads.map(|threads| threads as usize).or(default)
    }
}

impl Measure {
    fn name(&self) -> &'static str {
        match self {
            Self::Enqueue(_) => "enqueue",
            Self::Drain(_) => "drain",
            Self::EndToEnd(_) => "end-to-end",
            Self::Latency(_) => "latency",
        }
    }

    fn common(&self) -> &Common {
        match self {
            Self::Enqueue(enqueue) => &enqueue.common,
            Self::Drain(drain) => &drain.common,
            Self::EndToEnd(end_to_end) => &end_to_end.common,
            Self::Latency(latency) => &latency.common,
        }
    }

    fn what(&self) -> String {
        match self {
            Self::Enqueue(enqueue) => enqueue.what(),
            Self::Drain(drain) => drain.what(),
            Self::EndToEnd(end_to_end) => end_to_end.what(),
            Self::Latency(latency) => latency.what(),
        }
    }

    fn settings(&self) -> Value {
        match self {
            Self::Enqueue(enqueue) => enqueue.settings(),
            Self::Drain(drain) => drain.settings(),
            Self::EndToEnd(end_to_end) => end_to_end.settings(),
            Self::Latency(latency) => latency.settings(),
        }
    }

    fn receiving(&self) -> Option<&Receiving> {
        match self {
            Self::Enqueue(_) => None,
            Self::Drain(drain) => Some(&drain.receiving),
            Self::EndToEnd(end_to_end) => Some(&end_to_end.receiving),
            Self::Latency(latency) => Some(&latency.receiving),
        }
    }

    fn check(&self) -> Result<(), String> {
        self.common().which.check()?;
        match self {
            Self::Enqueue(enqueue) => enqueue.check(),
            Self::Drain(drain) => drain.check(),
            Self::EndToEnd(_) | Self::Latency(_) => Ok(()),
        }
    }
}

/// Measures as often as was asked for, and prints what was found. The first signal ends it in good order;
/// the second at once.
pub(super) async fn run(bench: Bench) -> Result<()> {
    let measure = bench.measure;
    measure.check().map_err(usage)?;
    let (stop, cut) = signals::listen_for_two()?;
    tokio::select! {
        done = all_runs(&measure, &stop) => done,
        // What is dropped here kills the server and removes the file.
        () = cut.cancelled() => Err(anyhow!("cut by a second signal; a queue {QUEUE} may be left behind")),
    }
}

async fn all_runs(measure: &Measure, stop: &CancellationToken) -> Result<()> {
    let common = measure.common();
    let mut progress = Progress::new(common.quiet);
    let mut notes = notes(common);
    for note in &notes {
        progress.note(&format!("note: {note}"));
    }
    let (mut runs, mut what) = (Vec::new(), String::new());
    for number in 1..=common.runs {
        if common.runs > 1 {
            progress.label(format!("run {number} of {}: ", common.runs));
        }
        let run = one_run(measure, &progress, stop).await?;
        let run = run.ok_or_else(|| anyhow!("interrupted"))?;
        runs.push(run.figures);
        what = run.what;
        if let Some(said) = run.warnings
            && !notes.contains(&said)
        {
            notes.push(said);
        }
    }
    let what = format!("{}{} bytes each; {what}", measure.what(), common.payload);
    let mut settings = measure.settings();
    settings["payload"] = common.payload.into();
    let report = Report { command: measure.name(), what, settings, notes, runs };
    print(&if common.json { report.json() } else { report.table() })
}

/// What one run found, and where.
struct Run {
    figures: Figures,
    what: String,
    /// What the server warned of, as of a database that does not sync.
    warnings: Option<String>,
}

/// One run from nothing to nothing; `None` where a signal came first.
async fn one_run(
    measure: &Measure,
    progress: &Progress,
    stop: &CancellationToken,
) -> Result<Option<Run>> {
    let which = &measure.common().which;
    if let Measure::Drain(drain) = measure
        && drain.in_process()
    {
        let place = which.place.open()?;
        let figures = service::run(drain, &place, progress, stop).await?;
        let what = format!("this process, {}", place.what);
        return Ok(figures.map(|figures| Run { figures, what, warnings: None }));
    }
    let stamps = Stamps::new();
    let sink = match measure.receiving() {
        Some(receiving) => Some(Sink::open(receiving.sink, stamps.clone()).await?),
        None => None,
    };
    let Some(target) = stop.run_until_cancelled(Target::open(which)).await else {
        return Ok(None);
    };
    let mut target = target?;
    let measured = async {
        // Not to be interrupted: whether there is a queue of ours must be known.
        target.make_queue(&queue(measure, sink.as_ref())).await?;
        let load = load(measure, &target, sink.as_ref(), &stamps, progress);
        stop.run_until_cancelled(load).await.transpose()
    };
    let mut measured = measured.await;
    if let (Err(error), Some(said)) = (&mut measured, target.last_words()) {
        *error = anyhow!("{error:#}\n  the server said: {said}");
    }
    let warnings = target.last_words().map(|said| format!("the server said: {said}"));
    let what = target.what.clone();
    let closed = target.close().await;
    if let (Err(error), true) = (&closed, measured.is_err()) {
        progress.note(&format!("{error:#}"));
    }
    let figures = measured?;
    closed?;
    Ok(figures.map(|figures| Run { figures, what, warnings }))
}

/// The settings of the queue that is made.
fn queue(measure: &Measure, sink: Option<&Sink>) -> Value {
    match (measure, measure.receiving(), sink) {
        (_, Some(receiving), Some(sink)) => receiving.queue(sink),
        _ => enqueue::queue(),
    }
}

async fn load(
    measure: &Measure,
    target: &Target,
    sink: Option<&Sink>,
    stamps: &Stamps,
    progress: &Progress,
) -> Result<Figures> {
    match (measure, sink) {
        (Measure::Drain(drain), Some(sink)) => drain.run(target, sink, stamps, progress).await,
        (Measure::EndToEnd(both), Some(sink)) => both.run(target, sink, stamps, progress).await,
        (Measure::Latency(latency), Some(sink)) => {
            latency.run(target, sink, stamps, progress).await
        }
        (Measure::Enqueue(enqueue), _) => enqueue.run(target, progress).await,
        (_, None) => Err(anyhow!("there is no sink to deliver to")),
    }
}

fn notes(common: &Common) -> Vec<String> {
    let mut notes = Vec::new();
    if cfg!(debug_assertions) {
        notes.push("this is a debug build, whose figures say nothing".to_owned());
    }
    if !common.which.is_remote() {
        notes.extend(Where::notes(&common.which.place));
    }
    notes
}

/// A mistake in the arguments that only shows when they are seen together.
fn usage(text: String) -> anyhow::Error {
    clap::Error::raw(ErrorKind::ValueValidation, format!("{text}\n")).into()
}

/// A span as it was asked for, shown as in `5 s`.
#[derive(Debug, Clone, Copy)]
struct Span(Duration);

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} s", self.0.as_secs_f64())
    }
}

/// The longest measurement.
const SECONDS_MAX: f64 = 86_400.0;

fn seconds(text: &str) -> Result<Span, String> {
    number(text, "seconds", 0.05..=SECONDS_MAX)
        .map(|seconds| Span(Duration::from_secs_f64(seconds)))
}

fn seconds_or_none(text: &str) -> Result<Span, String> {
    number(text, "seconds", 0.0..=3600.0).map(|seconds| Span(Duration::from_secs_f64(seconds)))
}

fn rate(text: &str) -> Result<f64, String> {
    number(text, "messages a second", 0.1..=100_000.0)
}

fn number(text: &str, of: &str, allowed: RangeInclusive<f64>) -> Result<f64, String> {
    let rule = || format!("a number of {of} from {} to {}", allowed.start(), allowed.end());
    text.parse().ok().filter(|value| allowed.contains(value)).ok_or_else(rule)
}

fn payload_size(text: &str) -> Result<usize, String> {
    let size = super::size::parse_size(text)?;
    match (PAYLOAD_MIN..=PAYLOAD_MAX).contains(&size) {
        true => Ok(size),
        false => Err("a payload has from 64 bytes, which its stamp needs, to 1MiB".to_owned()),
    }
}

fn concurrency(text: &str) -> Result<u32, String> {
    count(1..=100_000)(text).map(|limit| u32::try_from(limit).unwrap_or(u32::MAX))
}

fn count(allowed: RangeInclusive<u64>) -> impl Fn(&str) -> Result<u64, String> + Clone {
    move |text| {
        let rule = || format!("a whole number from {} to {}", allowed.start(), allowed.end());
        text.parse().ok().filter(|value| allowed.contains(value)).ok_or_else(rule)
    }
}
