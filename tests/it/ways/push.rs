//! Destinations that messages name themselves.

use std::time::Duration;

use http::Method;
use reqwest::RequestBuilder;
use serde_json::json;

use crate::support::client::{Client, ask};
use crate::support::process::Database;
use crate::support::receiver::{Gate, Mood};
use crate::support::scene::Scene;
use crate::support::{eventually, eventually_within};

fn push(client: &Client, url: &str) -> RequestBuilder {
    client.request(Method::POST, "/v1/push").header("pumphouse-url", url).body("hook")
}

#[tokio::test]
async fn it_is_off_unless_somebody_allows_it() {
    let scene = Scene::new().await;
    let answer = ask(push(&scene.client, &scene.receiver.url("/x"))).await;
    answer.expect_problem(403, "push-not-allowed");
    scene.client.get("/admin/v1/queues/push").await.expect_problem(404, "no-such-queue");
}

#[tokio::test]
async fn a_message_goes_where_it_says() {
    let scene = Scene::with_flags(Database::sqlite(), &["--push-allow", "127.0.0.1"]).await;
    let client = &scene.client;
    let request =
        push(client, &scene.receiver.url("/hook?a=b")).header("content-type", "text/x-hook");
    let request = request.header("pumphouse-type", "t").header("idempotency-key", "k");
    let id = ask(request.try_clone().unwrap()).await.expect(201).id();
    let again = ask(request).await.expect(200);
    assert_eq!(again.id(), id);
    let delivery = scene.receiver.wait_for_message(&id).await.remove(0);
    assert_eq!((delivery.path.as_str(), &delivery.body[..]), ("/hook?a=b", &b"hook"[..]));
    assert_eq!((delivery.header("content-type"), delivery.header("ce-type")), ("text/x-hook", "t"));
    let other = push(client, &scene.receiver.url("/hook?a=c")).header("idempotency-key", "k");
    ask(other).await.expect_problem(422, "idempotency-key-reused");
    // A dead destination says nothing of another one.
    client
        .patch_queue(
            "push",
            &json!({"recovery": {"immediate": 0, "backoff": {"base": "50ms", "max": "50ms"}}}),
        )
        .await;
    for _ in 0..15 {
        ask(push(client, "http://127.0.0.1:1/")).await.expect(201);
    }
    let id = ask(push(client, &scene.receiver.url("/well"))).await.expect(201).id();
    scene.receiver.wait_for_message(&id).await;
    assert_eq!(client.queue("push").await["breaker_state"], "closed");
    for (url, status) in [
        ("http://127.0.0.2/", 403),
        ("http://localhost/", 403),
        ("ftp://127.0.0.1/", 422),
        ("http://a:b@127.0.0.1/", 422),
        ("nonsense", 422),
    ] {
        assert_eq!(ask(push(client, url)).await.status, status, "{url}");
    }
    ask(client.request(Method::POST, "/v1/push").body("x")).await.expect(422);
    scene.queue("usual").await;
    let elsewhere = push(client, &scene.receiver.url("/x")).header("pumphouse-queue", "usual");
    ask(elsewhere).await.expect_problem(409, "wrong-handler");
    let missing = push(client, &scene.receiver.url("/x")).header("pumphouse-queue", "missing");
    ask(missing).await.expect_problem(404, "no-such-queue");
    // What came into the queue without a destination has none.
    let id = client.send("push", "x").await;
    eventually("it is dead", async || client.state(&id).await == "dead").await;
}

#[tokio::test]
async fn one_host_has_only_so_many_at_once() {
    let scene = Scene::with_flags(Database::sqlite(), &["--push-allow", "127.0.0.1"]).await;
    let settings = json!({"handler": {"kind": "push", "per_destination": 2, "timeout": "20s"}, "concurrency": {"limit": 16}});
    scene.client.put_queue("push", &settings).await;
    let shown = scene.client.queue("push").await;
    assert_eq!(shown["handler"]["per_destination"], 2);
    scene.client.put_queue("push", &shown).await;
    let gate = Gate::closed();
    scene.receiver.set("/held", Mood::held(&gate));
    for _ in 0..6 {
        ask(push(&scene.client, &scene.receiver.url("/held"))).await.expect(201);
    }
    scene.receiver.wait_for_open("/held", 2).await;
    // Another host is not held up.
    let other = crate::support::receiver::Receiver::start().await;
    let id = ask(push(&scene.client, &other.url("/free"))).await.expect(201).id();
    other.wait_for_message(&id).await;
    crate::support::never_within("a third", Duration::from_secs(1), || {
        scene.receiver.most_open("/held") > 2
    })
    .await;
    gate.open();
    scene.receiver.wait_for("/held", 6).await;
    assert_eq!(scene.receiver.most_open("/held"), 2);
}

/// 400 messages at two at a time, each of a few milliseconds.
#[tokio::test]
async fn a_burst_to_a_host_that_is_fast_is_soon_done() {
    let scene = Scene::with_flags(Database::sqlite(), &["--push-allow", "127.0.0.1"]).await;
    let settings =
        json!({"handler": {"kind": "push", "per_destination": 2}, "concurrency": {"limit": 16}});
    scene.client.put_queue("push", &settings).await;
    scene.receiver.set("/fast", Mood::slow(Duration::from_millis(5)));
    let url = scene.receiver.url("/fast");
    let sent = (0..400).map(|_| async { ask(push(&scene.client, &url)).await.expect(201) });
    futures::future::join_all(sent).await;
    eventually_within("all have come", Duration::from_secs(20), async || {
        scene.receiver.count("/fast") == 400
    })
    .await;
    assert!(scene.receiver.most_open("/fast") <= 2);
}
