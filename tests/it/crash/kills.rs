//! Thirty kills at random moments under load, on both databases.

use std::time::Duration;

use serde_json::json;

use crate::support::chance::{Chance, say};
use crate::support::ledger::{Ledger, doubled};
use crate::support::process::{Database, Process};
use crate::support::receiver::{Delivery, Mood};
use crate::support::scene::Scene;
use crate::support::senders::Senders;
use crate::support::{eventually, on_both, pass};

const KILLS: usize = 30;
const LIMIT: usize = 16;
const REPLICA: &[&str] = &["--replica", "one"];

on_both! { nothing_is_lost_over_thirty_kills_and_every_extra_delivery_has_a_cause }

async fn nothing_is_lost_over_thirty_kills_and_every_extra_delivery_has_a_cause(
    database: Database,
) {
    let mut chance = Chance::new();
    let mut scene = Scene::with_flags(database, REPLICA).await;
    let recovery = json!({"max_attempts": 1000, "max_crashes": 1000});
    scene.queue_with("q", json!({"concurrency": {"limit": LIMIT}, "recovery": recovery})).await;
    scene.receiver.set("/q", Mood::by(mostly_well));
    let senders = Senders::start(4, scene.client.clone(), "q");

    for kill in 0..KILLS {
        // Something has been promised since the last kill, and then a moment that nobody chose.
        let enough = senders.promised() + chance.below(20) as usize;
        eventually("there is a load", async || senders.promised() > enough).await;
        pass(chance.span(Duration::from_millis(100))).await;
        scene.process.kill_hard().await;
        if kill % 4 == 3 {
            // Once more while it starts: before it has the lock, while it migrates, while it recovers.
            let after = chance.span(Duration::from_millis(60));
            Process::start_and_kill(&scene.database, REPLICA, after).await;
        }
        scene.restart().await;
        senders.use_client(scene.client.clone());
    }
    let promised = senders.finish().await;
    let handled = everything_settles(&scene).await;

    say(&format!("{} messages, {} deliveries", promised.len(), handled.len()));
    assert!(promised.len() > KILLS * 8, "there was a load: {}", promised.len());
    let ledger = Ledger::read(promised, &scene.client, "q", &scene.receiver, "/q").await;
    ledger.check();
    assert_eq!(ledger.kept.len(), ledger.promised.len(), "what was repeated was taken once");
    let most = scene.receiver.most_open("/q");
    assert!(most <= LIMIT, "{most} at once");
    // A kill can double what was open and what was answered and not yet committed, and no more.
    let doubled = doubled(&handled);
    assert!(doubled <= KILLS * 2 * LIMIT, "{doubled} were handled more than once");
}

/// Fails one in five, and takes a moment, so that a kill finds something open.
fn mostly_well(delivery: &Delivery) -> Mood {
    match delivery.body.len() % 2 {
        0 => Mood::slow(Duration::from_millis(5)),
        _ => Mood::one_in_five_fails(),
    }
}

async fn everything_settles(scene: &Scene) -> Vec<Delivery> {
    eventually("everything is settled", async || {
        let stats = scene.client.queue("q").await["stats"].clone();
        ["ready", "scheduled", "in_flight"].iter().all(|count| stats[*count] == 0)
    })
    .await;
    scene.receiver.deliveries("/q")
}
