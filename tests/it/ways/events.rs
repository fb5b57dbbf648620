//! CloudEvents, with the official SDK as the peer and with what it does not say.

use http::Method;
use serde_json::json;

use crate::support::client::{ask, number};
use crate::support::process::Database;
use crate::support::python;
use crate::support::scene::Scene;
use crate::support::{on_both, say};

on_both! {
    the_official_sdk_sends_in_three_modes_and_knows_what_arrives
}

async fn the_official_sdk_sends_in_three_modes_and_knows_what_arrives(database: Database) {
    let scene = Scene::on(database).await;
    let base = format!("http://{}", scene.process.address());
    let said = python::run(include_str!("sdk_events.py"), &[&base]).await;
    say!("{}", said.trim());
    assert_eq!(said.trim(), "48 events arrived as they were sent");
}

#[tokio::test]
async fn an_event_that_is_none_is_refused_and_keeps_nothing() {
    let scene = Scene::new().await;
    scene.queue_with("q", json!({"concurrency": {"limit": 0}})).await;
    let event = |more: serde_json::Value| {
        let mut event = json!({"specversion": "1.0", "id": "1", "source": "/s", "type": "t"});
        for (name, value) in more.as_object().unwrap() {
            event[name] = value.clone();
        }
        event
    };
    let post = |content_type: &str, body: String| {
        let request = scene.client.request(Method::POST, "/v1/queues/q/messages").body(body);
        request.header("content-type", content_type)
    };
    let structured = "application/cloudevents+json; charset=utf-8";
    for (more, pointer) in [
        (json!({"id": null}), "/id"),
        (json!({"specversion": "0.3"}), "/specversion"),
        (json!({"time": "yesterday"}), "/time"),
        (json!({"Upper": "x"}), "/Upper"),
        (json!({"nested": {}}), "/nested"),
    ] {
        let answer = ask(post(structured, event(more.clone()).to_string())).await.expect(422);
        assert_eq!(answer.pointers(), [pointer], "{more}");
    }
    ask(post(structured, "{".to_owned())).await.expect(400);
    for header in ["ce-id", "ce-source", "ce-type", "ce-specversion"] {
        let mut request = post("text/plain", "x".to_owned());
        for (name, value) in
            [("ce-id", "1"), ("ce-source", "/s"), ("ce-type", "t"), ("ce-specversion", "1.0")]
        {
            if name != header {
                request = request.header(name, value);
            }
        }
        assert_eq!(
            ask(request).await.expect(422).pointers(),
            [header],
            "a required one is missing"
        );
    }
    let other = post(structured, event(json!({})).to_string()).header("pumphouse-type", "u");
    assert_eq!(ask(other).await.expect(422).pointers(), ["pumphouse-type"]);
    let mixed = post("application/vnd.pumphouse.message+json", "{\"payload\":1}".to_owned());
    assert_eq!(ask(mixed.header("ce-id", "1")).await.expect(422).pointers(), ["ce-id"]);
    assert_eq!(scene.client.all("/v1/messages?queue=q").await.len(), 0);
    // Each of a batch stands for itself.
    let batch = json!([
        event(json!({})),
        event(json!({"type": null})),
        event(json!({"id": "2"})),
        event(json!({"id": "2"}))
    ]);
    let answer =
        ask(post("application/cloudevents-batch+json", batch.to_string())).await.expect(207).json();
    let statuses = [0, 1, 2, 3].map(|place| number(&answer, &format!("/items/{place}/status")));
    assert_eq!(statuses, [201, 422, 201, 200]);
    // Options go along, and a key of its own stands above that of the event.
    let keyed = |key: &str| {
        let request = post(structured, event(json!({"id": "3"})).to_string());
        request.header("idempotency-key", key).header("pumphouse-delay", "1h")
    };
    let first = ask(keyed("a")).await.expect(201);
    assert_eq!(first.json()["state"], "scheduled");
    assert_ne!(ask(keyed("b")).await.expect(201).id(), first.id());
    let changed = post(structured, event(json!({"data": 1})).to_string());
    ask(changed).await.expect_problem(422, "idempotency-key-reused");
    let shown = scene.client.message(&first.id()).await;
    assert_eq!((&shown["event"]["source"], &shown["type"]), (&json!("/s"), &json!("t")));
}
