//! A stop under fire ends by its deadline: with retries pending, with the breaker open, without a database.

use std::time::{Duration, Instant};

use futures::future::join;
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};

use crate::support::client::{ask, number};
use crate::support::postgres::{Frozen, start_cluster};
use crate::support::process::Database;
use crate::support::receiver::{Gate, Mood, Reply};
use crate::support::scene::Scene;
use crate::support::{eventually, on_both, pass, say};

on_both! {
    nothing_open_ends_at_once_though_retries_are_pending
    nothing_open_ends_at_once_though_the_breaker_is_open
    what_hangs_is_cut_at_the_deadline_while_others_fail
}

async fn nothing_open_ends_at_once_though_retries_are_pending(database: Database) {
    let mut scene = Scene::on(database).await;
    let later = json!({"immediate": 0, "backoff": {"base": "1h", "max": "1h", "jitter": "none"}});
    scene.queue_with("q", json!({"recovery": later})).await;
    scene.receiver.set("/q", Mood::status(500));
    send(&scene, 50).await;
    eventually("all are to be tried later", async || stat(&scene, "/scheduled").await == 50).await;
    ends_at_once(&mut scene).await;
    assert_eq!(stat(&scene, "/scheduled").await, 50, "and come back");
}

async fn nothing_open_ends_at_once_though_the_breaker_is_open(database: Database) {
    let mut scene = Scene::on(database).await;
    let breaker = json!({"failures": 3, "open_for": "1h", "max_open": "1h"});
    scene.queue_with("q", json!({"breaker": breaker})).await;
    scene.receiver.set("/q", Mood::status(500));
    send(&scene, 50).await;
    eventually("it is open", async || {
        scene.client.queue("q").await["breaker_state"] == "open" && scene.receiver.open("/q") == 0
    })
    .await;
    ends_at_once(&mut scene).await;
    assert_eq!(stat(&scene, "/dead").await, 0);
    let queue = scene.client.queue("q").await;
    assert_eq!(queue["breaker_state"], "closed", "a start means that it is to be asked: {queue}");
}

/// Stops the queue, starts it, aborts, and ends the process: each at once. Leaves it stopped, and started again.
async fn ends_at_once(scene: &mut Scene) {
    for how in [json!({"mode": "drain", "deadline": "60s"}), json!({"mode": "abort"})] {
        let asked = Instant::now();
        let report = scene.client.stop_queue("q", &how).await;
        assert!(asked.elapsed() < Duration::from_secs(5), "{how}: {:?}", asked.elapsed());
        assert_eq!((number(&report, "/drained"), number(&report, "/aborted")), (0, 0), "{report}");
    }
    scene.process.terminate().await;
    assert!(scene.process.exit_within(Duration::from_secs(10)).await.success());
    scene.restart().await;
    scene.receiver.set("/q", Mood::ack());
    scene.client.start_queue("q").await;
}

async fn what_hangs_is_cut_at_the_deadline_while_others_fail(database: Database) {
    let scene = Scene::on(database).await;
    let settings = json!({
        "handler": {"timeout": "60s"},
        "concurrency": {"limit": 8},
        "recovery": {"max_attempts": 1000},
    });
    scene.queue_with("q", settings).await;
    scene.receiver.set(
        "/q",
        Mood::by(|delivery| match &delivery.body[..] {
            b"hang" => Mood::Hang,
            _ => Mood::status(500),
        }),
    );
    for _ in 0..3 {
        scene.client.send("q", "hang").await;
    }
    send(&scene, 50).await;
    scene.receiver.wait_for("/q", 100).await;
    let asked = Instant::now();
    let report = scene.client.stop_queue("q", &json!({"deadline": "1s"})).await;
    let took = asked.elapsed();
    assert_eq!(number(&report, "/aborted"), 3, "{report}");
    assert!(took >= Duration::from_secs(1) && took < Duration::from_secs(6), "{took:?}");
    let count = scene.receiver.count("/q");
    assert_eq!(stat(&scene, "/in_flight").await, 0);
    assert_eq!(stat(&scene, "/ready").await + stat(&scene, "/scheduled").await, 53);
    assert_eq!(scene.receiver.count("/q"), count, "nothing is tried any more");
}

#[tokio::test]
async fn without_a_database_a_stop_ends_by_its_deadline() {
    let cluster = start_cluster().await;
    let mut scene = Scene::on(Database::Postgres(cluster.url())).await;
    scene.queue_with("q", json!({"handler": {"timeout": "60s"}})).await;
    scene.receiver.set("/q", Mood::Hang);
    send(&scene, 4).await;
    scene.receiver.wait_for_open("/q", 4).await;
    cluster.stop_hard().await;
    let asked = Instant::now();
    let stop = scene.client.post("/admin/v1/queues/q/stop", &json!({"deadline": "1s"})).await;
    let took = asked.elapsed();
    assert_eq!(stop.status, 503, "nobody can write that it is stopped: {stop:?}");
    assert!(took < Duration::from_secs(10), "{took:?}");
    eventually("what was open is cut", async || scene.receiver.open("/q") == 0).await;
    let asked = Instant::now();
    scene.process.terminate().await;
    scene.process.exit_within(Duration::from_secs(40)).await;
    say!("stopped in {took:?}, ended in {:?}", asked.elapsed());
    assert!(asked.elapsed() < Duration::from_secs(27), "{:?}", asked.elapsed());
    cluster.start().await;
    scene.restart().await;
    scene.receiver.set("/q", Mood::ack());
    eventually("all are handled", async || scene.receiver.successes("/q") == 4).await;
}

/// What a failure leads to is told to a database that takes the call and never answers.
#[tokio::test]
async fn with_a_frozen_database_a_stop_ends_by_its_deadline() {
    let cluster = start_cluster().await;
    let scene = Scene::on(Database::Postgres(cluster.url())).await;
    let settings = json!({
        "handler": {"timeout": "5s"},
        "lease": "6s", // what cannot be settled comes back after it
        "breaker": {"failures": 1, "open_for": "1h", "max_open": "1h"},
    });
    scene.queue_with("q", settings).await;
    let gate = Gate::closed();
    let busy = Reply::new(503).header("Retry-After", "1");
    scene.receiver.set("/q", Mood::Held(gate.clone(), busy));
    send(&scene, 4).await;
    scene.receiver.wait_for_open("/q", 4).await;
    let mut connection = PgConnection::connect(&cluster.url()).await.expect("it answers");
    let frozen = Frozen::whole(&mut connection).await;
    gate.open();
    eventually("all have failed", async || scene.receiver.open("/q") == 0).await;
    let asked = Instant::now();
    let stop = scene.client.post("/admin/v1/pump/stop", &json!({"deadline": "1s"})).await;
    let took = asked.elapsed();
    assert_eq!(stop.status, 503, "nobody can write that it is stopped: {stop:?}");
    drop(frozen);
    say!("answered {} in {took:?}", stop.status);
    assert!(took < Duration::from_secs(20), "{took:?}");
    scene.receiver.set("/q", Mood::ack());
    for path in ["/admin/v1/pump/start", "/admin/v1/queues/q/start"] {
        eventually("it starts again", async || scene.client.post_nothing(path).await.status == 200)
            .await;
    }
    eventually("all are handled", async || scene.receiver.successes("/q") == 4).await;
}

/// Somebody works on the schema by hand, and whoever looks at the queues waits for that.
#[tokio::test]
async fn while_the_queues_are_locked_a_stop_ends_by_its_deadline() {
    let scene = Scene::on(Database::postgres().await).await;
    scene.queue("q").await;
    scene.receiver.set("/q", Mood::Hang);
    send(&scene, 4).await;
    scene.receiver.wait_for_open("/q", 4).await;
    let mut connection = PgConnection::connect(&scene.database.url()).await.expect("it answers");
    let lock = "begin; lock table pumphouse.queue in access exclusive mode";
    sqlx::raw_sql(lock).execute(&mut connection).await.expect("nobody else has it for long");
    // Long enough for the process to look at the queues, and to wait for it.
    let ceiling = json!({"concurrency": {"limit": 900}});
    let looks = scene.client.patch("/admin/v1/pump", &ceiling);
    let stops = async {
        pass(Duration::from_secs(1)).await;
        let asked = Instant::now();
        let stop = scene.client.post("/admin/v1/pump/stop", &json!({"deadline": "1s"})).await;
        (stop.status, asked.elapsed())
    };
    let (_, (status, took)) = join(looks, stops).await;
    say!("answered {status} in {took:?}");
    assert_eq!(status, 503);
    assert!(took < Duration::from_secs(9), "{took:?}");
    assert_eq!(scene.receiver.open("/q"), 0, "what was open is cut");
    sqlx::raw_sql("rollback").execute(&mut connection).await.expect("it goes on");
    scene.receiver.set("/q", Mood::ack());
    eventually("it goes on, because nobody could write the stop", async || {
        scene.receiver.successes("/q") == 4
    })
    .await;
}

async fn stat(scene: &Scene, name: &str) -> u64 {
    number(&scene.client.queue("q").await["stats"], name)
}

async fn send(scene: &Scene, count: usize) {
    let lines = "{\"payload\": \"x\"}\n".repeat(count);
    let sent: Value = ask(scene.client.batch("q", lines)).await.expect(207).json();
    assert_eq!(sent["items"].as_array().map(Vec::len), Some(count));
}
