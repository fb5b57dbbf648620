//! A queue's own rules over the table of the protocol, and what they would lead to.

use serde_json::{Value, json};

use crate::support::client::{number, text};
use crate::support::eventually;
use crate::support::on_both;
use crate::support::process::Database;
use crate::support::receiver::{Mood, Reply};
use crate::support::scene::Scene;

on_both! {
    a_rule_says_otherwise_than_the_table
    a_message_is_moved_under_its_id_with_a_new_budget
    what_cannot_be_moved_any_more_is_dead
}

async fn a_rule_says_otherwise_than_the_table(database: Database) {
    let scene = Scene::on(database).await;
    let rules = json!([
        {"match": {"status": 404}, "action": "discard"},
        {"match": {"status": "4xx", "attempt": "2-"}, "action": "dead_letter"},
        {"match": {"status": [400, "420-429"]}, "action": "retry", "delay": "20ms"},
        {"match": {"error_kind": "reset"}, "action": "dead_letter"},
        {"match": {"header": {"X-Why": "closed"}}, "action": "stop_queue"},
    ]);
    scene.queue_with("q", json!({"recovery": {"rules": rules}})).await;
    for (mood, state, failures) in [
        (Mood::status(404), "discarded", 0),
        (Mood::status(400), "dead", 2),
        (Mood::Close, "dead", 1),
    ] {
        scene.receiver.set("/q", mood);
        let id = scene.client.send("q", "x").await;
        eventually(state, async || scene.client.state(&id).await == state).await;
        let message = scene.client.message(&id).await;
        assert_eq!(number(&message, "/failures"), failures, "{message}");
    }
    scene.receiver.set("/q", Reply::new(500).header("x-why", "closed").into());
    let id = scene.client.send("q", "x").await;
    eventually("the queue stops", async || scene.client.queue("q").await["state"] == "stopped")
        .await;
    let queue = scene.client.queue("q").await;
    assert!(text(&queue, "/stopped/reason").contains("500"), "{queue}");
    eventually("it waits there", async || scene.client.state(&id).await == "ready").await;
    assert_eq!(scene.receiver.deliveries_of(&id).len(), 1, "and is not tried again");
    assert_eq!(number(&scene.client.message(&id).await, "/failures"), 0);
}

async fn a_message_is_moved_under_its_id_with_a_new_budget(database: Database) {
    let scene = Scene::on(database).await;
    scene.queue("second").await;
    let rules = json!([{"match": {"attempt": "3-"}, "action": "move", "to_queue": "second"}]);
    scene.queue_with("first", json!({"recovery": {"rules": rules}})).await;
    scene.receiver.set("/first", Mood::status(500));
    scene.receiver.set(
        "/second",
        Mood::by(|delivery| match delivery.attempt {
            ..6 => Mood::status(500),
            _ => Mood::ack(),
        }),
    );
    let id = scene.client.send("first", "x").await;
    eventually("it is completed", async || scene.client.state(&id).await == "completed").await;
    let attempts =
        |path| scene.receiver.deliveries(path).iter().map(|it| it.attempt).collect::<Vec<_>>();
    assert_eq!((attempts("/first"), attempts("/second")), (vec![1, 2, 3], vec![4, 5, 6]));
    let message = scene.client.message(&id).await;
    assert_eq!((text(&message, "/queue"), number(&message, "/failures")), ("second".into(), 2));
    assert_eq!(message["deliveries"].as_array().map(Vec::len), Some(6), "{message}");
    assert_eq!(message["deliveries"][3]["outcome"], "moved", "{message}");
    for queue in ["first", "second"] {
        let stats = scene.client.queue(queue).await["stats"].clone();
        assert_eq!(
            (number(&stats, "/ready"), number(&stats, "/in_flight")),
            (0, 0),
            "{queue}: {stats}"
        );
    }
}

async fn what_cannot_be_moved_any_more_is_dead(database: Database) {
    let scene = Scene::on(database).await;
    scene.queue("second").await;
    let rules = json!([{"action": "move", "to_queue": "second"}]);
    scene.queue_with("first", json!({"recovery": {"rules": rules}})).await;
    scene.client.delete("/admin/v1/queues/second").await.expect(204);
    // The rule stays as it was, and the rest can still be changed.
    scene.client.patch_queue("first", &json!({"concurrency": {"limit": 2}})).await;
    let shown = scene.client.queue("first").await;
    scene.client.put_queue("first", &shown).await;
    scene.receiver.set("/first", Mood::status(500));
    let id = scene.client.send("first", "x").await;
    eventually("it is dead", async || scene.client.state(&id).await == "dead").await;
    let reason = text(&scene.client.message(&id).await, "/reason");
    assert!(reason.contains("second") && reason.contains("gone"), "{reason}");
    assert_eq!(scene.client.message(&id).await["deliveries"][0]["outcome"], "dead_lettered");
    let metrics = scene.client.metrics().await;
    assert_eq!(metrics.value("pumphouse_messages_dead_total", &[("queue", "first")]), 1.0);
}

#[tokio::test]
async fn a_rule_that_cannot_be_fulfilled_is_refused_and_changes_nothing() {
    let scene = Scene::new().await;
    scene.queue("a").await;
    scene
        .queue_with("b", json!({"recovery": {"rules": [{"action": "move", "to_queue": "a"}]}}))
        .await;
    let before = scene.client.queue("a").await;
    for (rule, pointer) in [
        (json!({"action": "move", "to_queue": "nowhere"}), "/recovery/rules/0/to_queue"),
        (json!({"action": "move", "to_queue": "a"}), "/recovery/rules/0/to_queue"),
        (json!({"action": "move", "to_queue": "b"}), "/recovery/rules/0/to_queue"),
        (json!({"action": "move"}), "/recovery/rules/0/to_queue"),
        (json!({"action": "retry", "to_queue": "b"}), "/recovery/rules/0/to_queue"),
        (json!({"action": "discard", "delay": "1s"}), "/recovery/rules/0/delay"),
        (json!({"action": "retry", "delay": "400d"}), "/recovery/rules/0/delay"),
        (json!({"action": "shrug"}), "/recovery/rules/0/action"),
        (json!({"match": {"status": 99}, "action": "retry"}), "/recovery/rules/0/match/status"),
        (json!({"match": {"status": "4x"}, "action": "retry"}), "/recovery/rules/0/match/status"),
        (json!({"match": {"attempt": 0}, "action": "retry"}), "/recovery/rules/0/match/attempt"),
        (
            json!({"match": {"error_kind": "sulk"}, "action": "retry"}),
            "/recovery/rules/0/match/error_kind",
        ),
        (
            json!({"match": {"error_kind": "cancelled"}, "action": "retry"}),
            "/recovery/rules/0/match/error_kind",
        ),
        (
            json!({"match": {"error_kind": "timeout", "status": 500}, "action": "retry"}),
            "/recovery/rules/0/match/error_kind",
        ),
        (
            json!({"match": {"attempt": "13-"}, "action": "retry"}),
            "/recovery/rules/0/match/attempt",
        ),
        (
            json!({"match": {"header": {"x y": "z"}}, "action": "retry"}),
            "/recovery/rules/0/match/header",
        ),
        (
            json!({"match": {"header": {"X-A": "z", "x-a": "z"}}, "action": "retry"}),
            "/recovery/rules/0/match/header",
        ),
        (json!({"match": {"colour": "red"}, "action": "retry"}), "/recovery/rules/0/match"),
    ] {
        let patch = json!({"recovery": {"rules": [rule.clone()]}});
        let answer = scene.client.patch("/admin/v1/queues/a", &patch).await.expect(422).json();
        let found = text(&answer, "/errors/0/pointer");
        assert!(found.starts_with(pointer), "{rule}: {answer}");
    }
    assert_eq!(scene.client.queue("a").await, before);
    let many = vec![json!({"action": "retry"}); 33];
    let patch = json!({"recovery": {"rules": many}});
    scene.client.patch("/admin/v1/queues/a", &patch).await.expect(422);
}

#[tokio::test]
async fn rules_are_shown_as_they_can_be_put_back() {
    let scene = Scene::new().await;
    scene.queue("other").await;
    let rules = json!([
        {"match": {"status": [404, "5xx"], "error_kind": ["status"], "header": {"x-a": "b"}, "attempt": "3-"},
         "action": "retry", "delay": "5s"},
        {"match": {}, "action": "move", "to_queue": "other"},
    ]);
    scene.queue_with("q", json!({"recovery": {"rules": rules}})).await;
    let shown = scene.client.queue("q").await;
    assert_eq!(shown["recovery"]["rules"], rules);
    scene.client.put_queue("q", &shown).await;
    assert_eq!(scene.client.queue("q").await["recovery"], shown["recovery"]);
}

#[tokio::test]
async fn a_row_of_failures_can_be_tried_out() {
    let scene = Scene::new().await;
    scene.queue_with("q", json!({"recovery": {"max_attempts": 5, "immediate": 1}})).await;
    let simulate =
        async |body: Value| scene.client.post("/admin/v1/queues/q/recovery/simulate", &body).await;
    let body = json!({"failures": [{"error_kind": "timeout"}, {"status": 503, "retry_after": "1m"}, {"status": 500}]});
    let answer = simulate(body).await.expect(200).json();
    let steps = answer["steps"].as_array().expect("steps");
    let then = steps.iter().map(|step| text(step, "/then")).collect::<Vec<_>>();
    assert_eq!(then, ["retry", "retry", "retry", "retry", "dead_letter"], "{answer}");
    assert_eq!(steps[0]["wait"], json!({"min": "0s", "max": "0s"}), "{answer}");
    assert_eq!(
        steps[1]["wait"]["min"], "1m",
        "what the handler asks for is never undercut: {answer}"
    );
    assert!(text(&steps[4], "/reason").contains("5 times"), "{answer}");
    assert_eq!(answer["ends"], "dead_letter");
    let recovery = json!({"rules": [{"match": {"status": 500}, "action": "discard"}]});
    let answer = simulate(json!({"failures": [{"status": 500}], "recovery": recovery})).await;
    assert_eq!(answer.expect(200).json()["ends"], "discard");
    for wrong in [
        json!({"failures": []}),
        json!({"failures": [{}]}),
        json!({"failures": [{"status": 99}]}),
        json!({"failures": [{"error_kind": "sulk"}]}),
        json!({"failures": [{"status": 500}], "recovery": {"max_attempts": 0}}),
        json!({"failure": []}),
    ] {
        simulate(wrong).await.expect(422);
    }
    let moves = json!({"rules": [{"action": "move", "to_queue": "nowhere"}]});
    simulate(json!({"failures": [{"status": 500}], "recovery": moves})).await.expect(422);
    let nowhere = "/admin/v1/queues/nowhere/recovery/simulate";
    scene.client.post(nowhere, &json!({"failures": [{"status": 500}]})).await.expect(404);
}
