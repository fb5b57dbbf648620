//! What a handler gets, and what its answer means.

use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::support::client::{number, text};
use crate::support::eventually;
use crate::support::receiver::{Mood, Reply, gaps};
use crate::support::scene::Scene;

#[tokio::test]
async fn a_handler_gets_the_headers_of_the_protocol() {
    let scene =
        Scene::with_flags(crate::support::process::Database::sqlite(), &["--replica", "one"]).await;
    let changes =
        json!({"recovery": {"max_attempts": 7}, "handler": {"headers": {"x-api-key": "k"}}});
    scene.queue_with("q", changes).await;
    let id = scene.client.send("q", "x").await;
    let delivery = scene.receiver.wait_for("/q", 1).await.remove(0);
    let message = scene.client.message(&id).await;
    for (name, value) in [
        ("webhook-id", id.as_str()),
        ("ce-id", &id),
        ("ce-source", "/queues/q"),
        ("ce-type", "pumphouse.message"),
        ("ce-specversion", "1.0"),
        ("pumphouse-queue", "q"),
        ("pumphouse-attempt", "1"),
        ("pumphouse-max-attempts", "7"),
        ("pumphouse-replica", "one"),
        ("x-api-key", "k"),
    ] {
        assert_eq!(delivery.header(name), value, "{name}");
    }
    let moment = |text: &str| text.parse::<Timestamp>().expect("RFC 3339");
    let enqueued_at = moment(&text(&message, "/enqueued_at"));
    assert_eq!(moment(delivery.header("pumphouse-enqueued-at")), enqueued_at);
    assert_eq!(moment(delivery.header("ce-time")), enqueued_at);
    let sent_at = delivery.header("webhook-timestamp").parse::<i64>().expect("seconds");
    assert!((sent_at - delivery.at.as_second()).abs() <= 2, "{sent_at}");
}

#[tokio::test]
async fn a_header_that_is_not_plain_ascii_is_percent_encoded() {
    let scene = Scene::new().await;
    scene.queue("q").await;
    let headers = json!({"x-name": "50% Zo\u{eb}", "x-plain": "50% \"off\""});
    let envelope = json!({"payload": 1, "type": "100% gr\u{fc}\u{df}e", "headers": headers});
    scene.client.send_envelope("q", &envelope).await;
    let delivery = scene.receiver.wait_for("/q", 1).await.remove(0);
    assert_eq!(delivery.header("ce-type"), "100%25%20gr%C3%BC%C3%9Fe");
    assert_eq!(delivery.header("x-name"), "50%25%20Zo%C3%AB");
    assert_eq!(delivery.header("x-plain"), "50% \"off\"");
}

#[tokio::test]
async fn every_status_means_what_the_table_says() {
    let scene = Scene::new().await;
    for status in [200, 201, 202, 204, 206, 226] {
        after_one_answer(&scene, Reply::new(status), "acked", "completed").await;
    }
    for status in [404, 408, 409, 425, 429, 500, 501, 502, 503, 504, 599] {
        after_one_answer(&scene, Reply::new(status), "failed", "completed").await;
    }
    for status in
        [300, 301, 302, 303, 304, 307, 308, 400, 401, 403, 405, 406, 413, 415, 418, 422, 451]
    {
        after_one_answer(&scene, Reply::new(status), "dead_lettered", "dead").await;
    }
}

#[tokio::test]
async fn a_verdict_in_a_header_stands_above_the_status() {
    let scene = Scene::new().await;
    let verdict =
        |status: u16, verdict: &str| Reply::new(status).header("Pumphouse-Verdict", verdict);
    after_one_answer(&scene, verdict(500, "ack"), "acked", "completed").await;
    after_one_answer(&scene, verdict(404, "ack"), "acked", "completed").await;
    after_one_answer(&scene, verdict(200, "retry"), "failed", "completed").await;
    after_one_answer(&scene, verdict(400, "retry"), "failed", "completed").await;
    after_one_answer(&scene, verdict(200, "dead_letter"), "dead_lettered", "dead").await;
    after_one_answer(&scene, verdict(503, "dead_letter"), "dead_lettered", "dead").await;
    after_one_answer(&scene, verdict(200, "discard"), "discarded", "discarded").await;
    after_one_answer(&scene, verdict(500, "discard"), "discarded", "discarded").await;
}

#[tokio::test]
async fn messages_in_an_answer_are_not_lost_in_silence() {
    let scene = Scene::new().await;
    let sends =
        |reply: Reply| reply.header("content-type", "application/vnd.pumphouse.messages+json");
    after_one_answer(&scene, sends(Reply::new(200)), "failed", "completed").await;
    let acks = Reply::new(200).header("Pumphouse-Verdict", "ack");
    after_one_answer(&scene, sends(acks), "failed", "completed").await;
}

#[tokio::test]
async fn every_failure_can_be_made_worth_a_retry() {
    let scene = Scene::new().await;
    scene.queue_with("q", json!({"recovery": {"retry_statuses": "all"}})).await;
    scene.receiver.set("/q", first(Reply::new(400)));
    let id = scene.client.send("q", "x").await;
    eventually("it is completed", async || scene.client.state(&id).await == "completed").await;
    assert_eq!(scene.receiver.deliveries_of(&id).len(), 2);
}

#[tokio::test]
async fn gone_sets_the_message_aside_and_stops_the_queue() {
    let scene = Scene::new().await;
    scene.queue_with("q", json!({"concurrency": {"limit": 1}})).await;
    scene.receiver.set("/q", Mood::status(410));
    let id = scene.client.send("q", "x").await;
    eventually("it is dead", async || scene.client.state(&id).await == "dead").await;
    eventually("it is stopped", async || scene.client.queue("q").await["state"] == "stopped").await;
    let stopped = scene.client.queue("q").await["stopped"].clone();
    assert!(text(&stopped, "/reason").contains("410"), "{stopped}");
    assert_eq!(stopped["by"], "handler");
    let waits = scene.client.send("q", "y").await;
    scene.receiver.set("/q", Mood::ack());
    assert_eq!(scene.client.state(&waits).await, "ready");
    assert_eq!(scene.receiver.count("/q"), 1);
    scene.client.start_queue("q").await;
    eventually("it goes on", async || scene.client.state(&waits).await == "completed").await;
}

#[tokio::test]
async fn a_message_that_keeps_failing_ends_as_a_dead_letter() {
    let scene = Scene::new().await;
    scene.queue_with("q", json!({"recovery": {"max_attempts": 4}})).await;
    scene.receiver.set("/q", Mood::status(500));
    let id = scene.client.send("q", "x").await;
    eventually("it is dead", async || scene.client.state(&id).await == "dead").await;
    let deliveries = scene.receiver.deliveries_of(&id);
    let attempts = deliveries.iter().map(|delivery| delivery.attempt).collect::<Vec<_>>();
    assert_eq!(attempts, [1, 2, 3, 4]);
    let message = scene.client.message(&id).await;
    let outcome = |n: u64| {
        let all = message["deliveries"].as_array().expect("deliveries");
        all.iter().find(|delivery| delivery["number"] == n).map(|delivery| &delivery["outcome"])
    };
    assert_eq!(outcome(3), Some(&json!("failed")));
    assert_eq!(outcome(4), Some(&json!("dead_lettered")));
}

#[tokio::test]
async fn backoff_waits_after_the_immediate_retries() {
    let scene = Scene::new().await;
    let backoff = json!({"base": "200ms", "factor": 2, "max": "300ms", "jitter": "none"});
    let recovery = json!({"immediate": 1, "max_attempts": 5, "backoff": backoff});
    scene.queue_with("q", json!({"recovery": recovery})).await;
    scene.receiver.set("/q", Mood::status(500));
    scene.client.send("q", "x").await;
    let gaps = gaps(&scene.receiver.wait_for("/q", 5).await);
    let at_least = [0, 200, 300, 300].map(Duration::from_millis);
    for (gap, at_least) in gaps.iter().zip(at_least) {
        assert!(*gap >= at_least, "{gaps:?}");
    }
    assert!(gaps[0] < Duration::from_millis(200), "the first retry is at once: {gaps:?}");
}

#[tokio::test]
async fn retry_after_is_never_undercut_and_capped() {
    let scene = Scene::new().await;
    scene.queue_with("q", json!({"recovery": {"retry_after_max": "1s"}})).await;
    let http_date = "Fri, 31 Dec 2100 23:59:59 GMT";
    for (number, value) in ["1", "3600", http_date].into_iter().enumerate() {
        scene.receiver.set("/q", first(Reply::new(503).header("Retry-After", value)));
        let id = scene.client.send("q", number.to_string()).await;
        eventually("it is completed", async || scene.client.state(&id).await == "completed").await;
        let gap = gaps(&scene.receiver.deliveries_of(&id))[0];
        assert!(gap >= Duration::from_secs(1), "Retry-After {value}: {gap:?}");
        assert!(gap < Duration::from_secs(20), "Retry-After {value}: {gap:?}");
    }
    let verdict = Reply::new(200).header("Pumphouse-Verdict", "retry").header("Retry-After", "1");
    scene.receiver.set("/q", first(verdict));
    let id = scene.client.send("q", "x").await;
    eventually("it is completed", async || scene.client.state(&id).await == "completed").await;
    assert!(gaps(&scene.receiver.deliveries_of(&id))[0] >= Duration::from_secs(1));
}

#[tokio::test]
async fn a_retry_after_that_says_nothing_is_a_retry_as_any_other() {
    let scene = Scene::new().await;
    let past = "Sun, 06 Nov 1994 08:49:37 GMT";
    for value in ["soon", "", "NaN", "-5", "-1e300", "Infinity", "1e300x", "0", past] {
        let reply = Reply::new(503).header("Retry-After", value);
        after_one_answer(&scene, reply, "failed", "completed").await;
    }
    scene.queue_with("q", json!({"recovery": {"retry_after_max": "200ms"}})).await;
    for value in ["1e300", "99999999999999999999999999", "18446744073709551616"] {
        scene.receiver.set("/q", first(Reply::new(503).header("Retry-After", value)));
        let id = scene.client.send("q", "x").await;
        eventually(value, async || scene.client.state(&id).await == "completed").await;
    }
}

#[tokio::test]
async fn a_redirect_is_never_followed() {
    let scene = Scene::new().await;
    scene.queue("q").await;
    let canary = scene.receiver.url("/canary");
    for status in [301, 302, 303, 307, 308] {
        scene.receiver.set("/q", Reply::new(status).header("Location", &canary).into());
        let id = scene.client.send("q", "x").await;
        eventually("it is dead", async || scene.client.state(&id).await == "dead").await;
    }
    assert_eq!(scene.receiver.count("/canary"), 0);
}

#[tokio::test]
async fn the_first_four_kib_of_an_answer_are_kept() {
    let scene = Scene::new().await;
    scene.queue("q").await;
    scene.receiver.set("/q", Reply::new(200).body("y".repeat(10_000)).into());
    let id = scene.client.send("q", "x").await;
    eventually("it is completed", async || scene.client.state(&id).await == "completed").await;
    let message = scene.client.message(&id).await;
    assert_eq!(message["deliveries"][0]["answer"], Value::from("y".repeat(4096)));
}

/// A first answer of this kind, and acks after it.
fn first(reply: Reply) -> Mood {
    Mood::by(move |delivery| if delivery.attempt == 1 { reply.clone().into() } else { Mood::ack() })
}

/// Sends a message whose first delivery is answered so; checks that delivery's outcome and the final state.
async fn after_one_answer(scene: &Scene, reply: Reply, outcome: &str, state: &str) {
    let what = format!("{reply:?}");
    scene.queue("q").await;
    scene.receiver.set("/q", first(reply));
    let id = scene.client.send("q", "x").await;
    let settled = format!("{what} ends {state}");
    eventually(&settled, async || scene.client.state(&id).await == state).await;
    let message = scene.client.message(&id).await;
    let deliveries = message["deliveries"].as_array().expect("deliveries");
    let delivery = deliveries.iter().find(|delivery| number(delivery, "/number") == 1);
    let delivery = delivery.unwrap_or_else(|| panic!("{what}: {message}"));
    assert_eq!(delivery["outcome"], outcome, "{what}");
    let expected = if outcome == "failed" { 2 } else { 1 };
    assert_eq!(deliveries.len(), expected, "{what}: {message}");
}
