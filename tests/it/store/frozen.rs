//! What the Postgres store does when the server says nothing, and when others hold what it wants to write.

use std::time::{Duration, Instant};

use futures::FutureExt;
use pumphouse::model::{Leased, Settlement, State};
use pumphouse::store::Settled;
use sqlx::{Connection, Executor, PgConnection};

use crate::support::eventually;
use crate::support::postgres::{Frozen, fresh_database, start_cluster};
use crate::support::stage::{ALL, LONG, Stage, bodies_of, claim, message, together};
use crate::support::stores::on_postgres;

/// How long a store may take to close: a few seconds, and some for a busy machine.
const CLOSED_WITHIN: Duration = Duration::from_secs(15);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_closes_although_its_server_is_frozen() {
    let cluster = start_cluster().await;
    let stage = on_postgres(&cluster.url()).await;
    let queue = stage.queue("letters").await;
    stage.send_to(&queue, "a letter").await;
    let mut connection = PgConnection::connect(&cluster.url()).await.unwrap();
    let listens = "select exists (select 1 from pg_stat_activity where query ilike 'listen%')";
    eventually("it listens", async || {
        sqlx::query_scalar(listens).fetch_one(&mut connection).await.unwrap()
    })
    .await;
    let frozen = Frozen::whole(&mut connection).await;
    let sent = message(&queue, "asked, and not answered");
    let mut sent = stage.store.enqueue(together(vec![sent]));
    assert!((&mut sent).now_or_never().is_none());
    let started = Instant::now();
    stage.store.close().await;
    assert!(started.elapsed() < CLOSED_WITHIN, "{:?}", started.elapsed());
    assert!(stage.store.check().await.is_err(), "it is closed");
    drop(frozen);
}

#[tokio::test]
async fn a_lease_that_is_renewed_while_its_settlement_waits_is_settled_all_the_same() {
    let url = fresh_database().await;
    let stage = on_postgres(&url).await;
    let queue = stage.queue("letters").await;
    stage.send_to(&queue, "a letter").await;
    let leased = stage.claim_one(&queue).await;
    let settled = while_it_is_renewed(&url, &leased, stage.settle(&leased, Settlement::Ack)).await;
    assert!(matches!(settled, Settled::Done { .. }), "{settled:?}");
    assert_eq!(stage.state(leased.lease.id).await, Some(State::Completed));
    assert_eq!(count(&url, "select count(*) from pumphouse.lease").await, 0);
    assert_eq!(stage.depth(&queue).await.leased, 0);
}

#[tokio::test]
async fn a_lease_that_is_renewed_twice_at_the_same_time_holds() {
    let url = fresh_database().await;
    let stage = on_postgres(&url).await;
    let queue = stage.queue("letters").await;
    stage.send_to(&queue, "a letter").await;
    let leased = stage.claim_one(&queue).await;
    let renew = stage.store.renew(vec![leased.lease.clone()], LONG * 2);
    assert_eq!(while_it_is_renewed(&url, &leased, renew).await.unwrap(), [true]);
    let longer =
        "select count(*) from pumphouse.lease where until > pumphouse.now_micros() + 700000000";
    assert_eq!(count(&url, longer).await, 1, "the second word counts too");
    stage.must_settle(&leased, Settlement::Ack).await;
}

/// Does something about a lease that has to wait until a transaction has ended which prolongs that lease.
async fn while_it_is_renewed<T>(url: &str, leased: &Leased, work: impl Future<Output = T>) -> T {
    let mut other = PgConnection::connect(url).await.unwrap();
    let mut onlooker = PgConnection::connect(url).await.unwrap();
    let mut transaction = other.begin().await.unwrap();
    let renew = "update pumphouse.lease set until = until + 1 where seq = $1";
    let renewed = sqlx::query(renew).bind(leased.lease.seq).execute(&mut *transaction).await;
    assert_eq!(renewed.unwrap().rows_affected(), 1);
    let waits = "select exists (select 1 from pg_stat_activity
                 where datname = current_database() and wait_event_type = 'Lock')";
    let end = async {
        eventually("somebody waits", async || {
            sqlx::query_scalar(waits).fetch_one(&mut onlooker).await.unwrap()
        })
        .await;
        transaction.commit().await.unwrap();
    };
    tokio::join!(work, end).0
}

async fn count(url: &str, statement: &'static str) -> i64 {
    let mut connection = PgConnection::connect(url).await.unwrap();
    sqlx::query_scalar(statement).fetch_one(&mut connection).await.unwrap()
}

#[tokio::test]
async fn what_a_claim_holds_is_handed_over_although_the_unreadable_cannot_be_set_aside() {
    let url = fresh_database().await;
    let stage: Stage = on_postgres(&url).await;
    let queue = stage.queue("letters").await;
    for body in ["one", "broken", "two"] {
        stage.send_to(&queue, body).await;
    }
    let mut connection = PgConnection::connect(&url).await.unwrap();
    let damage = "update pumphouse.content set details = '{' where body = 'broken'";
    connection.execute(damage).await.unwrap();
    connection.execute("alter table pumphouse.dead rename to away").await.unwrap();
    let leased = stage.store.lease(claim(&queue, ALL, LONG)).await.unwrap();
    assert_eq!(bodies_of(&leased), ["one", "two"]);
    for leased in &leased {
        assert_eq!(stage.store.renew(vec![leased.lease.clone()], LONG).await.unwrap(), [true]);
    }
}
