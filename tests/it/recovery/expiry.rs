//! What waited longer than its sender wanted is not delivered.

use std::time::Duration;

use serde_json::json;

use crate::support::client::{number, text};
use crate::support::process::Database;
use crate::support::scene::Scene;
use crate::support::{eventually, on_both, pass};

on_both! {
    what_expires_is_counted_and_set_aside_if_the_queue_asks_for_it
    what_expires_while_it_waits_for_its_turn_is_not_delivered
}

async fn what_expires_is_counted_and_set_aside_if_the_queue_asks_for_it(database: Database) {
    let scene = Scene::on(database).await;
    let paused = json!({"on_expiry": "dead_letter", "concurrency": {"limit": 0}});
    scene.queue_with("q", paused).await;
    let id = scene.client.send_envelope("q", &json!({"payload": 1, "expires_in": "100ms"})).await;
    eventually("it is dead", async || scene.client.state(&id).await == "dead").await;
    let dead = scene.client.all("/admin/v1/dead-letters?queue=q").await;
    assert!(text(&dead[0], "/reason").contains("longer than its sender wanted"), "{dead:?}");
    for name in ["expired", "dead"] {
        let name = format!("pumphouse_messages_{name}_total");
        eventually("it is counted", async || {
            scene.client.metrics().await.value(&name, &[("queue", "q")]) == 1.0
        })
        .await;
    }
    scene.client.patch_queue("q", &json!({"concurrency": {"limit": 1}})).await;
    pass(Duration::from_millis(300)).await;
    assert_eq!(scene.receiver.count("/q"), 0, "and nobody gets it");
    assert_eq!(scene.client.queue("q").await["on_expiry"], "dead_letter");
    let redriven = format!("/admin/v1/dead-letters/{id}/redrive");
    scene.client.post_nothing(&redriven).await.expect(200);
    eventually("an operator can bring it back", async || {
        scene.client.state(&id).await == "completed"
    })
    .await;
    let wrong = json!({"on_expiry": "explode"});
    scene.client.patch("/admin/v1/queues/q", &wrong).await.expect(422);
}

/// Leased ahead of the gate, they expire before there is a place for them.
async fn what_expires_while_it_waits_for_its_turn_is_not_delivered(database: Database) {
    let scene = Scene::on(database).await;
    let rate = json!({"limit": 2, "period": "1s", "burst": 1});
    scene.queue_with("q", json!({"rate_limit": rate, "concurrency": {"limit": 4}})).await;
    let brief = json!({"payload": 1, "expires_in": "200ms"});
    for _ in 0..20 {
        scene.client.send_envelope("q", &brief).await;
    }
    eventually("none of them waits", async || {
        let stats = scene.client.queue("q").await["stats"].clone();
        ["/ready", "/in_flight", "/scheduled"].iter().all(|name| number(&stats, name) == 0)
    })
    .await;
    let late = scene.receiver.deliveries("/q").into_iter().filter(|delivery| {
        let enqueued = delivery.header("pumphouse-enqueued-at").parse::<jiff::Timestamp>();
        delivery.at.duration_since(enqueued.expect("a time")).as_millis() > 900
    });
    assert_eq!(late.count(), 0, "what was delivered was delivered in time");
    let expired = scene.client.all("/v1/messages?queue=q&state=expired").await.len();
    assert_eq!(expired + scene.receiver.count("/q"), 20);
    assert!(expired >= 10, "{expired}");
}
