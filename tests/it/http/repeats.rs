//! Sending the same thing twice: idempotency keys.

use futures::future::join_all;
use serde_json::json;

use crate::support::client::{Answer, ENVELOPE, ask};
use crate::support::eventually;
use crate::support::scene::Scene;

#[tokio::test]
async fn a_repeat_is_answered_with_the_first_answer() {
    let scene = Scene::new().await;
    scene.queue("once").await;
    let first = send(&scene, "key-1", "x").await.expect(201);
    assert_eq!(first.header("idempotency-replayed"), "");
    // Bare and quoted are the same key.
    for key in ["key-1", "\"key-1\""] {
        let again = send(&scene, key, "x").await.expect(200);
        assert_eq!(again.header("idempotency-replayed"), "true");
        let (first, again) = (first.json(), again.json());
        assert_eq!(again["duplicate"], true);
        for member in ["id", "queue", "state", "enqueued_at", "deliver_at"] {
            assert_eq!(again[member], first[member], "{member}");
        }
    }
    let counted = scene.client.metrics().await;
    assert_eq!(counted.value("pumphouse_messages_duplicate_total", &[("queue", "once")]), 2.0);
    assert_eq!(counted.value("pumphouse_messages_enqueued_total", &[("queue", "once")]), 1.0);
}

#[tokio::test]
async fn a_repeat_is_recognised_after_completion_and_after_a_restart() {
    let mut scene = Scene::new().await;
    scene.queue("once").await;
    let id = send(&scene, "key-1", "x").await.expect(201).id();
    eventually("it is completed", async || scene.client.state(&id).await == "completed").await;
    scene.process.kill_hard().await;
    scene.restart().await;
    assert_eq!(send(&scene, "key-1", "x").await.expect(200).id(), id);
    assert_eq!(scene.receiver.count("/once"), 1);
}

#[tokio::test]
async fn a_key_with_another_request_is_refused() {
    let scene = Scene::new().await;
    scene.queue("once").await;
    send(&scene, "key-1", "x").await.expect(201);
    let other_body = send(&scene, "key-1", "y").await.expect(422);
    assert_eq!(other_body.problem(), "idempotency-key-reused");
    let base = scene.client.message_to("once", "x").header("Idempotency-Key", "key-1");
    let other_type =
        base.try_clone().expect("it can be sent twice").header("content-type", "text/x");
    assert_eq!(ask(other_type).await.expect(422).problem(), "idempotency-key-reused");
    let other_option = base.header("Pumphouse-Priority", "3");
    assert_eq!(ask(other_option).await.expect(422).problem(), "idempotency-key-reused");
    assert_eq!(scene.client.all("/v1/messages?queue=once").await.len(), 1);
}

#[tokio::test]
async fn a_key_belongs_to_its_queue() {
    let scene = Scene::new().await;
    scene.queue("once").await;
    scene.queue("other").await;
    let one = send(&scene, "key-1", "x").await.expect(201).id();
    let request = scene.client.message_to("other", "x").header("Idempotency-Key", "key-1");
    assert_ne!(ask(request).await.expect(201).id(), one);
}

#[tokio::test]
async fn a_repeat_is_recognised_on_a_full_queue() {
    let scene = Scene::new().await;
    scene.queue_with("once", json!({"max_messages": 1, "concurrency": {"limit": 0}})).await;
    let id = send(&scene, "key-1", "x").await.expect(201).id();
    send(&scene, "key-2", "x").await.expect(429);
    assert_eq!(send(&scene, "key-1", "x").await.expect(200).id(), id);
}

#[tokio::test]
async fn of_sixty_four_at_once_one_is_taken() {
    let scene = Scene::new().await;
    scene.queue("once").await;
    let answers = join_all((0..64).map(|_| send(&scene, "key-1", "x"))).await;
    let taken = answers.iter().filter(|answer| answer.status == 201).count();
    assert_eq!(taken, 1, "{answers:?}");
    let id = answers.iter().find(|answer| answer.status == 201).map(Answer::id);
    for answer in &answers {
        match answer.status {
            200 | 201 => assert_eq!(Some(answer.id()), id),
            409 => drop(answer.problem()),
            other => panic!("{other}: {}", answer.text()),
        }
    }
    assert_eq!(scene.client.all("/v1/messages?queue=once").await.len(), 1);
}

#[tokio::test]
async fn an_envelope_carries_its_key() {
    let scene = Scene::new().await;
    scene.queue("once").await;
    let envelope = json!({"payload": 1, "idempotency_key": "key-1"});
    let send = || {
        let request = scene.client.message_to("once", envelope.to_string());
        ask(request.header("content-type", ENVELOPE))
    };
    let id = send().await.expect(201).id();
    assert_eq!(send().await.expect(200).id(), id);
}

#[tokio::test]
async fn a_batch_that_is_repeated_is_taken_once() {
    let scene = Scene::new().await;
    scene.queue("once").await;
    let lines = "{\"payload\":1}\n{\"payload\":2}\n";
    let send = |lines: &'static str| {
        ask(scene.client.batch("once", lines).header("Idempotency-Key", "batch-1"))
    };
    let first = send(lines).await.expect(207);
    let again = send(lines).await;
    assert_eq!(again.header("idempotency-replayed"), "true", "{again:?}");
    assert_eq!(again.ids(), first.ids());
    send("{\"payload\":1}\n").await.expect(422);
    assert_eq!(scene.client.all("/v1/messages?queue=once").await.len(), 2);
}

#[tokio::test]
async fn a_whole_batch_that_is_repeated_says_so() {
    let scene = Scene::new().await;
    scene.queue("once").await;
    let send = async |atomic: bool| {
        let path = "/v1/queues/once/messages/batch";
        let request = scene.client.request(reqwest::Method::POST, path);
        let batch = json!({"messages": [{"payload": 1}, {"payload": 2}], "atomic": atomic});
        ask(request.header("Idempotency-Key", "batch-1").json(&batch)).await
    };
    let first = send(true).await.expect(201);
    let again = send(true).await.expect(200);
    assert_eq!(again.header("idempotency-replayed"), "true");
    assert_eq!(again.ids(), first.ids());
    assert_eq!(send(false).await.expect(422).problem(), "idempotency-key-reused");
}

#[tokio::test]
async fn a_batch_in_another_form_is_another_request() {
    let scene = Scene::new().await;
    scene.queue("once").await;
    let send = async |query: &str, media_type: &str| {
        let path = format!("/v1/queues/once/messages/batch{query}");
        let request = scene.client.request(reqwest::Method::POST, &path);
        let request = request.header("content-type", media_type).body("{\"payload\":1}\n");
        ask(request.header("Idempotency-Key", "batch-1")).await
    };
    send("", "application/x-ndjson").await.expect(207);
    for (query, media_type) in [("?atomic=true", "application/x-ndjson"), ("", "application/jsonl")]
    {
        let answer = send(query, media_type).await.expect(422);
        assert_eq!(answer.problem(), "idempotency-key-reused");
    }
    assert_eq!(scene.client.all("/v1/messages?queue=once").await.len(), 1);
}

#[tokio::test]
async fn keys_in_a_batch_cover_their_items() {
    let scene = Scene::new().await;
    scene.queue("once").await;
    let lines =
        "{\"payload\":1,\"idempotency_key\":\"a\"}\n{\"payload\":2,\"idempotency_key\":\"b\"}\n";
    let first = ask(scene.client.batch("once", lines)).await.expect(207);
    let more = format!("{lines}{{\"payload\":3,\"idempotency_key\":\"c\"}}\n");
    let again = ask(scene.client.batch("once", more)).await.expect(207);
    let items = again.json();
    let statuses = [0, 1, 2].map(|at| items["items"][at]["status"].as_u64());
    assert_eq!(statuses, [Some(200), Some(200), Some(201)]);
    assert_eq!(again.ids()[..2], first.ids());
    // The same key twice in one batch is one message.
    let twice =
        "{\"payload\":4,\"idempotency_key\":\"d\"}\n{\"payload\":4,\"idempotency_key\":\"d\"}\n";
    let twice = ask(scene.client.batch("once", twice)).await.expect(207).ids();
    assert_eq!(twice[0], twice[1]);
    assert_eq!(scene.client.all("/v1/messages?queue=once").await.len(), 4);
}

async fn send(scene: &Scene, key: &str, body: &'static str) -> Answer {
    ask(scene.client.message_to("once", body).header("Idempotency-Key", key)).await
}
