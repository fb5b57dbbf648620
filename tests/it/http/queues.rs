//! Queues as an operator makes, changes and removes them.

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::client::{Answer, ask};
use crate::support::receiver::{Delivery, Gate, Mood};
use crate::support::scene::{Scene, quick};

const QUEUE: &str = "/admin/v1/queues/q";

#[tokio::test]
async fn a_queue_is_made_replaced_and_read_back() {
    let scene = Scene::new().await;
    scene.client.get(QUEUE).await.expect(404).problem();
    let settings = quick("http://127.0.0.1:9/", json!({"concurrency": {"limit": 3}}));
    scene.client.put(QUEUE, &settings).await.expect(201);
    let replaced = scene.client.put(QUEUE, &quick("http://127.0.0.1:9/x", json!({}))).await;
    let queue = replaced.expect(200).json();
    assert_eq!(queue["handler"]["url"], "http://127.0.0.1:9/x");
    assert_eq!(queue["concurrency"]["limit"], 16, "what is missing gets its default");
    assert_eq!(scene.client.queue("q").await["handler"], queue["handler"]);
}

#[tokio::test]
async fn the_defaults_are_those_of_the_protocol() {
    let scene = Scene::new().await;
    let handler = json!({"kind": "http", "url": "http://127.0.0.1:9/"});
    scene.client.put(QUEUE, &json!({"handler": handler})).await.expect(201);
    let queue = scene.client.queue("q").await;
    for (pointer, expected) in [
        ("/handler/timeout", json!("30s")),
        ("/concurrency/limit", json!(16)),
        ("/concurrency/scope", json!("cluster")),
        ("/lease", json!("1m")),
        ("/recovery/immediate", json!(2)),
        ("/recovery/max_attempts", json!(12)),
        ("/recovery/max_crashes", json!(20)),
        ("/recovery/backoff/base", json!("1s")),
        ("/recovery/backoff/max", json!("1h")),
        ("/recovery/backoff/jitter", json!("full")),
        ("/recovery/max_age", json!("3d")),
        ("/recovery/retry_after_max", json!("1h")),
        ("/recovery/retry_statuses", json!("default")),
        ("/dedup_window", json!("1d")),
        ("/retention/completed", json!("1d")),
        ("/retention/dead", json!("30d")),
        ("/max_messages", Value::Null),
        ("/state", json!("running")),
    ] {
        assert_eq!(queue.pointer(pointer), Some(&expected), "{pointer} in {queue}");
    }
    let stats = &queue["stats"];
    for count in ["ready", "scheduled", "in_flight", "dead"] {
        assert_eq!(stats[count], 0, "{count} in {stats}");
    }
}

#[tokio::test]
async fn what_is_read_can_be_put_back() {
    let scene = Scene::new().await;
    let headers = json!({"handler": {"headers": {"authorization": "Bearer secret-1"}}});
    scene.queue_with("q", headers).await;
    let first = scene.client.get(QUEUE).await.expect(200);
    assert!(!first.text().contains("secret-1"), "header values are masked: {}", first.text());
    let again = scene.client.put(QUEUE, &first.json()).await.expect(200);
    assert_eq!(again.header("etag"), first.header("etag"), "nothing changed");
    scene.client.send("q", "x").await;
    let delivery = scene.receiver.wait_for("/q", 1).await.remove(0);
    assert_eq!(delivery.header("authorization"), "Bearer secret-1", "a masked value keeps its own");
}

#[tokio::test]
async fn an_etag_is_that_of_the_settings_alone() {
    let scene = Scene::new().await;
    scene.queue_with("q", json!({"concurrency": {"limit": 0}})).await;
    let etag = async || scene.client.get(QUEUE).await.expect(200).header("etag").to_owned();
    let first = etag().await;
    assert!(first.starts_with('"') && first.ends_with('"'), "{first}");
    scene.client.send("q", "x").await;
    scene.client.stop_queue("q", &json!({})).await;
    assert_eq!(etag().await, first, "neither messages nor a stop change it");
    scene.client.patch_queue("q", &json!({"concurrency": {"limit": 1}})).await;
    let second = etag().await;
    assert_ne!(second, first);
    scene.client.patch_queue("q", &json!({"concurrency": {"limit": 0}})).await;
    assert_eq!(etag().await, first, "the same settings have the same");
}

#[tokio::test]
async fn a_change_can_be_bound_to_an_etag() {
    let scene = Scene::new().await;
    scene.queue("q").await;
    let current = scene.client.get(QUEUE).await.header("etag").to_owned();
    let settings = quick("http://127.0.0.1:9/", json!({}));
    let with = async |method: Method, name: &str, value: &str| -> Answer {
        let request = scene.client.request(method.clone(), QUEUE).header(name, value);
        let json = if method == Method::PATCH {
            "application/merge-patch+json"
        } else {
            "application/json"
        };
        let body = if method == Method::DELETE { String::new() } else { settings.to_string() };
        ask(request.header("content-type", json).body(body)).await
    };
    for method in [Method::PUT, Method::PATCH, Method::DELETE] {
        with(method, "if-match", "\"0000000000000000\"").await.expect(412).problem();
    }
    with(Method::PUT, "if-none-match", "*").await.expect(412).problem();
    assert_eq!(scene.client.get(QUEUE).await.header("etag"), current, "nothing changed");
    with(Method::PUT, "if-match", &current).await.expect(200);
    with(Method::PUT, "if-match", &current).await.expect(412);
    with(Method::PATCH, "if-match", "*").await.expect(200);
    let now = scene.client.get(QUEUE).await.header("etag").to_owned();
    with(Method::DELETE, "if-match", &now).await.expect(204);
    with(Method::PUT, "if-match", "*").await.expect(412);
    with(Method::PUT, "if-none-match", "*").await.expect(201);
}

#[tokio::test]
async fn a_merge_patch_changes_what_it_names_and_null_resets() {
    let scene = Scene::new().await;
    scene.queue_with("q", json!({"max_messages": 5, "concurrency": {"limit": 3}})).await;
    let patch = json!({"recovery": {"backoff": {"base": "20ms"}}, "concurrency": null});
    let queue = scene.client.patch_queue("q", &patch).await;
    assert_eq!(queue["recovery"]["backoff"]["base"], "20ms");
    assert_eq!(queue["recovery"]["backoff"]["max"], "50ms", "its neighbour stays");
    assert_eq!(queue["concurrency"]["limit"], 16, "null brings the default back");
    assert_eq!(queue["max_messages"], 5);
    let queue = scene.client.patch_queue("q", &json!({"max_messages": null})).await;
    assert_eq!(queue["max_messages"], Value::Null);
    let plain = scene.client.request(Method::PATCH, QUEUE).json(&json!({"max_messages": 9}));
    assert_eq!(ask(plain).await.expect(200).json()["max_messages"], 9, "plain JSON is taken too");
}

#[tokio::test]
async fn wrong_settings_name_every_mistake_and_change_nothing() {
    let scene = Scene::new().await;
    scene.queue("q").await;
    let before = scene.client.get(QUEUE).await.header("etag").to_owned();
    let patch =
        json!({"recovery": {"max_attempts": 0}, "max_messages": 0, "concurrency": {"limit": 7}});
    let answer = scene.client.patch(QUEUE, &patch).await.expect(422);
    answer.problem();
    let mut pointers = answer.pointers();
    pointers.sort();
    assert_eq!(pointers, ["/max_messages", "/recovery/max_attempts"]);
    assert_eq!(scene.client.get(QUEUE).await.header("etag"), before);
}

#[tokio::test]
async fn a_queue_with_messages_is_deleted_only_by_force() {
    let scene = Scene::new().await;
    scene.queue_with("q", json!({"concurrency": {"limit": 0}})).await;
    let id = scene.client.send("q", "x").await;
    scene.client.delete(QUEUE).await.expect(409).problem();
    scene.client.delete(&format!("{QUEUE}?force=true")).await.expect(204);
    scene.client.get(QUEUE).await.expect(404);
    scene.client.get(&format!("/v1/messages/{id}")).await.expect(404);
    ask(scene.client.message_to("q", "x")).await.expect(404);
}

#[tokio::test]
async fn a_purge_takes_what_waits_and_leaves_the_rest() {
    let scene = Scene::new().await;
    scene.queue_with("q", json!({"concurrency": {"limit": 1}})).await;
    let gate = Gate::closed();
    scene.receiver.set("/q", Mood::held(&gate));
    let held = scene.client.send("q", "held").await;
    scene.receiver.wait_for_open("/q", 1).await;
    let waits = scene.client.send("q", "waits").await;
    scene.client.send_envelope("q", &json!({"payload": 1, "delay": "1h"})).await;
    let answer = scene.client.post_nothing(&format!("{QUEUE}/purge")).await.expect(200);
    assert_eq!(answer.json()["purged"], 2);
    scene.client.get(&format!("/v1/messages/{waits}")).await.expect(404);
    gate.open();
    crate::support::eventually("it is completed", async || {
        scene.client.state(&held).await == "completed"
    })
    .await;
}

#[tokio::test]
async fn queues_are_listed_with_what_they_hold() {
    let scene = Scene::new().await;
    for name in ["b", "a", "c"] {
        scene.queue_with(name, json!({"concurrency": {"limit": 0}})).await;
    }
    scene.client.send("b", "x").await;
    scene.client.send_envelope("b", &json!({"payload": 1, "delay": "1h"})).await;
    let queues = scene.client.all("/admin/v1/queues").await;
    let names = queues.iter().map(|queue| queue["name"].as_str().expect("a name"));
    assert_eq!(names.collect::<Vec<_>>(), ["a", "b", "c"]);
    let stats = &queues[1]["stats"];
    assert_eq!((&stats["ready"], &stats["scheduled"]), (&json!(1), &json!(1)), "{stats}");
    let age = &stats["oldest_ready_age"];
    assert!(age.is_string() || age.is_number(), "{stats}");
}

#[tokio::test]
async fn a_queue_given_at_the_start_is_there() {
    let receiver = crate::support::receiver::Receiver::start().await;
    let flag = format!("given={}", receiver.url("/given"));
    let database = crate::support::process::Database::sqlite();
    let scene = Scene::with_flags(database, &["--queue", &flag]).await;
    scene.client.send("given", "x").await;
    receiver.wait_for("/given", 1).await;
}

#[tokio::test]
async fn a_secret_is_changed_and_removed_under_any_spelling() {
    let scene = Scene::new().await;
    scene.queue_with("q", json!({"handler": {"headers": {"authorization": "old"}}})).await;
    let headers = |headers: Value| json!({"handler": {"headers": headers}});
    scene.client.patch_queue("q", &headers(json!({"Authorization": "new"}))).await;
    let delivery = delivered(&scene, 1).await;
    assert_eq!(delivery.header("authorization"), "new");
    let both = json!({"Authorization": "a", "authorization": "b"});
    let put = quick(&scene.receiver.url("/q"), headers(both.clone()));
    for answer in
        [scene.client.patch(QUEUE, &headers(both)).await, scene.client.put(QUEUE, &put).await]
    {
        let pointers = answer.expect(422).pointers();
        assert!(pointers[0].eq_ignore_ascii_case("/handler/headers/authorization"), "{pointers:?}");
    }
    scene.client.patch_queue("q", &headers(json!({"AUTHORIZATION": null}))).await;
    assert_eq!(delivered(&scene, 2).await.header("authorization"), "");
}

#[tokio::test]
async fn a_masked_value_never_brings_an_old_secret_back() {
    let scene = Scene::new().await;
    scene.queue_with("q", json!({"handler": {"headers": {"authorization": "0"}}})).await;
    let shown = scene.client.queue("q").await;
    for round in 1..=20 {
        let secret = round.to_string();
        let rotated = json!({"handler": {"headers": {"authorization": secret}}});
        let (_, put) =
            tokio::join!(scene.client.patch_queue("q", &rotated), scene.client.put(QUEUE, &shown));
        put.expect(200);
        assert_eq!(delivered(&scene, round).await.header("authorization"), secret);
    }
}

#[tokio::test]
async fn a_lease_that_nobody_set_follows_the_timeout() {
    let scene = Scene::new().await;
    scene.queue("q").await;
    for (timeout, lease) in [("2m", "2m30s"), ("20s", "50s")] {
        let patch = json!({"handler": {"timeout": timeout}});
        assert_eq!(scene.client.patch_queue("q", &patch).await["lease"], lease);
    }
    scene.client.patch_queue("q", &json!({"lease": "40s"})).await;
    let patch = json!({"handler": {"timeout": "10s"}});
    assert_eq!(scene.client.patch_queue("q", &patch).await["lease"], "40s", "this one was set");
    let queue = scene.client.patch_queue("q", &json!({"lease": null})).await;
    assert_eq!(queue["lease"], "40s", "null brings back timeout and 30s");
}

#[tokio::test]
async fn another_kind_of_handler_begins_with_nothing() {
    let scene = Scene::new().await;
    let log = json!({"kind": "builtin", "name": "log"});
    scene.client.put_queue("q", &json!({"handler": log})).await;
    let http = json!({"handler": {"kind": "http", "url": "http://127.0.0.1:9/"}});
    let queue = scene.client.patch_queue("q", &http).await;
    assert_eq!(queue["handler"]["timeout"], "30s");
    let queue = scene.client.patch_queue("q", &json!({"handler": log})).await;
    assert_eq!(queue["handler"], log);
    let queue = scene.client.patch_queue("q", &json!({"handler": {"kind": "pull"}})).await;
    assert_eq!(queue["handler"], json!({"kind": "pull"}));
}

#[tokio::test]
async fn every_kind_of_handler_refuses_what_it_does_not_know() {
    let scene = Scene::new().await;
    for handler in [
        json!({"kind": "pull", "colour": "red"}),
        json!({"kind": "service", "colour": "red"}),
        json!({"kind": "builtin", "name": "log", "colour": "red"}),
        json!({"kind": "http", "url": "http://127.0.0.1:9/", "colour": "red"}),
    ] {
        let answer = scene.client.put(QUEUE, &json!({"handler": handler})).await.expect(422);
        assert!(answer.text().contains("colour"), "{}", answer.text());
    }
}

#[tokio::test]
async fn what_can_only_be_read_is_not_patched_in_silence() {
    let scene = Scene::new().await;
    scene.queue("q").await;
    for (patch, pointer) in [
        (json!({"state": "stopped"}), "/state"),
        (json!({"stopped": null}), "/stopped"),
        (json!({"stats": {}}), "/stats"),
        (json!({"name": "other"}), "/name"),
    ] {
        let answer = scene.client.patch(QUEUE, &patch).await.expect(422);
        assert_eq!(answer.pointers(), [pointer]);
    }
    let state = scene.client.patch(QUEUE, &json!({"state": "stopped"})).await;
    assert!(state.text().contains("/stop"), "it names the way: {}", state.text());
}

#[tokio::test]
async fn the_list_of_queues_has_pages() {
    let scene = Scene::new().await;
    let names = ["a", "b", "b.c", "b_c", "c"];
    for name in names {
        scene.queue_with(name, json!({"concurrency": {"limit": 0}})).await;
    }
    let mut listed = Vec::new();
    let mut cursor = String::new();
    for expected in [2, 2, 1] {
        let page = scene.client.get(&format!("/admin/v1/queues?limit=2&cursor={cursor}")).await;
        let page = page.expect(200).json();
        let items = page["items"].as_array().expect("items");
        assert_eq!(items.len(), expected, "{page}");
        listed.extend(items.iter().map(|queue| queue["name"].clone()));
        cursor = page["next"].as_str().unwrap_or_default().to_owned();
    }
    assert_eq!(cursor, "", "there is no page after the last");
    assert_eq!(listed, names.map(Value::from));
    for wrong in ["limit=0", "limit=many", "cursor=nonsense", "cursor=AQAAAAAAAAAB", "colour=red"] {
        scene.client.get(&format!("/admin/v1/queues?{wrong}")).await.expect(422).problem();
    }
}

/// The delivery of a new message to the queue `q`, which is its `count`th.
async fn delivered(scene: &Scene, count: usize) -> Delivery {
    scene.client.send("q", "x").await;
    scene.receiver.wait_for("/q", count).await.remove(count - 1)
}
