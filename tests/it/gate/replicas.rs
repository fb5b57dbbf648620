//! Several processes on one Postgres: one limit, one operator's hand.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::client::{ask, text};
use crate::support::process::{Database, Process};
use crate::support::receiver::{Delivery, Gate, Mood};
use crate::support::scene::Scene;
use crate::support::{eventually, eventually_within, never_within, pass};

/// How long a change may take to be in force in every process.
const IN_FORCE: Duration = Duration::from_secs(1);

#[tokio::test]
async fn a_limit_over_the_cluster_holds_over_all_processes() {
    let (scene, other) = two_processes().await;
    scene.queue_with("q", json!({"concurrency": {"limit": 6, "scope": "cluster"}})).await;
    scene.receiver.set("/q", Mood::slow(Duration::from_millis(20)));
    send_many(&scene, 600).await;
    scene.receiver.wait_for("/q", 150).await;
    // Each process has its share, wherever the limit is changed.
    other.client().patch_queue("q", &json!({"concurrency": {"limit": 2}})).await;
    let lowered = Instant::now();
    pass(IN_FORCE).await;
    scene.receiver.wait_for("/q", scene.receiver.count("/q") + 60).await;
    // Taken before it is asked for: it may be in force before the answer is here.
    let raised = Instant::now();
    scene.client.patch_queue("q", &json!({"concurrency": {"limit": 8}})).await;
    scene.receiver.wait_for("/q", 600).await;
    for (at, open) in scene.receiver.history("/q") {
        let bound = match at {
            at if at > raised => 8,
            at if at > lowered + IN_FORCE => 2,
            _ => 6,
        };
        let since = at.saturating_duration_since(lowered);
        assert!(open <= bound, "{open} open, with a limit of {bound}, {since:?} after the change");
    }
    let replicas = scene.receiver.deliveries("/q").into_iter();
    let replicas = replicas.map(|delivery| delivery.header("pumphouse-replica").to_owned());
    let replicas = replicas.collect::<std::collections::BTreeSet<_>>();
    assert_eq!(replicas.len(), 2, "both processes deliver: {replicas:?}");
}

#[tokio::test]
async fn a_limit_per_replica_counts_in_each_process() {
    let (scene, _other) = two_processes().await;
    let own = json!({"concurrency": {"limit": 3, "scope": "replica"}});
    scene.queue_with("q", own).await;
    let gate = Gate::closed();
    scene.receiver.set("/q", Mood::held(&gate));
    send_many(&scene, 20).await;
    eventually("three in each", async || scene.receiver.open("/q") == 6).await;
    let more = || scene.receiver.open("/q") > 6;
    never_within("more than three in each", Duration::from_millis(500), more).await;
    gate.open();
    scene.receiver.wait_for("/q", 20).await;
}

#[tokio::test]
async fn a_stop_is_obeyed_by_every_process_within_a_second() {
    let (scene, other) = two_processes().await;
    scene.queue_with("q", json!({"concurrency": {"limit": 4}})).await;
    scene.receiver.set("/q", Mood::slow(Duration::from_millis(10)));
    send_many(&scene, 1000).await;
    scene.receiver.wait_for("/q", 20).await;
    other.client().stop_queue("q", &json!({})).await;
    let stopped = Instant::now();
    eventually_within("every process stops", Duration::from_millis(1500), async || {
        let recent = Duration::from_millis(300);
        let last = scene.receiver.history("/q").last().map(|(at, _)| *at);
        last.is_some_and(|at| at.elapsed() > recent && stopped.elapsed() > recent)
    })
    .await;
    let count = scene.receiver.count("/q");
    assert!(count < 1000, "it was stopped under load");
    let more = || scene.receiver.count("/q") > count;
    never_within("a stopped queue delivers", Duration::from_millis(500), more).await;
    scene.client.start_queue("q").await;
    let goes_on = Duration::from_secs(2);
    eventually_within("both go on", goes_on, async || scene.receiver.count("/q") > count).await;
}

#[tokio::test]
async fn what_a_killed_process_held_is_delivered_by_the_other() {
    let (scene, mut other) = two_processes().await;
    let settings = json!({"concurrency": {"limit": 2, "scope": "replica"}, "handler": {"timeout": "2s"}, "lease": "4s"});
    scene.queue_with("q", settings).await;
    let name = "two";
    scene.receiver.set(
        "/q",
        Mood::by(move |delivery| {
            // Not at once, or this process would do them all alone.
            let ours = || Mood::slow(Duration::from_millis(100));
            if delivery.header("pumphouse-replica") == name { Mood::Hang } else { ours() }
        }),
    );
    send_many(&scene, 40).await;
    let held = async || {
        let deliveries = scene.receiver.deliveries("/q");
        deliveries.into_iter().find(|one| one.header("pumphouse-replica") == name)
    };
    eventually("the other process holds one", async || held().await.is_some()).await;
    other.kill_hard().await;
    let killed = Instant::now();
    eventually("all are completed", async || {
        let done = scene.client.all("/v1/messages?queue=q&state=completed").await;
        done.len() == 40
    })
    .await;
    let took = killed.elapsed();
    assert!(took < Duration::from_secs(10), "within the lease and a bit: {took:?}");
    let id = held().await.expect("it was").id;
    let message = scene.client.message(&id).await;
    let outcomes = message["deliveries"].as_array().expect("deliveries").iter();
    let outcomes = outcomes.map(|delivery| text(delivery, "/outcome")).collect::<Vec<_>>();
    assert!(outcomes.contains(&"lease_lost".to_owned()), "{message}");
}

#[tokio::test]
async fn a_frozen_process_changes_nothing_when_it_thaws() {
    let (scene, other) = two_processes().await;
    let settings = json!({"concurrency": {"limit": 1, "scope": "replica"}, "handler": {"timeout": "1s"}, "lease": "2s"});
    scene.queue_with("q", settings).await;
    let gate = Gate::closed();
    let held = gate.clone();
    scene.receiver.set(
        "/q",
        Mood::by(move |delivery| {
            if delivery.header("pumphouse-replica") == "two" {
                Mood::held(&held)
            } else {
                Mood::slow(Duration::from_millis(100))
            }
        }),
    );
    send_many(&scene, 10).await;
    let theirs = async || {
        let deliveries = scene.receiver.deliveries("/q");
        deliveries.into_iter().find(|one| one.header("pumphouse-replica") == "two")
    };
    eventually("the other process holds one", async || theirs().await.is_some()).await;
    other.signal("STOP").await;
    let id = theirs().await.expect("it was").id;
    gate.open();
    eventually("the first process has done it", async || {
        scene.client.state(&id).await == "completed"
    })
    .await;
    let done = scene.client.message(&id).await;
    other.signal("CONT").await;
    eventually("it is awake", async || other.client().get("/livez").await.status == 200).await;
    let again = send_many(&scene, 10);
    again.await;
    eventually("all are completed", async || {
        scene.client.all("/v1/messages?queue=q&state=completed").await.len() == 20
    })
    .await;
    assert_eq!(scene.client.message(&id).await, done, "a late answer changes nothing");
}

#[tokio::test]
async fn a_process_that_drains_for_long_keeps_its_leases() {
    let (scene, mut other) = two_processes().await;
    let settings =
        json!({"concurrency": {"limit": 2, "scope": "cluster"}, "handler": {"timeout": "60s"}});
    scene.queue_with("q", settings).await;
    let gate = Gate::closed();
    scene.receiver.set("/q", Mood::held(&gate));
    send_many(&scene, 6).await;
    scene.receiver.wait_for_open("/q", 2).await;
    other.terminate().await;
    // Longer than a process counts as alive without a word from it.
    let more = || scene.receiver.open("/q") > 2;
    never_within("more open than the limit", Duration::from_secs(8), more).await;
    gate.open();
    assert!(other.exit_within(Duration::from_secs(10)).await.success());
    eventually("all are completed", async || {
        scene.client.all("/v1/messages?queue=q&state=completed").await.len() == 6
    })
    .await;
    assert_eq!(scene.receiver.count("/q"), 6, "each was delivered once");
    for message in scene.client.all("/v1/messages?queue=q").await {
        assert_eq!(
            (&message["attempts"], &message["crashes"]),
            (&json!(1), &json!(0)),
            "{message}"
        );
    }
}

#[tokio::test]
async fn a_process_that_joins_under_load_gets_only_what_the_others_gave_up() {
    let scene = Scene::with_flags(Database::postgres().await, &["--replica", "one"]).await;
    let shared = json!({"concurrency": {"limit": 8, "scope": "cluster"}});
    scene.queue_with("q", shared).await;
    // So quick that its one process seldom has all eight open when it reports.
    scene.receiver.set("/q", Mood::slow(Duration::from_millis(3)));
    send_many(&scene, 1500).await;
    scene.receiver.wait_for("/q", 50).await;
    let _other = Process::start(&scene.database, &["--replica", "two"]).await;
    send_many(&scene, 500).await;
    let others = |one: &Delivery| one.header("pumphouse-replica") == "two";
    eventually("the one that joined delivers", async || {
        scene.receiver.deliveries("/q").iter().filter(|one| others(one)).count() > 20
    })
    .await;
    assert!(scene.receiver.most_open("/q") <= 8, "{} open", scene.receiver.most_open("/q"));
}

async fn two_processes() -> (Scene, Process) {
    let scene = Scene::with_flags(Database::postgres().await, &["--replica", "one"]).await;
    let other = Process::start(&scene.database, &["--replica", "two"]).await;
    let client = scene.client.clone();
    eventually("both know each other", async || {
        let pump = client.get("/admin/v1/pump").await.expect(200).json();
        pump["replicas"].as_array().map(Vec::len) == Some(2)
    })
    .await;
    (scene, other)
}

async fn send_many(scene: &Scene, count: usize) {
    let lines = "{\"payload\":1}\n".repeat(count);
    ask(scene.client.batch("q", lines)).await.expect(207);
}
