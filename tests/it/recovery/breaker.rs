//! A handler that is ill, or wants to be left alone, is left alone; and asked again with care.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::client::{number, text};
use crate::support::process::{Database, Process};
use crate::support::receiver::{Delivery, Mood, Reply};
use crate::support::scene::Scene;
use crate::support::{eventually, never_within, on_both, pass, say};

on_both! {
    a_dead_receiver_is_asked_a_few_times_and_no_message_dies_of_it
    probes_ramp_up_until_it_closes
    an_operator_closes_it
    a_429_or_503_that_names_a_time_holds_the_whole_queue
}

/// A breaker that is quick enough to be watched.
fn breaker(changes: Value) -> Value {
    let mut settings = json!({
        "breaker": {"failures": 5, "open_for": "1s", "max_open": "4s"},
        "concurrency": {"limit": 4},
        "recovery": {"max_attempts": 6},
    });
    for (name, value) in changes.as_object().expect("an object") {
        settings[name] = value.clone();
    }
    settings
}

async fn a_dead_receiver_is_asked_a_few_times_and_no_message_dies_of_it(database: Database) {
    let scene = Scene::on(database).await;
    scene.receiver.set("/q", Mood::status(500));
    scene.queue_with("q", breaker(json!({}))).await;
    let began = Instant::now();
    send_until_it_opens(&scene, 40).await;
    // Open for 1, 2, 4 and 4 seconds: with one probe after each, and what was under way when it opened.
    pass(Duration::from_secs(10)).await;
    let asked = scene.receiver.count("/q");
    let took = began.elapsed().as_secs();
    assert!(asked >= 5 + 2, "there were probes: {asked} in {took} s");
    assert!(asked <= 5 + 3 + 2 + took as usize / 4 + 1, "{asked} in {took} s");
    say!("asked {asked} times in {took} s, with 40 messages waiting");
    let metrics = scene.client.metrics().await;
    assert!(metrics.value("pumphouse_breaker_state", &[("queue", "q")]) > 0.0);
    scene.receiver.set("/q", Mood::ack());
    eventually("all are completed", async || completed(&scene).await == 40).await;
    let stats = scene.client.queue("q").await["stats"].clone();
    assert_eq!(number(&stats, "/dead"), 0, "{stats}");
    let metrics = scene.client.metrics().await;
    let postponed = [("queue", "q"), ("outcome", "postponed")];
    let postponed = metrics.value("pumphouse_deliveries_total", &postponed);
    assert!(postponed >= 2.0, "what failed while it was tried is told apart: {postponed}");
    assert_eq!(state(&scene).await, "closed");
}

/// By the settings that a queue has if nobody sets any. Ten fail before it opens, of which up to sixteen are open at
/// once; after half a minute one looks whether the handler is well; the next one would a minute after that.
#[tokio::test]
async fn a_dead_receiver_is_asked_at_most_26_times_in_a_minute() {
    let scene = Scene::new().await;
    let (retry, breaker) =
        (json!({}), json!({"failures": 10, "open_for": "30s", "max_open": "10m"}));
    let settings = json!({"recovery": retry, "breaker": breaker, "concurrency": {"limit": 16}});
    scene.queue_with("q", settings).await;
    scene.receiver.set("/q", Mood::status(500));
    let began = Instant::now();
    send_until_it_opens(&scene, 200).await;
    let at_once = scene.receiver.count("/q");
    pass(Duration::from_secs(60).saturating_sub(began.elapsed())).await;
    let asked = scene.receiver.count("/q");
    say!("asked {at_once} times before it opened, {asked} times in a minute");
    assert!((10..=25).contains(&at_once), "{at_once}");
    assert!(asked <= 26, "{asked}");
    assert!(asked > at_once, "one looked whether it is well");
    scene.receiver.set("/q", Mood::ack());
    scene.client.start_queue("q").await;
    // The one that tried goes after the others, when the breaker would have been tried again.
    eventually("all others are completed", async || completed(&scene).await == 199).await;
    let waits = scene.client.all("/v1/messages?queue=q&state=scheduled").await;
    let waits = text(&waits[0], "/id");
    scene.client.post_nothing(&format!("/v1/messages/{waits}/run")).await.expect(200);
    eventually("all are completed", async || completed(&scene).await == 200).await;
}

async fn probes_ramp_up_until_it_closes(database: Database) {
    let scene = Scene::on(database).await;
    scene.queue_with("q", breaker(json!({"concurrency": {"limit": 16}}))).await;
    scene.receiver.set("/q", Mood::status(503));
    send_until_it_opens(&scene, 60).await;
    eventually("what was under way has ended", async || scene.receiver.open("/q") == 0).await;
    let before = scene.receiver.history("/q").len();
    scene.receiver.set("/q", Mood::slow(Duration::from_millis(300)));
    eventually("all are completed", async || completed(&scene).await == 60).await;
    assert_eq!(state(&scene).await, "closed");
    let open =
        scene.receiver.history("/q")[before..].iter().map(|(_, open)| *open).collect::<Vec<_>>();
    // The most that were open up to each delivery: it grows step by step, and never by more than twice.
    let mut steps = vec![0];
    for open in open {
        let most = *steps.last().expect("there is a first");
        if open > most {
            assert!(open == most + 1, "one opens after another: {steps:?}, {open}");
            steps.push(open);
        }
    }
    say!("open at once: {steps:?}");
    assert!(steps.len() > 8, "the ramp reached more than eight: {steps:?}");
    let ends = scene.receiver.deliveries("/q");
    let well = ends.iter().filter(|delivery| delivery.succeeded()).collect::<Vec<_>>();
    // Those that began while the first probe was open would show a ramp that is none.
    let first = well[0].at;
    let early = well.iter().filter(|it| it.at.duration_since(first).as_millis() < 250).count();
    assert_eq!(early, 1, "the first probe is alone");
}

async fn an_operator_closes_it(database: Database) {
    let scene = Scene::on(database).await;
    let slow = json!({"failures": 3, "open_for": "1h", "max_open": "1h"});
    scene.queue_with("q", breaker(json!({"breaker": slow}))).await;
    scene.receiver.set("/q", Mood::status(500));
    let ids = [scene.client.send("q", "a").await, scene.client.send("q", "b").await];
    eventually("it is open", async || state(&scene).await == "open").await;
    scene.receiver.set("/q", Mood::ack());
    let asked = scene.receiver.count("/q");
    never_within("it is asked", Duration::from_millis(500), || {
        scene.receiver.count("/q") > asked + 1
    })
    .await;
    scene.client.start_queue("q").await;
    assert_eq!(state(&scene).await, "closed");
    for id in ids {
        eventually("it is completed", async || scene.client.state(&id).await == "completed").await;
    }
}

async fn a_429_or_503_that_names_a_time_holds_the_whole_queue(database: Database) {
    for status in [429, 503] {
        let scene = Scene::on(match &database {
            Database::Sqlite(_) => Database::sqlite(),
            Database::Postgres(_) => Database::postgres().await,
        })
        .await;
        scene.queue_with("q", breaker(json!({"concurrency": {"limit": 1}}))).await;
        let busy = Reply::new(status).header("Retry-After", "2");
        scene.receiver.set(
            "/q",
            Mood::by(move |delivery: &Delivery| match delivery.attempt {
                1 if delivery.body == "first" => busy.clone().into(),
                _ => Mood::ack(),
            }),
        );
        scene.client.send("q", "first").await;
        scene.receiver.wait_for("/q", 1).await;
        let id = scene.client.send("q", "second").await;
        let delivered = scene.receiver.wait_for_message(&id).await[0].clone();
        let first = scene.receiver.deliveries("/q")[0].clone();
        let gap = delivered.at.duration_since(first.at).as_millis();
        assert!((2000..5000).contains(&gap), "{status}: {gap} ms");
        eventually("both are done", async || scene.receiver.successes("/q") == 2).await;
        // A hold of an hour, and an operator who knows better.
        scene.receiver.set("/q", Reply::new(status).header("Retry-After", "3600").into());
        let third = scene.client.send("q", "third").await;
        eventually("it is held", async || {
            scene.client.queue("q").await["held_until"] != Value::Null
        })
        .await;
        let held_until = text(&scene.client.queue("q").await, "/held_until");
        assert!(held_until.parse::<jiff::Timestamp>().is_ok(), "{held_until}");
        eventually("it waits", async || scene.client.state(&third).await == "scheduled").await;
        scene.receiver.set("/q", Mood::ack());
        let fourth = scene.client.send("q", "fourth").await;
        scene.client.post_nothing(&format!("/v1/messages/{third}/run")).await.expect(200);
        for id in [third, fourth] {
            eventually("it is completed", async || scene.client.state(&id).await == "completed")
                .await;
        }
    }
}

#[tokio::test]
async fn one_breaker_over_all_processes() {
    let database = Database::postgres().await;
    let scene = Scene::on(database).await;
    let other = Process::start(&scene.database, &[]).await;
    scene.receiver.set("/q", Mood::status(500));
    scene.queue_with("q", breaker(json!({}))).await;
    send_until_it_opens(&scene, 60).await;
    pass(Duration::from_secs(6)).await;
    // Each process counts to five by itself, and at most four were under way; then 1, 2 and 4 seconds.
    let asked = scene.receiver.count("/q");
    assert!(asked <= 2 * 5 + 4 + 3, "{asked}");
    eventually("both say the same", async || {
        other.client().queue("q").await["breaker_state"] == state(&scene).await
    })
    .await;
    scene.receiver.set("/q", Mood::ack());
    eventually("all are completed", async || completed(&scene).await == 60).await;
}

#[tokio::test]
async fn a_4xx_says_nothing_about_the_handler_and_null_means_no_breaker() {
    let scene = Scene::new().await;
    scene.queue_with("q", breaker(json!({}))).await;
    scene.receiver.set("/q", Mood::status(400));
    send(&scene, 20).await;
    eventually("all are dead", async || {
        number(&scene.client.queue("q").await, "/stats/dead") == 20
    })
    .await;
    assert_eq!(state(&scene).await, "closed");
    scene.queue_with("q", breaker(json!({"breaker": null}))).await;
    scene.receiver.set("/q", Mood::status(500));
    send(&scene, 20).await;
    eventually("all are dead", async || {
        number(&scene.client.queue("q").await, "/stats/dead") == 40
    })
    .await;
    assert_eq!(scene.client.queue("q").await["breaker"], Value::Null);
}

#[tokio::test]
async fn a_patch_turns_it_off_and_on_and_closes_it() {
    let scene = Scene::new().await;
    let slow = json!({"failures": 3, "open_for": "1h", "max_open": "1h"});
    scene.queue_with("q", breaker(json!({"breaker": slow}))).await;
    scene.receiver.set("/q", Mood::status(500));
    send_until_it_opens(&scene, 5).await;
    scene.receiver.set("/q", Mood::ack());
    let patched = scene.client.patch_queue("q", &json!({"breaker": null})).await;
    assert_eq!((&patched["breaker"], &patched["breaker_state"]), (&Value::Null, &json!("closed")));
    eventually("all are completed", async || completed(&scene).await == 5).await;
    let patched = scene.client.patch_queue("q", &json!({"breaker": {"failures": 7}})).await;
    assert_eq!(patched["breaker"], json!({"failures": 7, "open_for": "30s", "max_open": "10m"}));
}

/// A probe that is answered with a time to come back: the next one waits for that, and not for the breaker alone.
#[tokio::test]
async fn who_is_tried_and_asks_for_time_gets_it() {
    let scene = Scene::new().await;
    let quick = json!({"failures": 3, "open_for": "500ms", "max_open": "500ms"});
    scene.queue_with("q", breaker(json!({"breaker": quick}))).await;
    scene.receiver.set("/q", Mood::status(500));
    send_until_it_opens(&scene, 5).await;
    eventually("what was under way has ended", async || scene.receiver.open("/q") == 0).await;
    let asked = scene.receiver.count("/q");
    scene.receiver.set("/q", Reply::new(503).header("Retry-After", "3600").into());
    eventually("it is tried", async || scene.receiver.count("/q") > asked).await;
    never_within("it is tried again", Duration::from_secs(3), || {
        scene.receiver.count("/q") > asked + 1
    })
    .await;
    assert_ne!(scene.client.queue("q").await["held_until"], Value::Null);
}

/// One delivery from before hangs, and does not stand in the way of the one that tries.
#[tokio::test]
async fn what_hangs_from_before_it_opened_does_not_keep_it_open() {
    let scene = Scene::new().await;
    let settings = json!({
        "breaker": {"failures": 3, "open_for": "500ms", "max_open": "500ms"},
        "handler": {"timeout": "10m"},
    });
    scene.queue_with("q", breaker(settings)).await;
    scene.receiver.set(
        "/q",
        Mood::by(|delivery| match &delivery.body[..] {
            b"hang" => Mood::Hang,
            _ => Mood::status(500),
        }),
    );
    scene.client.send("q", "hang").await;
    scene.receiver.wait_for_open("/q", 1).await;
    send_until_it_opens(&scene, 20).await;
    scene.receiver.set("/q", Mood::ack());
    eventually("all others are completed", async || completed(&scene).await == 20).await;
    assert_eq!(state(&scene).await, "closed");
    assert!(scene.receiver.most_open("/q") <= 4, "never more than the limit");
}

async fn send(scene: &Scene, count: usize) {
    for number in 0..count {
        scene.client.send("q", number.to_string()).await;
    }
}

/// Sends so many to a handler that fails.
async fn send_until_it_opens(scene: &Scene, count: usize) {
    send(scene, count).await;
    eventually("it is open", async || state(scene).await == "open").await;
}

async fn state(scene: &Scene) -> String {
    text(&scene.client.queue("q").await, "/breaker_state")
}

async fn completed(scene: &Scene) -> usize {
    scene.client.all("/v1/messages?queue=q&state=completed").await.len()
}
