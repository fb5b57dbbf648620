//! Stop and start of queues and of the whole pump, and what outlives a restart.

use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use serde_json::json;

use crate::support::client::text;
use crate::support::process::Database;
use crate::support::scene::Scene;
use crate::support::{eventually, never_within, on_both};

on_both! {
    a_stopped_queue_keeps_accepting_and_delivers_nothing
    a_stop_outlives_a_restart
    a_stopped_pump_holds_every_queue
    a_message_can_be_run_although_its_queue_is_stopped
    a_pause_ends_by_itself
    an_idle_pump_stops_at_once
    stop_and_start_in_turn_lose_nothing
}

async fn a_stopped_queue_keeps_accepting_and_delivers_nothing(database: Database) {
    let scene = Scene::on(database).await;
    scene.queue("q").await;
    scene.queue("other").await;
    let report = scene.client.stop_queue("q", &json!({})).await;
    assert_eq!(report, json!({"drained": 0, "aborted": 0, "released": 0}));
    let queue = scene.client.queue("q").await;
    assert_eq!(queue["state"], "stopped");
    assert_eq!(queue["stopped"]["by"], "operator");
    text(&queue, "/stopped/at").parse::<Timestamp>().expect("RFC 3339");
    let id = scene.client.send("q", "x").await;
    scene.client.send("other", "x").await;
    scene.receiver.wait_for("/other", 1).await;
    let delivered = || scene.receiver.count("/q") > 0;
    never_within("a stopped queue delivers", Duration::from_millis(500), delivered).await;
    // Twice does no harm.
    assert_eq!(scene.client.stop_queue("q", &json!({})).await, report);
    for _ in 0..2 {
        scene.client.start_queue("q").await;
    }
    assert_eq!(scene.client.queue("q").await["state"], "running");
    eventually("it is completed", async || scene.client.state(&id).await == "completed").await;
    assert_eq!(scene.receiver.count("/q"), 1);
}

async fn a_stop_outlives_a_restart(database: Database) {
    let mut scene = Scene::on(database).await;
    scene.queue("q").await;
    scene.client.stop_queue("q", &json!({})).await;
    scene.client.send("q", "x").await;
    scene.process.kill_hard().await;
    scene.restart().await;
    assert_eq!(scene.client.queue("q").await["state"], "stopped");
    let delivered = || scene.receiver.count("/q") > 0;
    never_within("a stopped queue delivers", Duration::from_millis(500), delivered).await;
    scene.client.start_queue("q").await;
    scene.receiver.wait_for("/q", 1).await;

    scene.client.post("/admin/v1/pump/stop", &json!({})).await.expect(200);
    scene.client.send("q", "y").await;
    scene.process.kill_hard().await;
    scene.restart().await;
    assert_eq!(pump_state(&scene).await, "stopped");
    let delivered = || scene.receiver.count("/q") > 1;
    never_within("a stopped pump delivers", Duration::from_millis(500), delivered).await;
    scene.client.post_nothing("/admin/v1/pump/start").await;
    scene.receiver.wait_for("/q", 2).await;
}

async fn a_stopped_pump_holds_every_queue(database: Database) {
    let scene = Scene::on(database).await;
    scene.queue("a").await;
    scene.queue("b").await;
    scene.client.stop_queue("b", &json!({})).await;
    let stop = scene.client.post_nothing("/admin/v1/pump/stop").await.expect(200).json();
    assert_eq!(stop, json!({"drained": 0, "aborted": 0, "released": 0}));
    assert_eq!(pump_state(&scene).await, "stopped");
    scene.client.send("a", "x").await;
    scene.client.send("b", "x").await;
    let any = || scene.receiver.count("/a") + scene.receiver.count("/b") > 0;
    never_within("a stopped pump delivers", Duration::from_millis(500), any).await;
    let started = scene.client.post_nothing("/admin/v1/pump/start").await;
    assert!(matches!(started.status, 200 | 204), "{started:?}");
    assert_eq!(pump_state(&scene).await, "running");
    scene.receiver.wait_for("/a", 1).await;
    let own = || scene.receiver.count("/b") > 0;
    never_within("a queue's own stop ends with the pump's", Duration::from_millis(300), own).await;
    scene.client.start_queue("b").await;
    scene.receiver.wait_for("/b", 1).await;
}

async fn a_message_can_be_run_although_its_queue_is_stopped(database: Database) {
    let scene = Scene::on(database).await;
    scene.queue("q").await;
    scene.client.stop_queue("q", &json!({})).await;
    let waits = scene.client.send("q", "waits").await;
    let hurried = scene.client.send("q", "hurried").await;
    scene.client.post_nothing(&format!("/v1/messages/{hurried}/run")).await.expect(200);
    eventually("it is completed", async || scene.client.state(&hurried).await == "completed").await;
    assert_eq!(scene.client.state(&waits).await, "ready");
    assert_eq!(scene.client.queue("q").await["state"], "stopped");
}

async fn a_pause_ends_by_itself(database: Database) {
    let scene = Scene::on(database).await;
    scene.queue("q").await;
    let receipt = scene.client.send("q", "first").await;
    scene.receiver.wait_for("/q", 1).await;
    let now = text(&scene.client.message(&receipt).await, "/enqueued_at");
    let now = now.parse::<Timestamp>().expect("RFC 3339");
    let until = now + SignedDuration::from_millis(1500);
    scene.client.stop_queue("q", &json!({"until": until.to_string()})).await;
    let stopped = scene.client.queue("q").await["stopped"].clone();
    assert_eq!(text(&stopped, "/until").parse::<Timestamp>().expect("RFC 3339"), until);
    scene.client.send("q", "second").await;
    let deliveries = scene.receiver.wait_for("/q", 2).await;
    let late = deliveries[1].at.duration_since(until);
    assert!(!late.is_negative(), "early by {late}");
    assert!(late.as_millis() < 2000, "late by {late}");
    assert_eq!(scene.client.queue("q").await["state"], "running");
}

async fn an_idle_pump_stops_at_once(database: Database) {
    let scene = Scene::on(database).await;
    for number in 0..10 {
        scene.queue(&format!("q{number}")).await;
    }
    scene.client.send("q0", "x").await;
    scene.receiver.wait_for("/q0", 1).await;
    eventually("it is idle", async || scene.client.queue("q0").await["stats"]["in_flight"] == 0)
        .await;
    let asked = Instant::now();
    scene.client.post("/admin/v1/pump/stop", &json!({"deadline": "20s"})).await.expect(200);
    let took = asked.elapsed();
    assert!(took < Duration::from_secs(1), "{took:?}");
}

async fn stop_and_start_in_turn_lose_nothing(database: Database) {
    let scene = Scene::on(database).await;
    scene.queue("q").await;
    let mut ids = Vec::new();
    for round in 0..15 {
        ids.push(scene.client.send("q", format!("{round}a")).await);
        let deadline = if round % 2 == 0 { "0s" } else { "5s" };
        scene.client.stop_queue("q", &json!({"deadline": deadline})).await;
        ids.push(scene.client.send("q", format!("{round}b")).await);
        scene.client.start_queue("q").await;
    }
    for id in &ids {
        eventually("it is completed", async || scene.client.state(id).await == "completed").await;
    }
}

async fn pump_state(scene: &Scene) -> String {
    text(&scene.client.get("/admin/v1/pump").await.expect(200).json(), "/state")
}
