//! A chain of handlers with a fan-out, killed at random moments: every child of a completed parent exists once.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

use crate::support::chance::mix;
use crate::support::client::{Client, ask, text};
use crate::support::process::Database;
use crate::support::receiver::{Mood, Reply};
use crate::support::scene::Scene;
use crate::support::{eventually_within, on_both, pass, say};

on_both! {
    every_child_of_a_completed_parent_exists_once_over_fifty_kills
}

const ROOTS: usize = 2_000;
const KILLS: u64 = 50;

async fn every_child_of_a_completed_parent_exists_once_over_fifty_kills(database: Database) {
    let mut scene = Scene::with_flags(database, &["--replica", "one"]).await;
    let settings = json!({
        "concurrency": {"limit": 32},
        "recovery": {"max_crashes": 1_000, "max_attempts": 1_000},
    });
    for name in ["a", "b", "c"] {
        scene.queue_with(name, settings.clone()).await;
    }
    scene
        .receiver
        .set("/a", carries(json!([{"queue": "b", "payload": 1}, {"queue": "b", "payload": 2}])));
    scene.receiver.set("/b", carries(json!([{"queue": "c", "payload": 3}])));
    for batch in 0..ROOTS / 500 {
        let line = |number| {
            let root = batch * 500 + number;
            format!("{}\n", json!({"payload": root, "correlation_id": format!("root-{root}")}))
        };
        let lines = (0..500).map(line).collect::<String>();
        ask(scene.client.batch("a", lines)).await.expect(207);
    }
    for kill in 0..KILLS {
        pass(Duration::from_millis(20 + mix(kill) % 200)).await;
        scene.process.kill_hard().await;
        scene.restart().await;
    }
    let left = async || {
        let mut left = 0;
        for name in ["a", "b", "c"] {
            let stats = scene.client.queue(name).await["stats"].clone();
            left += ["ready", "scheduled", "in_flight"]
                .iter()
                .map(|state| stats[*state].as_u64().expect("a count"))
                .sum::<u64>();
        }
        left
    };
    eventually_within("all are done", Duration::from_secs(120), async || left().await == 0).await;
    let all = all(&scene.client).await;
    let of = |queue: &'static str| all.values().filter(move |message| message["queue"] == queue);
    assert_eq!([of("a").count(), of("b").count(), of("c").count()], [ROOTS, 2 * ROOTS, 2 * ROOTS]);
    let mut children = BTreeMap::<String, usize>::new();
    for message in of("b").chain(of("c")) {
        let parent = text(message, "/causation_id");
        *children.entry(parent.clone()).or_default() += 1;
        let parent = &all[&parent];
        assert_eq!(message["correlation_id"], parent["correlation_id"], "{message}");
        assert_eq!(parent["state"], "completed", "no child of an uncompleted one: {parent}");
    }
    assert!(of("a").all(|root| children[&text(root, "/id")] == 2));
    assert!(of("b").all(|middle| children[&text(middle, "/id")] == 1));
    let deliveries = ["/a", "/b", "/c"].map(|path| scene.receiver.count(path));
    say!("{KILLS} kills, deliveries {deliveries:?} of {ROOTS} roots");
}

fn carries(messages: Value) -> Mood {
    let reply = Reply::new(200).header("content-type", "application/vnd.pumphouse.messages+json");
    reply.body(json!({"messages": messages}).to_string()).into()
}

/// Every message, by its id.
async fn all(client: &Client) -> BTreeMap<String, Value> {
    let messages = client.all("/v1/messages").await;
    messages.into_iter().map(|message| (text(&message, "/id"), message)).collect()
}
