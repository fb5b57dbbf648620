//! SIGTERM: what is open may finish, what is new is refused, and then the process goes.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::client::{ask, try_ask};
use crate::support::process::Database;
use crate::support::receiver::{Gate, Mood};
use crate::support::scene::Scene;
use crate::support::{eventually, on_both};

on_both! {
    a_terminated_process_lets_open_deliveries_finish_and_takes_nothing_new
    a_terminated_process_cuts_at_its_deadline_and_counts_no_failure
    a_second_signal_ends_it_at_once
    an_idle_process_ends_at_once
}

const SLOW: &str = "60s";

async fn a_terminated_process_lets_open_deliveries_finish_and_takes_nothing_new(
    database: Database,
) {
    let (mut scene, gate, id) = one_open(database, &[]).await;
    let waits = scene.client.send("q", "waits").await;
    scene.process.terminate().await;
    eventually("it is not ready", async || scene.client.get("/readyz").await.status == 503).await;
    scene.client.get("/livez").await.expect(200);
    let refused = ask(scene.client.message_to("q", "new")).await.expect(503);
    refused.problem();
    assert!(refused.header("retry-after").parse::<u32>().is_ok(), "{refused:?}");
    assert_eq!(scene.receiver.open("/q"), 1, "what is open goes on");
    gate.open();
    let status = scene.process.exit_within(Duration::from_secs(10)).await;
    assert_eq!(status.code(), Some(0), "{}", scene.process.log());
    assert_eq!(scene.receiver.count("/q"), 1, "nothing starts after the signal");
    scene.restart().await;
    assert_eq!(outcomes(&scene, &id).await, ["acked"]);
    eventually("it is completed", async || scene.client.state(&waits).await == "completed").await;
    assert_eq!(
        scene.client.all("/v1/messages?queue=q").await.len(),
        2,
        "what was refused is not kept"
    );
}

async fn a_terminated_process_cuts_at_its_deadline_and_counts_no_failure(database: Database) {
    let (mut scene, gate, id) = one_open(database, &["--drain-deadline", "800ms"]).await;
    let asked = Instant::now();
    scene.process.terminate().await;
    let status = scene.process.exit_within(Duration::from_secs(10)).await;
    let took = asked.elapsed();
    assert_eq!(status.code(), Some(0), "{}", scene.process.log());
    assert!((800..3000).contains(&took.as_millis()), "{took:?}");
    scene.receiver.wait_for_open("/q", 0).await;
    gate.open();
    scene.restart().await;
    eventually("it is completed", async || scene.client.state(&id).await == "completed").await;
    assert_eq!(outcomes(&scene, &id).await, ["released", "acked"]);
    let message = scene.client.message(&id).await;
    let deliveries = message["deliveries"].as_array().expect("deliveries");
    let first = deliveries.iter().find(|delivery| delivery["number"] == 1).expect("the first");
    assert_eq!(first["error_kind"], "cancelled");
    // A limit of one attempt, and it was tried again: the cut one did not count.
    assert_eq!(scene.client.queue("q").await["recovery"]["max_attempts"], 1);
}

async fn a_second_signal_ends_it_at_once(database: Database) {
    let (mut scene, gate, id) = one_open(database, &[]).await;
    scene.process.terminate().await;
    eventually("it is not ready", async || scene.client.get("/readyz").await.status == 503).await;
    let asked = Instant::now();
    scene.process.terminate().await;
    scene.process.exit_within(Duration::from_secs(3)).await;
    assert!(asked.elapsed() < Duration::from_secs(3));
    gate.open();
    scene.restart().await;
    eventually("it is completed", async || scene.client.state(&id).await == "completed").await;
}

async fn an_idle_process_ends_at_once(database: Database) {
    let mut scene = Scene::on(database).await;
    scene.queue("q").await;
    scene.client.send("q", "x").await;
    scene.receiver.wait_for("/q", 1).await;
    let asked = Instant::now();
    scene.process.terminate().await;
    let status = scene.process.exit_within(Duration::from_secs(5)).await;
    assert_eq!(status.code(), Some(0), "{}", scene.process.log());
    assert!(asked.elapsed() < Duration::from_secs(3), "{:?}", asked.elapsed());
    assert!(try_ask(scene.client.message_to("q", "x")).await.is_err(), "nobody listens");
}

/// A queue that gives up after one failure, and one delivery that its handler holds.
async fn one_open(database: Database, flags: &[&str]) -> (Scene, Gate, String) {
    let flags = [&["--replica", "one"], flags].concat();
    let scene = Scene::with_flags(database, &flags).await;
    let settings = json!({
        "concurrency": {"limit": 1},
        "handler": {"timeout": SLOW},
        "recovery": {"max_attempts": 1},
    });
    scene.queue_with("q", settings).await;
    let gate = Gate::closed();
    scene.receiver.set("/q", Mood::held(&gate));
    let id = scene.client.send("q", "held").await;
    scene.receiver.wait_for_open("/q", 1).await;
    (scene, gate, id)
}

/// How the deliveries of a message ended, the first one first.
async fn outcomes(scene: &Scene, id: &str) -> Vec<Value> {
    let message = scene.client.message(id).await;
    let mut deliveries = message["deliveries"].as_array().expect("deliveries").clone();
    deliveries.sort_by_key(|delivery| delivery["number"].as_u64());
    deliveries.iter().map(|delivery| delivery["outcome"].clone()).collect()
}
