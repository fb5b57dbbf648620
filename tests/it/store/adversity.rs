//! What the Postgres store does when callers go away, rows are broken, statements fail or the server stops.

use std::time::Duration;

use futures::future::{BoxFuture, join_all};
use pumphouse::model::{NewMessage, ReplicaName, Settlement, State};
use pumphouse::store::{
    Attendance, DeleteQueue, EnqueueOutcome, Enqueued, Error, Postgres, Precondition, Settled,
};
use sqlx::{Connection, Executor, PgConnection};

use crate::support::eventually;
use crate::support::postgres::{fresh_database, start_cluster};
use crate::support::stage::{
    ALL, LONG, SHORT, bodies_of, claim, dead_letter, message, message_in, queue_name,
    retry_at_once, settle, together,
};
use crate::support::stores::on_postgres;

/// Rounds in which callers go away. Where a transaction can be left open by one of them, a few dozen of
/// these rounds find it.
const ROUNDS: u64 = 200;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_acknowledged_is_there_whoever_else_goes_away() {
    let url = fresh_database().await;
    let stage = on_postgres(&url).await;
    let queue = stage.queue("letters").await;
    let (old, other) = (stage.queue("old").await, queue_name("other"));
    stage.send_all((0..ROUNDS).map(|_| message(&old, "purged")).collect()).await;
    let mut onlooker = PgConnection::connect(&url).await.unwrap();
    for round in 1..=ROUNDS {
        // Callers of every kind who do not wait for their answer. Each begins a transaction somewhere.
        let patience = Duration::from_micros(20 + round * 37 % 900);
        let store = stage.store.clone();
        let callers: [BoxFuture<'_, ()>; 4] = [
            Box::pin(async { drop(store.enqueue(together(vec![message(&queue, "x")])).await) }),
            Box::pin(async {
                drop(store.put_queue(&other, Default::default(), Precondition::None).await)
            }),
            Box::pin(async { drop(store.attend(reported()).await) }),
            Box::pin(async { drop(store.delete_queue(&other, true, Precondition::None).await) }),
        ];
        for caller in callers {
            // Whether it was done in time is not the question.
            let _ = tokio::time::timeout(patience, caller).await;
        }
        // Two who stay: what they are told must be true for everybody else.
        assert_eq!(stage.store.purge(&old, 1).await.unwrap(), 1);
        let left = "select count(*) from pumphouse.ready join pumphouse.queue on id = queue_id
                    where name = 'old'";
        let left: i64 = sqlx::query_scalar(left).fetch_one(&mut onlooker).await.unwrap();
        assert_eq!(left as u64, ROUNDS - round, "a purge was acknowledged");
        let id = stage.send(message(&queue, "kept")).await.id;
        let there = "select exists (select 1 from pumphouse.message where id = $1)";
        let there: bool =
            sqlx::query_scalar(there).bind(id.0).fetch_one(&mut onlooker).await.unwrap();
        assert!(there, "{id} was acknowledged");
    }
}

fn reported() -> Attendance {
    Attendance {
        replica: ReplicaName::parse("here").expect("a good name"),
        incarnation: 1,
        good_for: LONG,
        wants: Vec::new(),
        leaving: false,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_calls_that_share_a_transaction_only_the_poisoned_one_fails() {
    let stage = on_postgres(&fresh_database().await).await;
    let queue = stage.queue("letters").await;
    for _ in 0..5 {
        let call = |n: usize| {
            // The one character that the database cannot keep in a text.
            let kind = (n == 7).then(|| "po\0ison".to_owned());
            let message = NewMessage { kind, ..message(&queue, &n.to_string()) };
            stage.store.enqueue(together(vec![message]))
        };
        let answers = join_all((0..20).map(call)).await;
        for (n, answer) in answers.into_iter().enumerate() {
            match answer {
                Ok(EnqueueOutcome::Done(done)) => assert!(n != 7 && done.len() == 1, "{n}"),
                Ok(other) => panic!("{n}: {other:?}"),
                Err(error) => {
                    assert!(n == 7 && matches!(error, Error::Refused { .. }), "{n}: {error}")
                }
            }
        }
    }
    assert_eq!(stage.depth(&queue).await.ready, 5 * 19);
    let leased = stage.claim(&queue, ALL).await;
    let settlements = leased.iter().enumerate().map(|(n, leased)| {
        let nowhere = (n == 7).then(|| message(&queue_name("nowhere"), "lost"));
        stage.store.settle(settle(leased, Settlement::Ack, nowhere.into_iter().collect()))
    });
    for (n, settled) in join_all(settlements).await.into_iter().enumerate() {
        assert_eq!(matches!(settled, Ok(Settled::Done { .. })), n != 7, "{n}: {settled:?}");
    }
    assert_eq!(stage.depth(&queue).await.leased, 1);
}

#[tokio::test]
async fn a_row_that_cannot_be_read_becomes_a_dead_letter_and_the_next_is_taken() {
    let url = fresh_database().await;
    let stage = on_postgres(&url).await;
    let queue = stage.queue("letters").await;
    let broken = stage.send_to(&queue, "broken").await;
    stage.send_to(&queue, "whole").await;
    let mut connection = PgConnection::connect(&url).await.unwrap();
    let damage = "update pumphouse.content set details = '{' where seq = \
                  (select seq from pumphouse.message where id = $1)";
    sqlx::query(damage).bind(broken.0).execute(&mut connection).await.unwrap();
    assert_eq!(bodies_of(&stage.claim(&queue, 1).await), ["whole"]);
    let record = stage.record(broken).await;
    assert_eq!((record.state, record.tries.attempts), (State::Dead, 1));
    assert!(record.reason.is_some_and(|reason| reason.contains("cannot be read")));
    assert_eq!(stage.depth(&queue).await.dead, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_stops_and_starts_again_loses_nothing_that_was_acknowledged() {
    let cluster = start_cluster().await;
    let stage = on_postgres(&cluster.url()).await;
    let queue = stage.queue("letters").await;
    let mut kept = Vec::new();
    for n in 0..20 {
        kept.push(stage.send_to(&queue, &n.to_string()).await);
    }
    let leased = stage.claim(&queue, 3).await;
    stage.must_settle(&leased[0], Settlement::Ack).await;
    cluster.stop_hard().await;
    let away = stage.store.enqueue(together(vec![message(&queue, "lost")])).await;
    assert!(matches!(away, Err(Error::Unavailable(_))), "{away:?}");
    let away = stage.store.settle(settle(&leased[1], Settlement::Ack, Vec::new())).await;
    assert!(matches!(away, Err(Error::Unavailable(_))), "{away:?}");
    let away = stage.store.lease(claim(&queue, 1, LONG)).await;
    assert!(matches!(away, Err(Error::Unavailable(_))), "{away:?}");
    assert!(matches!(stage.store.check().await, Err(Error::Unavailable(_))));
    cluster.start().await;
    eventually("the store works again", async || stage.store.check().await.is_ok()).await;
    for id in kept {
        assert!(stage.look(id).await.is_some(), "{id} was acknowledged");
    }
    assert_eq!(stage.state(leased[0].lease.id).await, Some(State::Completed));
    stage.send_to(&queue, "after").await;
    // Claims are kept too; only the answer to one could be lost.
    stage.must_settle(&leased[1], Settlement::Ack).await;
    assert_eq!(stage.state(leased[1].lease.id).await, Some(State::Completed));
    let depth = stage.depth(&queue).await;
    assert_eq!(depth.ready + depth.leased, 19);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_connection_that_broke_since_it_was_used_costs_nobody_an_error() {
    let url = fresh_database().await;
    let stage = on_postgres(&url).await;
    let queue = stage.queue("letters").await;
    let mut other = PgConnection::connect(&url).await.unwrap();
    for _ in 0..5 {
        // Both connections that take messages in have just been used.
        join_all((0..9).map(|_| stage.send_to(&queue, "before"))).await;
        other
            .execute(
                "select pg_terminate_backend(pid) from pg_stat_activity \
                 where datname = current_database() and application_name = 'pumphouse'",
            )
            .await
            .unwrap();
        stage.send_to(&queue, "after").await;
    }
    assert_eq!(on_postgres(&url).await.depth(&queue).await.ready, 50);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn counts_are_those_of_the_rows_whatever_happens() {
    let url = fresh_database().await;
    let stage = on_postgres(&url).await;
    let queue = stage.queue_with("letters", |settings| {
        settings.retention.completed = Duration::ZERO;
        settings.recovery.max_crashes = 2;
    });
    let queue = queue.await;
    for round in 0..10 {
        let sent = (0..20).map(|n| message(&queue, &n.to_string())).collect();
        stage.send_all(sent).await;
        stage.send(message_in(&queue, "later", LONG)).await;
        let (leased, lost) = tokio::join!(
            stage.claim(&queue, 12),
            stage.store.lease(claim(&queue, 3, Duration::from_micros(1)))
        );
        assert!(!lost.unwrap().is_empty());
        let settle = leased.iter().enumerate().map(|(n, leased)| {
            let settlement = match n % 5 {
                0 => Settlement::Ack,
                1 => retry_at_once(),
                2 => Settlement::Retry { after: LONG },
                3 => dead_letter("enough"),
                _ => Settlement::Release,
            };
            stage.store.settle(settle(leased, settlement, Vec::new()))
        });
        let upkeep = async {
            stage.store.reap(ALL).await.unwrap();
            stage.store.promote(ALL).await.unwrap();
            stage.store.sweep(ALL).await.unwrap();
        };
        let (settled, ()) = tokio::join!(join_all(settle), upkeep);
        assert!(settled.iter().all(Result::is_ok), "{round}: {settled:?}");
        stage.store.purge(&queue, 2).await.unwrap();
        stage.store.redrive(Default::default(), 1).await.unwrap();
    }
    let depth = stage.depth(&queue).await;
    let mut connection = PgConnection::connect(&url).await.unwrap();
    connection.execute("set search_path = pumphouse").await.unwrap();
    for (table, count) in [
        ("ready", depth.ready),
        ("scheduled", depth.scheduled),
        ("lease", depth.leased),
        ("dead", depth.dead),
    ] {
        let rows = sqlx::AssertSqlSafe(format!("select count(*) from {table}"));
        let rows: i64 = sqlx::query_scalar(rows).fetch_one(&mut connection).await.unwrap();
        assert_eq!(rows as u64, count, "{table}");
    }
    // Every message that can still be delivered has one token, and nothing else has.
    let astray = "
        select count(*) from message where (state = 0) <> (1 = (
            select count(*) from (
                select seq from ready union all select seq from scheduled union all select seq from lease
            ) as token where token.seq = message.seq))";
    let astray: i64 = sqlx::query_scalar(astray).fetch_one(&mut connection).await.unwrap();
    assert_eq!(astray, 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_queue_that_is_deleted_while_messages_come_in_leaves_nothing_behind() {
    let url = fresh_database().await;
    let stage = on_postgres(&url).await;
    for _ in 0..20 {
        let queue = stage.queue("letters").await;
        stage.send_to(&queue, "leased").await;
        stage.claim_for(&queue, SHORT).await;
        let calls = (0..20).map(|n| {
            let later = message_in(&queue, &n.to_string(), LONG);
            stage.store.enqueue(together(vec![message(&queue, "now"), later]))
        });
        let delete = stage.store.delete_queue(&queue, true, Precondition::None);
        let (answers, deleted) = tokio::join!(join_all(calls), delete);
        assert_eq!(deleted.unwrap(), DeleteQueue::Deleted);
        for answer in answers {
            let answer = answer.unwrap();
            let EnqueueOutcome::Done(done) = &answer else { panic!("{answer:?}") };
            let taken = done.iter().filter(|one| matches!(one, Enqueued::New(_))).count();
            assert!(taken == 0 || taken == 2, "{answer:?}");
        }
    }
    while stage.store.sweep(ALL).await.unwrap().more {}
    let mut connection = PgConnection::connect(&url).await.unwrap();
    connection.execute("set search_path = pumphouse").await.unwrap();
    for table in
        ["message", "content", "ready", "scheduled", "lease", "delivery", "doomed", "tally"]
    {
        let rows = sqlx::AssertSqlSafe(format!("select count(*) from {table}"));
        let rows: i64 = sqlx::query_scalar(rows).fetch_one(&mut connection).await.unwrap();
        assert_eq!(rows, 0, "{table}");
    }
}

#[tokio::test]
async fn a_schema_that_is_newer_than_the_program_is_refused() {
    let url = fresh_database().await;
    Postgres::migrate(&url).await.unwrap();
    let mut connection = PgConnection::connect(&url).await.unwrap();
    let newer = "insert into pumphouse._sqlx_migrations (version, description, success, checksum, execution_time)
                 values (9999, 'from the future', true, '', 0)";
    connection.execute(newer).await.unwrap();
    let refused = Postgres::open(&url).await;
    assert!(
        matches!(&refused, Err(Error::Refused { what }) if what.contains("newer")),
        "{refused:?}"
    );
}

#[tokio::test]
async fn a_database_that_is_not_there_is_told_from_one_that_does_not_answer() {
    let url = fresh_database().await;
    let refused = Postgres::open(&format!("{url}_not")).await;
    assert!(matches!(refused, Err(Error::Refused { .. })), "{refused:?}");
    let away = Postgres::open("postgres://nobody@127.0.0.1:1/nothing").await;
    assert!(matches!(away, Err(Error::Unavailable(_))), "{away:?}");
}
