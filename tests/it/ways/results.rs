//! Results: a sender that waits, and answers that are sent on.

use std::time::Duration;

use futures::future::join_all;
use http::Method;
use jiff::Timestamp;
use pumphouse::clock::{Clock, SystemClock};
use serde_json::{Value, json};

use crate::support::client::{Client, ask, number, text};
use crate::support::process::{Database, Process};
use crate::support::receiver::{Mood, Reply};
use crate::support::scene::Scene;
use crate::support::{on_both, say};

on_both! {
    whoever_waits_hears_how_it_ended
    an_answer_is_sent_on
}

async fn wait_for(client: &Client, queue: &str, wait: &str) -> crate::support::client::Answer {
    let path = format!("/v1/queues/{queue}/messages?wait={wait}");
    ask(client.request(Method::POST, &path).body("x")).await
}

async fn whoever_waits_hears_how_it_ended(database: Database) {
    let scene = Scene::on(database).await;
    for queue in ["well", "ill", "slow"] {
        let recovery = json!({"recovery": {"immediate": 0, "max_attempts": 2}});
        scene.queue_with(queue, recovery).await;
    }
    scene.receiver.set("/well", Mood::from(Reply::new(200).body("made: 7")));
    scene.receiver.set("/ill", Mood::status(500));
    scene.receiver.set("/slow", Mood::slow(Duration::from_secs(2)));
    let answer = wait_for(&scene.client, "well", "10s").await.expect(200);
    let body = answer.json();
    assert_eq!(answer.header("location"), format!("/v1/messages/{}", text(&body, "/id")));
    assert_eq!(
        (text(&body, "/state"), text(&body, "/deliveries/0/answer")),
        ("completed".to_owned(), "made: 7".to_owned())
    );
    let body = wait_for(&scene.client, "ill", "10s").await.expect(200).json();
    assert_eq!((text(&body, "/state"), number(&body, "/failures")), ("dead".to_owned(), 2));
    let body = wait_for(&scene.client, "slow", "100ms").await.expect(202).json();
    let id = text(&body, "/id");
    assert_eq!(scene.client.state(&id).await, "leased", "it goes on");
    // A repeat waits for the first one.
    let keyed = || {
        let request = scene.client.request(Method::POST, "/v1/queues/slow/messages?wait=20s");
        request.body("y").header("idempotency-key", "k")
    };
    let (first, second) = tokio::join!(ask(keyed()), ask(keyed()));
    assert_eq!((first.status, second.status), (200, 200));
    assert_eq!(first.id(), second.id());
    assert_eq!(text(&second.json(), "/state"), "completed");
    if let Database::Postgres(_) = scene.database {
        another_process_settles_it(&scene).await;
    }
    for wrong in ["61s", "soon", "-1"] {
        wait_for(&scene.client, "well", wrong).await.expect(422);
    }
    wait_for(&scene.client, "missing", "1s").await.expect_problem(404, "no-such-queue");
}

/// Who waits at one process hears of what a worker says to another one.
async fn another_process_settles_it(scene: &Scene) {
    let other = Process::start(&scene.database, &["--replica", "other"]).await;
    scene.client.put_queue("outside", &json!({"handler": {"kind": "pull"}})).await;
    let waits = join_all((0..20).map(|_| wait_for(&scene.client, "outside", "20s")));
    let works = async {
        let (client, mut done) = (other.client(), 0);
        while done < 20 {
            let wanted = json!({"max": 20, "wait": "10s"});
            let held = client.post("/v1/queues/outside/leases", &wanted).await.expect(200).json();
            let leases = held["leases"].as_array().expect("leases");
            assert!(!leases.is_empty(), "there is more to do");
            let ack = |lease: &Value| json!({"token": lease["token"], "verdict": "ack"});
            let said = leases.iter().map(ack).collect::<Vec<_>>();
            let said = client.post("/v1/leases/settle", &json!({"settlements": said})).await;
            let heard = said.expect(207).json();
            let heard = heard["items"].as_array().expect("items");
            assert!(heard.iter().all(|item| item["status"] == 200), "{heard:?}");
            done += leases.len();
        }
    };
    let (answers, ()) = tokio::join!(waits, works);
    for answer in answers {
        let body = answer.expect(200).json();
        let by = (text(&body, "/state"), text(&body, "/deliveries/0/replica"));
        assert_eq!(by, ("completed".to_owned(), "other".to_owned()), "{body}");
    }
}

async fn an_answer_is_sent_on(database: Database) {
    let scene = Scene::on(database).await;
    scene.queue("ask").await;
    scene.queue("answers").await;
    let long = "r".repeat(100_000);
    let reply = Reply::new(200).header("content-type", "text/x-answer").body(long.clone());
    scene.receiver.set("/ask", Mood::from(reply));
    let request = scene.client.message_to("ask", "question");
    let request = request.header("pumphouse-reply-to", "answers");
    let id = ask(request.header("pumphouse-correlation-id", "c-7")).await.expect(201).id();
    let answer = scene.receiver.wait_for("/answers", 1).await.remove(0);
    assert_eq!((answer.header("content-type"), answer.body.len()), ("text/x-answer", long.len()));
    assert_eq!(answer.header("pumphouse-causation-id"), id);
    assert_eq!(answer.header("pumphouse-correlation-id"), "c-7");
    // A failure is no answer.
    scene.receiver.set("/ask", Mood::status(400));
    let envelope = json!({"payload": 1, "reply_to": "answers"});
    let id = scene.client.send_envelope("ask", &envelope).await;
    crate::support::eventually("it is dead", async || scene.client.state(&id).await == "dead")
        .await;
    assert_eq!(scene.receiver.count("/answers"), 1);
    assert_eq!(scene.client.message(&id).await["reply_to"], "answers");
    // Whoever wants an answer in a queue that is not there hears it before the work is done.
    let request = scene.client.message_to("ask", "x").header("pumphouse-reply-to", "missing");
    assert_eq!(ask(request).await.expect(422).pointers(), ["reply_to"]);
    let request = scene.client.message_to("ask", "x").header("pumphouse-reply-to", "NO");
    assert_eq!(ask(request).await.expect(422).pointers(), ["pumphouse-reply-to"]);
    // What is sent with an ack may want an answer too.
    scene.client.put_queue("jobs", &json!({"handler": {"kind": "pull"}})).await;
    let parent = scene.client.send("jobs", "x").await;
    let held =
        scene.client.post("/v1/queues/jobs/leases", &json!({"wait": "5s"})).await.expect(200);
    let token = text(&held.json(), "/leases/0/token");
    let ack = async |reply_to: &str| {
        let message = json!({"queue": "ask", "payload": 1, "reply_to": reply_to});
        let said = json!({"token": token, "verdict": "ack", "messages": [message]});
        let said = json!({"settlements": [said]});
        scene.client.post("/v1/leases/settle", &said).await.expect(207).json()["items"][0].clone()
    };
    let refused = ack("missing").await;
    assert_eq!(number(&refused, "/status"), 422, "{refused}");
    let detail = text(&refused, "/problem/errors/0/detail");
    assert!(detail.contains("/messages/0") && detail.contains("no queue missing"), "{detail}");
    assert_eq!(scene.client.state(&parent).await, "leased");
    assert_eq!(number(&ack("answers").await, "/status"), 200);
    // A worker's answer.
    scene.client.put_queue("jobs", &json!({"handler": {"kind": "pull"}})).await;
    scene.client.send_envelope("jobs", &json!({"payload": 1, "reply_to": "answers"})).await;
    let held =
        scene.client.post("/v1/queues/jobs/leases", &json!({"wait": "5s"})).await.expect(200);
    let token = text(&held.json(), "/leases/0/token");
    let said = json!({"settlements": [{"token": token, "verdict": "ack", "reply": {"payload": {"ok": true}}}]});
    scene.client.post("/v1/leases/settle", &said).await.expect(207);
    let answer = scene.receiver.wait_for("/answers", 2).await.remove(1);
    assert_eq!(
        (answer.header("content-type"), &answer.body[..]),
        ("application/json", &b"{\"ok\":true}"[..])
    );
}

const CALLERS: usize = 200;
const ROUNDS: usize = 15;
const WORK: Duration = Duration::from_millis(50);

/// When a message was settled, as the store has it.
async fn settled(scene: &Scene, id: &str) -> Timestamp {
    crate::support::eventually("it is done", async || scene.client.state(id).await == "completed")
        .await;
    text(&scene.client.message(id).await, "/finished_at").parse().expect("it is a time")
}

/// Two hundred at once; how long the middle one took: by the message itself (from `POST` until it is
/// settled, as the store has it) where nobody waits, and by the caller where each does.
async fn round(scene: &Scene, waits: bool) -> Duration {
    let path = if waits { "/v1/queues/work/messages?wait=20s" } else { "/v1/queues/work/messages" };
    let callers = (0..CALLERS).map(|_| async {
        let began = SystemClock.now();
        let answer = ask(scene.client.request(Method::POST, path).body("x")).await;
        let status = if waits { 200 } else { 201 };
        let id = answer.expect(status).id();
        (id, began, SystemClock.now())
    });
    let called = join_all(callers).await;
    let mut took = Vec::new();
    for (id, began, answered) in called {
        let end = if waits { answered } else { settled(scene, &id).await };
        took.push(end.duration_since(began).unsigned_abs());
    }
    took.sort_unstable();
    took[CALLERS / 2]
}

#[tokio::test]
async fn to_wait_costs_little_beside_the_message_itself() {
    let scene = Scene::on(Database::sqlite().off_the_disk()).await;
    scene.queue_with("work", json!({"concurrency": {"limit": 64}})).await;
    scene.receiver.set("/work", Mood::slow(WORK));
    round(&scene, true).await;
    let mut ratios = Vec::new();
    for _ in 0..ROUNDS {
        let itself = round(&scene, false).await;
        let waited = round(&scene, true).await;
        ratios.push(waited.as_secs_f64() / itself.as_secs_f64());
    }
    ratios.sort_by(f64::total_cmp);
    let shown = ratios.iter().map(|ratio| format!("{ratio:.2}")).collect::<Vec<_>>().join(" ");
    say!("{CALLERS} callers, {WORK:?} of work: waited / itself {shown}");
    assert!(ratios[ROUNDS / 2] <= 1.2, "{shown}");
}
