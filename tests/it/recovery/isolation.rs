//! A queue whose handler hangs costs the others nothing.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::client::ask;
use crate::support::process::Database;
use crate::support::receiver::Mood;
use crate::support::scene::Scene;
use crate::support::{on_both, pass, say};

/// How many wait behind the handler that hangs.
const WAITING: usize = 100_000;
/// How many are sent to the other queue in a round, and how many rounds there are.
const SENT: usize = 400;
const ROUNDS: usize = 3;

on_both! {
    a_hanging_handler_with_a_hundred_thousand_waiting_slows_nobody
}

/// Two houses, one with such a queue and one without, are sent to in turn, so that both are measured in the same
/// moments of a noisy machine.
async fn a_hanging_handler_with_a_hundred_thousand_waiting_slows_nobody(database: Database) {
    let alone = match &database {
        Database::Sqlite(_) => Database::sqlite(),
        Database::Postgres(_) => Database::postgres().await,
    };
    let (beside, alone) = (Scene::on(database).await, Scene::on(alone).await);
    for scene in [&beside, &alone] {
        scene.queue("well").await;
    }
    beside.queue_with("stuck", json!({"handler": {"timeout": "10m"}})).await;
    beside.receiver.set("/stuck", Mood::Hang);
    for _ in 0..WAITING / 10_000 {
        let lines = "{\"payload\": \"x\"}\n".repeat(10_000);
        ask(beside.client.batch("stuck", lines)).await.expect(207);
    }
    beside.receiver.wait_for_open("/stuck", 16).await;
    let mut ratios = Vec::new();
    let used = [&beside, &alone].map(cpu_time);
    for _ in 0..ROUNDS {
        let (mut with, mut without) = (Vec::new(), Vec::new());
        for _ in 0..SENT {
            with.push(send(&beside).await);
            without.push(send(&alone).await);
            pass(Duration::from_millis(2)).await;
        }
        let (with, without) = (p99(&beside, with).await, p99(&alone, without).await);
        say!("p99 beside it {with:?}, alone {without:?}");
        ratios.push(with.as_secs_f64() / without.as_secs_f64());
    }
    let used = [cpu_time(&beside) - used[0], cpu_time(&alone) - used[1]];
    say!("ratios {ratios:.2?}, ticks of CPU {used:?}");
    ratios.sort_by(f64::total_cmp);
    assert!(ratios[ROUNDS / 2] <= 1.5, "{ratios:?}");
    assert!(used[0] as f64 <= used[1] as f64 * 1.5 + 5.0, "it costs CPU: {used:?}");
    assert_eq!(beside.receiver.open("/stuck"), 16);
}

async fn send(scene: &Scene) -> (String, Instant) {
    let asked = Instant::now();
    (scene.client.send("well", "x").await, asked)
}

/// From the beginning of the `POST` to the delivery: of a hundred, one takes longer.
async fn p99(scene: &Scene, sent: Vec<(String, Instant)>) -> Duration {
    let mut took = Vec::new();
    for (id, asked) in sent {
        let delivered = scene.receiver.wait_for_message(&id).await[0].started;
        took.push(delivered.saturating_duration_since(asked));
    }
    took.sort_unstable();
    took[took.len() * 99 / 100]
}

/// How many ticks of a clock with a hundred a second the process has used.
fn cpu_time(scene: &Scene) -> u64 {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", scene.process.pid()));
    let stat = stat.expect("it runs");
    // After the name, which may have blanks: the state and ten more, then user and system.
    let after = stat.rsplit(") ").next().expect("there is a name");
    let fields = after.split(' ').collect::<Vec<_>>();
    [fields[11], fields[12]].iter().map(|ticks| ticks.parse::<u64>().expect("a number")).sum()
}
