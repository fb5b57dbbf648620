//! The same key from many at once, over processes, and over a kill.

use std::collections::BTreeSet;
use std::time::Duration;

use futures::future::join_all;
use serde_json::json;

use crate::support::chance::mix;
use crate::support::client::{ask, try_ask};
use crate::support::process::{Database, Process};
use crate::support::scene::Scene;
use crate::support::{eventually, on_both, pass, say};

on_both! {
    who_lost_the_answer_to_a_kill_may_ask_again
    of_a_unique_key_there_is_one_message_at_a_time
}

#[tokio::test]
async fn one_key_from_sixty_four_clients_over_two_processes_is_one_message() {
    let scene = Scene::with_flags(Database::postgres().await, &["--replica", "one"]).await;
    let other = Process::start(&scene.database, &["--replica", "two"]).await;
    scene.queue("q").await;
    let clients = [scene.client.clone(), other.client()];
    let mut messages = BTreeSet::new();
    for round in 0..10 {
        let key = format!("order-{round}");
        let send = |n: usize| {
            let request = clients[n % 2].message_to("q", format!("body {round}"));
            ask(request.header("Idempotency-Key", key.as_str()))
        };
        let answers = join_all((0..64).map(send)).await;
        let ids = answers.iter().map(|answer| answer.id()).collect::<BTreeSet<_>>();
        let new = answers.iter().filter(|answer| answer.status == 201).count();
        let replayed = answers.iter().filter(|answer| answer.status == 200);
        let replayed = replayed.filter(|it| it.headers["idempotency-replayed"] == "true").count();
        assert_eq!((ids.len(), new, replayed), (1, 1, 63), "{ids:?}");
        messages.extend(ids);
        let wrong = clients[round % 2].message_to("q", "another body");
        let wrong = ask(wrong.header("Idempotency-Key", key.as_str())).await;
        wrong.expect_problem(422, "idempotency-key-reused");
    }
    eventually("all came", async || scene.receiver.count("/q") == 10).await;
    assert_eq!(scene.client.all("/v1/messages?queue=q").await.len(), 10);
    assert_eq!(messages.len(), 10);
}

async fn who_lost_the_answer_to_a_kill_may_ask_again(database: Database) {
    let mut scene = Scene::with_flags(database, &["--replica", "one"]).await;
    scene.queue("q").await;
    let mut lost = 0;
    const ROUNDS: u64 = 12;
    for round in 0..ROUNDS {
        let client = scene.client.clone();
        let request = move || {
            let request = client.message_to("q", format!("order {round}"));
            request.header("Idempotency-Key", format!("order-{round}"))
        };
        let asked = tokio_util::task::TaskTracker::new().spawn(try_ask(request()));
        pass(Duration::from_micros(mix(round) % 12_000)).await;
        scene.process.kill_hard().await;
        let answer = asked.await.expect("it does not panic");
        lost += u64::from(answer.is_err());
        scene.restart().await;
        let again = scene.client.message_to("q", format!("order {round}"));
        let again = ask(again.header("Idempotency-Key", format!("order-{round}"))).await;
        assert!([200, 201].contains(&again.status), "{again:?}");
        if let Ok(answer) = answer {
            assert_eq!(answer.id(), again.id());
        }
        scene.receiver.wait_for_message(&again.id()).await;
    }
    assert_eq!(scene.client.all("/v1/messages?queue=q").await.len(), ROUNDS as usize);
    say!("{lost} of {ROUNDS} answers were lost");
}

async fn of_a_unique_key_there_is_one_message_at_a_time(database: Database) {
    let scene = Scene::on(database).await;
    scene.queue_with("q", json!({"concurrency": {"limit": 0}})).await;
    let send = |body: &'static str| {
        let request = scene.client.message_to("q", body);
        ask(request.header("Pumphouse-Unique-While-Pending", "nightly report"))
    };
    let first = send("monday").await.expect(201);
    let again = send("tuesday").await.expect(200);
    assert_eq!((first.id(), true), (again.id(), again.json()["duplicate"] == true));
    let line = json!({"payload": "x", "unique_while_pending": "nightly report"});
    let batch = format!("{line}\n{{\"payload\": \"y\"}}\n{line}\n");
    let items = ask(scene.client.batch("q", batch)).await.expect(207).json()["items"].clone();
    let statuses = [0, 1, 2].map(|at| items[at]["status"].as_u64());
    assert_eq!(statuses, [Some(200), Some(201), Some(200)], "only the real duplicates: {items}");
    scene.queue("q").await;
    eventually("it is done", async || scene.client.state(&first.id()).await == "completed").await;
    let next = send("tuesday").await.expect(201);
    assert_ne!(first.id(), next.id());
    let wrong = scene.client.message_to("q", "x").header("Pumphouse-Unique-While-Pending", "");
    ask(wrong).await.expect_problem(422, "invalid");
}
