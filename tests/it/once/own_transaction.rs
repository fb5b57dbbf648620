//! Sending from a transaction of one's own: with it or not at all.

use std::time::{Duration, Instant};

use futures::future::join_all;
use pumphouse::model::{Details, Idempotency, NewMessage, QueueName, When};
use pumphouse::store::{Enqueued, Postgres};
use serde_json::json;
use sqlx::{AssertSqlSafe, Connection, PgConnection, query, query_scalar};

use crate::support::client::{ask, number, text};
use crate::support::process::Database;
use crate::support::receiver::Reply;
use crate::support::scene::Scene;
use crate::support::{eventually, pass, say};

async fn house() -> (Scene, PgConnection) {
    let scene = Scene::on(Database::postgres().await).await;
    scene.queue("q").await;
    let connection = PgConnection::connect(&scene.database.url()).await.unwrap();
    (scene, connection)
}

async fn run(connection: &mut PgConnection, statement: &str) -> Result<(), sqlx::Error> {
    query(AssertSqlSafe(statement.to_owned())).execute(connection).await.map(drop)
}

#[tokio::test]
async fn what_is_rolled_back_was_never_sent_and_what_is_committed_is_handled() {
    let (scene, mut mine) = house().await;
    run(&mut mine, "create table orders (id integer primary key)").await.unwrap();
    for end in ["rollback", "commit"] {
        run(&mut mine, "begin").await.unwrap();
        run(&mut mine, "insert into orders (id) values (17)").await.unwrap();
        let send = "select pumphouse.send('q', '{\"order\":  17}', type => 'order.placed', \
                    correlation_id => 'order-17', headers => '{\"X-Tenant\": \"größer\"}')";
        run(&mut mine, send).await.unwrap();
        assert_eq!(scene.client.all("/v1/messages").await.len(), 0, "not before the end");
        run(&mut mine, end).await.unwrap();
    }
    let delivery = scene.receiver.wait_for("/q", 1).await[0].clone();
    assert_eq!(&delivery.body[..], b"{\"order\":  17}", "byte for byte");
    assert_eq!(delivery.header("pumphouse-type"), "order.placed");
    assert_eq!(delivery.header("content-type"), "application/json");
    assert_eq!(delivery.header("pumphouse-correlation-id"), "order-17");
    assert_eq!(delivery.header("x-tenant"), "gr%C3%B6%C3%9Fer");
    pass(Duration::from_millis(1_500)).await;
    assert_eq!(scene.client.all("/v1/messages").await.len(), 1);
    assert_eq!(scene.receiver.count("/q"), 1);
}

#[tokio::test]
async fn a_transaction_that_is_open_for_long_delays_nobody() {
    let (scene, mut mine) = house().await;
    let wait = async || {
        let began = Instant::now();
        let mut ids = vec![scene.client.send("q", "x").await];
        for group in ["g", "h"] {
            let request = scene.client.message_to("q", "x").header("Pumphouse-Group", group);
            ids.push(ask(request).await.expect(201).id());
        }
        for id in &ids {
            eventually("it is done", async || scene.client.state(id).await == "completed").await;
        }
        began.elapsed()
    };
    let mut alone = Vec::new();
    for _ in 0..9 {
        alone.push(wait().await);
    }
    run(&mut mine, "begin").await.unwrap();
    for _ in 0..100 {
        run(
            &mut mine,
            "select pumphouse.send('q', '1'), pumphouse.send('q', '2', in_group => 'g')",
        )
        .await
        .unwrap();
    }
    let mut beside = Vec::new();
    for _ in 0..9 {
        beside.push(wait().await);
    }
    // Nor does it hold up an operator, but for one who wants the queue to be gone.
    let patched = scene.client.patch("/admin/v1/queues/q", &json!({"max_messages": 1000})).await;
    patched.expect(200);
    let deleted = scene.client.delete("/admin/v1/queues/q?force=true").await;
    deleted.expect_problem(409, "queue-in-use");
    alone.sort_unstable();
    beside.sort_unstable();
    say!("from sending to done: alone {:?}, beside the open transaction {:?}", alone[4], beside[4]);
    assert!(beside[4] < alone[4] * 2 + Duration::from_millis(50), "{alone:?} {beside:?}");
    let before = scene.receiver.count("/q");
    run(&mut mine, "commit").await.unwrap();
    eventually("all came", async || scene.receiver.count("/q") == before + 200).await;
}

#[tokio::test]
async fn what_is_wrong_over_http_is_wrong_in_sql() {
    let (scene, mut mine) = house().await;
    scene.queue_with("full", json!({"max_messages": 1, "concurrency": {"limit": 0}})).await;
    run(&mut mine, "select pumphouse.send('full', '1')").await.unwrap();
    let huge = format!("select pumphouse.send_bytes('q', '{}')", "x".repeat((1 << 20) + 1));
    for (statement, says) in [
        ("select pumphouse.send('nowhere', '1')", "no queue nowhere"),
        ("select pumphouse.send('full', '1')", "max_messages"),
        ("select pumphouse.send('q', null)", "payload"),
        ("select pumphouse.send('q', 'no json')", "json"),
        (huge.as_str(), "1048576"),
        ("select pumphouse.send('q', '1', type => '')", "type: 1 to 255"),
        ("select pumphouse.send('q', '1', type => E'a\\nb')", "control characters"),
        ("select pumphouse.send('q', '1', in_group => repeat('ö', 128))", "in_group: 1 to 255"),
        ("select pumphouse.send('q', '1', priority => 101)", "priority"),
        ("select pumphouse.send('q', '1', priority => null)", "priority"),
        ("select pumphouse.send('q', '1', delay => '-1s')", "delay"),
        ("select pumphouse.send('q', '1', delay => '367 days')", "delay"),
        (
            "select pumphouse.send('q', '1', deliver_at => now() + interval '367 days')",
            "deliver_at",
        ),
        ("select pumphouse.send('q', '1', delay => '1s', deliver_at => now())", "exclude"),
        ("select pumphouse.send('q', '1', expires_in => '1s', expires_at => now())", "exclude"),
        ("select pumphouse.send('q', '1', in_group => 'g', delay => '1s')", "neither delay"),
        ("select pumphouse.send('q', '1', in_group => 'g', priority => 1)", "nor priority"),
        ("select pumphouse.send('q', '1', idempotency_key => 'a\"b')", "visible ASCII"),
        ("select pumphouse.send('q', '1', headers => '{\"Content-Length\": \"1\"}')", "reserved"),
        ("select pumphouse.send('q', '1', headers => '{\"Pumphouse-Queue\": \"1\"}')", "reserved"),
        ("select pumphouse.send('q', '1', headers => '{\"a b\": \"1\"}')", "no header name"),
        ("select pumphouse.send('q', '1', headers => '{\"a\": 1}')", "no text"),
        ("select pumphouse.send('q', '1', headers => '{\"a\": \"b\\r\\nc: d\"}')", "control"),
        ("select pumphouse.send('q', '1', headers => '[]')", "an object"),
    ] {
        let error = run(&mut mine, statement).await.expect_err(statement).to_string();
        assert!(error.contains(says), "{statement}: {error}");
    }
    run(&mut mine, "select pumphouse.send('q', '1', idempotency_key => 'k')").await.unwrap();
    let reused = run(&mut mine, "select pumphouse.send('q', '2', idempotency_key => 'k')").await;
    assert!(reused.expect_err("reused").to_string().contains("another request"));
    scene.receiver.wait_for("/q", 1).await;
    assert_eq!(scene.client.all("/v1/messages?queue=q").await.len(), 1, "nothing else was kept");
}

#[tokio::test]
async fn what_can_be_said_over_http_can_be_said_in_sql() {
    let (scene, mut mine) = house().await;
    scene.queue_with("q", json!({"concurrency": {"limit": 0}})).await;
    let send = async |mine: &mut PgConnection, options: &str| -> String {
        let send = format!("select pumphouse.send('q', '1', {options})::text");
        query_scalar(AssertSqlSafe(send)).fetch_one(mine).await.unwrap()
    };
    let later = send(&mut mine, "delay => '1 hour', priority => 5, expires_in => '2 hours'").await;
    let message = scene.client.message(&later).await;
    assert_eq!(
        (text(&message, "/state").as_str(), number(&message, "/priority")),
        ("scheduled", 5)
    );
    let first =
        send(&mut mine, "idempotency_key => 'k', in_group => 'g', fairness_key => 't'").await;
    let again =
        send(&mut mine, "idempotency_key => 'k', in_group => 'g', fairness_key => 't'").await;
    assert_eq!(first, again);
    let message = scene.client.message(&first).await;
    assert_eq!((&message["group"], &message["fairness_key"]), (&json!("g"), &json!("t")));
    // Keys that count while a message is pending are the same, whoever uses them.
    let unique = send(&mut mine, "unique_while_pending => 'report', causation_id => 'night'").await;
    let http = scene.client.message_to("q", "x").header("Pumphouse-Unique-While-Pending", "report");
    assert_eq!(ask(http).await.expect(200).id(), unique);
    assert_eq!(unique, send(&mut mine, "unique_while_pending => 'report'").await);
    // The same group, and the same turn, as over HTTP.
    let http = scene.client.message_to("q", "x").header("Pumphouse-Group", "g");
    let http = ask(http.header("Pumphouse-Fairness-Key", "t")).await.expect(201).id();
    let same = "select count(distinct (grp, lane)) from pumphouse.message where id::text = any($1)";
    let same = query_scalar::<_, i64>(same).bind(vec![first.clone(), http]);
    assert_eq!(same.fetch_one(&mut mine).await.unwrap(), 1);
    let bytes = "select pumphouse.send_bytes('q', '\\x00ff', 'application/x-thing')::text";
    let bytes: String = query_scalar(bytes).fetch_one(&mut mine).await.unwrap();
    let payload = scene.client.get(&format!("/v1/messages/{bytes}/payload")).await.expect(200);
    assert_eq!(&payload.body[..], [0, 255]);
    assert_eq!(uuid::Uuid::parse_str(&bytes).unwrap().get_version_num(), 7);
}

#[tokio::test]
async fn a_role_that_may_send_may_do_nothing_else() {
    let (scene, mut mine) = house().await;
    run(&mut mine, "set role pumphouse_sender").await.unwrap();
    run(&mut mine, "select pumphouse.send('q', '1')").await.unwrap();
    for statement in [
        "select * from pumphouse.message",
        "delete from pumphouse.ready",
        "select pumphouse.take_one('q', null, '', null, null, '{}', 0, null, null, null, 0::smallint, null, null, '{}', '{}', '{}')",
    ] {
        let error = run(&mut mine, statement).await.expect_err(statement).to_string();
        assert!(error.contains("permission denied"), "{statement}: {error}");
    }
    scene.receiver.wait_for("/q", 1).await;
}

#[tokio::test]
async fn a_program_with_the_library_sends_in_its_own_transaction() {
    let (scene, mut mine) = house().await;
    let message = |body: &str| NewMessage {
        details: Details { group: Some("g".to_owned()), ..Details::default() },
        keys: vec![Idempotency::new("mine", body, [7; 32])],
        expires: Some(When::In(Duration::from_secs(60))),
        ..NewMessage::new(QueueName::parse("q").unwrap(), body.to_owned())
    };
    for end in ["rollback", "commit"] {
        let mut transaction = mine.begin().await.unwrap();
        let first = Postgres::enqueue_in(&mut transaction, &message("1")).await.unwrap();
        let Enqueued::New(first) = first else { panic!("{first:?}") };
        let again = Postgres::enqueue_in(&mut transaction, &message("1")).await.unwrap();
        assert_eq!(again, Enqueued::Duplicate(first));
        Postgres::enqueue_in(&mut transaction, &message("2")).await.unwrap();
        match end {
            "commit" => transaction.commit().await.unwrap(),
            _ => transaction.rollback().await.unwrap(),
        }
    }
    let deliveries = scene.receiver.wait_for("/q", 2).await;
    let bodies = deliveries.iter().map(|it| &it.body[..]).collect::<Vec<_>>();
    assert_eq!(bodies, [b"1", b"2"]);
    let nowhere = NewMessage::new(QueueName::parse("nowhere").unwrap(), "x");
    let error = Postgres::enqueue_in(&mut mine, &nowhere).await.expect_err("no such queue");
    assert!(error.to_string().contains("nowhere"), "{error}");
    let wrong = NewMessage { deliver: When::In(Duration::from_secs(1)), ..message("3") };
    let error = Postgres::enqueue_in(&mut mine, &wrong).await.expect_err("a group with a delay");
    assert!(error.to_string().contains("/group"), "{error}");
    assert_eq!(scene.client.all("/v1/messages").await.len(), 2, "nothing else was kept");
}

/// Two with the same key: the second waits for the first, and is told of its message.
#[tokio::test]
async fn who_sends_with_a_key_that_is_in_use_waits_for_it() {
    let (scene, mut mine) = house().await;
    let mut other = PgConnection::connect(&scene.database.url()).await.unwrap();
    for end in ["rollback", "commit"] {
        let send = "select pumphouse.send('q', '1', idempotency_key => $1)::text";
        run(&mut mine, "begin").await.unwrap();
        let first = query_scalar::<_, String>(send).bind(end).fetch_one(&mut mine).await.unwrap();
        let second = query_scalar::<_, String>(send).bind(end).fetch_one(&mut other);
        let ends = async {
            pass(Duration::from_millis(200)).await;
            run(&mut mine, end).await.unwrap();
        };
        let (second, ()) = tokio::join!(second, ends);
        assert_eq!(first == second.unwrap(), end == "commit", "{end}");
    }
    assert_eq!(scene.client.all("/v1/messages?queue=q").await.len(), 2);
}

/// Who sends with such a key over HTTP is told so after a while, and nobody else waits for that.
#[tokio::test]
async fn a_key_that_is_in_use_holds_up_its_sender_alone() {
    let (scene, mut mine) = house().await;
    scene.queue("sends").await;
    run(&mut mine, "begin").await.unwrap();
    run(&mut mine, "select pumphouse.send('q', '1', unique_while_pending => 'k')").await.unwrap();
    let held_up = |_| {
        let request = scene.client.message_to("q", "x");
        ask(request.header("Pumphouse-Unique-While-Pending", "k"))
    };
    // One of them is a handler's answer.
    let sends = json!({"messages": [{"queue": "q", "payload": 1, "unique_while_pending": "k"}]});
    let sends = Reply::new(200)
        .header("content-type", "application/vnd.pumphouse.messages+json")
        .body(sends.to_string());
    scene.receiver.set("/sends", sends.into());
    let asked = scene.client.send("sends", "x").await;
    let other = |_| async {
        let mut slowest = Duration::ZERO;
        for _ in 0..10 {
            let began = Instant::now();
            let id = scene.client.send("q", "of somebody else").await;
            eventually("it is done", async || scene.client.state(&id).await == "completed").await;
            slowest = slowest.max(began.elapsed());
        }
        slowest
    };
    let others = join_all((0..4).map(other));
    let (held_up, slowest) = tokio::join!(join_all((0..20).map(held_up)), others);
    let slowest = slowest.into_iter().max().expect("there are others");
    for answer in held_up {
        answer.expect_problem(409, "idempotency-key-in-use");
    }
    say!("the slowest of the others took {slowest:?}");
    assert!(slowest < Duration::from_secs(2), "{slowest:?}");
    run(&mut mine, "rollback").await.unwrap();
    eventually("it is settled", async || scene.client.state(&asked).await == "completed").await;
    eventually("it is sent", async || {
        scene.client.all("/v1/messages?queue=q&state=completed").await.len() == 41
    })
    .await;
}
