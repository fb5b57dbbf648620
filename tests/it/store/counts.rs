//! What a message costs, counted and not timed: transactions, pages and statements, held to bounds a bit above
//! what they were when this was written. A bound may be raised for a good reason; it is here to be asked for one.

use std::path::PathBuf;
use std::sync::Arc;

use futures::future::join_all;
use pumphouse::clock::SystemClock;
use pumphouse::model::{Leased, QueueName, Settlement};
use pumphouse::store::{Settled, Sqlite};
use sqlx::{Connection, Executor, PgConnection};

use crate::support::postgres::{Cluster, start_cluster};
use crate::support::stage::{ALL, Stage, message, settle};
use crate::support::stores::on_postgres;

/// How many messages are sent one by one, and how many together.
const SINGLE: usize = 100;
const TOGETHER: usize = 500;

/// From sent to settled, each alone.
async fn one_by_one(stage: &Stage, queue: &QueueName) {
    for _ in 0..SINGLE {
        stage.send(message(queue, &"x".repeat(256))).await;
        stage.must_settle(&stage.claim_one(queue).await, Settlement::Ack).await;
    }
}

async fn send_together(stage: &Stage, queue: &QueueName) {
    let body = "x".repeat(256);
    stage.send_all((0..TOGETHER).map(|_| message(queue, &body)).collect()).await;
}

async fn settle_together(stage: &Stage, leased: &[Leased]) {
    let acks =
        leased.iter().map(|one| stage.store.settle(settle(one, Settlement::Ack, Vec::new())));
    join_all(acks).await.into_iter().for_each(|settled| {
        assert!(matches!(settled, Ok(Settled::Done { .. })), "{settled:?}");
    });
}

/// Fails with what was counted where it is more than the bound.
fn at_most(what: &str, messages: usize, counted: u64, bound: f64) {
    let each = counted as f64 / messages as f64;
    assert!(each <= bound, "{what} a message: {each:.3}, and the bound is {bound}");
}

/// The log of a database file: each page that was written since the log began, and where commits ended.
struct Log(PathBuf);

impl Log {
    /// How many commits and how many pages. [The format](https://sqlite.org/walformat.html): a head of 32 bytes,
    /// then frames with a head of 24, in which the second number is not 0 for the last frame of a commit.
    fn count(&self) -> (u64, u64) {
        let log = std::fs::read(&self.0).unwrap();
        let frames = log.get(32..).unwrap_or(&[]).chunks_exact(24 + 4096);
        let pages = frames.len() as u64;
        let commits = frames.filter(|frame| frame[4..8] != [0; 4]).count() as u64;
        (commits, pages)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_costs_sqlite_few_commits_and_pages() {
    let (stage, log) = logged().await;
    let queue = stage.queue("letters").await;
    let before = log.count();
    one_by_one(&stage, &queue).await;
    let (commits, pages) = log.count();
    at_most("alone, commits", SINGLE, commits - before.0, 3.0);
    at_most("alone, pages", SINGLE, pages - before.1, 19.0);

    let (stage, log) = logged().await;
    let queue = stage.queue("letters").await;
    let before = log.count();
    send_together(&stage, &queue).await;
    let sent = log.count();
    assert_eq!(sent.0 - before.0, 1, "what is sent together is one commit");
    at_most("sent together, pages", TOGETHER, sent.1 - before.1, 0.15);
    let leased = stage.claim(&queue, ALL).await;
    let claimed = log.count();
    assert_eq!((leased.len(), claimed.0 - sent.0), (TOGETHER, 1), "a claim is one commit");
    at_most("claimed together, pages", TOGETHER, claimed.1 - sent.1, 0.055);
    settle_together(&stage, &leased).await;
    let settled = log.count();
    // The first may be on its way before the others come.
    let commits = settled.0 - claimed.0;
    assert!(commits <= 3, "settlements share commits: {commits}");
    // Each commit writes the pages again on which it goes on where the one before it ended.
    let bound = 0.06 + 0.02 * commits as f64;
    at_most("settled together, pages", TOGETHER, settled.1 - claimed.1, bound);
}

/// A store whose log is never begun again while a test counts in it.
async fn logged() -> (Stage, Log) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("house.db");
    let url = format!("sqlite://{}", file.display());
    let store = Sqlite::open(&url, Arc::new(SystemClock)).await.unwrap();
    let reader = sqlx::SqliteConnection::connect(&url).await.unwrap();
    let stage = Stage::real(Arc::new(store));
    let mut log = file.into_os_string();
    log.push("-wal");
    // Who reads keeps the log from being begun again.
    let mut reader = reader;
    reader.execute("begin; select count(*) from queue").await.unwrap();
    (stage.with((directory, std::sync::Mutex::new(reader))), Log(log.into()))
}

/// What a server wrote and did since it was last asked.
struct Server {
    cluster: Cluster,
    connection: PgConnection,
    statements: usize,
    written: i64,
}

impl Server {
    async fn start() -> (Self, Stage) {
        let cluster = start_cluster().await;
        let mut connection = PgConnection::connect(&cluster.url()).await.unwrap();
        for set in ["log_statement = 'all'", "log_line_prefix = '%a: '", "autovacuum = off"] {
            let set = sqlx::AssertSqlSafe(format!("alter system set {set}"));
            connection.execute(set).await.unwrap();
        }
        connection.execute("select pg_reload_conf()").await.unwrap();
        let stage = on_postgres(&cluster.url()).await;
        (Self { cluster, connection, statements: 0, written: 0 }, stage)
    }

    /// How many statements were executed, and how many bytes were written to the log, since the last call.
    async fn count(&mut self) -> (u64, u64) {
        let log = self.cluster.log();
        let ours = log.lines().filter(|line| line.starts_with("pumphouse: LOG:  "));
        // News to other replicas follow the clock, and not the messages.
        let told = |line: &&str| {
            let executed = line.contains("LOG:  execute ") || line.contains("LOG:  statement: ");
            executed && !line.contains("pg_notify")
        };
        let statements = ours.filter(told).count();
        let written: i64 =
            sqlx::query_scalar("select (pg_current_wal_insert_lsn() - '0/0')::bigint")
                .fetch_one(&mut self.connection)
                .await
                .unwrap();
        assert!(statements > 0, "the server says what it executes: {log}");
        let since = (statements - self.statements, written - self.written);
        (self.statements, self.written) = (statements, written);
        (since.0 as u64, since.1 as u64)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_message_costs_postgres_few_statements_and_bytes() {
    let (mut server, stage) = Server::start().await;
    let queue = stage.queue("letters").await;
    one_by_one(&stage, &queue).await; // so that statements are prepared, and pages written whole
    server.count().await;
    one_by_one(&stage, &queue).await;
    let (statements, bytes) = server.count().await;
    at_most("alone, statements", SINGLE, statements, 3.1);
    at_most("alone, bytes of log", SINGLE, bytes, 2700.0);

    send_together(&stage, &queue).await;
    let (statements, bytes) = server.count().await;
    assert!(
        (1..=2).contains(&statements),
        "what is sent together is one transaction: {statements}"
    );
    at_most("sent together, bytes of log", TOGETHER, bytes, 1050.0);
    let leased = stage.claim(&queue, ALL).await;
    let (statements, bytes) = server.count().await;
    assert_eq!(leased.len(), TOGETHER);
    assert!((1..=2).contains(&statements), "a claim is one statement: {statements}");
    at_most("claimed together, bytes of log", TOGETHER, bytes, 500.0);
    settle_together(&stage, &leased).await;
    let (statements, bytes) = server.count().await;
    assert!((1..=6).contains(&statements), "settlements share statements: {statements}");
    at_most("settled together, bytes of log", TOGETHER, bytes, 720.0);
    stage.store.close().await;
}
