//! What becomes of open deliveries when their queue or the pump is stopped.

use std::time::{Duration, Instant};

use futures::future::join;
use serde_json::{Value, json};
use sqlx::{Connection, Executor, PgConnection};

use crate::support::client::{number, text};
use crate::support::process::Database;
use crate::support::receiver::{Gate, Mood};
use crate::support::scene::Scene;
use crate::support::{eventually, on_both, pass};

on_both! {
    a_drain_lets_open_deliveries_finish
    a_drain_cuts_at_its_deadline_and_counts_no_failure
    a_drain_tells_what_finished_from_what_was_cut
    an_abort_cuts_at_once
    two_callers_wait_for_the_same_end
    a_shorter_deadline_shortens_it_for_all
    a_start_ends_a_drain
    the_whole_pump_drains_and_aborts
}

async fn a_drain_lets_open_deliveries_finish(database: Database) {
    let (scene, gate) = three_open_of_ten(database).await;
    let stop = json!({"mode": "drain", "deadline": "20s"});
    let release = async {
        the_queue_is_stopping(&scene).await;
        gate.open();
    };
    let (report, ()) = join(scene.client.stop_queue("q", &stop), release).await;
    assert_eq!((number(&report, "/drained"), number(&report, "/aborted")), (3, 0), "{report}");
    assert_eq!(scene.receiver.count("/q"), 3, "no delivery starts after the stop");
    assert_eq!(states(&scene, "completed").await, 3);
    assert_eq!(states(&scene, "leased").await, 0);
    assert_eq!(states(&scene, "ready").await, 7);
}

async fn a_drain_cuts_at_its_deadline_and_counts_no_failure(database: Database) {
    let (scene, gate) = three_open_of_ten(database).await;
    let asked = Instant::now();
    let report = scene.client.stop_queue("q", &json!({"deadline": "700ms"})).await;
    let took = asked.elapsed();
    assert!((700..3000).contains(&took.as_millis()), "{took:?}");
    assert_eq!((number(&report, "/drained"), number(&report, "/aborted")), (0, 3), "{report}");
    everything_waits_and_nothing_failed(&scene).await;
    gate.open();
    scene.client.start_queue("q").await;
    eventually("all are completed", async || states(&scene, "completed").await == 10).await;
}

async fn a_drain_tells_what_finished_from_what_was_cut(database: Database) {
    let (scene, gate) = three_open_of_ten(database).await;
    let stop = json!({"deadline": "1500ms"});
    let release = async {
        the_queue_is_stopping(&scene).await;
        gate.let_through(1);
    };
    let (report, ()) = join(scene.client.stop_queue("q", &stop), release).await;
    assert_eq!((number(&report, "/drained"), number(&report, "/aborted")), (1, 2), "{report}");
    assert_eq!(states(&scene, "completed").await, 1);
    assert_eq!(states(&scene, "ready").await, 9);
}

async fn an_abort_cuts_at_once(database: Database) {
    let (scene, _gate) = three_open_of_ten(database).await;
    let asked = Instant::now();
    let report = scene.client.stop_queue("q", &json!({"mode": "abort"})).await;
    let took = asked.elapsed();
    assert!(took < Duration::from_secs(2), "{took:?}");
    assert_eq!(number(&report, "/aborted"), 3, "{report}");
    everything_waits_and_nothing_failed(&scene).await;
}

async fn two_callers_wait_for_the_same_end(database: Database) {
    let (scene, gate) = three_open_of_ten(database).await;
    let long = json!({"deadline": "20s"});
    let first = scene.client.stop_queue("q", &long);
    let second = scene.client.stop_queue("q", &long);
    let release = async {
        the_queue_is_stopping(&scene).await;
        assert_eq!(scene.receiver.open("/q"), 3, "the stop waits for what is open");
        gate.open();
        scene.receiver.wait_for_open("/q", 0).await;
    };
    let ((first, second), ()) = join(join(first, second), release).await;
    assert_eq!(number(&first, "/drained"), 3, "{first} {second}");
    assert_eq!(states(&scene, "completed").await, 3);
}

async fn a_shorter_deadline_shortens_it_for_all(database: Database) {
    let (scene, _gate) = three_open_of_ten(database).await;
    let asked = Instant::now();
    let (long, short) = (json!({"deadline": "25s"}), json!({"mode": "abort"}));
    let patient = scene.client.stop_queue("q", &long);
    let hurried = async {
        the_queue_is_stopping(&scene).await;
        scene.client.stop_queue("q", &short).await
    };
    let (patient, _) = join(patient, hurried).await;
    assert!(asked.elapsed() < Duration::from_secs(10), "{:?}", asked.elapsed());
    assert_eq!(number(&patient, "/aborted"), 3, "{patient}");
    everything_waits_and_nothing_failed(&scene).await;
}

async fn a_start_ends_a_drain(database: Database) {
    let (scene, gate) = three_open_of_ten(database).await;
    let long = json!({"deadline": "20s"});
    let stop = scene.client.stop_queue("q", &long);
    let start = async {
        the_queue_is_stopping(&scene).await;
        scene.client.start_queue("q").await;
        gate.open();
        eventually("all are completed", async || states(&scene, "completed").await == 10).await;
    };
    join(stop, start).await;
    assert_eq!(scene.client.queue("q").await["state"], "running");
}

async fn the_whole_pump_drains_and_aborts(database: Database) {
    let (scene, gate) = three_open_of_ten(database).await;
    scene.queue_with("other", json!({"concurrency": {"limit": 1}})).await;
    scene.receiver.set("/other", Mood::held(&gate));
    scene.client.send("other", "x").await;
    scene.receiver.wait_for_open("/other", 1).await;
    let stop = json!({"mode": "abort"});
    let report = scene.client.post("/admin/v1/pump/stop", &stop).await.expect(200).json();
    assert_eq!(number(&report, "/aborted"), 4, "{report}");
    everything_waits_and_nothing_failed(&scene).await;
    gate.open();
    scene.client.post_nothing("/admin/v1/pump/start").await;
    eventually("all are completed", async || states(&scene, "completed").await == 10).await;
    scene.receiver.wait_for("/other", 2).await;
}

#[tokio::test]
async fn a_claim_that_comes_back_after_an_abort_takes_nobodys_room() {
    let scene = Scene::on(Database::postgres().await).await;
    scene.queue_with("q", json!({"concurrency": {"limit": 3}})).await;
    scene.client.stop_queue("q", &json!({})).await;
    for number in 0..10 {
        scene.client.send("q", number.to_string()).await;
    }
    let (mut other, mut onlooker) = (connect(&scene).await, connect(&scene).await);
    let mut transaction = other.begin().await.expect("a transaction begins");
    // A claim reads it, and neither a stop nor a start.
    let lock = "lock table pumphouse.content in access exclusive mode";
    transaction.execute(lock).await.expect("it is locked");
    scene.client.start_queue("q").await;
    // A stopped queue's claims, of what is urgent, read other rows and wait as well.
    let waits = "select exists (select 1 from pg_stat_activity where datname = current_database()
                 and wait_event_type = 'Lock' and query like '%select ready.ctid as tid%'
                 and query not like '%ready.urgent%')";
    eventually("a claim waits", async || {
        sqlx::query_scalar(waits).fetch_one(&mut onlooker).await.expect("the server answers")
    })
    .await;
    let abort = json!({"mode": "abort"});
    let let_go = async {
        the_queue_is_stopping(&scene).await;
        pass(Duration::from_millis(200)).await; // for the cut, which follows the close at once
        transaction.commit().await.expect("the lock is released");
    };
    let (report, ()) = join(scene.client.stop_queue("q", &abort), let_go).await;
    assert!(number(&report, "/released") > 0, "the claim came back after the abort: {report}");
    assert_eq!(states(&scene, "ready").await, 10);
    scene.client.start_queue("q").await;
    eventually("all are completed", async || states(&scene, "completed").await == 10).await;
}

async fn connect(scene: &Scene) -> PgConnection {
    PgConnection::connect(&scene.database.url()).await.expect("the database takes connections")
}

/// Ten messages, a limit of three, and a handler that holds the first three.
async fn three_open_of_ten(database: Database) -> (Scene, Gate) {
    let scene = Scene::on(database).await;
    let slow = json!({"concurrency": {"limit": 3}, "handler": {"timeout": "60s"}});
    scene.queue_with("q", slow).await;
    let gate = Gate::closed();
    scene.receiver.set("/q", Mood::held(&gate));
    for number in 0..10 {
        scene.client.send("q", number.to_string()).await;
    }
    scene.receiver.wait_for_open("/q", 3).await;
    (scene, gate)
}

async fn everything_waits_and_nothing_failed(scene: &Scene) {
    let messages = scene.client.all("/v1/messages?queue=q").await;
    assert_eq!(messages.len(), 10);
    let mut cut = 0;
    for message in messages {
        assert_eq!(text(&message, "/state"), "ready", "{message}");
        let message = scene.client.message(&text(&message, "/id")).await;
        for delivery in message["deliveries"].as_array().expect("deliveries") {
            assert_eq!(delivery["outcome"], "released", "{message}");
            assert_eq!(delivery["error_kind"], "cancelled", "{message}");
            cut += 1;
        }
        assert!(message["failures"] == 0 || message["failures"] == Value::Null, "{message}");
    }
    assert_eq!(cut, 3, "what was cut has its record");
    scene.receiver.wait_for_open("/q", 0).await;
}

/// Waits until the stop is in force: it is written down first, and then heard by the pump.
async fn the_queue_is_stopping(scene: &Scene) {
    eventually("the stop is written down", async || {
        scene.client.queue("q").await["state"] == "stopped"
    })
    .await;
    eventually("the stop is in force", async || {
        scene.client.metrics().await.value("pumphouse_pump_running", &[("queue", "q")]) == 0.0
    })
    .await;
    pass(Duration::from_millis(100)).await;
}

async fn states(scene: &Scene, state: &str) -> usize {
    scene.client.all(&format!("/v1/messages?queue=q&state={state}")).await.len()
}
