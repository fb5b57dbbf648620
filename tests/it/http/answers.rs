//! Messages in a handler's answer: they leave with the ack, or not at all.

use serde_json::{Value, json};

use crate::support::client::{number, text};
use crate::support::process::Database;
use crate::support::receiver::{Mood, Reply};
use crate::support::scene::Scene;
use crate::support::{eventually, on_both};

on_both! {
    what_an_answer_carries_is_sent_with_the_ack
    events_in_an_answer_are_sent_and_go_on_as_they_came
    nothing_is_sent_without_an_ack
    what_cannot_be_sent_makes_a_failed_delivery_and_sends_nothing
}

fn carries(messages: Value) -> Reply {
    Reply::new(200)
        .header("content-type", "application/vnd.pumphouse.messages+json; charset=utf-8")
        .body(json!({"messages": messages}).to_string())
}

async fn what_an_answer_carries_is_sent_with_the_ack(database: Database) {
    let scene = Scene::on(database).await;
    for name in ["a", "b", "c"] {
        scene.queue(name).await;
    }
    scene.receiver.set(
        "/a",
        carries(json!([
            {"queue": "b", "payload": {"n": 1}, "type": "first", "headers": {"X-Kept": "yes"}},
            {"queue": "c", "payload_base64": "eA==", "content_type": "text/plain", "correlation_id": "own"},
            {"queue": "c", "payload": 3, "delay": "1h"},
        ]))
        .into(),
    );
    let envelope = json!({"payload": "root", "correlation_id": "order-17"});
    let root = scene.client.send_envelope("a", &envelope).await;
    let first = scene.receiver.wait_for("/b", 1).await[0].clone();
    let second = scene.receiver.wait_for("/c", 1).await[0].clone();
    assert_eq!((&first.body[..], &second.body[..]), (&br#"{"n":1}"#[..], &b"x"[..]));
    assert_eq!(first.header("pumphouse-type"), "first");
    assert_eq!((first.header("x-kept"), second.header("content-type")), ("yes", "text/plain"));
    for (sent, correlation) in [(&first, "order-17"), (&second, "own")] {
        assert_eq!(sent.header("pumphouse-causation-id"), root);
        assert_eq!(sent.header("pumphouse-correlation-id"), correlation);
    }
    let conversation = scene.client.all("/v1/messages?correlation_id=order-17").await;
    let queues = conversation.iter().map(|it| text(it, "/queue")).collect::<Vec<_>>();
    assert_eq!(queues.len(), 3, "{conversation:?}");
    assert!(conversation.iter().filter(|it| it["causation_id"] == root).count() == 2);
    assert_eq!(number(&scene.client.queue("c").await["stats"], "/scheduled"), 1);
    assert_eq!(scene.client.state(&root).await, "completed");
}

async fn events_in_an_answer_are_sent_and_go_on_as_they_came(database: Database) {
    let scene = Scene::on(database).await;
    for name in ["a", "b"] {
        scene.queue(name).await;
    }
    let events = |events: Value| {
        Reply::new(200)
            .header("content-type", "application/cloudevents-batch+json; charset=utf-8")
            .body(events.to_string())
    };
    let event = json!({"specversion": "1.0", "id": "e 1", "source": "/shop", "type": "order.placed",
        "subject": "größer", "tenant": 7, "queue": "b", "datacontenttype": "text/plain", "data": "x"});
    scene.receiver.set("/a", events(json!([event, event])).into());
    let root = scene.client.send("a", "x").await;
    let sent = scene.receiver.wait_for("/b", 2).await;
    for delivery in &sent {
        let said = ["ce-specversion", "ce-id", "ce-source", "ce-type", "ce-subject", "ce-tenant"];
        let said = said.map(|name| delivery.header(name));
        assert_eq!(said, ["1.0", "e%201", "/shop", "order.placed", "gr%C3%B6%C3%9Fer", "7"]);
        assert_eq!((delivery.header("ce-queue"), delivery.header("ce-time")), ("", ""));
        assert_eq!(
            (&delivery.body[..], delivery.header("content-type")),
            (&b"x"[..], "text/plain")
        );
        assert_eq!(delivery.header("pumphouse-causation-id"), root);
    }
    assert_ne!(sent[0].id, sent[1].id, "each is a message of its own");
    scene.queue_with("a", json!({"recovery": {"max_attempts": 1}})).await;
    scene.receiver.set("/a", events(json!([event, {"queue": "b"}])).into());
    let id = scene.client.send("a", "x").await;
    eventually("it is dead", async || scene.client.state(&id).await == "dead").await;
    let error = scene.client.message(&id).await["deliveries"][0]["error"].clone();
    assert!(text(&error, "").contains("/1/"), "{error}");
    assert_eq!(scene.receiver.count("/b"), 2);
}

async fn nothing_is_sent_without_an_ack(database: Database) {
    let scene = Scene::on(database).await;
    for name in ["a", "b"] {
        scene.queue(name).await;
    }
    let one = json!([{"queue": "b", "payload": 1}]);
    for (verdict, state) in
        [("retry", "completed"), ("dead_letter", "dead"), ("discard", "discarded")]
    {
        let reply = carries(one.clone()).header("pumphouse-verdict", verdict);
        scene.receiver.set(
            "/a",
            Mood::by(move |delivery| match delivery.attempt {
                1 => reply.clone().into(),
                _ => Mood::ack(),
            }),
        );
        let id = scene.client.send("a", "x").await;
        eventually(state, async || scene.client.state(&id).await == state).await;
    }
    let wrong_status = Reply::new(500)
        .header("content-type", "application/vnd.pumphouse.messages+json")
        .body(json!({"messages": one}).to_string());
    scene.queue_with("a", json!({"recovery": {"max_attempts": 1}})).await;
    scene.receiver.set("/a", wrong_status.into());
    let id = scene.client.send("a", "x").await;
    eventually("it is dead", async || scene.client.state(&id).await == "dead").await;
    assert_eq!(scene.client.all("/v1/messages?queue=b").await.len(), 0);
}

async fn what_cannot_be_sent_makes_a_failed_delivery_and_sends_nothing(database: Database) {
    let scene = Scene::on(database).await;
    scene.queue_with("a", json!({"recovery": {"max_attempts": 2}})).await;
    scene.queue_with("b", json!({"concurrency": {"limit": 0}})).await;
    scene.queue_with("full", json!({"concurrency": {"limit": 0}, "max_messages": 1})).await;
    scene.client.send("full", "x").await;
    let good = json!({"queue": "b", "payload": 1});
    let huge = "y".repeat(2 << 20);
    for (messages, kind, names) in [
        (json!([good, {"queue": "nowhere", "payload": 1}]), "malformed", "nowhere"),
        (json!([good, {"queue": "full", "payload": 1}]), "malformed", "full"),
        (json!([good, {"payload": 1}]), "malformed", "/messages/1/queue"),
        (json!([good, {"queue": "b", "payload": 1, "delay": "soon"}]), "malformed", "/messages/1"),
        (json!("none"), "malformed", "member"),
        (json!([{"queue": "b", "payload": huge}]), "too_large", "limit"),
    ] {
        scene.receiver.set("/a", carries(messages).into());
        let id = scene.client.send("a", "x").await;
        eventually(names, async || scene.client.state(&id).await == "dead").await;
        let message = scene.client.message(&id).await;
        for attempt in 0..2 {
            let delivery = &message["deliveries"][attempt];
            assert_eq!(delivery["error_kind"], kind, "{names}: {delivery}");
            assert!(text(delivery, "/error").contains(names), "{delivery}");
        }
        assert_eq!(number(&message, "/crashes"), 0, "{message}");
    }
    assert_eq!(scene.client.all("/v1/messages?queue=b").await.len(), 0);
    let stats = scene.client.queue("a").await["stats"].clone();
    assert_eq!(number(&stats, "/in_flight"), 0, "nothing stays leased");
}
