//! Handlers that send without end cost no memory.

use std::time::{Duration, Instant};

use serde_json::json;

use crate::support::client::ask;
use crate::support::receiver::{Gate, Mood};
use crate::support::scene::Scene;
use crate::support::{pass, say};

const HANDLERS: usize = 64;

#[tokio::test]
async fn endless_answers_of_many_handlers_at_once_cost_no_memory() {
    let scene = Scene::new().await;
    let changes = json!({
        "concurrency": {"limit": HANDLERS},
        "handler": {"timeout": "4s"},
        "recovery": {"max_attempts": 1},
    });
    scene.queue_with("q", changes).await;
    // As many deliveries that end well, first: what they cost is there in any case.
    let gate = Gate::closed();
    scene.receiver.set("/q", Mood::held(&gate));
    send(&scene).await;
    scene.receiver.wait_for_open("/q", HANDLERS).await;
    let before = memory(&scene);
    gate.open();
    scene.receiver.wait_for("/q", HANDLERS).await;
    for (name, mood) in
        [("a drip", Mood::Drip), ("a flood", Mood::Huge(1 << 30)), ("a drip again", Mood::Drip)]
    {
        scene.receiver.set("/q", mood);
        let dripped = Instant::now();
        send(&scene).await;
        let mut most = 0;
        while dripped.elapsed() < Duration::from_secs(3) {
            most = most.max(memory(&scene));
            pass(Duration::from_millis(50)).await;
        }
        say!("{name} from {HANDLERS} handlers at once: {before} KiB before, at most {most} KiB");
        assert!(most <= before + 20 * 1024, "{name}: {before} KiB before, then {most} KiB");
        pass(Duration::from_secs(2)).await;
    }
}

async fn send(scene: &Scene) {
    let lines = "{\"payload\": \"x\"}\n".repeat(HANDLERS);
    ask(scene.client.batch("q", lines)).await.expect(207);
}

/// What is resident of the process, in KiB.
fn memory(scene: &Scene) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", scene.process.pid()));
    let status = status.expect("it runs");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("there is one");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse().ok()).expect("a number")
}
