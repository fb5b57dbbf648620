//! Topics over HTTP: publish, subscribe, and what kills leave behind.

use std::collections::BTreeMap;
use std::time::Duration;

use http::Method;
use serde_json::json;
use tokio_util::task::TaskTracker;

use crate::support::chance::mix;
use crate::support::client::{Client, ENVELOPE, ask, number, text, try_ask};
use crate::support::process::Database;
use crate::support::receiver::{Mood, Reply};
use crate::support::scene::Scene;
use crate::support::{eventually_within, on_both, pass, say};

on_both! {
    every_subscriber_gets_every_message_once_over_ten_kills
}

const SUBSCRIBERS: usize = 20;
const PUBLISHED: usize = 10_000;
const BATCH: usize = 50;
const KILLS: u64 = 10;

/// Large enough to be kept once for all copies.
fn payload(number: usize) -> String {
    format!("{number} {}", "x".repeat(4096))
}

async fn every_subscriber_gets_every_message_once_over_ten_kills(database: Database) {
    let mut scene = Scene::with_flags(database, &["--replica", "one"]).await;
    // Of each publish half of the queues want the even ones, and half want all.
    let name = |number: usize| format!("s{number:02}");
    for number in 0..SUBSCRIBERS {
        // The last one fails all the time: its handler is not there, and it neither waits nor gives up.
        let changes = if number + 1 == SUBSCRIBERS {
            json!({"handler": {"kind": "http", "url": "http://127.0.0.1:1/"},
                "breaker": null, "rate_limit": {"limit": 50, "period": "1s", "burst": 5},
                "recovery": {"immediate": 0, "max_attempts": 1000, "max_crashes": 1000,
                    "backoff": {"base": "100ms", "max": "100ms"}}})
        } else {
            json!({"handler": {"kind": "builtin", "name": "discard"}, "recovery": {"max_crashes": 1000}})
        };
        scene.client.put_queue(&name(number), &changes).await;
        let filter =
            if number.is_multiple_of(2) { json!({"type": "numbers.even"}) } else { json!({}) };
        let path = format!("/admin/v1/topics/numbers/subscriptions/{}", name(number));
        let put = json!({"queue": name(number), "filter": filter});
        scene.client.put(&path, &put).await.expect(201);
    }
    let (clients, feed) = tokio::sync::watch::channel(scene.client.clone());
    let tasks = TaskTracker::new();
    let publishing = tasks.spawn(publish_all(feed));
    for kill in 0..KILLS {
        pass(Duration::from_millis(500 + mix(kill) % 900)).await;
        scene.process.kill_hard().await;
        scene.restart().await;
        clients.send_replace(scene.client.clone());
    }
    let published = publishing.await.expect("the publisher ends");
    assert_eq!(published.len(), PUBLISHED, "every publish has a name of its own");
    let counts = async |queue: &str| {
        let stats = scene.client.queue(queue).await["stats"].clone();
        ["ready", "scheduled", "in_flight"].map(|state| number(&stats, &format!("/{state}")))
    };
    for number in 0..SUBSCRIBERS - 1 {
        let queue = name(number);
        eventually_within("it is done", Duration::from_secs(120), async || {
            counts(&queue).await == [0, 0, 0]
        })
        .await;
    }
    for number in 0..SUBSCRIBERS {
        let queue = name(number);
        let mut seen = BTreeMap::<String, usize>::new();
        let (mut finished, mut failures) = (BTreeMap::<String, usize>::new(), 0);
        for message in scene.client.all(&format!("/v1/messages?queue={queue}")).await {
            *seen.entry(text(&message, "/published_id")).or_default() += 1;
            let failing = number + 1 == SUBSCRIBERS;
            assert_eq!(message["state"] != "completed", failing, "{message}");
            if message["state"] == "completed" {
                *finished.entry(text(&message, "/published_id")).or_default() += 1;
            }
            failures += message["failures"].as_u64().expect("failures are counted");
        }
        let wanted = published.values().filter(|even| number % 2 == 1 || **even).count();
        assert_eq!(seen.len(), wanted, "{queue} has every message it wants, and no other");
        assert!(seen.values().all(|count| *count == 1), "{queue} has each once");
        if number + 1 < SUBSCRIBERS {
            assert_eq!(finished, seen, "{queue} has finished each once");
            assert_eq!(failures, 0, "{queue} has nothing to do with what fails");
        } else {
            assert!(failures > 100 * KILLS / 2, "{queue} went on failing: {failures} times");
        }
        assert!(seen.keys().all(|id| published.contains_key(id)), "{queue} has what was published");
    }
    // What is kept once for several goes with the last of them.
    let before = shared(&scene.database).await;
    for number in 0..SUBSCRIBERS {
        let path = format!("/admin/v1/queues/{}?force=true", name(number));
        ask(scene.client.request(Method::DELETE, &path)).await.expect(204);
    }
    eventually_within("no payload is left", Duration::from_secs(120), async || {
        shared(&scene.database).await == 0
    })
    .await;
    say!(
        "{KILLS} kills, {PUBLISHED} published to {SUBSCRIBERS}: {before} payloads kept once, 0 left at the end"
    );
    assert_eq!(before, PUBLISHED as i64);
}

/// Publishes all messages, and gives for each name whether it is even.
async fn publish_all(feed: tokio::sync::watch::Receiver<Client>) -> BTreeMap<String, bool> {
    let mut published = BTreeMap::new();
    for batch in 0..PUBLISHED / BATCH {
        let line = |item: usize| {
            let number = batch * BATCH + item;
            let kind = if number.is_multiple_of(2) { "numbers.even" } else { "numbers.odd" };
            format!("{}\n", json!({"payload": payload(number), "type": kind}))
        };
        let lines = (0..BATCH).map(line).collect::<String>();
        loop {
            let client = feed.borrow().clone();
            let request = client.request(Method::POST, "/v1/topics/numbers/messages/batch");
            let request = request.header("content-type", "application/x-ndjson");
            let request = request.header("idempotency-key", format!("batch-{batch}"));
            match try_ask(request.body(lines.clone())).await {
                Ok(answer) if answer.status == 207 => {
                    let body = answer.json();
                    for (place, item) in body["items"].as_array().expect("items").iter().enumerate()
                    {
                        let even = (batch * BATCH + place).is_multiple_of(2);
                        let matched = if even { SUBSCRIBERS } else { SUBSCRIBERS / 2 };
                        assert_eq!(number(item, "/matched"), matched as u64, "{item}");
                        published.insert(text(item, "/published_id"), even);
                    }
                    break;
                }
                // Nobody knows what became of it, so the same again.
                Ok(answer) if answer.status == 503 => (),
                Ok(answer) => panic!("{}: {}", answer.status, answer.text()),
                Err(_) => (),
            }
            pass(Duration::from_millis(20)).await;
        }
    }
    published
}

/// How many payloads the database keeps for several messages.
async fn shared(database: &Database) -> i64 {
    match database {
        Database::Sqlite(directory) => {
            let path = directory.path().join("pump.db");
            let url = format!("sqlite://{}?mode=ro", path.display());
            let mut connection = <sqlx::SqliteConnection as sqlx::Connection>::connect(&url).await;
            let connection = connection.as_mut().expect("a reader may look");
            sqlx::query_scalar("select count(*) from shared").fetch_one(connection).await.unwrap()
        }
        Database::Postgres(url) => {
            let mut connection = <sqlx::PgConnection as sqlx::Connection>::connect(url).await;
            let connection = connection.as_mut().expect("the database can be reached");
            let count = sqlx::query_scalar("select count(*) from pumphouse.shared");
            count.fetch_one(connection).await.unwrap()
        }
    }
}

#[tokio::test]
async fn publishing_says_who_wants_it() {
    let scene = Scene::new().await;
    scene.queue("mails").await;
    scene.queue("audit").await;
    let base = "/admin/v1/topics/orders/subscriptions";
    let put = json!({"queue": "mails", "filter": {"type": "orders.*", "headers": {"X-Tenant": ["a", {"prefix": "b"}]}}});
    let shown = scene.client.put(&format!("{base}/mails"), &put).await.expect(201).json();
    assert_eq!(shown["filter"]["headers"], json!({"x-tenant": ["a", {"prefix": "b"}]}));
    scene.client.put(&format!("{base}/mails"), &shown).await.expect(200);
    scene.client.put(&format!("{base}/all"), &json!({"queue": "audit"})).await.expect(201);
    let publish = |kind: &str, tenant: &str| {
        let request = scene.client.request(Method::POST, "/v1/topics/orders/messages").body("x");
        let request = request.header("pumphouse-type", kind);
        request.header("pumphouse-forward-x-tenant", tenant).header("idempotency-key", "k-1")
    };
    let first = ask(publish("orders.placed", "b-7")).await.expect(201);
    let body = first.json();
    assert_eq!((number(&body, "/matched"), &body["duplicate"]), (2, &json!(false)));
    let queues = body["messages"].as_array().unwrap().iter().map(|it| text(it, "/queue"));
    assert_eq!(queues.collect::<Vec<_>>(), ["audit", "mails"]);
    let again = ask(publish("orders.placed", "b-7")).await.expect(200);
    assert_eq!(again.header("idempotency-replayed"), "true");
    assert_eq!(again.json()["published_id"], body["published_id"]);
    ask(publish("orders.placed", "c")).await.expect_problem(422, "idempotency-key-reused");
    let mail = text(&body, "/messages/1/id");
    let delivery = scene.receiver.wait_for_message(&mail).await.remove(0);
    let published_id = text(&body, "/published_id");
    assert_eq!(delivery.header("pumphouse-published-id"), published_id);
    assert_eq!(delivery.header("ce-id"), published_id, "copies share it");
    assert_eq!(delivery.header("x-tenant"), "b-7");
    let envelope = json!({"payload": {"n": 1}, "type": "invoices.sent"}).to_string();
    let request = scene.client.request(Method::POST, "/v1/topics/orders/messages").body(envelope);
    let answer = ask(request.header("content-type", ENVELOPE)).await.expect(201);
    assert_eq!(number(&answer.json(), "/matched"), 1, "not the mails");
    let nobody = |query| scene.client.post_nothing(query);
    let answer = nobody("/v1/topics/nobody/messages").await.expect(201).json();
    assert_eq!((number(&answer, "/matched"), &answer["messages"]), (0, &json!([])));
    let refused = nobody("/v1/topics/nobody/messages?require_subscribers=true").await;
    refused.expect_problem(409, "no-subscribers");
    let topics = scene.client.get("/admin/v1/topics").await.expect(200).json();
    let topics = topics["items"].as_array().unwrap();
    let of = |name: &str| topics.iter().find(|topic| topic["topic"] == name).unwrap();
    assert_eq!(number(of("orders"), "/subscriptions"), 2);
    assert_eq!(number(of("orders"), "/published_last_minute"), 2, "a repeat is none");
    assert_eq!(number(of("nobody"), "/subscriptions"), 0, "a typing error is seen");
    let metrics = scene.client.metrics().await;
    let name = "pumphouse_messages_published_total";
    assert_eq!(metrics.value(name, &[("topic", "orders")]), 2.0);
    scene.client.delete(&format!("{base}/all")).await.expect(204);
    scene.client.delete(&format!("{base}/all")).await.expect_problem(404, "no-such-subscription");
    let listed = scene.client.get(base).await.expect(200).json();
    assert_eq!(listed["items"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn a_subscription_that_cannot_be_is_refused_and_changes_nothing() {
    let scene = Scene::new().await;
    scene.queue("q").await;
    let path = "/admin/v1/topics/t/subscriptions/s";
    for (body, pointer) in [
        (json!({"queue": "missing"}), "/queue"),
        (json!({"queue": "NO"}), "/queue"),
        (json!({"queue": "q", "filter": {"type": []}}), "/filter/type"),
        (json!({"queue": "q", "filter": {"headers": {"x y": "a"}}}), "/filter/headers/x y"),
        (json!({"queue": "q", "filter": {"kind": "a"}}), "/filter/kind"),
        (json!({"queue": "q", "filter": {"type": 7}}), "/filter/type"),
        (json!({"queue": "q", "filter": {"type": {"suffix": "x"}}}), "/filter/type"),
        (json!({}), ""),
    ] {
        let answer = scene.client.put(path, &body).await.expect(422);
        assert_eq!(answer.pointers(), [pointer], "{body}");
    }
    scene.client.get(path).await.expect_problem(404, "no-such-subscription");
    scene
        .client
        .put("/admin/v1/topics/NO/subscriptions/s", &json!({"queue": "q"}))
        .await
        .expect(422);
}

#[tokio::test]
async fn a_handlers_answer_may_publish() {
    let scene = Scene::on(Database::postgres().await).await;
    for queue in ["from", "a", "b"] {
        scene.queue(queue).await;
    }
    for queue in ["a", "b"] {
        let path = format!("/admin/v1/topics/made/subscriptions/{queue}");
        scene.client.put(&path, &json!({"queue": queue})).await.expect(201);
    }
    let sent = json!({"messages": [{"topic": "made", "payload": 1, "type": "t"}]}).to_string();
    let reply = Reply::new(200).header("content-type", "application/vnd.pumphouse.messages+json");
    scene.receiver.set("/from", Mood::from(reply.body(sent)));
    let parent = scene.client.send("from", "x").await;
    for path in ["/a", "/b"] {
        let delivery = scene.receiver.wait_for(path, 1).await.remove(0);
        assert_eq!(delivery.header("pumphouse-causation-id"), parent);
        assert_eq!(delivery.header("pumphouse-correlation-id"), parent);
    }
    let event =
        json!([{"specversion": "1.0", "id": "1", "source": "/s", "type": "t", "topic": "made"}]);
    let reply = Reply::new(200).header("content-type", "application/cloudevents-batch+json");
    scene.receiver.set("/from", Mood::from(reply.body(event.to_string())));
    scene.client.send("from", "y").await;
    let delivery = scene.receiver.wait_for("/a", 2).await.remove(1);
    assert_eq!((delivery.header("ce-id"), delivery.header("ce-topic")), ("1", ""));
}
