//! Whether every statement of the SQLite store can be prepared, and lives on an index where tables are big.

use pumphouse::store::Sqlite;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions, Row, SqliteConnection};

/// Tables that grow with the number of messages. What is not in here stays small.
const BIG: [&str; 5] = ["message", "head", "content", "delivery", "idempotency"];

/// The only statements that may sort: those over a list of ids, which is as long as a request can be, and the one that
/// deals out turns, which is as long as a claim can be.
const MAY_SORT: [&str; 2] = ["json_each(?10)", "json_each(?5) as turns"];

#[tokio::test]
async fn every_statement_is_prepared_and_none_reads_a_big_table_whole() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("house.db");
    Sqlite::migrate(&format!("sqlite://{}", path.display())).await.unwrap();
    let options = SqliteConnectOptions::new().filename(&path);
    let mut connection = options.connect().await.unwrap();
    let statements = Sqlite::statements();
    assert!(statements.len() > 50, "only {} statements are listed", statements.len());
    let mut complaints = Vec::new();
    for statement in statements {
        let plan = plan(&mut connection, statement).await;
        let reads_whole = |line: &String| BIG.iter().any(|table| is_scan_of(line, table));
        let sorts = |line: &String| line.starts_with("USE TEMP B-TREE FOR ORDER BY");
        let may_sort = MAY_SORT.iter().any(|list| statement.contains(list));
        if plan.iter().any(|line| reads_whole(line) || (sorts(line) && !may_sort)) {
            complaints.push(format!("{statement}\n    {}\n", plan.join("\n    ")));
        }
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

#[tokio::test]
async fn a_statement_without_an_index_would_be_found() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("house.db");
    Sqlite::migrate(&format!("sqlite://{}", path.display())).await.unwrap();
    let mut connection = SqliteConnectOptions::new().filename(&path).connect().await.unwrap();
    let plan = plan(&mut connection, "select seq from message where attempts = 7").await;
    assert!(plan.iter().any(|line| is_scan_of(line, "message")), "{plan:?}");
}

fn is_scan_of(line: &str, table: &str) -> bool {
    let rest = line.strip_prefix("SCAN ").and_then(|rest| rest.strip_prefix(table));
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(' '))
}

async fn plan(connection: &mut SqliteConnection, statement: &str) -> Vec<String> {
    let explain = AssertSqlSafe(format!("explain query plan {statement}"));
    match sqlx::query(explain).fetch_all(connection).await {
        Ok(rows) => rows.iter().map(|row| row.get("detail")).collect(),
        Err(error) => panic!("cannot be prepared: {error}\n{statement}"),
    }
}
