//! Sending many messages in one request.

use serde_json::{Value, json};

use crate::support::client::{Answer, ask, text};
use crate::support::scene::Scene;

#[tokio::test]
async fn a_batch_in_json_is_answered_item_by_item_in_order() {
    let scene = Scene::new().await;
    scene.queue("batch").await;
    let messages = (0..5).map(|number| json!({"payload": number})).collect::<Vec<_>>();
    let answer = post(&scene, &json!({"messages": messages})).await.expect(207);
    let ids = answer.ids();
    assert_eq!(ids.len(), 5);
    assert!(statuses(&answer).iter().all(|status| *status == 201), "{}", answer.text());
    for (number, id) in ids.iter().enumerate() {
        let payload = scene.client.get(&format!("/v1/messages/{id}/payload")).await.expect(200);
        assert_eq!(payload.text(), number.to_string());
    }
    scene.receiver.wait_for("/batch", 5).await;
}

#[tokio::test]
async fn a_batch_in_lines_takes_what_is_good_and_names_what_is_not() {
    let scene = Scene::new().await;
    scene.queue("batch").await;
    let lines = "{\"payload\": 1}\n{\"payload\": 2, \"priority\": 1000}\n{\"payload\": 3}\n";
    let answer = ask(scene.client.batch("batch", lines)).await.expect(207);
    assert_eq!(statuses(&answer), [201, 422, 201]);
    let problem = &answer.json()["items"][1]["problem"];
    assert_eq!(problem["status"], 422);
    assert!(problem["code"].is_string(), "{problem}");
    let delivered = scene.receiver.wait_for("/batch", 2).await;
    let mut bodies = delivered.into_iter().map(|delivery| delivery.body).collect::<Vec<_>>();
    bodies.sort();
    assert_eq!(bodies, ["1", "3"]);
}

#[tokio::test]
async fn lines_may_end_as_they_like_and_be_empty() {
    let scene = Scene::new().await;
    scene.queue("batch").await;
    let answer = ask(scene.client.batch("batch", "{\"payload\":1}\r\n\n{\"payload\":2}")).await;
    assert_eq!(statuses(&answer.expect(207)), [201, 201]);
}

#[tokio::test]
async fn an_atomic_batch_is_taken_whole() {
    let scene = Scene::new().await;
    scene.queue("batch").await;
    let messages = json!([{"payload": 1}, {"payload": 2}]);
    let answer = post(&scene, &json!({"messages": messages, "atomic": true})).await.expect(201);
    assert_eq!(answer.ids().len(), 2);
    scene.receiver.wait_for("/batch", 2).await;
}

#[tokio::test]
async fn an_atomic_batch_with_one_mistake_leaves_nothing() {
    let scene = Scene::new().await;
    scene.queue("batch").await;
    let messages = json!([{"payload": 1}, {"payload": 2, "delay": "soon"}, {"payload": 3}]);
    let answer = post(&scene, &json!({"messages": messages, "atomic": true})).await.expect(422);
    answer.problem();
    assert_eq!(answer.pointers(), ["/messages/1/delay"]);
    assert_eq!(scene.client.all("/v1/messages?queue=batch").await, Vec::<Value>::new());
}

#[tokio::test]
async fn an_atomic_batch_that_does_not_fit_leaves_nothing() {
    let scene = Scene::new().await;
    scene.queue_with("batch", json!({"max_messages": 1, "concurrency": {"limit": 0}})).await;
    let messages = json!([{"payload": 1}, {"payload": 2}]);
    let answer = post(&scene, &json!({"messages": messages, "atomic": true})).await.expect(422);
    assert_eq!(answer.pointers(), ["/messages/1"]);
    assert_eq!(scene.client.all("/v1/messages?queue=batch").await, Vec::<Value>::new());
    let loose = post(&scene, &json!({"messages": messages})).await.expect(207);
    assert_eq!(statuses(&loose), [201, 429]);
}

#[tokio::test]
async fn a_batch_to_no_queue_takes_nothing() {
    let scene = Scene::new().await;
    for atomic in [false, true] {
        let batch = json!({"messages": [{"payload": 1}], "atomic": atomic});
        assert_eq!(post(&scene, &batch).await.expect(404).problem(), "no-such-queue");
    }
}

#[tokio::test]
async fn a_batch_has_a_limit_of_messages() {
    let scene = Scene::new().await;
    scene.queue_with("batch", json!({"concurrency": {"limit": 0}})).await;
    let line = "{\"payload\":0}\n";
    let most = ask(scene.client.batch("batch", line.repeat(10_000))).await.expect(207);
    assert_eq!(most.ids().len(), 10_000);
    ask(scene.client.batch("batch", line.repeat(10_001))).await.expect(413).problem();
    let stats = &scene.client.queue("batch").await["stats"];
    assert_eq!(stats["ready"], 10_000, "{stats}");
}

async fn post(scene: &Scene, body: &Value) -> Answer {
    scene.client.post("/v1/queues/batch/messages/batch", body).await
}

fn statuses(answer: &Answer) -> Vec<u64> {
    let body = answer.json();
    let items = body["items"].as_array().unwrap_or_else(|| panic!("no items: {body}"));
    for item in items.iter().filter(|item| item["status"] == 201) {
        text(item, "/id");
    }
    items.iter().map(|item| item["status"].as_u64().expect("a status")).collect()
}
