//! Whether the tests' own Postgres is what they take it for: private, quick to restart, gone at the end.

use sqlx::{Connection, PgConnection};

use crate::support::postgres::{fresh_database, start_cluster};

#[tokio::test]
async fn every_test_gets_a_database_of_its_own() {
    let (one, other) = (fresh_database().await, fresh_database().await);
    assert_ne!(one, other);
    let mut connection = PgConnection::connect(&one).await.unwrap();
    let tables = "select count(*) from pg_class where relnamespace = 'public'::regnamespace";
    let count: i64 = sqlx::query_scalar(tables).fetch_one(&mut connection).await.unwrap();
    assert_eq!(count, 0);
}

#[tokio::test]
async fn a_cluster_keeps_what_was_committed_when_its_plug_is_pulled() {
    let cluster = start_cluster().await;
    let mut connection = PgConnection::connect(&cluster.url()).await.unwrap();
    sqlx::query("create table kept (n int)").execute(&mut connection).await.unwrap();
    cluster.stop_hard().await;
    assert!(sqlx::query("select n from kept").execute(&mut connection).await.is_err());
    assert!(PgConnection::connect(&cluster.url()).await.is_err());
    cluster.start().await;
    let mut connection = PgConnection::connect(&cluster.url()).await.unwrap();
    sqlx::query("select n from kept").execute(&mut connection).await.unwrap();
}
