//! Workers who pull: over HTTP, killed, slow, in crowds.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use futures::future::join_all;
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::support::chance::mix;
use crate::support::client::{Client, number, text};
use crate::support::postgres::{Cluster, start_cluster};
use crate::support::process::{Database, Process};
use crate::support::scene::Scene;
use crate::support::{eventually, eventually_within, on_both, pass, say};

on_both! {
    workers_that_die_lose_nothing_and_hold_nothing_together
    a_stale_token_changes_nothing
    of_two_words_on_one_message_the_first_counts
    workers_settle_as_handlers_do
    the_gate_bounds_what_is_out
    groups_and_turns_are_for_workers_too
}

const MESSAGES: usize = 50_000;
const WORKERS: usize = 8;
const LEASE: Duration = Duration::from_secs(2);
/// By how much the clocks of a database and of a test may differ.
const MARGIN: Duration = Duration::from_millis(50);

/// What workers hold: for each message who, by the number of the attempt, and until when.
#[derive(Default)]
struct Holders {
    open: BTreeMap<String, (u64, Instant)>,
    /// What was acked, as far as its worker lived to hear of it.
    done: BTreeSet<String>,
    together: Vec<String>,
    repeated: usize,
    /// How much was settled too late.
    stale: usize,
    /// What was refused as too late although the answer was there in time.
    refused_in_time: Vec<String>,
}

impl Holders {
    /// Whoever heard of an earlier attempt only now has no say: a later one is held already.
    fn hold(&mut self, id: &str, attempt: u64, until: Instant) {
        if self.open.get(id).is_some_and(|(open, _)| *open > attempt) {
            return;
        }
        let before = self.open.insert(id.to_owned(), (attempt, until));
        if let Some((earlier, until)) = before
            && until > Instant::now() + MARGIN
        {
            self.together.push(format!("{id}: {earlier} and {attempt}"));
        }
    }

    /// Whoever has it by now with a later attempt goes on to hold it.
    fn let_go(&mut self, id: &str, attempt: u64) {
        if self.open.get(id).is_some_and(|(open, _)| *open == attempt) {
            self.open.remove(id);
        }
    }
}

async fn workers_that_die_lose_nothing_and_hold_nothing_together(database: Database) {
    let scene = Scene::on(database).await;
    let settings = json!({"handler": {"kind": "pull"}, "concurrency": {"limit": 2000},
        "recovery": {"max_crashes": 1000}});
    scene.client.put_queue("jobs", &settings).await;
    for batch in 0..MESSAGES / 5000 {
        let lines = (0..5000).map(|item| format!("{{\"payload\":{}}}\n", batch * 5000 + item));
        crate::support::client::ask(scene.client.batch("jobs", lines.collect::<String>()))
            .await
            .expect(207);
    }
    let holders = Arc::new(Mutex::new(Holders::default()));
    let (tasks, mut workers) = (TaskTracker::new(), Vec::new());
    let enough = CancellationToken::new();
    let deaths = Arc::new(Mutex::new(0));
    for worker in 0..WORKERS as u64 {
        let (client, holders, enough) = (scene.client.clone(), holders.clone(), enough.clone());
        let deaths = deaths.clone();
        workers.push(tasks.spawn(async move {
            for life in 0.. {
                if enough.is_cancelled() {
                    return;
                }
                // Killed at random: what it was about to do is left undone, its connection with it.
                let span = Duration::from_millis(300 + mix(worker * 1000 + life) % 2500);
                let lives = work(&client, &holders, mix(worker * 7919 + life));
                if tokio::time::timeout(span, enough.run_until_cancelled(lives)).await.is_err() {
                    *deaths.lock().unwrap() += 1;
                }
            }
        }));
    }
    let left = async || {
        let stats = scene.client.queue("jobs").await["stats"].clone();
        let states = ["ready", "scheduled", "in_flight", "dead"];
        states.iter().map(|state| number(&stats, &format!("/{state}"))).sum::<u64>()
    };
    // Whoever ends before it is told to has met what must not be, and says so when it is waited for.
    eventually_within("all are settled", Duration::from_secs(240), async || {
        workers.iter().any(|worker| worker.is_finished()) || left().await == 0
    })
    .await;
    enough.cancel();
    for worker in workers {
        worker.await.expect("every worker lives, and dies, as it is meant to");
    }
    let completed = scene.client.all("/v1/messages?queue=jobs&state=completed").await;
    assert_eq!(completed.len(), MESSAGES, "every message is done");
    let holders = holders.lock().unwrap();
    assert_eq!(holders.together, Vec::<String>::new(), "no message is held twice at a time");
    let early = &holders.refused_in_time;
    assert_eq!(*early, Vec::<String>::new(), "what is settled in time is not too late");
    let deaths = *deaths.lock().unwrap();
    say!(
        "{MESSAGES} messages, {WORKERS} workers, {deaths} deaths, {} repeated, {} stale",
        holders.repeated,
        holders.stale
    );
    assert!(deaths > WORKERS, "they died");
}

/// A worker's life: takes messages, works a little, settles them; some it forgets, as one that hangs.
async fn work(client: &Client, holders: &Mutex<Holders>, seed: u64) {
    for round in 0.. {
        let asked = Instant::now();
        let wanted = json!({"max": 100, "wait": "1s", "duration": "2s"});
        let answer = client.post("/v1/queues/jobs/leases", &wanted).await;
        if answer.status != 200 {
            pass(Duration::from_millis(20)).await;
            continue;
        }
        let body = answer.json();
        let leases = body["leases"].as_array().expect("leases");
        {
            let mut holders = holders.lock().unwrap();
            for lease in leases {
                let id = text(lease, "/message/id");
                let attempt = number(lease, "/attempt");
                // Counted from before it was asked for: then it is over for certain.
                holders.hold(&id, attempt, asked + LEASE);
                holders.repeated += usize::from(attempt > 1);
            }
        }
        if mix(seed + round).is_multiple_of(20) {
            continue; // it hangs: its leases run out
        }
        let verdicts = leases.iter().map(|lease| {
            let failed = mix(seed ^ number(lease, "/message/payload")).is_multiple_of(50);
            let verdict = if failed { json!("release") } else { json!("ack") };
            json!({"token": lease["token"], "verdict": verdict})
        });
        let settlements = verdicts.collect::<Vec<_>>();
        // From here on it holds none of them: they may be somebody else's before it has heard so.
        for lease in leases {
            holders.lock().unwrap().let_go(&text(lease, "/message/id"), number(lease, "/attempt"));
        }
        let answer = client.post("/v1/leases/settle", &json!({"settlements": settlements})).await;
        let answered = Instant::now();
        let body = answer.expect(207).json();
        let mut holders = holders.lock().unwrap();
        for ((lease, said), item) in
            leases.iter().zip(&settlements).zip(body["items"].as_array().expect("items"))
        {
            let id = text(lease, "/message/id");
            match number(item, "/status") {
                200 => {
                    if said["verdict"] == "ack" {
                        assert!(holders.done.insert(id), "an ack is written once");
                    }
                }
                409 => {
                    holders.stale += 1;
                    if answered + MARGIN < asked + LEASE {
                        holders.refused_in_time.push(id);
                    }
                }
                other => panic!("{other}: {item}"),
            }
        }
    }
}

/// Leases so many, and gives what came.
async fn lease(client: &Client, queue: &str, wanted: Value) -> Vec<Value> {
    let answer = client.post(&format!("/v1/queues/{queue}/leases"), &wanted).await.expect(200);
    answer.json()["leases"].as_array().expect("leases").clone()
}

async fn settle(client: &Client, settlement: Value) -> Value {
    let body = json!({"settlements": [settlement]});
    client.post("/v1/leases/settle", &body).await.expect(207).json()["items"][0].clone()
}

async fn a_stale_token_changes_nothing(database: Database) {
    let scene = Scene::on(database).await;
    scene.client.put_queue("jobs", &json!({"handler": {"kind": "pull"}})).await;
    scene.client.put_queue("next", &json!({"handler": {"kind": "pull"}})).await;
    let id = scene.client.send("jobs", "x").await;
    let old = lease(&scene.client, "jobs", json!({"duration": "1s"})).await.remove(0);
    eventually("it comes back", async || scene.client.state(&id).await == "ready").await;
    let new = lease(&scene.client, "jobs", json!({"wait": "5s"})).await.remove(0);
    assert_eq!((number(&old, "/attempt"), number(&new, "/attempt")), (1, 2));
    for verdict in ["ack", "retry", "dead_letter", "discard", "release"] {
        let item = settle(&scene.client, json!({"token": old["token"], "verdict": verdict})).await;
        assert_eq!(
            (number(&item, "/status"), &item["problem"]["code"]),
            (409, &json!("lease-lost"))
        );
    }
    let sends = json!({"token": old["token"], "verdict": "ack", "messages": [{"queue": "next", "payload": 1}]});
    assert_eq!(number(&settle(&scene.client, sends).await, "/status"), 409);
    let renew = json!({"tokens": [old["token"], new["token"], "nonsense"], "duration": "60s"});
    let items = scene.client.post("/v1/leases/renew", &renew).await.expect(207).json();
    let statuses = [0, 1, 2].map(|place| number(&items, &format!("/items/{place}/status")));
    assert_eq!(statuses, [409, 200, 409]);
    assert_eq!(scene.client.state(&id).await, "leased");
    assert_eq!(number(&scene.client.queue("next").await, "/stats/ready"), 0, "nothing was sent");
    let done = settle(&scene.client, json!({"token": new["token"], "verdict": "ack"})).await;
    assert_eq!(number(&done, "/status"), 200);
    let again = settle(&scene.client, json!({"token": new["token"], "verdict": "ack"})).await;
    assert_eq!(number(&again, "/status"), 409, "used");
    let message = scene.client.message(&id).await;
    let outcomes = message["deliveries"].as_array().unwrap().iter();
    let outcomes = outcomes.map(|it| (number(it, "/number"), text(it, "/outcome")));
    let wanted = [(2, "acked".to_owned()), (1, "lease_lost".to_owned())];
    assert_eq!(outcomes.collect::<Vec<_>>(), wanted);
}

/// In one request. If the two ran beside each other, now the one and now the other would count.
async fn of_two_words_on_one_message_the_first_counts(database: Database) {
    let scene = Scene::on(database).await;
    let settings = json!({"handler": {"kind": "pull"}, "concurrency": {"limit": 50}});
    scene.client.put_queue("jobs", &settings).await;
    for _ in 0..50 {
        scene.client.send("jobs", "x").await;
    }
    let held = lease(&scene.client, "jobs", json!({"max": 50, "wait": "5s"})).await;
    let word = |lease: &Value, verdict| json!({"token": lease["token"], "verdict": verdict});
    let acks = held.iter().map(|lease| word(lease, "ack"));
    let words = acks.chain(held.iter().map(|lease| word(lease, "dead_letter")));
    let settlements = json!({"settlements": words.collect::<Vec<_>>()});
    let items = scene.client.post("/v1/leases/settle", &settlements).await.expect(207).json();
    let items = items["items"].as_array().unwrap();
    assert!(items[..50].iter().all(|item| item["status"] == 200), "{items:?}");
    assert!(items[50..].iter().all(|item| item["status"] == 409), "{items:?}");
    let stats = scene.client.queue("jobs").await;
    assert_eq!((number(&stats, "/stats/in_flight"), number(&stats, "/stats/dead")), (0, 0));
    // Of two of which the first is refused, the second counts.
    let id = scene.client.send("jobs", "x").await;
    let held = lease(&scene.client, "jobs", json!({"wait": "5s"})).await.remove(0);
    let sends = json!({"token": held["token"], "verdict": "ack", "messages": [{"queue": "missing", "payload": 1}]});
    let settlements = json!({"settlements": [sends, word(&held, "ack")]});
    let items = scene.client.post("/v1/leases/settle", &settlements).await.expect(207).json();
    let statuses = [0, 1].map(|place| number(&items, &format!("/items/{place}/status")));
    assert_eq!((statuses, scene.client.state(&id).await), ([422, 200], "completed".to_owned()));
}

async fn workers_settle_as_handlers_do(database: Database) {
    let scene = Scene::on(database).await;
    let settings = json!({"handler": {"kind": "pull"},
        "recovery": {"immediate": 0, "max_attempts": 2, "backoff": {"base": "10ms", "max": "10ms"}}});
    scene.client.put_queue("jobs", &settings).await;
    scene.queue("next").await;
    let client = &scene.client;
    let one = async || lease(client, "jobs", json!({"max": 1, "wait": "10s"})).await.remove(0);
    let said = async |lease: &Value, mut settlement: Value| {
        settlement["token"] = lease["token"].clone();
        assert_eq!(number(&settle(client, settlement).await, "/status"), 200);
    };
    let id = client
        .send_envelope(
            "jobs",
            &json!({"payload": {"n": 1}, "type": "t",
        "correlation_id": "c", "headers": {"x-a": "b"}}),
        )
        .await;
    let held = one().await;
    assert_eq!(held["message"]["payload"], json!({"n": 1}));
    assert_eq!(
        (&held["message"]["type"], &held["message"]["headers"]),
        (&json!("t"), &json!({"x-a": "b"}))
    );
    said(&held, json!({"verdict": "release"})).await;
    let held = one().await;
    assert_eq!(number(&held, "/attempt"), 2);
    said(&held, json!({"verdict": "retry", "reason": "the database is away"})).await;
    let message = client.message(&id).await;
    assert_eq!(
        (number(&message, "/failures"), &message["deliveries"][0]["error"]),
        (1, &json!("the database is away"))
    );
    let held = one().await;
    said(&held, json!({"verdict": "retry"})).await;
    assert_eq!(client.state(&id).await, "dead", "its two attempts have failed");
    let discarded = client.send("jobs", "x").await;
    said(&one().await, json!({"verdict": "discard", "reason": "nobody needs it"})).await;
    assert_eq!(client.message(&discarded).await["reason"], "nobody needs it");
    let dead = client.send("jobs", "x").await;
    said(&one().await, json!({"verdict": "dead_letter"})).await;
    assert_eq!(client.state(&dead).await, "dead");
    let later = client.send("jobs", "x").await;
    said(&one().await, json!({"verdict": "retry", "delay": "1h"})).await;
    assert_eq!(client.state(&later).await, "scheduled");
    // An ack sends, in its own transaction; one that cannot is no ack.
    let parent = client.send("jobs", "parent").await;
    let held = one().await;
    let refused = settle(
        client,
        json!({"token": held["token"], "verdict": "ack",
        "messages": [{"queue": "missing", "payload": 1}]}),
    )
    .await;
    assert_eq!(number(&refused, "/status"), 422);
    assert_eq!(client.state(&parent).await, "leased");
    said(&held, json!({"verdict": "ack", "messages": [{"queue": "next", "payload": "child"}]}))
        .await;
    let child = scene.receiver.wait_for("/next", 1).await.remove(0);
    assert_eq!(
        (child.header("pumphouse-causation-id"), &child.body[..]),
        (parent.as_str(), &b"\"child\""[..])
    );
    // What cannot be said is refused, and changes nothing.
    let id = client.send("jobs", "y").await;
    let held = one().await;
    for (settlement, pointer) in [
        (json!({"verdict": "ack", "delay": "1s"}), "/delay"),
        (json!({"verdict": "retry", "messages": [{"queue": "next", "payload": 1}]}), "/messages"),
        (json!({"verdict": "retry", "reply": {"payload": 1}}), "/reply"),
        (json!({"verdict": "ack", "messages": [{"payload": 1}]}), "/messages/0/queue"),
        (json!({"verdict": "ack", "reply": {}}), "/reply"),
    ] {
        let mut settlement = settlement;
        settlement["token"] = held["token"].clone();
        let item = settle(client, settlement).await;
        assert_eq!(
            (number(&item, "/status"), text(&item, "/problem/errors/0/pointer")),
            (422, pointer.to_owned())
        );
    }
    client
        .post("/v1/leases/settle", &json!({"settlements": [{"token": "x", "verdict": "maybe"}]}))
        .await
        .expect(422);
    assert_eq!(client.state(&id).await, "leased");
    for wrong in [
        json!({"max": 0}),
        json!({"max": 1001}),
        json!({"wait": "61s"}),
        json!({"duration": "0s"}),
        json!({"duration": "13h"}),
        json!({"x": 1}),
    ] {
        client.post("/v1/queues/jobs/leases", &wrong).await.expect(422);
    }
    client.post_nothing("/v1/queues/next/leases").await.expect_problem(409, "wrong-handler");
    client.post_nothing("/v1/queues/missing/leases").await.expect_problem(404, "no-such-queue");
}

async fn the_gate_bounds_what_is_out(database: Database) {
    let scene = Scene::on(database).await;
    let settings = json!({"handler": {"kind": "pull"}, "concurrency": {"limit": 3}});
    scene.client.put_queue("jobs", &settings).await;
    for _ in 0..10 {
        scene.client.send("jobs", "x").await;
    }
    let client = &scene.client;
    let all = async || lease(client, "jobs", json!({"max": 10})).await;
    let held = all().await;
    assert_eq!((held.len(), all().await.len()), (3, 0));
    // Who waits is let in by a settlement, at once.
    let waits = lease(client, "jobs", json!({"wait": "20s"}));
    let frees = async {
        pass(Duration::from_millis(200)).await;
        settle(client, json!({"token": held[0]["token"], "verdict": "ack"})).await
    };
    let begun = Instant::now();
    let (came, _) = tokio::join!(waits, frees);
    assert_eq!(came.len(), 1);
    assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    // A stopped queue leases nothing, but what an operator wants run now.
    client.patch_queue("jobs", &json!({"concurrency": {"limit": 100}})).await;
    client.stop_queue("jobs", &json!({})).await;
    assert_eq!(all().await.len(), 0);
    let waiting = client.all("/v1/messages?queue=jobs&state=ready").await;
    let id = text(&waiting[0], "/id");
    client.post_nothing(&format!("/v1/messages/{id}/run")).await.expect(200);
    let urgent = lease(client, "jobs", json!({"max": 10, "wait": "5s"})).await;
    assert_eq!(urgent.iter().map(|it| text(it, "/message/id")).collect::<Vec<_>>(), [id]);
    client.start_queue("jobs").await;
    eventually("the rest can be had", async || all().await.len() == 5).await;
    // What a process gave out is held although the process is started again.
    let before = client.all("/v1/messages?queue=jobs&state=leased").await.len();
    let mut scene = scene;
    scene.process.kill_hard().await;
    scene.restart().await;
    assert_eq!(scene.client.all("/v1/messages?queue=jobs&state=leased").await.len(), before);
    let token = urgent[0]["token"].clone();
    let item = settle(&scene.client, json!({"token": token, "verdict": "ack"})).await;
    assert_eq!(number(&item, "/status"), 200, "another process takes what a worker says");
}

#[tokio::test]
async fn a_worker_that_goes_away_while_it_waits_gets_nothing() {
    let scene = Scene::new().await;
    scene.client.put_queue("jobs", &json!({"handler": {"kind": "pull"}})).await;
    for _ in 0..20 {
        let wanted = json!({"wait": "30s"});
        let poll = scene.client.post("/v1/queues/jobs/leases", &wanted);
        tokio::time::timeout(Duration::from_millis(30), poll).await.expect_err("nothing is there");
    }
    let id = scene.client.send("jobs", "x").await;
    let held = lease(&scene.client, "jobs", json!({"wait": "5s"})).await;
    assert_eq!(text(&held[0], "/message/id"), id);
    assert_eq!(number(&held[0], "/attempt"), 1, "those who had gone took nothing");
}

async fn groups_and_turns_are_for_workers_too(database: Database) {
    let scene = Scene::on(database).await;
    let client = &scene.client;
    client.put_queue("jobs", &json!({"handler": {"kind": "pull"}})).await;
    for number in 0..3 {
        client.send_envelope("jobs", &json!({"payload": number, "group": "g"})).await;
    }
    for number in 0..3 {
        let held = lease(client, "jobs", json!({"max": 10, "wait": "5s"})).await;
        assert_eq!(held.len(), 1, "one of a group at a time");
        assert_eq!(held[0]["message"]["payload"], json!(number));
        settle(client, json!({"token": held[0]["token"], "verdict": "ack"})).await;
    }
    // More workers wait than the gate lets in, and one key has a backlog.
    let settings = json!({"handler": {"kind": "pull"}, "concurrency": {"limit": 2}});
    client.put_queue("crowd", &settings).await;
    for (key, count) in [("a", 30), ("b", 5)] {
        for _ in 0..count {
            client.send_envelope("crowd", &json!({"payload": key, "fairness_key": key})).await;
        }
    }
    let held = lease(client, "crowd", json!({"max": 2})).await;
    assert_eq!(held.len(), 2, "the gate is full");
    let came = Mutex::new(held.iter().map(|it| text(it, "/message/payload")).collect::<Vec<_>>());
    let enough = || came.lock().unwrap().len() >= TURNS;
    let workers = join_all((0..3).map(async |_| {
        while !enough() {
            for lease in lease(client, "crowd", json!({"max": 1, "wait": "2s"})).await {
                came.lock().unwrap().push(text(&lease, "/message/payload"));
                settle(client, json!({"token": lease["token"], "verdict": "ack"})).await;
            }
        }
    }));
    let frees = async {
        pass(Duration::from_millis(200)).await;
        for lease in &held {
            settle(client, json!({"token": lease["token"], "verdict": "ack"})).await;
        }
    };
    tokio::join!(workers, frees);
    let came = came.into_inner().unwrap();
    let of_b = came[..TURNS].iter().filter(|key| *key == "b").count();
    assert_eq!(of_b, 5, "they take turns: {came:?}");
}

/// How many leases two keys that take turns need for five of the second, and a few for those who ask at once.
const TURNS: usize = 14;

/// How many statements a process sends its database in a second, of whatever kind, while so many workers wait.
async fn statements_a_second(server: &Cluster, process: &Process, polls: usize) -> f64 {
    let client = process.client();
    let waiting = (0..polls).map(|_| {
        let client = client.clone();
        async move { lease(&client, "jobs", json!({"wait": "15s"})).await.len() }
    });
    // Each statement that is executed is a line of the server's log.
    let count = || {
        let log = server.log();
        let executed =
            |line: &&str| line.contains("LOG:  execute ") || line.contains("LOG:  statement: ");
        log.lines().filter(executed).count()
    };
    let measured = async {
        pass(Duration::from_secs(2)).await;
        let (before, begun) = (count(), Instant::now());
        pass(Duration::from_secs(12)).await;
        (count() - before) as f64 / begun.elapsed().as_secs_f64()
    };
    let (answers, rate) = tokio::join!(join_all(waiting), measured);
    assert_eq!(answers.into_iter().sum::<usize>(), 0);
    rate
}

#[tokio::test]
async fn a_crowd_that_waits_asks_the_database_no_more_than_one_does() {
    let server = start_cluster().await;
    let database = Database::Postgres(server.url());
    let mut connection = PgConnection::connect(&server.url()).await.unwrap();
    sqlx::raw_sql("alter system set log_statement = 'all'").execute(&mut connection).await.unwrap();
    sqlx::raw_sql("select pg_reload_conf()").execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
    let process = Process::start(&database, &[]).await;
    process.client().put_queue("jobs", &json!({"handler": {"kind": "pull"}})).await;
    let nobody = statements_a_second(&server, &process, 0).await;
    let crowd = statements_a_second(&server, &process, 200).await;
    say!("statements a second: {nobody:.2} with nobody waiting, {crowd:.2} with 200 long polls");
    assert!(nobody > 0.5, "it shows that it is alive, and the log tells of it: {nobody}");
    assert!(crowd < 5.0, "{nobody} and {crowd}");
}

#[tokio::test]
async fn a_queue_that_gets_another_kind_of_handler_goes_on_with_that() {
    let scene = Scene::new().await;
    scene.client.put_queue("jobs", &json!({"handler": {"kind": "pull"}})).await;
    scene.client.send("jobs", "1").await;
    let url = scene.receiver.url("/jobs");
    scene.client.patch_queue("jobs", &json!({"handler": {"kind": "http", "url": url}})).await;
    scene.receiver.wait_for("/jobs", 1).await;
    scene.client.post_nothing("/v1/queues/jobs/leases").await.expect_problem(409, "wrong-handler");
    scene.client.patch_queue("jobs", &json!({"handler": null})).await;
    let id = scene.client.send("jobs", "2").await;
    let held = lease(&scene.client, "jobs", json!({"wait": "5s"})).await;
    assert_eq!((text(&held[0], "/message/id"), number(&held[0], "/attempt")), (id, 1));
    // Whoever waits while it changes gets nothing.
    let url = scene.receiver.url("/again");
    let waits = lease(&scene.client, "jobs", json!({"wait": "3s"}));
    let changes = async {
        pass(Duration::from_millis(200)).await;
        let http = json!({"handler": {"kind": "http", "url": url}});
        scene.client.patch_queue("jobs", &http).await;
        scene.client.send("jobs", "3").await
    };
    let (held, _) = tokio::join!(waits, changes);
    assert_eq!(held.len(), 0);
    scene.receiver.wait_for("/again", 1).await;
}

#[tokio::test]
async fn a_rate_limit_is_for_workers_too() {
    let scene = Scene::new().await;
    let settings = json!({"handler": {"kind": "pull"}, "rate_limit": {"limit": 1, "period": "1h", "burst": 5}});
    scene.client.put_queue("jobs", &settings).await;
    for _ in 0..20 {
        scene.client.send("jobs", "x").await;
    }
    let polls = (0..10).map(|_| lease(&scene.client, "jobs", json!({"max": 5})));
    let leased = join_all(polls).await.into_iter().map(|leases| leases.len()).sum::<usize>();
    assert_eq!(leased, 5, "as many as there are tokens, however many ask at once");
}

#[tokio::test]
async fn who_waits_at_a_shut_gate_goes_on_soon_after_it_is_open() {
    let scene = Scene::new().await;
    let shut = json!({"handler": {"kind": "pull"}, "concurrency": {"limit": 0}});
    scene.client.put_queue("jobs", &shut).await;
    scene.client.send("jobs", "x").await;
    for _ in 0..3 {
        let waits = lease(&scene.client, "jobs", json!({"wait": "2500ms", "duration": "1s"}));
        let opens = async {
            pass(Duration::from_millis(300)).await;
            scene.client.patch_queue("jobs", &json!({"concurrency": {"limit": 1}})).await
        };
        let (held, _) = tokio::join!(waits, opens);
        let word = json!({"token": held[0]["token"], "verdict": "release"});
        assert_eq!(number(&settle(&scene.client, word).await, "/status"), 200);
        scene.client.patch_queue("jobs", &json!({"concurrency": {"limit": 0}})).await;
    }
}
