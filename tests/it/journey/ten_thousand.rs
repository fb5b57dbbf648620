//! Ten thousand messages of real input, and a handler that fails one in five.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use serde_json::json;

use crate::support::client::{Client, ask, text};
use crate::support::process::Database;
use crate::support::receiver::{Delivery, Mood};
use crate::support::scene::Scene;
use crate::support::text::{Sample, samples};
use crate::support::{eventually, eventually_within, on_both};

const MESSAGES: usize = 10_000;
const BATCH: usize = 1_000;
const LIMIT: usize = 64;
/// How long a slow machine may take for them.
const ENOUGH: Duration = Duration::from_secs(120);

on_both! { all_messages_of_real_input_get_through_a_handler_that_fails_one_in_five }

async fn all_messages_of_real_input_get_through_a_handler_that_fails_one_in_five(
    database: Database,
) {
    let scene = Scene::on(database).await;
    scene.queue_with("lines", json!({"concurrency": {"limit": LIMIT}})).await;
    scene.receiver.set("/lines", Mood::one_in_five_fails());

    let sent = send_all(&scene.client, &samples(MESSAGES)).await;
    assert_eq!(sent.len(), MESSAGES, "every message has an id of its own");

    eventually_within("all are handled", ENOUGH, async || {
        scene.receiver.successes("/lines") >= MESSAGES
    })
    .await;
    eventually("all are completed", async || {
        let metrics = scene.client.metrics().await;
        let done = metrics.value("pumphouse_messages_completed_total", &[("queue", "lines")]);
        done >= MESSAGES as f64
    })
    .await;

    let handled = scene.receiver.deliveries("/lines");
    every_message_was_handled_byte_for_byte(&sent, &handled);
    every_message_was_tried_as_often_as_it_had_to_be(&handled);
    let most = scene.receiver.most_open("/lines");
    assert!(most <= LIMIT, "{most} at once");
    the_counts_agree(&scene, &handled).await;
}

/// Sends all samples as lines; gives the bytes that belong to each id.
async fn send_all(client: &Client, samples: &[Sample]) -> HashMap<String, Vec<u8>> {
    let mut sent = HashMap::new();
    for part in samples.chunks(BATCH) {
        let lines = part.iter().map(|sample| sample.line.as_str()).collect::<Vec<_>>().join("\n");
        let answer = ask(client.batch("lines", lines)).await.expect(207);
        let ids = answer.ids();
        assert_eq!(ids.len(), part.len());
        sent.extend(ids.into_iter().zip(part.iter().map(|sample| sample.payload.clone())));
    }
    sent
}

fn every_message_was_handled_byte_for_byte(sent: &HashMap<String, Vec<u8>>, handled: &[Delivery]) {
    let mut missing = sent.keys().map(String::as_str).collect::<std::collections::HashSet<_>>();
    for delivery in handled {
        let payload = sent.get(&delivery.id).expect("nothing is delivered that was not sent");
        assert_eq!(delivery.body, *payload, "{}", delivery.id);
        if delivery.succeeded() {
            missing.remove(delivery.id.as_str());
        }
    }
    assert!(missing.is_empty(), "{} were never handled: {missing:?}", missing.len());
}

/// Nothing crashed, so nothing may come twice: failures and one success, numbered in order. A gap is an attempt that was
/// given back before it was delivered, because it waited for a place for too long: promise 3 lets its number go.
fn every_message_was_tried_as_often_as_it_had_to_be(handled: &[Delivery]) {
    let mut tries = BTreeMap::<&str, Vec<(u32, bool)>>::new();
    for delivery in handled {
        tries.entry(&delivery.id).or_default().push((delivery.attempt, delivery.succeeded()));
    }
    for (id, tries) in tries {
        let last = tries.len();
        let in_order = tries.windows(2).all(|pair| pair[0].0 < pair[1].0) && tries[0].0 >= 1;
        let right =
            in_order && tries.iter().zip(1..).all(|((_, ok), number)| *ok == (number == last));
        assert!(right, "{id}: {tries:?}");
    }
}

async fn the_counts_agree(scene: &Scene, handled: &[Delivery]) {
    let items = scene.client.all("/v1/messages?queue=lines&state=completed").await;
    assert_eq!(items.len(), MESSAGES, "completed, says the API");
    assert!(items.iter().all(|item| text(item, "/state") == "completed"));
    let failures = handled.iter().filter(|delivery| !delivery.succeeded()).count();
    let share = failures as f64 / handled.len() as f64;
    assert!((0.15..0.25).contains(&share), "one in five failed, not {share}");
    let metrics = scene.client.metrics().await;
    let deliveries = |outcome: &str| {
        let labels = [("queue", "lines"), ("outcome", outcome)];
        metrics.value("pumphouse_deliveries_total", &labels)
    };
    assert_eq!(deliveries("acked"), MESSAGES as f64);
    assert_eq!(deliveries("failed"), failures as f64);
    assert_eq!(deliveries("lease_lost") + deliveries("released"), 0.0);
    let total = |name: &str| metrics.value(name, &[("queue", "lines")]);
    assert_eq!(total("pumphouse_messages_enqueued_total"), MESSAGES as f64);
    assert_eq!(total("pumphouse_messages_completed_total"), MESSAGES as f64);
    assert_eq!(total("pumphouse_messages_dead_total"), 0.0);
    let stats = scene.client.queue("lines").await["stats"].clone();
    for count in ["ready", "scheduled", "in_flight", "dead"] {
        assert_eq!(stats[count], 0, "{count}: {stats}");
    }
}
