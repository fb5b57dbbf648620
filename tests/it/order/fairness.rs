//! One tenant has fifty thousand messages waiting: how long do the others wait?

use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::client::ask;
use crate::support::process::Database;
use crate::support::receiver::{Mood, Reply};
use crate::support::scene::Scene;
use crate::support::{eventually, on_both, say};

/// How many messages the noisy one has waiting.
const NOISY: usize = 50_000;
/// How many others there are, and for how many seconds each sends one message.
const QUIET: usize = 10;
const SECONDS: usize = 10;
/// How long the handler takes for a message, and how many it takes at once.
const WORK: Duration = Duration::from_millis(50);
const LIMIT: usize = 8;

on_both! {
    one_noisy_key_does_not_starve_the_others
}

async fn one_noisy_key_does_not_starve_the_others(database: Database) {
    let scene = Scene::on(database).await;
    scene.queue_with("q", json!({"concurrency": {"limit": LIMIT}})).await;
    scene.receiver.set("/q", Mood::Slow(WORK, Reply::new(200)));
    let alone = quiet_ones(&scene).await;
    for _ in 0..NOISY / 10_000 {
        let lines = "{\"payload\": \"x\", \"fairness_key\": \"noisy\"}\n".repeat(10_000);
        ask(scene.client.batch("q", lines)).await.expect(207);
    }
    let noisy = scene.receiver.count("/q");
    let beside = quiet_ones(&scene).await;
    let noisy = scene.receiver.count("/q") - noisy - QUIET * SECONDS;
    say!("alone {alone:?}, beside {NOISY} waiting {beside:?}; {noisy} of those came meanwhile");
    assert!(noisy > SECONDS * 50, "the handler was busy: {noisy}");
    assert!(beside.0 <= alone.0 * 2, "in the middle: {beside:?} {alone:?}");
    assert!(beside.1 <= alone.1 * 2, "of ten, one took longer: {beside:?} {alone:?}");
}

/// How long the others wait until theirs is handled: half of them, and nine of ten.
async fn quiet_ones(scene: &Scene) -> (Duration, Duration) {
    let mut sent = Vec::new();
    let began = Instant::now();
    for round in 0..SECONDS * QUIET {
        let at = Duration::from_millis(round as u64 * 1_000 / QUIET as u64);
        tokio::time::sleep(at.saturating_sub(began.elapsed())).await;
        let key = format!("quiet {}", round % QUIET);
        let request = scene.client.message_to("q", "x").header("Pumphouse-Fairness-Key", key);
        let asked = Instant::now();
        sent.push((ask(request).await.expect(201).id(), asked));
    }
    let mut waits = Vec::new();
    for (id, asked) in sent {
        let ended = || scene.receiver.deliveries_of(&id).first().and_then(|it| it.ended);
        eventually("it is handled", async || ended().is_some()).await;
        waits.push(ended().expect("it has ended") - asked);
    }
    waits.sort_unstable();
    (waits[waits.len() / 2], waits[waits.len() * 9 / 10])
}
