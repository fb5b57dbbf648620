//! What operators and their machines look at: health, metrics, the API's own description.

use std::collections::BTreeSet;

use http::Method;
use pumphouse::telemetry::metrics;
use serde_json::{Value, json};

use crate::support::client::{ask, text};
use crate::support::eventually;
use crate::support::receiver::{Gate, Mood};
use crate::support::scene::Scene;

#[tokio::test]
async fn a_process_says_that_it_lives_and_is_ready() {
    let scene = Scene::new().await;
    for path in ["/livez", "/readyz"] {
        scene.client.get(path).await.expect(200);
    }
}

#[tokio::test]
async fn the_api_describes_itself() {
    let scene = Scene::new().await;
    let answer = scene.client.get("/openapi.json").await.expect(200);
    let document = answer.json();
    assert!(text(&document, "/openapi").starts_with("3."), "{document}");
    let paths = document["paths"].as_object().expect("it has paths");
    for path in [
        "/v1/queues/{queue}/messages",
        "/v1/queues/{queue}/messages/batch",
        "/v1/messages/{id}",
        "/admin/v1/queues/{queue}",
        "/admin/v1/queues/{queue}/stop",
        "/admin/v1/pump",
        "/admin/v1/dead-letters",
    ] {
        assert!(paths.contains_key(path), "{path} in {:?}", paths.keys());
    }
    // Every reference leads somewhere.
    for reference in references(&document) {
        let pointer = reference.strip_prefix('#').expect("nothing is looked up elsewhere");
        assert!(document.pointer(pointer).is_some(), "{reference}");
    }
}

#[tokio::test]
async fn the_documentation_needs_nothing_from_outside() {
    let scene = Scene::new().await;
    let mut page = scene.client.get("/docs").await;
    if (300..400).contains(&page.status) {
        let location = page.header("location").to_owned();
        let path = if location.starts_with('/') { location } else { format!("/{location}") };
        page = scene.client.get(&path).await;
    }
    let html = page.expect(200).text();
    for attribute in ["src=\"", "href=\"", "src='", "href='"] {
        for part in html.split(attribute).skip(1) {
            let url = part.split(['"', '\'']).next().unwrap_or_default();
            assert!(!url.contains("//") && !url.is_empty(), "{url}");
        }
    }
}

#[tokio::test]
async fn every_problem_points_at_its_page() {
    let scene = Scene::new().await;
    let problem = scene.client.get("/docs/nothing").await.expect(404);
    assert_eq!(problem.problem(), "not-found");
    let page = scene.client.get(&text(&problem.json(), "/type")).await.expect(200);
    assert!(page.text().contains("`not-found`"), "{}", page.text());
    scene.client.get("/docs/problems/nothing").await.expect(404).problem();
}

#[tokio::test]
async fn the_description_says_what_is_answered_and_taken() {
    let scene = Scene::new().await;
    let document = scene.client.get("/openapi.json").await.expect(200).json();
    let operations =
        document["paths"].as_object().expect("paths").iter().flat_map(|(path, item)| {
            let methods = item.as_object().expect("an item").iter();
            methods.map(move |(method, operation)| (format!("{method} {path}"), operation))
        });
    for (operation, description) in operations {
        for status in ["4XX", "5XX"] {
            let media_types = &description["responses"][status]["content"];
            assert!(media_types["application/problem+json"].is_object(), "{operation} {status}");
        }
    }
    let payload = &document["components"]["schemas"]["Envelope"]["properties"]["payload"];
    assert!(payload.is_object() && payload.get("type").is_none(), "any JSON: {payload}");
    // What a GET shows can be put back, by the schema too.
    scene.queue("q").await;
    let taken = &document["components"]["schemas"]["SettingsBody"]["properties"];
    for member in scene.client.queue("q").await.as_object().expect("a queue").keys() {
        assert!(taken.get(member).is_some(), "{member} is in the schema of a PUT");
    }
}

#[tokio::test]
async fn every_metric_is_shown_with_its_help() {
    let scene = Scene::new().await;
    scene.queue("q").await;
    scene.receiver.set(
        "/q",
        Mood::by(|delivery| match &delivery.body[..] {
            b"dies" => Mood::status(422),
            _ => Mood::ack(),
        }),
    );
    for body in ["lives", "dies"] {
        let request = scene.client.message_to("q", body).header("Idempotency-Key", body);
        ask(request.try_clone().expect("it can be sent twice")).await;
        ask(request).await.expect(200);
    }
    let subscription = "/admin/v1/topics/t/subscriptions/q";
    scene.client.put(subscription, &json!({"queue": "q"})).await.expect(201);
    for status in [201, 200] {
        let publish = scene.client.request(Method::POST, "/v1/topics/t/messages").body("lives");
        ask(publish.header("Idempotency-Key", "published")).await.expect(status);
    }
    scene.receiver.wait_for("/q", 3).await;
    let wanted = metrics::ALL.iter().filter(|metric| {
        // These two are counted only when it happens, and a series that never moved is not shown.
        !matches!(metric.name, "pumphouse_messages_expired_total" | "pumphouse_leases_lost_total")
    });
    for metric in wanted {
        let what = format!("{} is shown", metric.name);
        eventually(&what, async || {
            let page = scene.client.get("/metrics").await.expect(200).text();
            let shown = page.lines().any(|line| {
                line.strip_prefix(metric.name).is_some_and(|rest| rest.starts_with(['{', ' ', '_']))
            });
            shown && page.contains(&format!("# HELP {} ", metric.name))
        })
        .await;
    }
}

#[tokio::test]
async fn metrics_follow_what_happens() {
    let scene = Scene::new().await;
    scene.queue_with("q", json!({"concurrency": {"limit": 2}})).await;
    let gate = Gate::closed();
    scene.receiver.set("/q", Mood::held(&gate));
    for number in 0..5 {
        scene.client.send("q", number.to_string()).await;
    }
    scene.receiver.wait_for_open("/q", 2).await;
    let of_q = ("queue", "q");
    let shows = async |name: &str, labels: &[(&str, &str)], value: f64| {
        eventually(&format!("{name} {labels:?} is {value}"), async || {
            scene.client.metrics().await.value(name, labels) == value
        })
        .await;
    };
    shows("pumphouse_messages_enqueued_total", &[of_q], 5.0).await;
    shows("pumphouse_in_flight", &[of_q], 2.0).await;
    shows("pumphouse_concurrency_limit", &[of_q], 2.0).await;
    shows("pumphouse_pump_running", &[of_q], 1.0).await;
    shows("pumphouse_queue_messages", &[of_q, ("state", "leased")], 2.0).await;
    shows("pumphouse_queue_messages", &[of_q, ("state", "ready")], 3.0).await;
    gate.open();
    shows("pumphouse_messages_completed_total", &[of_q], 5.0).await;
    shows("pumphouse_deliveries_total", &[of_q, ("outcome", "acked")], 5.0).await;
    shows("pumphouse_delivery_duration_seconds_count", &[of_q], 5.0).await;
    shows("pumphouse_in_flight", &[of_q], 0.0).await;
    scene.client.stop_queue("q", &json!({})).await;
    shows("pumphouse_pump_running", &[of_q], 0.0).await;
}

fn references(value: &Value) -> BTreeSet<String> {
    match value {
        Value::Object(members) => {
            let own = members.get("$ref").and_then(Value::as_str).map(str::to_owned);
            own.into_iter().chain(members.values().flat_map(references)).collect()
        }
        Value::Array(items) => items.iter().flat_map(references).collect(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => BTreeSet::new(),
    }
}
