//! apalis on SQLite and on Postgres; `variant` says which.

use std::str::FromStr;
use std::time::Duration;

use anyhow::{Result, bail};
use apalis::prelude::*;
use apalis_postgres::PostgresStorage;
use apalis_sqlite::SqliteStorage;
use pumphouse_bench_peers::{Ask, Handled, Job, Peer, measure};
use sqlx::postgres::PgPoolOptions;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteSynchronous};

const QUEUE: &str = "bench";
const POSTGRES_CONNECTIONS_MAX: u32 = 20;
const CONCURRENCY: usize = 256;
const FETCH_MAX: usize = 500;

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
struct OnSqlite(SqliteStorage<Job>, String);

async fn open_sqlite(ask: Ask) -> Result<OnSqlite> {
    // `setup` turns `synchronous` off on the connection that it runs on. That connection is closed before anything is
    // measured, or a share of the calls would not be durable.
    let options = SqliteConnectOptions::from_str(&format!("sqlite://{}", ask.url))?
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .busy_timeout(Duration::from_secs(30));
    let migrating = SqlitePool::connect_with(options.clone()).await?;
    SqliteStorage::setup(&migrating).await?;
    migrating.close().await;

    // One connection: SQLite has one writer, and several would only wait for each other.
    let options = options.synchronous(SqliteSynchronous::Full);
    let pool = SqlitePoolOptions::new().max_connections(1).connect_with(options).await?;
    let synchronous: i64 = sqlx::query_scalar("pragma synchronous").fetch_one(&pool).await?;
    if synchronous != 2 {
        bail!("apalis would run with synchronous = {synchronous}, which is not durable");
    }
    let config = sqlite_config();
    Ok(OnSqlite(SqliteStorage::new(&pool).with_config(config), ask.url))
}

fn sqlite_config() -> apalis_sqlite::Config {
    apalis_sqlite::Config::default().queue(QUEUE).batch_size(FETCH_MAX).lock_tasks(false)
}

impl Peer for OnSqlite {
    fn describe(&self, measure: &str) -> (String, String) {
        describe(measure, "WAL, synchronous FULL; ", "update hook")
    }

    async fn enqueue(&mut self, job: Job) -> Result<()> {
        Ok(self.0.push(job).await?)
    }

    async fn bulk(&mut self, jobs: Vec<Job>) -> Result<()> {
        Ok(self.0.push_bulk(jobs).await?)
    }

    async fn work(&mut self, ask: &Ask, handled: Handled) -> Result<()> {
        let backend = self.0.clone();
        let worker = WorkerBuilder::new("bench").backend(backend).concurrency(CONCURRENCY).data(handled).build(handle);
        tokio::spawn(async move { worker.run().await.expect("the worker lost its database") });
        Ok(())
    }
}

#[derive(Clone)]
struct OnPostgres(PostgresStorage<Job>);

async fn open_postgres(ask: Ask) -> Result<OnPostgres> {
    let pool = PgPoolOptions::new().max_connections(POSTGRES_CONNECTIONS_MAX).connect(&ask.url).await?;
    PostgresStorage::setup(&pool).await?;
    let config = apalis_postgres::Config::default().queue(QUEUE).batch_size(FETCH_MAX).lock_tasks(false);
    Ok(OnPostgres(PostgresStorage::new(&pool).with_config(config)))
}

impl Peer for OnPostgres {
    fn describe(&self, measure: &str) -> (String, String) {
        describe(measure, "", "NOTIFY")
    }

    async fn enqueue(&mut self, job: Job) -> Result<()> {
        Ok(self.0.push(job).await?)
    }

    async fn bulk(&mut self, jobs: Vec<Job>) -> Result<()> {
        Ok(self.0.push_bulk(jobs).await?)
    }

    async fn work(&mut self, ask: &Ask, handled: Handled) -> Result<()> {
        let backend = self.0.clone();
        if ask.measure == "latency" {
            let worker = WorkerBuilder::new("bench")
                .backend(backend.with_pubsub())
                .concurrency(CONCURRENCY)
                .data(handled)
                .build(handle);
            tokio::spawn(async move { worker.run().await.expect("the worker lost its database") });
            return Ok(());
        }
        let worker = WorkerBuilder::new("bench").backend(backend).concurrency(CONCURRENCY).data(handled).build(handle);
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
        "drain" => format!("{durability}concurrency {CONCURRENCY}, batch {FETCH_MAX}, lock_tasks off"),
        _ => format!("{durability}woken by {wake}, concurrency {CONCURRENCY}, lock_tasks off"),
    };
    ("1.0.0".to_owned(), settings)
}
