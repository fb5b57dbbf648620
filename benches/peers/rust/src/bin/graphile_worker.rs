//! graphile_worker, the Rust port, on Postgres.

use std::sync::OnceLock;
use std::time::Duration;

use anyhow::{Result, anyhow};
use graphile_worker::{
    IntoTaskHandlerResult, JobSpec, LocalQueueConfig, TaskHandler, WorkerContext, WorkerOptions,
    WorkerUtils,
};
use pumphouse_bench_peers::{Ask, Handled, Job, Peer, measure};
use serde::{Deserialize, Serialize};
use sqlx::postgres::PgPoolOptions;

const SCHEMA: &str = "graphile_worker";
const CONNECTIONS_MAX: u32 = 20;
const LATENCY_CONCURRENCY: usize = 10;

/// The library makes its handlers out of the payload alone, so they find their listener here.
static HANDLED: OnceLock<Handled> = OnceLock::new();

#[derive(Clone, Serialize, Deserialize)]
struct Bench(Job);

impl TaskHandler for Bench {
    const IDENTIFIER: &'static str = "bench";

    async fn run(self, _: WorkerContext) -> impl IntoTaskHandlerResult {
        HANDLED.get().expect("set before the worker starts").handled(self.0.n);
        Ok::<(), String>(())
    }
}

#[derive(Clone)]
struct GraphileWorker {
    pool: sqlx::PgPool,
    utils: WorkerUtils,
}

#[tokio::main]
async fn main() -> Result<()> {
    measure(connect).await
}

async fn connect(ask: Ask) -> Result<GraphileWorker> {
    let pool = PgPoolOptions::new().max_connections(CONNECTIONS_MAX).connect(&ask.url).await?;
    let utils = WorkerUtils::new(pool.clone(), SCHEMA);
    utils.migrate().await?;
    Ok(GraphileWorker { pool, utils })
}

impl Peer for GraphileWorker {
    fn describe(&self, measure: &str) -> (String, String) {
        let settings = match measure {
            "enqueue" => format!("add_job, pool of {CONNECTIONS_MAX}"),
            "bulk" => "add_jobs".to_owned(),
            "drain" => {
                "concurrency 500, local queue 5000, completions batched within 5 ms".to_owned()
            }
            _ => format!("concurrency {LATENCY_CONCURRENCY}, NOTIFY, no local queue"),
        };
        ("0.14.1".to_owned(), settings)
    }

    async fn enqueue(&mut self, job: Job) -> Result<()> {
        self.utils.add_job(Bench(job), JobSpec::default()).await?;
        Ok(())
    }

    async fn bulk(&mut self, jobs: Vec<Job>) -> Result<()> {
        let spec = JobSpec::default();
        let jobs: Vec<_> = jobs.into_iter().map(|job| (Bench(job), &spec)).collect();
        self.utils.add_jobs(&jobs).await?;
        Ok(())
    }

    async fn work(&mut self, ask: &Ask, handled: Handled) -> Result<()> {
        HANDLED.set(handled).map_err(|_| anyhow!("only one worker a run"))?;
        let options = WorkerOptions::default()
            .schema(SCHEMA)
            .define_job::<Bench>()
            .pg_pool(self.pool.clone())
            .listen_os_shutdown_signals(false);
        let options = if ask.measure == "drain" {
            let batch_delay = Duration::from_millis(5);
            options
                .concurrency(500)
                .local_queue(LocalQueueConfig::default().with_size(5_000))
                .complete_job_batch_delay(batch_delay)
                .fail_job_batch_delay(batch_delay)
        } else {
            options.concurrency(LATENCY_CONCURRENCY)
        };
        let worker = options.init().await?;
        tokio::spawn(async move { worker.run().await.expect("the worker lost its database") });
        Ok(())
    }
}
