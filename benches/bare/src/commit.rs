//! One row, one commit, one after another: with one HTTP request, the least that a durable POST can take.

use std::path::PathBuf;
use std::thread;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::json;

use crate::client::payload;
use crate::{postgres, report, sqlite};

#[derive(Args)]
pub struct Commit {
    #[command(flatten)]
    to: To,
    /// How many commits to time
    #[arg(long, default_value_t = 2000)]
    count: u64,
    /// How long to wait before the next commit, in milliseconds
    #[arg(long, default_value_t = 0)]
    pause: u64,
    /// How many bytes each message carries
    #[arg(long, default_value_t = 256)]
    payload: usize,
}

#[derive(Args)]
#[group(required = true, multiple = false)]
struct To {
    /// A SQLite database; its table `bare_message` is made anew
    #[arg(long)]
    file: Option<PathBuf>,
    /// A Postgres database; its table `bare_message` is made anew
    #[arg(long)]
    url: Option<String>,
}

impl Commit {
    pub fn run(self) -> anyhow::Result<()> {
        let payload = payload(self.payload);
        let mut times = report::histogram();
        let begin;
        let program;
        if let Some(file) = &self.to.file {
            program = "commit-sqlite";
            let store = sqlite::Store::open(file)?;
            begin = Instant::now();
            for _ in 0..self.count {
                let sent = Instant::now();
                store.insert_many(&payload, 1)?;
                times.saturating_record(sent.elapsed().as_nanos() as u64);
                thread::sleep(Duration::from_millis(self.pause));
            }
        } else {
            program = "commit-postgres";
            let url = self.to.url.as_deref().unwrap_or_default();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let store = runtime.block_on(async {
                postgres::make_table(url).await?;
                postgres::Store::connect(url).await
            })?;
            begin = Instant::now();
            for _ in 0..self.count {
                let sent = Instant::now();
                runtime.block_on(store.insert_many(&payload, 1))?;
                times.saturating_record(sent.elapsed().as_nanos() as u64);
                thread::sleep(Duration::from_millis(self.pause));
            }
        }
        let took = begin.elapsed();
        let (p50, p99) = (report::milliseconds(&times, 0.5), report::milliseconds(&times, 0.99));
        report::say(program, self.count, took, json!({"p50_ms": p50, "p99_ms": p99}));
        Ok(())
    }
}
