//! A conversation is shown with all that belongs to it.

use serde_json::json;

use crate::support::client::text;
use crate::support::process::Database;
use crate::support::receiver::Reply;
use crate::support::scene::Scene;
use crate::support::{eventually, on_both};

on_both! {
    a_conversation_is_found_from_its_root_to_its_leaves
}

async fn a_conversation_is_found_from_its_root_to_its_leaves(database: Database) {
    let scene = Scene::on(database).await;
    for name in ["a", "b"] {
        scene.queue(name).await;
    }
    let sends = json!({"messages": [{"queue": "b", "payload": 1}, {"queue": "b", "payload": 2}]});
    let sends = Reply::new(200)
        .header("content-type", "application/vnd.pumphouse.messages+json")
        .body(sends.to_string());
    scene.receiver.set("/a", sends.into());
    // Its sender names no conversation: then it is named by its first message.
    let root = scene.client.send("a", "x").await;
    scene.client.send("a", "of another one").await;
    scene.receiver.wait_for("/b", 4).await;
    let list = format!("/v1/messages?correlation_id={root}");
    let conversation = scene.client.all(&list).await;
    let rows = conversation.iter().map(|it| (text(it, "/queue"), it["causation_id"].clone()));
    let rows = rows.collect::<Vec<_>>();
    let child = ("b".to_owned(), json!(root));
    assert_eq!(rows, [child.clone(), child, ("a".to_owned(), json!(null))]);
    let (mut pages, mut cursor) = (Vec::new(), String::new());
    loop {
        let page = scene.client.get(&format!("{list}&limit=1&cursor={cursor}")).await;
        let page = page.expect(200).json();
        pages.extend(page["items"].as_array().expect("a list").iter().map(|it| it["id"].clone()));
        match page["next"].as_str() {
            Some(next) => cursor = next.to_owned(),
            None => break,
        }
    }
    let ids = conversation.iter().map(|it| it["id"].clone()).collect::<Vec<_>>();
    assert_eq!(pages, ids, "one by one, the root last");
    let of_queue = scene.client.all(&format!("{list}&queue=b")).await;
    assert_eq!(of_queue.len(), 2);
    let done = format!("{list}&state=completed");
    eventually("all are done", async || scene.client.all(&done).await.len() == 3).await;
    for delivery in scene.receiver.deliveries("/b") {
        let cause = delivery.header("pumphouse-causation-id");
        assert_eq!(delivery.header("pumphouse-correlation-id"), cause);
    }
}
