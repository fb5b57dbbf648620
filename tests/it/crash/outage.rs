//! The database goes away under load, and comes back.

use std::net::TcpListener;
use std::time::Duration;

use futures::future::join;
use reqwest::Method;
use serde_json::json;

use crate::support::client::{Client, ask};
use crate::support::ledger::Ledger;
use crate::support::postgres::start_cluster;
use crate::support::process::{Database, Process};
use crate::support::receiver::Mood;
use crate::support::scene::Scene;
use crate::support::senders::Senders;
use crate::support::{eventually, eventually_within};

const OUTAGES: usize = 2;
const LIMIT: usize = 16;

#[tokio::test]
async fn a_process_outlives_its_database_and_loses_nothing() {
    let cluster = start_cluster().await;
    let mut scene = Scene::on(Database::Postgres(cluster.url())).await;
    let settings = json!({
        "concurrency": {"limit": LIMIT},
        "handler": {"timeout": "2s"},
        "lease": "3s",
        "recovery": {"max_attempts": 1000, "max_crashes": 1000},
    });
    scene.queue_with("q", settings).await;
    scene.receiver.set("/q", Mood::slow(Duration::from_millis(5)));
    let senders = Senders::start(4, scene.client.clone(), "q");
    for _ in 0..OUTAGES {
        let before = senders.promised();
        eventually("there is a load", async || senders.promised() > before + 50).await;
        cluster.stop_hard().await;
        it_says_what_it_cannot_do(&scene).await;
        assert!(scene.process.runs(), "{}", scene.process.log());
        cluster.start().await;
        let soon = Duration::from_secs(10);
        eventually_within("it is ready again", soon, async || {
            scene.client.get("/readyz").await.status == 200
        })
        .await;
    }
    let before = senders.promised();
    eventually("it takes messages again", async || senders.promised() > before + 50).await;
    assert!(senders.refused() > 0, "senders were told to come again");
    let promised = senders.finish().await;
    eventually("everything is settled", async || {
        let stats = scene.client.queue("q").await["stats"].clone();
        ["ready", "scheduled", "in_flight"].iter().all(|count| stats[*count] == 0)
    })
    .await;
    let ledger = Ledger::read(promised, &scene.client, "q", &scene.receiver, "/q").await;
    ledger.check();
    assert_eq!(ledger.kept.len(), ledger.promised.len(), "what was repeated was taken once");
}

#[tokio::test]
async fn a_process_that_starts_before_its_database_lives_and_waits() {
    let cluster = start_cluster().await;
    cluster.stop_hard().await;
    let database = Database::Postgres(cluster.url());
    let free = TcpListener::bind("127.0.0.1:0").expect("a free port").local_addr();
    let address = free.expect("a listener has an address");
    let listen = address.to_string();
    let flags = ["--listen", listen.as_str()];
    let starts = Process::start(&database, &flags);
    let meanwhile = async {
        let client = Client::new(address);
        let asked = || client.request(Method::GET, "/livez").send();
        eventually("it lives", async || asked().await.is_ok_and(|it| it.status() == 200)).await;
        client.get("/readyz").await.expect(503);
        let refused = ask(client.message_to("q", "x")).await.expect(503);
        refused.problem();
        assert!(refused.header("retry-after").parse::<u32>().is_ok(), "{refused:?}");
        cluster.start().await;
    };
    let (process, ()) = join(starts, meanwhile).await;
    process.client().get("/readyz").await.expect(200);
}

async fn it_says_what_it_cannot_do(scene: &Scene) {
    eventually("it is not ready", async || scene.client.get("/readyz").await.status == 503).await;
    scene.client.get("/livez").await.expect(200);
    let refused = ask(scene.client.message_to("q", "x")).await.expect(503);
    refused.problem();
    assert!(refused.header("retry-after").parse::<u32>().is_ok(), "{refused:?}");
}
