//! Groups through the public door: in order and one at a time, also when a process is killed on the way.

use std::collections::HashMap;
use std::time::Duration;

use serde_json::json;

use crate::support::chance::mix;
use crate::support::client::ask;
use crate::support::process::{Database, Process};
use crate::support::receiver::{Delivery, Mood};
use crate::support::scene::Scene;
use crate::support::{eventually, eventually_within, on_both, pass, say};

on_both! {
    what_a_group_is_through_the_door
    a_blocked_group_goes_on_when_its_dead_letter_is_redriven
}

const GROUPS: usize = 200;
const MESSAGES: usize = 20_000;

#[tokio::test]
async fn two_processes_of_which_one_is_killed_keep_every_group_in_order() {
    let scene = Scene::with_flags(Database::postgres().await, &["--replica", "one"]).await;
    let mut other = Process::start(&scene.database, &["--replica", "two"]).await;
    send_all(&scene).await;
    scene.receiver.wait_for("/q", MESSAGES / 3).await;
    other.kill_hard().await;
    check(&scene).await;
}

#[tokio::test]
async fn one_process_that_is_killed_keeps_every_group_in_order() {
    let mut scene = Scene::with_flags(Database::sqlite(), &["--replica", "one"]).await;
    send_all(&scene).await;
    scene.receiver.wait_for("/q", MESSAGES / 3).await;
    scene.process.kill_hard().await;
    scene.restart().await;
    check(&scene).await;
}

/// Sends all messages of all groups, a thousand at once, to a handler that fails a tenth of them at first.
async fn send_all(scene: &Scene) {
    let settings = json!({"concurrency": {"limit": 64}, "recovery": {"max_crashes": 1_000}});
    scene.queue_with("q", settings).await;
    scene.receiver.set(
        "/q",
        Mood::by(|delivery| {
            let chance = mix(number_in(delivery) as u64);
            let fails = chance.is_multiple_of(10) && delivery.attempt <= 2;
            if fails { Mood::status(500) } else { Mood::ack() }
        }),
    );
    for batch in 0..MESSAGES / 1_000 {
        let line = |number: usize| {
            let number = batch * 1_000 + number;
            format!("{}\n", json!({"payload": number, "group": format!("g{}", number % GROUPS)}))
        };
        ask(scene.client.batch("q", (0..1_000).map(line).collect::<String>())).await.expect(207);
    }
}

fn number_in(delivery: &Delivery) -> usize {
    String::from_utf8_lossy(&delivery.body).parse().expect("a number was sent")
}

async fn check(scene: &Scene) {
    let left = async || {
        let stats = scene.client.queue("q").await["stats"].clone();
        ["ready", "scheduled", "in_flight"].map(|it| stats[it].as_u64().expect("a count"))
    };
    let done = async || left().await == [0, 0, 0];
    eventually_within("all are done", Duration::from_secs(180), done).await;
    let deliveries = scene.receiver.deliveries("/q");
    let mut groups = HashMap::<&str, Vec<&Delivery>>::new();
    for delivery in &deliveries {
        groups.entry(delivery.header("pumphouse-group")).or_default().push(delivery);
    }
    assert_eq!(groups.len(), GROUPS);
    let (mut overlaps, mut out_of_order, mut done) = (0, 0, 0);
    for deliveries in groups.values() {
        for pair in deliveries.windows(2) {
            let ended = pair[0].ended.expect("nothing is open any more");
            overlaps += usize::from(pair[1].started < ended);
            // The next one comes after this one was acked; this one may come again, if nobody heard of the ack.
            let (now, next) = (number_in(pair[0]), number_in(pair[1]));
            let in_order = next == now || (next == now + GROUPS && pair[0].succeeded());
            out_of_order += usize::from(!in_order);
        }
        let last = deliveries.last().expect("a group has messages");
        done += usize::from(last.succeeded() && number_in(last) >= MESSAGES - GROUPS);
    }
    let failed = deliveries.iter().filter(|delivery| !delivery.succeeded()).count();
    say!(
        "{} deliveries, {failed} failed, {overlaps} overlaps, {out_of_order} out of order, {done} groups done",
        deliveries.len()
    );
    assert_eq!((overlaps, out_of_order, done), (0, 0, GROUPS));
}

async fn what_a_group_is_through_the_door(database: Database) {
    let scene = Scene::on(database).await;
    scene.queue("q").await;
    scene.receiver.set("/q", Mood::Hang);
    let send =
        |n: usize| scene.client.message_to("q", n.to_string()).header("Pumphouse-Group", "g");
    let mut ids = Vec::new();
    for n in 0..3 {
        ids.push(ask(send(n)).await.expect(201).id());
    }
    let first = scene.receiver.wait_for("/q", 1).await[0].clone();
    assert_eq!((first.id.as_str(), first.header("pumphouse-group")), (ids[0].as_str(), "g"));
    // Nobody else is held up.
    let alone = scene.client.send("q", "of no group").await;
    scene.receiver.wait_for_message(&alone).await;
    let stats = scene.client.queue("q").await["stats"].clone();
    assert_eq!((stats["ready"].as_u64(), stats["behind"].as_u64()), (Some(2), Some(2)), "{stats}");
    assert_eq!(scene.client.message(&ids[1]).await["group"], "g");
    let listed = scene.client.all("/v1/messages?queue=q&group=g").await;
    assert_eq!(listed.len(), 3, "{listed:?}");
    assert_eq!(scene.client.all("/v1/messages?group=other").await.len(), 0);
    // A place in a group is not for sale.
    let run = scene.client.post_nothing(&format!("/v1/messages/{}/run", ids[1])).await;
    run.expect_problem(409, "wrong-state");
    for (header, value) in [("Pumphouse-Delay", "1s"), ("Pumphouse-Priority", "1")] {
        ask(send(9).header(header, value)).await.expect_problem(422, "invalid");
    }
    ask(scene.client.message_to("q", "x").header("Pumphouse-Group", ""))
        .await
        .expect_problem(422, "invalid");
    assert_eq!(scene.receiver.count("/q"), 2);
}

async fn a_blocked_group_goes_on_when_its_dead_letter_is_redriven(database: Database) {
    let scene = Scene::on(database).await;
    scene.queue_with("q", json!({"group_on_dead": "block"})).await;
    assert_eq!(scene.client.queue("q").await["group_on_dead"], "block");
    scene.receiver.set("/q", Mood::status(400));
    let send =
        |n: usize| scene.client.message_to("q", n.to_string()).header("Pumphouse-Group", "g");
    let dead = ask(send(0)).await.expect(201).id();
    eventually("it is dead", async || scene.client.state(&dead).await == "dead").await;
    scene.receiver.set("/q", Mood::ack());
    let next = ask(send(1)).await.expect(201).id();
    let alone = scene.client.send("q", "of no group").await;
    scene.receiver.wait_for_message(&alone).await;
    pass(Duration::from_millis(300)).await;
    assert_eq!(scene.client.state(&next).await, "ready");
    let redrive = json!({"filter": {"group": "g", "queue": "q"}});
    let redriven = scene.client.post("/admin/v1/redrives", &redrive).await.expect(200);
    assert_eq!(redriven.json()["redriven"], 1);
    scene.receiver.wait_for_message(&next).await;
    let numbers =
        scene.receiver.deliveries("/q").iter().map(|it| it.body.clone()).collect::<Vec<_>>();
    assert_eq!(numbers, [&b"0"[..], b"of no group", b"0", b"1"]);
}
