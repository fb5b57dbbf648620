//! Whether every statement of the Postgres store can be prepared, and lives on an index where tables are big.

use std::time::Duration;

use pumphouse::store::{Postgres, Store};
use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection, Row};

use crate::support::postgres::fresh_database;

/// Tables that grow with the number of messages. What is not in here stays small.
const BIG: [&str; 10] = [
    "message",
    "content",
    "ready",
    "behind",
    "head",
    "scheduled",
    "lease",
    "delivery",
    "idempotency",
    "dead",
];

/// Rows in every big table, spread over sixty queues.
const FILL: &str = "
    insert into queue (name, settings, state, max_crashes, dedup_window, retention_completed, retention_dead, dead_on_expiry, group_blocks)
    select 'q' || n, '{}', '{}', 20, 1, 1, 1, n % 2 = 0, n % 2 = 0 from generate_series(1, 60) as n;
    insert into message (seq, id, queue_id, state, rank, due_at, attempts, failures, crashes, enqueued_at, size, lane, grp)
    select n, md5(n::text)::uuid, n % 60 + 1, case when n % 3 = 0 then 5 else 0 end, 0, n, 0, 0, 0, n, 1,
        case when n % 2 = 0 then n % 20 else 0 end, case when n % 2 = 0 then n % 7000 end
    from generate_series(1, 60000) as n;
    insert into content (seq, deliver_at, details, body, correlation_id)
    select seq, due_at, '{}', 'body', case when seq % 3 = 0 then 'c' || seq % 100 end from message;
    insert into ready (queue_id, rank, lane, due_at, seq, urgent, expires_at)
    select queue_id, rank, lane, due_at, seq, seq % 100 = 0, case when seq % 10 = 0 then seq end from message where seq <= 20000;
    insert into ready (queue_id, rank, lane, due_at, seq, urgent, grp)
    select queue_id, 0, lane, due_at, 100000 + seq, false, grp from message where grp is not null;
    insert into behind (queue_id, grp, seq, due_at, lane, expires_at)
    select queue_id, grp, seq, due_at, lane, case when seq % 10 = 0 then seq end from message where grp is not null;
    insert into head (queue_id, grp, seq, dirty)
    select queue_id, grp, min(seq), false from message where grp is not null group by queue_id, grp;
    insert into scheduled (queue_id, rank, lane, due_at, seq, expires_at)
    select queue_id, rank, lane, due_at, seq, case when seq % 10 = 0 then seq end from message where seq between 20001 and 40000;
    insert into lease (seq, token, incarnation, leased_at, until, queue_id, attempt, replica)
    select seq, seq, seq % 5, seq, seq, queue_id, 1, 'r' || seq % 5 from message where seq > 40000;
    insert into dead (seq, finished_at, queue_id) select seq, seq, queue_id from message;
    insert into ended (seq, finished_at, queue_id) select seq, seq, queue_id from message;
    insert into delivery (seq, number, replica, started_at, duration, outcome, answer)
    select seq, 1, 'r', seq, 1, 'acked', '' from message;
    insert into idempotency (queue_id, key, fingerprint, seq, id, enqueued_at, deliver_at, expires_at, sweep_at)
    select queue_id, decode(md5(seq::text), 'hex'), '', seq, id, seq, seq, seq, seq from message;
    insert into replica (name, incarnation, seen_at, good_for) select 'r' || n, n, n, 1 from generate_series(1, 5) as n;
    delete from tally;
    analyze;";

#[tokio::test]
async fn every_statement_is_prepared_and_none_reads_a_big_table_whole() {
    let mut connection = house().await;
    connection.execute(FILL).await.unwrap();
    refuse(&mut connection, reads_whole).await;
}

/// The plan that is made for empty tables may be kept when they are full.
#[tokio::test]
async fn no_statement_is_fooled_by_an_empty_table() {
    let mut connection = house().await;
    connection.execute("vacuum analyze").await.unwrap();
    refuse(&mut connection, reads_whole).await;
}

/// Whether a line of a plan, seen with those after it, reads a big table without a condition on an index.
fn reads_whole(line: &str, rest: &[&str]) -> bool {
    let of_big = |what: &str| BIG.iter().any(|table| line.contains(&format!("{what} on {table} ")));
    let by_index = line.contains("Index") && of_big("");
    let condition = rest.first().is_some_and(|next| next.contains("Index Cond"));
    of_big("Seq Scan") || (by_index && !condition)
}

/// Statements that read a big table from one end, no further than to their limit.
const FROM_ONE_END: [&str; 2] =
    ["select due_at - now_micros()", "from dead\n        cross join lateral"];

async fn house() -> PgConnection {
    let url = fresh_database().await;
    Postgres::migrate(&url).await.unwrap();
    let mut connection = PgConnection::connect(&url).await.unwrap();
    connection.execute("set search_path = pumphouse").await.unwrap();
    // As on every connection of ours.
    connection.execute("set plan_cache_mode = force_generic_plan").await.unwrap();
    for (name, value) in Postgres::planning() {
        let set = AssertSqlSafe(format!("set {name} = {value}"));
        connection.execute(set).await.unwrap();
    }
    connection
}

/// Complains of every statement with a plan in which some line, seen with the lines after it, is wrong.
async fn refuse(connection: &mut PgConnection, is_wrong: impl Fn(&str, &[&str]) -> bool) {
    let mut complaints = Vec::new();
    for (number, statement) in Postgres::statements().enumerate() {
        let plan = plan(connection, number, statement).await;
        let lines = plan.lines().collect::<Vec<_>>();
        let wrong = (0..lines.len()).find(|at| is_wrong(lines[*at], &lines[at + 1..]));
        let excused = FROM_ONE_END.iter().any(|start| statement.contains(start));
        if let Some(at) = wrong.filter(|_| !excused) {
            complaints.push(format!("{}:\n{statement}\n{plan}", lines[at]));
        }
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n\n"));
}

/// The plan for values that are not known: the one that the server may keep for all.
async fn plan(connection: &mut PgConnection, number: usize, statement: &str) -> String {
    let name = format!("statement_{number}");
    let prepare = AssertSqlSafe(format!("prepare {name} as {statement}"));
    if let Err(error) = connection.execute(prepare).await {
        panic!("cannot be prepared: {error}\n{statement}");
    }
    let count = "select cardinality(parameter_types) from pg_prepared_statements where name = $1";
    let count: i32 =
        sqlx::query_scalar(count).bind(&name).fetch_one(&mut *connection).await.unwrap();
    let nulls = vec!["null"; count as usize].join(", ");
    let arguments = if count == 0 { String::new() } else { format!("({nulls})") };
    let explain = AssertSqlSafe(format!("explain execute {name} {arguments}"));
    let rows = connection.fetch_all(explain).await.unwrap();
    rows.iter().map(|row| row.get::<String, _>(0) + "\n").collect()
}

#[tokio::test]
async fn a_store_that_is_opened_twice_has_one_schema() {
    let url = fresh_database().await;
    let (one, other) = tokio::join!(Postgres::open(&url), Postgres::open(&url));
    let (one, other) = (one.unwrap(), other.unwrap());
    one.check().await.unwrap();
    other.check().await.unwrap();
    one.close().await;
    tokio::time::timeout(Duration::from_secs(10), other.close()).await.unwrap();
}
