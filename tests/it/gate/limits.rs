//! How many deliveries at once: raised, lowered, set to nothing, under load.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::process::Database;
use crate::support::receiver::{Gate, Mood};
use crate::support::scene::Scene;
use crate::support::{eventually_within, never_within, on_both};

on_both! {
    a_raised_limit_acts_at_once_and_cancels_nothing
    a_lowered_limit_never_runs_old_plus_new
    a_limit_of_nothing_pauses
    the_ceiling_is_over_all_queues
    a_limit_outlives_a_restart
}

/// How long a change may take to be in force.
const SOON: Duration = Duration::from_secs(1);
/// How long a request may be on its way from the gate to the handler.
const ON_ITS_WAY: Duration = Duration::from_millis(100);

async fn a_raised_limit_acts_at_once_and_cancels_nothing(database: Database) {
    let (scene, gate) = loaded(database, 2).await;
    scene.receiver.wait_for_open("/q", 2).await;
    limit(&scene, 10).await;
    eventually_within("ten are open", SOON, async || scene.receiver.open("/q") == 10).await;
    let deliveries = scene.receiver.deliveries("/q");
    assert!(deliveries.iter().all(|delivery| delivery.ended.is_none()), "nothing was cut");
    gate.open();
    all_get_through(&scene).await;
    assert_eq!(scene.receiver.most_open("/q"), 10);
}

async fn a_lowered_limit_never_runs_old_plus_new(database: Database) {
    let scene = Scene::on(database).await;
    scene.queue_with("q", json!({"concurrency": {"limit": 12}})).await;
    // So slow that what was open before a change is still open after it.
    scene.receiver.set("/q", Mood::slow(Duration::from_millis(150)));
    send_many(&scene, 400).await;
    scene.receiver.wait_for("/q", 30).await;
    for (upper, lower) in [(12, 7), (7, 2), (2, 4), (4, 1)] {
        limit(&scene, lower).await;
        let changed = Instant::now();
        let before = scene.receiver.count("/q");
        scene.receiver.wait_for("/q", before + 5 * lower).await;
        let history = scene.receiver.history("/q");
        let after = history.windows(2).filter(|pair| pair[1].0 > changed);
        for (at, open) in after.filter(|pair| pair[1].1 > pair[0].1).map(|pair| pair[1]) {
            // What was on its way when the limit changed has come by then.
            let bound = if at - changed > ON_ITS_WAY { lower } else { upper.max(lower) };
            assert!(open <= bound, "a delivery started as number {open} with a limit of {bound}");
        }
    }
    assert_eq!(scene.receiver.most_open("/q"), 12, "the load was there");
    limit(&scene, 50).await;
    let deliveries = scene.receiver.wait_for("/q", 400).await;
    assert_eq!(deliveries.len(), 400, "nothing was cut and nothing came twice");
}

async fn a_limit_of_nothing_pauses(database: Database) {
    let scene = Scene::on(database).await;
    scene.queue_with("q", json!({"concurrency": {"limit": 0}})).await;
    send_many(&scene, 5).await;
    let delivered = || scene.receiver.count("/q") > 0;
    never_within("a paused queue delivers", Duration::from_millis(500), delivered).await;
    limit(&scene, 1).await;
    eventually_within("it goes on", SOON, async || scene.receiver.count("/q") > 0).await;
    scene.receiver.wait_for("/q", 5).await;
    assert_eq!(scene.receiver.most_open("/q"), 1);
    limit(&scene, 0).await;
    send_many(&scene, 5).await;
    let delivered = || scene.receiver.count("/q") > 5;
    never_within("a paused queue delivers", Duration::from_millis(500), delivered).await;
}

async fn the_ceiling_is_over_all_queues(database: Database) {
    let scene = Scene::on(database).await;
    ceiling(&scene, 5).await;
    let gate = Gate::closed();
    for queue in ["q", "r", "s"] {
        scene.queue(queue).await;
        scene.receiver.set(&format!("/{queue}"), Mood::held(&gate));
        for number in 0..10 {
            scene.client.send(queue, number.to_string()).await;
        }
    }
    let open = || ["/q", "/r", "/s"].iter().map(|path| scene.receiver.open(path)).sum::<usize>();
    eventually_within("five are open", Duration::from_secs(5), async || open() == 5).await;
    never_within("more than the ceiling", Duration::from_millis(500), || open() > 5).await;
    ceiling(&scene, 8).await;
    eventually_within("eight are open", SOON, async || open() == 8).await;
    gate.open();
    for path in ["/q", "/r", "/s"] {
        scene.receiver.wait_for(path, 10).await;
    }
}

async fn a_limit_outlives_a_restart(database: Database) {
    let (mut scene, _gate) = loaded(database, 7).await;
    limit(&scene, 3).await;
    ceiling(&scene, 2).await;
    scene.process.kill_hard().await;
    scene.receiver.wait_for_open("/q", 0).await;
    let before = scene.receiver.count("/q");
    scene.restart().await;
    assert_eq!(scene.client.queue("q").await["concurrency"]["limit"], 3);
    let pump = scene.client.get("/admin/v1/pump").await.expect(200).json();
    assert_eq!(pump["concurrency"]["limit"], 2, "{pump}");
    scene.receiver.wait_for("/q", before + 2).await;
    let more = || scene.receiver.open("/q") > 2;
    never_within("more than the ceiling", Duration::from_millis(500), more).await;
}

/// A queue with this limit, a handler that holds everything, and thirty messages.
async fn loaded(database: Database, limit: usize) -> (Scene, Gate) {
    let scene = Scene::on(database).await;
    scene
        .queue_with("q", json!({"concurrency": {"limit": limit}, "handler": {"timeout": "60s"}}))
        .await;
    let gate = Gate::closed();
    scene.receiver.set("/q", Mood::held(&gate));
    send_many(&scene, 30).await;
    scene.receiver.wait_for_open("/q", limit).await;
    (scene, gate)
}

async fn send_many(scene: &Scene, count: usize) {
    let lines = "{\"payload\":1}\n".repeat(count);
    crate::support::client::ask(scene.client.batch("q", lines)).await.expect(207);
}

async fn limit(scene: &Scene, limit: usize) {
    scene.client.patch_queue("q", &json!({"concurrency": {"limit": limit}})).await;
}

async fn ceiling(scene: &Scene, limit: usize) {
    let patch = json!({"concurrency": {"limit": limit}});
    scene.client.patch("/admin/v1/pump", &patch).await.expect(200);
}

async fn all_get_through(scene: &Scene) {
    let deliveries = scene.receiver.wait_for("/q", 30).await;
    assert_eq!(deliveries.len(), 30, "each once");
}
