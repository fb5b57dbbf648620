//! Dead letters: looked at, brought back, thrown away.

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::support::client::text;
use crate::support::eventually;
use crate::support::receiver::Mood;
use crate::support::scene::Scene;

const DEAD: &str = "/admin/v1/dead-letters";

#[tokio::test]
async fn a_dead_letter_shows_why_it_died() {
    let scene = Scene::new().await;
    let ids = dead_letters(&scene, 3).await;
    let listed = scene.client.all(DEAD).await;
    let mut newest_first = ids.clone();
    newest_first.reverse();
    let listed_ids = listed.iter().map(|item| text(item, "/id")).collect::<Vec<_>>();
    assert_eq!(listed_ids, newest_first);
    let item = &listed[0];
    assert_eq!(item["state"], "dead");
    assert_eq!(item["queue"], "q");
    assert!(text(item, "/reason").contains("422"), "{item}");
    let message = scene.client.message(&ids[2]).await;
    let delivery = &message["deliveries"][0];
    assert_eq!((&delivery["outcome"], &delivery["status"]), (&json!("dead_lettered"), &json!(422)));
    let counted = scene.client.metrics().await;
    assert_eq!(counted.value("pumphouse_messages_dead_total", &[("queue", "q")]), 3.0);
}

#[tokio::test]
async fn dead_letters_are_filtered() {
    let scene = Scene::new().await;
    let ids = dead_letters(&scene, 2).await;
    let since = text(&scene.client.message(&ids[1]).await, "/enqueued_at");
    since.parse::<Timestamp>().expect("RFC 3339");
    for (query, expected) in [
        ("queue=q", vec![&ids[1], &ids[0]]),
        ("queue=other", vec![]),
        ("type=t.0", vec![&ids[0]]),
        (&format!("since={since}"), vec![&ids[1]]),
        (&format!("until={since}"), vec![&ids[0]]),
    ] {
        let listed = scene.client.all(&format!("{DEAD}?{query}")).await;
        let listed = listed.iter().map(|item| text(item, "/id")).collect::<Vec<_>>();
        assert_eq!(listed.iter().collect::<Vec<_>>(), expected, "{query}");
    }
}

#[tokio::test]
async fn a_redriven_letter_keeps_its_id_and_its_numbers_and_starts_anew() {
    let scene = Scene::new().await;
    scene.queue_with("q", json!({"recovery": {"max_attempts": 2}})).await;
    scene.receiver.set("/q", Mood::status(500));
    let id = scene.client.send("q", "x").await;
    eventually("it is dead", async || scene.client.state(&id).await == "dead").await;
    // One more failure: with the old budget it would be dead again at once.
    scene.receiver.set(
        "/q",
        Mood::by(|delivery| match delivery.attempt {
            3 => Mood::status(500),
            _ => Mood::ack(),
        }),
    );
    scene.client.post_nothing(&format!("{DEAD}/{id}/redrive")).await.expect(200);
    eventually("it is completed", async || scene.client.state(&id).await == "completed").await;
    let attempts = scene.receiver.deliveries_of(&id);
    let attempts = attempts.iter().map(|delivery| delivery.attempt).collect::<Vec<_>>();
    assert_eq!(attempts, [1, 2, 3, 4]);
    let message = scene.client.message(&id).await;
    assert_eq!(message["deliveries"].as_array().map(Vec::len), Some(4), "its history stays");
    scene.client.post_nothing(&format!("{DEAD}/{id}/redrive")).await.expect(409).problem();
}

#[tokio::test]
async fn all_letters_of_a_queue_can_be_redriven_at_once() {
    let scene = Scene::new().await;
    let ids = dead_letters(&scene, 20).await;
    scene.receiver.set("/q", Mood::ack());
    let filter = json!({"filter": {"queue": "q"}});
    let answer = scene.client.post("/admin/v1/redrives", &filter).await.expect(200);
    assert_eq!(answer.json()["redriven"], 20);
    for id in &ids {
        eventually("it is completed", async || scene.client.state(id).await == "completed").await;
    }
    assert_eq!(scene.client.all(DEAD).await, Vec::<Value>::new());
}

#[tokio::test]
async fn a_deleted_letter_is_gone() {
    let scene = Scene::new().await;
    let ids = dead_letters(&scene, 2).await;
    scene.client.delete(&format!("{DEAD}/{}", ids[0])).await.expect(204);
    scene.client.get(&format!("/v1/messages/{}", ids[0])).await.expect(404);
    scene.client.delete(&format!("{DEAD}/{}", ids[0])).await.expect(404).problem();
    assert_eq!(scene.client.all(DEAD).await.len(), 1);
    let alive = scene.client.send_envelope("q", &json!({"payload": 1, "delay": "1h"})).await;
    scene.client.delete(&format!("{DEAD}/{alive}")).await.expect(409).problem();
}

/// So many dead letters in the queue `q`, the oldest first, with the types `t.0`, `t.1`, …
async fn dead_letters(scene: &Scene, count: usize) -> Vec<String> {
    scene.queue("q").await;
    scene.receiver.set("/q", Mood::status(422));
    let mut ids = Vec::new();
    for number in 0..count {
        let envelope = json!({"payload": number, "type": format!("t.{number}")});
        let id = scene.client.send_envelope("q", &envelope).await;
        eventually("it is dead", async || scene.client.state(&id).await == "dead").await;
        ids.push(id);
    }
    ids
}
