//! Workers who pull from several replicas at a time.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::client::{Client, number, text};
use crate::support::process::{Database, Process};
use crate::support::scene::Scene;
use crate::support::{eventually, pass, say};

async fn lease(client: &Client, wait: &str) -> Vec<Value> {
    let wanted = json!({"max": 1, "wait": wait});
    let answer = client.post("/v1/queues/jobs/leases", &wanted).await.expect(200);
    answer.json()["leases"].as_array().expect("leases").clone()
}

#[tokio::test]
async fn a_settlement_through_one_replica_lets_on_who_waits_at_another() {
    let scene = Scene::on(Database::postgres().await).await;
    let other = Process::start(&scene.database, &["--replica", "other"]).await;
    let (here, there) = (&scene.client, other.client());
    let settings = json!({"handler": {"kind": "pull"}, "concurrency": {"limit": 1}});
    here.put_queue("jobs", &settings).await;
    eventually("each knows of the other", async || {
        let pump = here.get("/admin/v1/pump").await.expect(200).json();
        pump["replicas"].as_array().is_some_and(|all| all.len() == 2)
    })
    .await;
    let first = here.send("jobs", "1").await;
    let held = lease(here, "10s").await.remove(0);
    assert_eq!(text(&held, "/message/id"), first);
    let second = here.send("jobs", "2").await;
    assert_eq!(lease(here, "0s").await.len(), 0, "the gate is full");
    let frees = async {
        pass(Duration::from_millis(500)).await;
        let settlement = json!({"token": held["token"], "verdict": "ack"});
        let body = json!({"settlements": [settlement]});
        let heard = there.post("/v1/leases/settle", &body).await.expect(207).json();
        assert_eq!(number(&heard, "/items/0/status"), 200);
        Instant::now()
    };
    let waits = async { (lease(here, "30s").await, Instant::now()) };
    let ((came, came_at), freed) = tokio::join!(waits, frees);
    assert_eq!(came.iter().map(|it| text(it, "/message/id")).collect::<Vec<_>>(), [second]);
    assert!(came_at > freed, "it waited for that");
    let took = came_at.duration_since(freed);
    say!("it went on {took:?} after the settlement elsewhere");
    assert!(took < Duration::from_secs(4), "{took:?}");
    assert_eq!(text(&here.message(&first).await, "/deliveries/0/replica"), "other");
}
