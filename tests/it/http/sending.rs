//! Sending one message: what is answered, and what the handler then gets.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use crate::support::client::{ENVELOPE, ask, text};
use crate::support::eventually;
use crate::support::receiver::Delivery;
use crate::support::scene::Scene;

#[tokio::test]
async fn a_message_is_answered_with_a_receipt_and_delivered() {
    let scene = Scene::new().await;
    scene.queue("emails").await;
    let request = scene.client.message_to("emails", "{\"to\": \"ada\"}");
    let answer = ask(request.header("content-type", "application/json")).await.expect(201);
    let receipt = answer.json();
    let id = answer.id();
    assert_eq!(answer.header("location"), format!("/v1/messages/{id}"));
    assert_eq!(receipt["queue"], "emails");
    assert_eq!(receipt["state"], "ready");
    assert_eq!(receipt["duplicate"], false);
    let moment = |pointer| text(&receipt, pointer).parse::<Timestamp>().expect("RFC 3339");
    assert!(moment("/deliver_at") <= moment("/enqueued_at"));
    let id_version = id.as_bytes()[14];
    assert_eq!(id_version, b'7', "a UUIDv7: {id}");

    let delivery = scene.receiver.wait_for("/emails", 1).await.remove(0);
    assert_eq!(delivery.id, id);
    assert_eq!(delivery.body, "{\"to\": \"ada\"}");
    assert_eq!(delivery.header("content-type"), "application/json");
    eventually("it is completed", async || scene.client.state(&id).await == "completed").await;
}

#[tokio::test]
async fn any_bytes_arrive_as_they_were_sent() {
    let scene = Scene::new().await;
    scene.queue("bytes").await;
    let every_byte = (0..=255).cycle().take(70_000).collect::<Vec<u8>>();
    let bodies: [&[u8]; 7] = [
        b"",
        b"\0",
        b"\r\n\r\n",
        b"{\"a\":1.0,  \"a\":2}\n",
        &[0xff, 0xfe, 0x80],
        "Gr\u{fc}\u{df}e \u{1f600} \u{202e}".as_bytes(),
        &every_byte,
    ];
    for (number, body) in bodies.iter().enumerate() {
        let id = scene.client.send("bytes", body.to_vec()).await;
        let kept = scene.client.get(&format!("/v1/messages/{id}/payload")).await.expect(200);
        assert_eq!(kept.body, *body, "body {number} as it is kept");
        let delivered = &scene.receiver.wait_for_message(&id).await[0];
        assert_eq!(delivered.body, *body, "body {number} as it is delivered");
        assert_eq!(delivered.header("content-length"), body.len().to_string());
    }
}

#[tokio::test]
async fn options_in_headers_reach_message_and_handler() {
    let scene = Scene::new().await;
    scene.queue("options").await;
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let request = scene.client.message_to("options", "x").header("content-type", "text/plain");
    let request = request
        .header("Pumphouse-Type", "orders.created")
        .header("Pumphouse-Priority", "-7")
        .header("Pumphouse-Correlation-Id", "conversation-1")
        .header("Pumphouse-Causation-Id", "cause-1")
        .header("Pumphouse-Forward-X-Tenant", "acme")
        .header("traceparent", trace)
        .header("tracestate", "vendor=1")
        .header("tracestate", "other=2")
        .header("baggage", "user=ada");
    let id = ask(request).await.expect(201).id();
    let delivery = scene.receiver.wait_for("/options", 1).await.remove(0);
    the_options_arrived(&delivery, trace);
    let message = scene.client.message(&id).await;
    assert_eq!(message["type"], "orders.created");
    assert_eq!(message["priority"], -7);
    assert_eq!(message["correlation_id"], "conversation-1");
    assert_eq!(message["causation_id"], "cause-1");
    assert_eq!(message["content_type"], "text/plain");
}

#[tokio::test]
async fn an_envelope_says_the_same_in_json() {
    let scene = Scene::new().await;
    scene.queue("options").await;
    let envelope = json!({
        "payload_base64": STANDARD.encode("x"),
        "content_type": "text/plain",
        "type": "orders.created",
        "headers": {"X-Tenant": "acme"},
        "priority": -7,
        "correlation_id": "conversation-1",
        "causation_id": "cause-1",
    });
    let id = scene.client.send_envelope("options", &envelope).await;
    let delivery = scene.receiver.wait_for("/options", 1).await.remove(0);
    assert_eq!(delivery.body, "x");
    assert_eq!(delivery.header("x-tenant"), "acme");
    assert_eq!(delivery.header("content-type"), "text/plain");
    assert_eq!(delivery.header("ce-type"), "orders.created");
    assert_eq!(delivery.header("pumphouse-causation-id"), "cause-1");
    assert_eq!(scene.client.message(&id).await["priority"], -7);
}

#[tokio::test]
async fn a_json_payload_is_delivered_as_it_was_written() {
    let scene = Scene::new().await;
    scene.queue("exact").await;
    let payload = "{ \"z\": 1.50, \"a\": [1e2,  \"\\u00e9\"] }";
    let request = scene.client.message_to("exact", format!("{{\"payload\": {payload}}}"));
    ask(request.header("content-type", ENVELOPE)).await.expect(201);
    let delivery = scene.receiver.wait_for("/exact", 1).await.remove(0);
    assert_eq!(delivery.body, payload);
    assert_eq!(delivery.header("content-type"), "application/json");
}

#[tokio::test]
async fn a_delay_is_kept_however_it_is_written() {
    let scene = Scene::new().await;
    scene.queue("later").await;
    let at = (scene_time(&scene).await + SignedDuration::from_millis(300)).to_string();
    let headers = [
        ("Pumphouse-Delay", "300ms"),
        ("Pumphouse-Delay", "PT0.3S"),
        ("Pumphouse-Delay", "0.3"),
        ("Pumphouse-Deliver-At", at.as_str()),
    ];
    for (name, value) in headers {
        let request = scene.client.message_to("later", "x").header(name, value);
        let answer = ask(request).await.expect(201);
        the_message_waits_until_it_is_due(&scene, &answer.json()).await;
    }
    for envelope in [json!({"payload": 1, "delay": "300ms"}), json!({"payload": 1, "delay": 0.3})] {
        let request = scene.client.message_to("later", envelope.to_string());
        let answer = ask(request.header("content-type", ENVELOPE)).await.expect(201);
        the_message_waits_until_it_is_due(&scene, &answer.json()).await;
    }
}

#[tokio::test]
async fn a_moment_that_has_passed_counts_as_now() {
    let scene = Scene::new().await;
    scene.queue("past").await;
    let request = scene.client.message_to("past", "x");
    let answer = ask(request.header("Pumphouse-Deliver-At", "2001-01-01T00:00:00Z")).await;
    assert_eq!(answer.expect(201).json()["state"], "ready");
    scene.receiver.wait_for("/past", 1).await;
}

#[tokio::test]
async fn a_message_that_waits_too_long_expires_undelivered() {
    let scene = Scene::new().await;
    scene.queue_with("stale", json!({"concurrency": {"limit": 0}})).await;
    let request = scene.client.message_to("stale", "x").header("Pumphouse-Expires-In", "50ms");
    let by_header = ask(request).await.expect(201).id();
    let envelope = json!({"payload": 1, "expires_in": "50ms"});
    let by_envelope = scene.client.send_envelope("stale", &envelope).await;
    let fresh = scene.client.send("stale", "x").await;
    for id in [&by_header, &by_envelope] {
        eventually("it has expired", async || scene.client.state(id).await == "expired").await;
    }
    scene.client.patch_queue("stale", &json!({"concurrency": {"limit": 1}})).await;
    eventually("the fresh one is done", async || scene.client.state(&fresh).await == "completed")
        .await;
    assert_eq!(scene.receiver.count("/stale"), 1, "only what is fresh is delivered");
    eventually("it is counted", async || {
        let metrics = scene.client.metrics().await;
        metrics.value("pumphouse_messages_expired_total", &[("queue", "stale")]) == 2.0
    })
    .await;
}

#[tokio::test]
async fn what_has_a_higher_priority_goes_first() {
    let scene = Scene::new().await;
    scene.queue_with("order", json!({"concurrency": {"limit": 0}})).await;
    for priority in [0, -100, 100, 5, 0] {
        scene.client.send_envelope("order", &json!({"payload": 1, "priority": priority})).await;
    }
    scene.client.patch_queue("order", &json!({"concurrency": {"limit": 1}})).await;
    let mut priorities = Vec::new();
    for delivery in scene.receiver.wait_for("/order", 5).await {
        priorities.push(scene.client.message(&delivery.id).await["priority"].clone());
    }
    assert_eq!(priorities, [100, 5, 0, 0, -100].map(Value::from));
}

#[tokio::test]
async fn messages_of_one_priority_go_in_the_order_they_came() {
    let scene = Scene::new().await;
    scene.queue_with("order", json!({"concurrency": {"limit": 1}})).await;
    let mut sent = Vec::new();
    for number in 0..20 {
        sent.push(scene.client.send("order", number.to_string()).await);
    }
    let delivered = scene.receiver.wait_for("/order", 20).await;
    assert_eq!(delivered.into_iter().map(|delivery| delivery.id).collect::<Vec<_>>(), sent);
}

#[tokio::test]
async fn a_full_queue_says_so_and_takes_more_once_there_is_room() {
    let scene = Scene::new().await;
    scene.queue_with("small", json!({"max_messages": 2, "concurrency": {"limit": 0}})).await;
    scene.client.send("small", "1").await;
    scene.client.send("small", "2").await;
    let full = ask(scene.client.message_to("small", "3")).await.expect(429);
    assert_eq!(full.problem(), "queue-full");
    assert!(full.header("retry-after").parse::<u32>().is_ok(), "{full:?}");
    scene.client.patch_queue("small", &json!({"concurrency": {"limit": 1}})).await;
    eventually("there is room", async || {
        ask(scene.client.message_to("small", "3")).await.status == 201
    })
    .await;
}

#[tokio::test]
async fn an_unknown_queue_is_made_only_where_that_is_wanted() {
    let scene = Scene::new().await;
    let answer = ask(scene.client.message_to("new", "x")).await.expect(404);
    answer.problem();
    let eager =
        Scene::with_flags(crate::support::process::Database::sqlite(), &["--auto-create-queues"])
            .await;
    let id = eager.client.send("new", "x").await;
    assert_eq!(eager.client.state(&id).await, "ready");
    assert_eq!(eager.client.queue("new").await["handler"]["kind"], "pull");
    eventually("a warning names it", async || {
        eager.process.log().lines().any(|line| line.contains("WARN") && line.contains("queue=new"))
    })
    .await;
}

fn the_options_arrived(delivery: &Delivery, trace: &str) {
    assert_eq!(delivery.header("content-type"), "text/plain");
    assert_eq!(delivery.header("ce-type"), "orders.created");
    assert_eq!(delivery.header("pumphouse-correlation-id"), "conversation-1");
    assert_eq!(delivery.header("pumphouse-causation-id"), "cause-1");
    assert_eq!(delivery.header("x-tenant"), "acme");
    assert_eq!(delivery.header("tracestate"), "vendor=1,other=2");
    assert_eq!(delivery.header("baggage"), "user=ada");
    let parent = delivery.header("traceparent");
    assert!(parent.starts_with(&trace[..36]) && parent.ends_with("-01"), "{parent}");
    assert_ne!(parent, trace, "the next hop has a parent id of its own");
}

async fn the_message_waits_until_it_is_due(scene: &Scene, receipt: &Value) {
    assert_eq!(receipt["state"], "scheduled", "{receipt}");
    let id = text(receipt, "/id");
    let due = text(receipt, "/deliver_at").parse::<Timestamp>().expect("RFC 3339");
    let delivered = scene.receiver.wait_for_message(&id).await[0].at;
    assert!(delivered >= due, "due at {due}, delivered at {delivered}");
}

/// The database's time, as a receipt shows it.
async fn scene_time(scene: &Scene) -> Timestamp {
    scene
        .client
        .put_queue("clock", &json!({"handler": {"kind": "builtin", "name": "discard"}}))
        .await;
    let receipt = ask(scene.client.message_to("clock", "tick")).await.expect(201).json();
    let now = text(&receipt, "/enqueued_at").parse::<Timestamp>().expect("RFC 3339");
    // So far ahead that the four requests before it are answered.
    now + Duration::from_millis(1200)
}

#[tokio::test]
async fn a_trace_goes_along_with_every_form() {
    let scene = Scene::new().await;
    scene.queue("traced").await;
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let plain = scene.client.message_to("traced", "x");
    let envelope = scene.client.message_to("traced", "{\"payload\": 1}");
    let batch = scene.client.batch("traced", "{\"payload\": 2}\n{\"payload\": 3}\n");
    for request in [plain, envelope.header("content-type", ENVELOPE), batch] {
        let request = request.header("traceparent", trace).header("tracestate", "vendor=1");
        let answer = ask(request.header("baggage", "user=ada")).await;
        assert!(matches!(answer.status, 201 | 207), "{answer:?}");
    }
    for delivery in scene.receiver.wait_for("/traced", 4).await {
        assert!(delivery.header("traceparent").starts_with(&trace[..36]), "{delivery:?}");
        assert_eq!(delivery.header("tracestate"), "vendor=1");
        assert_eq!(delivery.header("baggage"), "user=ada");
    }
}

#[tokio::test]
async fn a_trace_that_is_too_long_costs_the_trace_and_not_the_message() {
    let scene = Scene::new().await;
    scene.queue("traced").await;
    for (name, longest) in [("tracestate", 512), ("baggage", 8192)] {
        for (length, kept) in [(longest, true), (longest + 1, false)] {
            let value = format!("k={}", "v".repeat(length - 2));
            let request = scene.client.message_to("traced", "x").header(name, &value);
            let request = request
                .header("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01");
            let id = ask(request).await.expect(201).id();
            let delivery = &scene.receiver.wait_for_message(&id).await[0];
            assert_eq!(delivery.header(name) == value, kept, "{name} of {length} bytes");
        }
    }
    let request = scene.client.message_to("traced", "x").header("traceparent", "0".repeat(513));
    ask(request).await.expect(201);
}

#[tokio::test]
async fn a_time_is_no_further_away_than_a_delay_may_be() {
    let scene = Scene::new().await;
    scene.queue_with("q", json!({"concurrency": {"limit": 0}})).await;
    let far = "5000-01-01T00:00:00Z";
    for option in ["deliver_at", "expires_at"] {
        let header = format!("pumphouse-{}", option.replace('_', "-"));
        let answer = ask(scene.client.message_to("q", "x").header(&header, far)).await;
        assert_eq!(answer.expect(422).pointers(), [header]);
        let request = scene.client.message_to("q", json!({"payload": 1, option: far}).to_string());
        let answer = ask(request.header("content-type", ENVELOPE)).await;
        assert_eq!(answer.expect(422).pointers(), [format!("/{option}")]);
    }
    let id = scene.client.send_envelope("q", &json!({"payload": 1, "delay": "366d"})).await;
    let path = format!("/v1/messages/{id}");
    let answer = scene.client.patch(&path, &json!({"deliver_at": far})).await.expect(422);
    assert_eq!(answer.pointers(), ["/deliver_at"]);
    let soon = scene_time(&scene).await + SignedDuration::from_hours(24 * 365);
    scene.client.patch(&path, &json!({"deliver_at": soon.to_string()})).await.expect(200);
}

#[tokio::test]
async fn a_mistake_is_named_as_the_sender_wrote_it() {
    let scene = Scene::new().await;
    scene.queue_with("q", json!({"concurrency": {"limit": 0}})).await;
    let long = "x".repeat(256);
    for (header, value) in [
        ("pumphouse-type", long.as_str()),
        ("pumphouse-correlation-id", &long),
        ("pumphouse-causation-id", &long),
        ("pumphouse-expires-in", "367d"),
        ("pumphouse-forward-host", "x"),
        ("content-type", &long),
    ] {
        let answer = ask(scene.client.message_to("q", "x").header(header, value)).await;
        let pointers = answer.expect(422).pointers();
        assert!(pointers.len() == 1 && pointers[0].eq_ignore_ascii_case(header), "{pointers:?}");
    }
    for (envelope, pointer) in [
        (json!({"payload": 1, "type": long}), "/type"),
        (json!({"payload": 1, "expires_in": "367d"}), "/expires_in"),
        (json!({"payload": 1, "headers": {"Host": "x"}}), "/headers/Host"),
        (json!({"payload": 1, "headers": {"a/b~": "x"}}), "/headers/a~1b~0"),
    ] {
        let request = scene.client.message_to("q", envelope.to_string());
        let answer = ask(request.header("content-type", ENVELOPE)).await;
        assert_eq!(answer.expect(422).pointers(), [pointer]);
    }
}
