//! As fast as a rate limit allows, and as many at once as serve the handler best.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::client::{ask, number};
use crate::support::process::{Database, Process};
use crate::support::receiver::Mood;
use crate::support::scene::Scene;
use crate::support::{never_within, on_both, pass, say};

on_both! {
    a_rate_limit_holds_and_a_change_is_in_force_within_a_second
}

async fn a_rate_limit_holds_and_a_change_is_in_force_within_a_second(database: Database) {
    let scene = Scene::on(database).await;
    let rate = json!({"limit": 20, "period": "1s", "burst": 5});
    scene.queue_with("q", json!({"rate_limit": rate})).await;
    scene.queue("other").await;
    send_many(&scene, "q", 400).await;
    let first = scene.receiver.wait_for("/q", 1).await[0].at;
    scene.receiver.wait_for("/q", 65).await;
    let late = scene.receiver.deliveries("/q")[64].at.duration_since(first).as_millis();
    assert!((2900..8000).contains(&late), "5 at once and 60 at 20 a second: {late} ms");
    // What waits for its turn holds nothing that others need, and few leases.
    let started = Instant::now();
    let id = scene.client.send("other", "x").await;
    scene.receiver.wait_for_message(&id).await;
    assert!(started.elapsed() < Duration::from_millis(500), "{:?}", started.elapsed());
    let in_flight = number(&scene.client.queue("q").await, "/stats/in_flight");
    assert!(in_flight <= 20, "{in_flight} leases");
    let raised = json!({"rate_limit": {"limit": 1000, "period": "1s", "burst": 100}});
    scene.client.patch_queue("q", &raised).await;
    let raised = Instant::now();
    scene.receiver.wait_for("/q", 400).await;
    assert!(raised.elapsed() < Duration::from_secs(3), "{:?}", raised.elapsed());
    scene
        .client
        .patch_queue("q", &json!({"rate_limit": {"limit": 1, "period": "1h", "burst": 1}}))
        .await;
    pass(Duration::from_secs(1)).await;
    send_many(&scene, "q", 50).await;
    pass(Duration::from_secs(1)).await;
    let after = scene.receiver.count("/q");
    assert!(after <= 400 + 101, "what had gathered, and one: {after}");
}

#[tokio::test]
async fn processes_share_a_rate() {
    let scene = Scene::on(Database::postgres().await).await;
    let _other = Process::start(&scene.database, &[]).await;
    let rate = json!({"limit": 40, "period": "1s", "burst": 2});
    scene.queue_with("q", json!({"rate_limit": rate})).await;
    pass(Duration::from_secs(2)).await;
    send_many(&scene, "q", 200).await;
    let first = scene.receiver.wait_for("/q", 1).await[0].at;
    scene.receiver.wait_for("/q", 122).await;
    let took = scene.receiver.deliveries("/q")[121].at.duration_since(first).as_millis();
    assert!((2700..6000).contains(&took), "120 at 40 a second: {took} ms");
}

/// How long one place of the handler with a knee needs for a message.
const SERVES_IN: Duration = Duration::from_millis(40);

#[tokio::test]
async fn an_adaptive_limit_finds_the_knee_follows_it_and_can_be_pinned() {
    let scene = Scene::new().await;
    let adaptive = json!({"limit": 1, "adaptive": {"min": 1, "max": 64}});
    scene.receiver.set("/q", Mood::counter(8, SERVES_IN));
    scene.queue_with("q", json!({"concurrency": adaptive.clone()})).await;
    for _ in 0..4 {
        send_many(&scene, "q", 10_000).await;
    }
    let limit = async || {
        let metrics = scene.client.metrics().await;
        metrics.value("pumphouse_concurrency_limit", &[("queue", "q")])
    };
    for knee in [8usize, 16, 4, 8] {
        scene.receiver.set("/q", Mood::counter(knee, SERVES_IN));
        // The knee with fixed limits, the one that serves it best among them, and then by itself.
        let mut best = 0.0f64;
        for fixed in [knee, knee * 5 / 4, knee * 3 / 2] {
            let pinned = json!({"concurrency": {"limit": fixed, "adaptive": null}});
            scene.client.patch_queue("q", &pinned).await;
            pass(Duration::from_secs(1)).await;
            best = best.max(throughput(&scene, Duration::from_secs(2)).await);
            assert_eq!(limit().await, fixed as f64, "pinned");
        }
        scene.client.patch_queue("q", &json!({"concurrency": adaptive.clone()})).await;
        pass(Duration::from_secs(4)).await;
        let found = throughput(&scene, Duration::from_secs(6)).await;
        let share = found / best;
        say!(
            "knee {knee}: limit {}, {:.0} % of the best fixed limit",
            limit().await,
            share * 100.0
        );
        assert!(share >= 0.9, "knee {knee}: {found} of {best} a second");
        let (limit, knee) = (limit().await, knee as f64);
        assert!((knee * 0.5..=knee * 2.0 + 4.0).contains(&limit), "knee {knee}: {limit}");
    }
}

#[tokio::test]
async fn a_limit_of_zero_pauses_an_adaptive_gate_too() {
    let scene = Scene::new().await;
    let adaptive = json!({"limit": 0, "adaptive": {"min": 1, "max": 8}});
    scene.queue_with("q", json!({"concurrency": adaptive})).await;
    send_many(&scene, "q", 20).await;
    never_within("it is delivered", Duration::from_millis(500), || scene.receiver.count("/q") > 0)
        .await;
    scene.client.patch_queue("q", &json!({"concurrency": {"limit": 4}})).await;
    scene.receiver.wait_for("/q", 20).await;
}

/// Messages that were handled in a second.
async fn throughput(scene: &Scene, span: Duration) -> f64 {
    let (before, asked) = (scene.receiver.successes("/q"), Instant::now());
    pass(span).await;
    (scene.receiver.successes("/q") - before) as f64 / asked.elapsed().as_secs_f64()
}

#[tokio::test]
async fn impossible_paces_are_refused() {
    let scene = Scene::new().await;
    scene.queue("q").await;
    let before = scene.client.queue("q").await;
    for wrong in [
        json!({"rate_limit": {"limit": 0}}),
        json!({"rate_limit": {"limit": 1, "period": "0s"}}),
        json!({"rate_limit": {"limit": 1, "burst": 0}}),
        json!({"rate_limit": {"limit": 1, "period": "2d"}}),
        json!({"rate_limit": {}}),
        json!({"concurrency": {"adaptive": {"min": 0, "max": 5}}}),
        json!({"concurrency": {"adaptive": {"min": 6, "max": 5}}}),
        json!({"concurrency": {"adaptive": {"min": 1}}}),
        json!({"breaker": {"failures": 0}}),
        json!({"breaker": {"open_for": "1h", "max_open": "1m"}}),
    ] {
        scene.client.patch("/admin/v1/queues/q", &wrong).await.expect(422);
    }
    assert_eq!(scene.client.queue("q").await, before);
}

async fn send_many(scene: &Scene, queue: &str, count: usize) {
    let lines = "{\"payload\": 1}\n".repeat(count);
    ask(scene.client.batch(queue, lines)).await.expect(207);
}
