//! What every Rust driver shares: how the four measures are taken. A driver says only how its peer is called.
//! The twin of `lib.mjs`, so that a figure means the same whatever the client is written in.

use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::sync::Notify;
use tokio::time::{sleep, sleep_until, timeout};

const WARMUP: Duration = Duration::from_secs(1);
const BATCH: u64 = 1_000;
/// A worker that has handled nothing new for this long has lost jobs.
const SILENCE_MAX: Duration = Duration::from_secs(60);

/// What `run.py` asks for, as JSON in the first argument.
#[derive(Clone, Deserialize)]
pub struct Ask {
    pub measure: String,
    pub producers: u64,
    pub seconds: u64,
    pub jobs: u64,
    pub rate: u64,
    pub payload: usize,
    pub url: String,
    pub variant: String,
}

/// One job; its JSON is as long as `--payload` says.
#[derive(Clone, Serialize, Deserialize)]
pub struct Job {
    pub n: u64,
    pub pad: String,
}

/// How a peer is called. Every producer gets a clone of its own.
pub trait Peer: Clone + Send + Sync + 'static {
    /// The client library's version, and the settings that this measure ran with.
    fn describe(&self, measure: &str) -> (String, String);
    /// One job, answered once it is durable.
    fn enqueue(&mut self, job: Job) -> impl Future<Output = Result<()>> + Send;
    /// Many jobs in the peer's best bulk form, answered once all are durable.
    fn bulk(&mut self, jobs: Vec<Job>) -> impl Future<Output = Result<()>> + Send;
    /// Starts a worker in the background whose handler does nothing but tell `handled`.
    fn work(&mut self, ask: &Ask, handled: Handled) -> impl Future<Output = Result<()>> + Send;
}

/// Takes the one measure that was asked for and prints it as one line.
pub async fn measure<P: Peer, F: Future<Output = Result<P>>>(
    connect: impl FnOnce(Ask) -> F,
) -> Result<()> {
    let ask: Ask = serde_json::from_str(
        &std::env::args().nth(1).context("no question in the first argument")?,
    )?;
    let peer = connect(ask.clone()).await?;
    let (version, settings) = peer.describe(&ask.measure);
    let mut figures = match ask.measure.as_str() {
        "enqueue" => enqueue(peer, &ask).await?,
        "bulk" => bulk(peer, &ask).await?,
        "drain" => drain(peer, &ask).await?,
        "latency" => latency(peer, &ask).await?,
        other => bail!("no measure is called {other}"),
    };
    figures["version"] = json!(version);
    figures["settings"] = json!(settings);
    println!("{figures}");
    // Workers run for ever; the server is thrown away with all they hold.
    std::process::exit(0)
}

/// One awaited call per job, from `producers` loops at once.
async fn enqueue<P: Peer>(peer: P, ask: &Ask) -> Result<Value> {
    call_until_deadline(peer, ask, 1, |mut peer, n, payload| async move {
        peer.enqueue(job(n, payload)).await?;
        Ok(peer)
    })
    .await
}

/// 1,000 jobs in each awaited call.
async fn bulk<P: Peer>(peer: P, ask: &Ask) -> Result<Value> {
    call_until_deadline(peer, ask, BATCH, |mut peer, n, payload| async move {
        peer.bulk(jobs(n * BATCH, BATCH, payload)).await?;
        Ok(peer)
    })
    .await
}

/// `jobs` are queued before the worker starts. The first job handled starts the clock and is not counted.
async fn drain<P: Peer>(mut peer: P, ask: &Ask) -> Result<Value> {
    for queued in (0..ask.jobs).step_by(BATCH as usize) {
        peer.bulk(jobs(queued, BATCH.min(ask.jobs - queued), ask.payload)).await?;
    }
    let handled = Handled::new(ask.jobs, 0);
    peer.work(ask, handled.clone()).await?;
    handled.all().await?;
    let elapsed = handled.last() - handled.first();
    Ok(
        json!({ "jobs": ask.jobs, "per_second": round((ask.jobs - 1) as f64 / elapsed.as_secs_f64()) }),
    )
}

/// Open loop: a call is made when it is due, whether or not the earlier ones have been answered.
async fn latency<P: Peer>(mut peer: P, ask: &Ask) -> Result<Value> {
    let warm = WARMUP.as_secs() * ask.rate;
    let total = warm + ask.seconds * ask.rate;
    let handled = Handled::new(total, warm);
    peer.work(ask, handled.clone()).await?;

    // Callers that were idle long enough are used again: opening a connection is no part of a call.
    let idle = Arc::new(Mutex::new(vec![peer.clone()]));
    let began = Instant::now();
    let failed = Arc::new(OnceLock::new());
    for n in 0..total {
        sleep_until((began + Duration::from_secs_f64(n as f64 / ask.rate as f64)).into()).await;
        let mut caller = idle.lock().unwrap().pop().unwrap_or_else(|| peer.clone());
        let (idle, failed, handled, job) =
            (idle.clone(), failed.clone(), handled.clone(), job(n, ask.payload));
        tokio::spawn(async move {
            handled.calling(n);
            match caller.enqueue(job).await {
                Ok(()) => idle.lock().unwrap().push(caller),
                Err(error) => drop(failed.set(error)),
            }
        });
    }
    handled.all().await?;
    if let Some(error) = failed.get() {
        bail!("a call failed: {error:#}");
    }
    let times = handled.times();
    let mut figures = json!({ "jobs": times.len(), "rate": ask.rate });
    add_percentiles(&mut figures, times);
    figures["behind_ms"] =
        json!(round((handled.last() - handled.called(total - 1)).as_secs_f64() * 1e3));
    Ok(figures)
}

async fn call_until_deadline<P, C, F>(
    peer: P,
    ask: &Ask,
    jobs_per_call: u64,
    call: C,
) -> Result<Value>
where
    P: Peer,
    C: Fn(P, u64, usize) -> F + Copy + Send + 'static,
    F: Future<Output = Result<P>> + Send,
{
    let count_from = Instant::now() + WARMUP;
    let deadline = count_from + Duration::from_secs(ask.seconds);
    let next = Arc::new(AtomicU64::new(0));
    let producers: Vec<_> = (0..ask.producers)
        .map(|_| {
            let (mut peer, next, payload) = (peer.clone(), next.clone(), ask.payload);
            tokio::spawn(async move {
                let mut times = Vec::new();
                let mut last = count_from;
                loop {
                    let began = Instant::now();
                    if began >= deadline {
                        return Ok::<_, anyhow::Error>((times, last));
                    }
                    peer = call(peer, next.fetch_add(1, Relaxed), payload).await?;
                    // A call belongs to the window when it began in it; the window then lasts until the last of
                    // them was answered.
                    if began >= count_from {
                        last = Instant::now();
                        times.push(last - began);
                    }
                }
            })
        })
        .collect();
    let (mut times, mut last) = (Vec::new(), count_from);
    for producer in producers {
        let (its_times, its_last) = producer.await??;
        times.extend(its_times);
        last = last.max(its_last);
    }
    let per_second = times.len() as f64 * jobs_per_call as f64 / (last - count_from).as_secs_f64();
    let mut figures = json!({ "producers": ask.producers, "per_second": round(per_second) });
    add_percentiles(&mut figures, times);
    Ok(figures)
}

/// Told by the handler, at its start, about every job.
#[derive(Clone)]
pub struct Handled(Arc<Seen>);

struct Seen {
    began: Instant,
    total: u64,
    warm: u64,
    count: AtomicU64,
    first_nanos: AtomicU64,
    last_nanos: AtomicU64,
    called_nanos: Vec<AtomicU64>,
    times: Mutex<Vec<Duration>>,
    all: Notify,
}

impl Handled {
    fn new(total: u64, warm: u64) -> Self {
        // Only `latency`, which has a warm part, asks when each job was called for.
        let called = if warm > 0 { total } else { 0 };
        Self(Arc::new(Seen {
            began: Instant::now(),
            total,
            warm,
            count: AtomicU64::new(0),
            first_nanos: AtomicU64::new(u64::MAX),
            last_nanos: AtomicU64::new(0),
            called_nanos: (0..called).map(|_| AtomicU64::new(0)).collect(),
            times: Mutex::new(Vec::new()),
            all: Notify::new(),
        }))
    }

    pub fn handled(&self, n: u64) {
        let seen = &self.0;
        let now = self.nanos();
        seen.first_nanos.fetch_min(now, Relaxed);
        seen.last_nanos.fetch_max(now, Relaxed);
        if let Some(called) = seen.called_nanos.get(n as usize)
            && n >= seen.warm
        {
            seen.times.lock().unwrap().push(Duration::from_nanos(now - called.load(Relaxed)));
        }
        if seen.count.fetch_add(1, Relaxed) + 1 == seen.total {
            seen.all.notify_one();
        }
    }

    fn calling(&self, n: u64) {
        self.0.called_nanos[n as usize].store(self.nanos(), Relaxed);
    }

    async fn all(&self) -> Result<()> {
        let mut before = 0;
        while timeout(SILENCE_MAX, self.0.all.notified()).await.is_err() {
            let now = self.0.count.load(Relaxed);
            if now == before {
                bail!("{now} of {} jobs were handled, and no more came", self.0.total);
            }
            before = now;
        }
        // The handler that was told last may still be writing down its time.
        sleep(Duration::from_millis(10)).await;
        Ok(())
    }

    fn first(&self) -> Duration {
        Duration::from_nanos(self.0.first_nanos.load(Relaxed))
    }

    fn last(&self) -> Duration {
        Duration::from_nanos(self.0.last_nanos.load(Relaxed))
    }

    fn called(&self, n: u64) -> Duration {
        Duration::from_nanos(self.0.called_nanos[n as usize].load(Relaxed))
    }

    fn times(&self) -> Vec<Duration> {
        self.0.times.lock().unwrap().clone()
    }

    fn nanos(&self) -> u64 {
        self.0.began.elapsed().as_nanos() as u64
    }
}

fn jobs(from: u64, count: u64, payload: usize) -> Vec<Job> {
    (from..from + count).map(|n| job(n, payload)).collect()
}

fn job(n: u64, payload: usize) -> Job {
    let around = r#"{"n":,"pad":""}"#.len() + n.to_string().len();
    Job { n, pad: "x".repeat(payload.saturating_sub(around)) }
}

fn add_percentiles(figures: &mut Value, mut times: Vec<Duration>) {
    times.sort_unstable();
    for (name, share) in [("p50_ms", 0.5), ("p99_ms", 0.99)] {
        let at = ((times.len() as f64 * share) as usize).min(times.len().saturating_sub(1));
        let millis = times.get(at).map(|time| (time.as_secs_f64() * 1e6).round() / 1e3);
        figures[name] = json!(millis);
    }
}

fn round(value: f64) -> f64 {
    if value <= 0.0 {
        return 0.0;
    }
    let unit = 10f64.powi(3 - value.log10().floor() as i32);
    (value * unit).round() / unit
}
