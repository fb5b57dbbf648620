//! apalis on SQLite and on Postgres; `variant` says which.

use std::str::FromStr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use apalis::prelude::*;
use apalis_postgres::{PostgresStorage, Pubsub};
use apalis_sqlite::SqliteStorage;
use futures::StreamExt;
use futures::channel::mpsc::{self, UnboundedReceiver};
use pumphouse_bench_peers::{Ask, Handled, Job, Peer, measure};
use sqlx::postgres::{PgPool, PgPoolOptions};
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqliteOperation, SqlitePool, SqlitePoolOptions,
    SqliteSynchronous,
};

const QUEUE: &str = "bench";
const POSTGRES_CONNECTIONS_MAX: u32 = 20;
const CONCURRENCY: usize = 256;
const FETCH_MAX: usize = 500;
/// A worker that is woken while it fetches can miss the wake-up and would sleep until its next heartbeat, so its own
/// examples poll besides.
const POLL: Duration = Duration::from_millis(10);
const SYNCHRONOUS_FULL: i64 = 2;

#[tokio::main]
async fn main() -> Result<()> {
    let ask: Ask = serde_json::from_str(&std::env::args().nth(1).unwrap_or_default())?;
    match ask.variant.as_str() {
        "sqlite" => measure(open_sqlite).await,
        "postgres" => measure(open_postgres).await,
        other => bail!("apalis has no store called {other}"),
    }
}

#[derive(Clone)]
struct OnSqlite {
    storage: SqliteStorage<Job>,
    inserts: Arc<Mutex<Option<UnboundedReceiver<()>>>>,
}

async fn open_sqlite(ask: Ask) -> Result<OnSqlite> {
    // `setup` turns `synchronous` off on the connection that it runs on. That connection is closed before anything is
    // measured, or a share of the calls would not be durable.
    let options = SqliteConnectOptions::from_str(&format!("sqlite://{}", ask.url))?
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Full);
    let migrating = SqlitePool::connect_with(options.clone()).await?;
    SqliteStorage::setup(&migrating).await?;
    migrating.close().await;

    // One connection: SQLite has one writer, and several would only wait for each other. The update hook is what
    // `connect_with_callback` sets on a pool of its own, which could be told neither the size nor `synchronous`.
    let (inserted, inserts) = mpsc::unbounded();
    let pool = SqlitePoolOptions::new()
        .max_connections(1)
        .after_connect(move |connection, _| {
            let inserted = inserted.clone();
            Box::pin(async move {
                connection.lock_handle().await?.set_update_hook(move |update| {
                    if update.operation == SqliteOperation::Insert && update.table == "Jobs" {
                        let _ = inserted.unbounded_send(());
                    }
                });
                Ok(())
            })
        })
        .connect_with(options)
        .await?;
    let synchronous: i64 = sqlx::query_scalar("pragma synchronous").fetch_one(&pool).await?;
    if synchronous != SYNCHRONOUS_FULL {
        bail!("apalis would run with synchronous = {synchronous}, which is not durable");
    }
    let config =
        apalis_sqlite::Config::default().queue(QUEUE).batch_size(FETCH_MAX).lock_tasks(false);
    Ok(OnSqlite {
        storage: SqliteStorage::new(&pool).with_config(config),
        inserts: Arc::new(Mutex::new(Some(inserts))),
    })
}

impl Peer for OnSqlite {
    fn describe(&self, measure: &str) -> (String, String) {
        describe(measure, "WAL, synchronous FULL, one connection; ", "update hook")
    }

    async fn enqueue(&mut self, job: Job) -> Result<()> {
        Ok(self.storage.push(job).await?)
    }

    async fn bulk(&mut self, jobs: Vec<Job>) -> Result<()> {
        Ok(self.storage.push_bulk(jobs).await?)
    }

    async fn work(&mut self, _: &Ask, handled: Handled) -> Result<()> {
        let inserts = self.inserts.lock().unwrap().take().context("only one worker a run")?;
        let wake = Strategy::new().stream(inserts.ready_chunks(FETCH_MAX)).interval(POLL);
        let backend = self.storage.clone().poll_with_strategy(wake);
        let worker = WorkerBuilder::new("bench")
            .backend(backend)
            .concurrency(CONCURRENCY)
            .data(handled)
            .build(handle);
        tokio::spawn(async move { worker.run().await.expect("the worker lost its database") });
        Ok(())
    }
}

#[derive(Clone)]
struct OnPostgres {
    storage: PostgresStorage<Job>,
    pool: PgPool,
}

async fn open_postgres(ask: Ask) -> Result<OnPostgres> {
    let pool =
        PgPoolOptions::new().max_connections(POSTGRES_CONNECTIONS_MAX).connect(&ask.url).await?;
    PostgresStorage::setup(&pool).await?;
    let config =
        apalis_postgres::Config::default().queue(QUEUE).batch_size(FETCH_MAX).lock_tasks(false);
    Ok(OnPostgres { storage: PostgresStorage::new(&pool).with_config(config), pool })
}

impl Peer for OnPostgres {
    fn describe(&self, measure: &str) -> (String, String) {
        describe(measure, "", "NOTIFY")
    }

    async fn enqueue(&mut self, job: Job) -> Result<()> {
        Ok(self.storage.push(job).await?)
    }

    async fn bulk(&mut self, jobs: Vec<Job>) -> Result<()> {
        Ok(self.storage.push_bulk(jobs).await?)
    }

    async fn work(&mut self, _: &Ask, handled: Handled) -> Result<()> {
        let inserts = Pubsub::new(self.pool.clone(), QUEUE.to_owned());
        let wake = Strategy::new().stream(inserts.ready_chunks(FETCH_MAX)).interval(POLL);
        let backend = self.storage.clone().poll_with_strategy(wake);
        let worker = WorkerBuilder::new("bench")
            .backend(backend)
            .concurrency(CONCURRENCY)
            .data(handled)
            .build(handle);
        tokio::spawn(async move { worker.run().await.expect("the worker lost its database") });
        Ok(())
    }
}

async fn handle(job: Job, handled: Data<Handled>) -> Result<(), BoxDynError> {
    handled.handled(job.n);
    Ok(())
}

fn describe(measure: &str, durability: &str, wake: &str) -> (String, String) {
    let settings = match measure {
        "enqueue" => format!("{durability}push"),
        "bulk" => format!("{durability}push_bulk"),
        "drain" => {
            format!("{durability}concurrency {CONCURRENCY}, batch {FETCH_MAX}, lock_tasks off")
        }
        _ => format!(
            "{durability}woken by {wake} and every {} ms, concurrency {CONCURRENCY}, lock_tasks off",
            POLL.as_millis()
        ),
    };
    ("1.0.0".to_owned(), settings)
}
