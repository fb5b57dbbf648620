//! What becomes many copies: sent in parts where it may be, refused where it must be one transaction.

use std::collections::BTreeMap;

use http::Method;
use serde_json::{Value, json};

use crate::support::client::{Answer, Client, ask, number, text, try_ask};
use crate::support::process::Database;
use crate::support::receiver::{Mood, Reply};
use crate::support::scene::Scene;
use crate::support::{eventually, on_both};

on_both! {
    a_batch_that_becomes_many_copies_is_sent_once_however_often_it_is_repeated
    a_batch_goes_on_without_the_client_that_sent_it
    what_becomes_too_many_copies_does_not_go_with_an_ack
}

const SUBSCRIBERS: usize = 20;
/// One transaction makes at most 10,000 copies: so these are five of 500.
const MESSAGES: usize = 2_500;
const AT_ONCE: usize = 500;

/// A topic that so many queues want, which nobody takes messages from.
async fn subscribe(client: &Client, subscribers: usize) {
    for number in 0..subscribers {
        let queue = format!("s{number}");
        client.put_queue(&queue, &json!({"handler": {"kind": "pull"}})).await;
        let path = format!("/admin/v1/topics/many/subscriptions/{queue}");
        client.put(&path, &json!({"queue": queue})).await.expect(201);
    }
}

/// A batch of so many messages with a key; those from `odd` on are of another type.
fn batch(client: &Client, key: &str, odd: usize) -> reqwest::RequestBuilder {
    let line = |number: usize| {
        let kind = if number < odd { "even" } else { "odd" };
        format!("{}\n", json!({"payload": number, "type": kind}))
    };
    let request = client.request(Method::POST, "/v1/topics/many/messages/batch");
    let request = request.header("content-type", "application/x-ndjson");
    let lines = (0..MESSAGES).map(line).collect::<String>();
    request.header("idempotency-key", key.to_owned()).body(lines)
}

fn statuses(answer: &Answer) -> Vec<u64> {
    let body = answer.json();
    let items = body["items"].as_array().unwrap_or_else(|| panic!("no items: {body}"));
    items.iter().map(|item| number(item, "/status")).collect()
}

/// How many messages each queue has.
async fn ready(client: &Client, subscribers: usize) -> Vec<u64> {
    let mut ready = Vec::new();
    for number_of in 0..subscribers {
        ready.push(number(&client.queue(&format!("s{number_of}")).await, "/stats/ready"));
    }
    ready
}

async fn a_batch_that_becomes_many_copies_is_sent_once_however_often_it_is_repeated(
    database: Database,
) {
    let scene = Scene::on(database).await;
    subscribe(&scene.client, SUBSCRIBERS).await;
    let first = ask(batch(&scene.client, "k", MESSAGES)).await.expect(207);
    assert_eq!(statuses(&first), vec![201; MESSAGES]);
    assert_eq!(first.json()["items"][MESSAGES - 1]["matched"], SUBSCRIBERS);
    let again = ask(batch(&scene.client, "k", MESSAGES)).await.expect(207);
    assert_eq!(statuses(&again), vec![200; MESSAGES]);
    assert_eq!(again.header("idempotency-replayed"), "true");
    let names = |answer: &Answer| {
        let body = answer.json();
        let items = body["items"].as_array().unwrap().iter();
        items.map(|item| text(item, "/published_id")).collect::<Vec<_>>()
    };
    assert_eq!(names(&again), names(&first));
    assert_eq!(ready(&scene.client, SUBSCRIBERS).await, [MESSAGES as u64; SUBSCRIBERS]);
    let other = ask(batch(&scene.client, "k", 0)).await;
    other.expect_problem(422, "idempotency-key-reused");
    let lines = "{\"payload\": 1}\n".repeat(AT_ONCE + 1);
    let path = "/v1/topics/many/messages/batch?atomic=true";
    let atomic = scene.client.request(Method::POST, path).body(lines);
    let atomic = ask(atomic.header("content-type", "application/x-ndjson")).await;
    atomic.expect_problem(413, "too-large");
}

async fn a_batch_goes_on_without_the_client_that_sent_it(database: Database) {
    let scene = Scene::on(database).await;
    subscribe(&scene.client, SUBSCRIBERS).await;
    let one = async || number(&scene.client.queue("s0").await, "/stats/ready");
    let sending = try_ask(batch(&scene.client, "k", MESSAGES));
    let begun = eventually("a part is sent", async || one().await > 0);
    tokio::select! {
        _ = sending => panic!("it was to be left while it was under way"),
        () = begun => (),
    }
    eventually("all are sent", async || one().await == MESSAGES as u64).await;
    assert_eq!(ready(&scene.client, SUBSCRIBERS).await, [MESSAGES as u64; SUBSCRIBERS]);
}

#[tokio::test]
async fn a_batch_that_is_sent_in_part_says_so_and_its_repeat_sends_the_rest() {
    let scene = Scene::on(Database::postgres().await).await;
    subscribe(&scene.client, SUBSCRIBERS).await;
    let Database::Postgres(url) = &scene.database else { panic!("it is on Postgres") };
    let mut operator = <sqlx::PgConnection as sqlx::Connection>::connect(url).await.unwrap();
    // As one that has no room for connections says it, in the middle of the third part.
    let break_it =
        "create function pumphouse.break_it() returns trigger language plpgsql as $$ begin
            raise exception 'away' using errcode = '53300';
        end $$;
        create trigger break_it before insert on pumphouse.content for each row
        when (new.kind = 'odd') execute procedure pumphouse.break_it();";
    sqlx::raw_sql(break_it).execute(&mut operator).await.unwrap();
    let odd = 2 * AT_ONCE + AT_ONCE / 2;
    let broken = ask(batch(&scene.client, "k", odd)).await.expect(207);
    let wanted = [vec![201; 2 * AT_ONCE], vec![503; MESSAGES - 2 * AT_ONCE]].concat();
    assert_eq!(statuses(&broken), wanted);
    let problem = broken.json()["items"][MESSAGES - 1]["problem"].clone();
    assert_eq!(problem["code"], "database-unavailable", "{problem}");
    assert_eq!(ready(&scene.client, SUBSCRIBERS).await, [2 * AT_ONCE as u64; SUBSCRIBERS]);
    let mend = "drop trigger break_it on pumphouse.content";
    sqlx::raw_sql(mend).execute(&mut operator).await.unwrap();
    let again = ask(batch(&scene.client, "k", odd)).await.expect(207);
    let wanted = [vec![200; 2 * AT_ONCE], vec![201; MESSAGES - 2 * AT_ONCE]].concat();
    assert_eq!(statuses(&again), wanted);
    assert_eq!(again.header("idempotency-replayed"), "", "some of it is new");
    assert_eq!(ready(&scene.client, SUBSCRIBERS).await, [MESSAGES as u64; SUBSCRIBERS]);
    let mut seen = BTreeMap::<String, usize>::new();
    for message in scene.client.all("/v1/messages?queue=s7").await {
        *seen.entry(text(&message, "/published_id")).or_default() += 1;
    }
    assert_eq!((seen.len(), seen.values().max()), (MESSAGES, Some(&1)), "each once");
}

async fn what_becomes_too_many_copies_does_not_go_with_an_ack(database: Database) {
    let scene = Scene::on(database).await;
    let client = &scene.client;
    subscribe(client, SUBSCRIBERS).await;
    client.put_queue("jobs", &json!({"handler": {"kind": "pull"}})).await;
    let parent = client.send("jobs", "x").await;
    let held = client.post("/v1/queues/jobs/leases", &json!({"wait": "5s"})).await.expect(200);
    let token = text(&held.json(), "/leases/0/token");
    let messages = |count: usize| vec![json!({"topic": "many", "payload": 1}); count];
    let ack = async |messages: Vec<Value>| {
        let settlement = json!({"token": token, "verdict": "ack", "messages": messages});
        let body = json!({"settlements": [settlement]});
        client.post("/v1/leases/settle", &body).await.expect(207).json()["items"][0].clone()
    };
    let refused = ack(messages(AT_ONCE + 1)).await;
    assert_eq!(number(&refused, "/status"), 422, "{refused}");
    assert_eq!(text(&refused, "/problem/errors/0/pointer"), "/messages");
    let detail = text(&refused, "/problem/errors/0/detail");
    assert!(detail.contains("10000 copies") && detail.contains("send fewer"), "{detail}");
    assert_eq!(client.state(&parent).await, "leased");
    assert_eq!(ready(client, SUBSCRIBERS).await, [0; SUBSCRIBERS]);
    assert_eq!(number(&ack(messages(AT_ONCE)).await, "/status"), 200);
    assert_eq!(ready(client, SUBSCRIBERS).await, [AT_ONCE as u64; SUBSCRIBERS]);
    // A handler's answer that is too much is as one that is malformed.
    let answer = json!({"messages": messages(AT_ONCE + 1)}).to_string();
    let reply = Reply::new(200).header("content-type", "application/vnd.pumphouse.messages+json");
    scene.receiver.set("/work", Mood::from(reply.body(answer)));
    scene.queue_with("work", json!({"recovery": {"immediate": 0, "max_attempts": 1}})).await;
    let parent = client.send("work", "x").await;
    eventually("it has failed", async || client.state(&parent).await == "dead").await;
    let delivery = client.message(&parent).await["deliveries"][0].clone();
    assert_eq!(delivery["error_kind"], "malformed", "{delivery}");
    assert!(text(&delivery, "/error").contains("10000 copies"), "{delivery}");
    assert_eq!(ready(client, SUBSCRIBERS).await, [AT_ONCE as u64; SUBSCRIBERS]);
}
