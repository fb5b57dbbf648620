//! Reading messages back, and changing those that wait.

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::support::client::{ask, text};
use crate::support::eventually;
use crate::support::receiver::{Gate, Mood, Reply};
use crate::support::scene::Scene;

#[tokio::test]
async fn a_message_shows_its_state_and_its_deliveries() {
    let scene = Scene::new().await;
    scene.queue("seen").await;
    scene.receiver.set(
        "/seen",
        Mood::by(|delivery| match delivery.attempt {
            1 => Reply::new(503).body("not yet").into(),
            _ => Reply::new(200).body("thanks").into(),
        }),
    );
    let id = scene.client.send("seen", "x").await;
    eventually("it is completed", async || scene.client.state(&id).await == "completed").await;
    let message = scene.client.message(&id).await;
    assert_eq!(message["id"], json!(id));
    assert_eq!(message["queue"], "seen");
    let deliveries = message["deliveries"].as_array().expect("deliveries");
    assert_eq!(deliveries.len(), 2, "{message}");
    let number = |n: u64| {
        let found = deliveries.iter().find(|delivery| delivery["number"] == n);
        found.unwrap_or_else(|| panic!("no delivery {n}: {message}"))
    };
    let (first, second) = (number(1), number(2));
    assert_eq!((&first["outcome"], &first["status"]), (&json!("failed"), &json!(503)));
    assert_eq!((&first["error_kind"], &first["answer"]), (&json!("status"), &json!("not yet")));
    assert_eq!((&second["outcome"], &second["status"]), (&json!("acked"), &json!(200)));
    assert_eq!((&second["error_kind"], &second["answer"]), (&Value::Null, &json!("thanks")));
    for delivery in deliveries {
        assert!(delivery["replica"].is_string() && delivery["duration_ms"].is_number());
        text(delivery, "/started_at").parse::<Timestamp>().expect("RFC 3339");
    }
}

#[tokio::test]
async fn a_payload_stands_in_json_as_text_or_as_base64() {
    let scene = Scene::new().await;
    scene.queue_with("q", json!({"concurrency": {"limit": 0}})).await;
    let send = async |content_type: &str, body: &'static str| {
        ask(scene.client.message_to("q", body).header("content-type", content_type)).await.id()
    };
    send("application/json", "{\"a\": 1.0}").await;
    send("application/json", "{broken").await;
    send("text/plain", "plain").await;
    let items = scene.client.all("/v1/messages?queue=q&include=payload").await;
    let [plain, broken, whole] = &items[..] else { panic!("three messages: {items:?}") };
    assert_eq!(whole["payload"], json!({"a": 1.0}));
    assert_eq!(broken["payload_base64"], "e2Jyb2tlbg==");
    assert_eq!(plain["payload_base64"], "cGxhaW4=");
    for item in scene.client.all("/v1/messages?queue=q").await {
        assert!(item.get("payload").is_none() && item.get("payload_base64").is_none(), "{item}");
    }
}

#[tokio::test]
async fn a_page_with_payloads_ends_before_it_grows_too_large() {
    let scene = Scene::new().await;
    scene.queue_with("q", json!({"concurrency": {"limit": 0}})).await;
    let mut sent = Vec::new();
    for _ in 0..20 {
        sent.push(scene.client.send("q", vec![b'x'; 1024 * 1024]).await);
    }
    sent.reverse();
    let with = "/v1/messages?queue=q&include=payload";
    let first = scene.client.get(with).await.expect(200).json();
    let ids = |page: &Value| {
        let items = page["items"].as_array().expect("items").iter();
        items.map(|item| text(item, "/id").to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(ids(&first), sent[..16], "16 MiB of payloads");
    let next = text(&first, "/next");
    let second = scene.client.get(&format!("{with}&cursor={next}")).await.expect(200).json();
    assert_eq!((ids(&second), &second["next"]), (sent[16..].to_vec(), &Value::Null));
    let without = scene.client.get("/v1/messages?queue=q").await.expect(200).json();
    assert_eq!(ids(&without), sent);
}

#[tokio::test]
async fn a_payload_comes_back_with_its_content_type() {
    let scene = Scene::new().await;
    scene.queue("q").await;
    let request = scene.client.message_to("q", "<a/>").header("content-type", "text/xml");
    let id = ask(request).await.expect(201).id();
    let payload = scene.client.get(&format!("/v1/messages/{id}/payload")).await.expect(200);
    assert_eq!((payload.text(), payload.header("content-type")), ("<a/>".to_owned(), "text/xml"));
}

#[tokio::test]
async fn a_list_goes_from_new_to_old_and_is_stable_while_messages_come() {
    let scene = Scene::new().await;
    scene.queue_with("q", json!({"concurrency": {"limit": 0}})).await;
    let mut sent = Vec::new();
    for number in 0..25 {
        sent.push(scene.client.send("q", number.to_string()).await);
    }
    sent.reverse();
    let mut seen = Vec::new();
    let mut cursor = String::new();
    loop {
        let page = scene.client.get(&format!("/v1/messages?queue=q&limit=4&cursor={cursor}")).await;
        let page = page.expect(200).json();
        let items = page["items"].as_array().expect("items");
        assert!(items.len() <= 4);
        seen.extend(items.iter().map(|item| text(item, "/id")));
        scene.client.send("q", "more").await;
        let Some(next) = page["next"].as_str() else { break };
        next.clone_into(&mut cursor);
    }
    assert_eq!(seen, sent);
}

#[tokio::test]
async fn a_page_has_fifty_items_and_two_hundred_at_most() {
    let scene = Scene::new().await;
    scene.queue_with("q", json!({"concurrency": {"limit": 0}})).await;
    ask(scene.client.batch("q", "{\"payload\":1}\n".repeat(210))).await.expect(207);
    for (query, expected) in [("", 50), ("?limit=7", 7), ("?limit=200", 200), ("?limit=9999", 200)]
    {
        let page = scene.client.get(&format!("/v1/messages{query}")).await.expect(200).json();
        assert_eq!(page["items"].as_array().map(Vec::len), Some(expected), "{query}");
        assert!(page["next"].is_string(), "{query}");
    }
}

#[tokio::test]
async fn lists_are_filtered() {
    let scene = Scene::new().await;
    for queue in ["a", "b"] {
        scene.queue_with(queue, json!({"concurrency": {"limit": 0}})).await;
    }
    let one = json!({"payload": 1, "type": "t.one", "correlation_id": "c1"});
    let one = scene.client.send_envelope("a", &one).await;
    let two = json!({"payload": 2, "type": "t.two", "delay": "1h"});
    let two = scene.client.send_envelope("a", &two).await;
    let three = scene.client.send("b", "3").await;
    let since = text(&scene.client.message(&two).await, "/enqueued_at");
    for (query, expected) in [
        ("queue=a".to_owned(), vec![&two, &one]),
        ("queue=b".to_owned(), vec![&three]),
        ("state=scheduled".to_owned(), vec![&two]),
        ("state=ready".to_owned(), vec![&three, &one]),
        ("type=t.one".to_owned(), vec![&one]),
        ("correlation_id=c1&queue=a".to_owned(), vec![&one]),
        (format!("until={since}"), vec![&one]),
        (format!("since={since}"), vec![&three, &two]),
        ("queue=b&state=scheduled".to_owned(), vec![]),
    ] {
        let items = scene.client.all(&format!("/v1/messages?{query}")).await;
        let ids = items.iter().map(|item| text(item, "/id")).collect::<Vec<_>>();
        assert_eq!(ids.iter().collect::<Vec<_>>(), expected, "{query}");
    }
}

#[tokio::test]
async fn what_waits_can_be_cancelled_and_nothing_else() {
    let scene = Scene::new().await;
    scene.queue_with("q", json!({"concurrency": {"limit": 1}})).await;
    let gate = Gate::closed();
    scene.receiver.set("/q", Mood::held(&gate));
    let held = scene.client.send("q", "held").await;
    scene.receiver.wait_for_open("/q", 1).await;
    let waits = scene.client.send("q", "waits").await;
    let delayed = scene.client.send_envelope("q", &json!({"payload": 1, "delay": "1h"})).await;
    for id in [&waits, &delayed] {
        let answer = scene.client.delete(&format!("/v1/messages/{id}")).await.expect(200);
        assert_eq!(answer.json()["state"], "cancelled");
        scene.client.delete(&format!("/v1/messages/{id}")).await.expect(409).problem();
    }
    scene.client.delete(&format!("/v1/messages/{held}")).await.expect(409).problem();
    gate.open();
    eventually("it is completed", async || scene.client.state(&held).await == "completed").await;
    scene.client.delete(&format!("/v1/messages/{held}")).await.expect(409).problem();
    assert_eq!(scene.receiver.count("/q"), 1, "what was cancelled is not delivered");
}

#[tokio::test]
async fn what_waits_can_be_run_now_or_put_off() {
    let scene = Scene::new().await;
    scene.queue("q").await;
    let delayed =
        async || scene.client.send_envelope("q", &json!({"payload": 1, "delay": "1h"})).await;
    let now = delayed().await;
    scene.client.post_nothing(&format!("/v1/messages/{now}/run")).await.expect(200);
    eventually("it is completed", async || scene.client.state(&now).await == "completed").await;
    scene.client.post_nothing(&format!("/v1/messages/{now}/run")).await.expect(409).problem();

    let moved = delayed().await;
    let enqueued_at = text(&scene.client.message(&moved).await, "/enqueued_at");
    let enqueued_at = enqueued_at.parse::<Timestamp>().expect("RFC 3339");
    let due = enqueued_at + SignedDuration::from_millis(500);
    let path = format!("/v1/messages/{moved}");
    scene.client.patch(&path, &json!({"deliver_at": due.to_string()})).await.expect(200);
    eventually("it is completed", async || scene.client.state(&moved).await == "completed").await;
    assert!(scene.receiver.deliveries_of(&moved)[0].at >= due, "not before its new time");
    scene.client.patch(&path, &json!({"deliver_at": due.to_string()})).await.expect(409).problem();
}
