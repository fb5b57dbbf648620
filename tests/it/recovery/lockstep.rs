//! What failed together does not come back together.

use std::time::Duration;

use serde_json::json;

use crate::support::receiver::{Mood, Reply};
use crate::support::say;
use crate::support::scene::Scene;

#[tokio::test]
async fn second_attempts_of_five_hundred_are_spread_over_the_window() {
    let scene = Scene::new().await;
    let backoff = json!({"base": "4s", "max": "4s", "jitter": "full"});
    let changes = json!({
        "recovery": {"immediate": 0, "backoff": backoff},
        "concurrency": {"limit": 500},
        "breaker": null,
    });
    let times = fail_once(&scene, changes, Reply::new(500)).await;
    let buckets = histogram(&times, Duration::from_millis(500), 8);
    // Evenly it would be 62 in each; three standard deviations are 22.
    assert!(buckets.iter().all(|count| (30..=100).contains(count)), "{buckets:?}");
}

#[tokio::test]
async fn those_that_were_told_when_to_come_back_are_spread_behind_that_time() {
    let scene = Scene::new().await;
    let changes =
        json!({"recovery": {"immediate": 0}, "concurrency": {"limit": 500}, "breaker": null});
    let busy = Reply::new(408).header("Retry-After", "20");
    let times = fail_once(&scene, changes, busy).await;
    let first = times.iter().min().expect("there are some");
    assert!(*first >= Duration::from_secs(20), "never undercut: {first:?}");
    let late =
        times.iter().map(|time| time.saturating_sub(Duration::from_secs(20))).collect::<Vec<_>>();
    let buckets = histogram(&late, Duration::from_millis(400), 5);
    assert!(buckets.iter().all(|count| (30..=200).contains(count)), "{buckets:?}");
}

/// Lets 500 messages fail at one moment; gives how long after it each came back.
async fn fail_once(scene: &Scene, changes: serde_json::Value, reply: Reply) -> Vec<Duration> {
    scene.queue_with("q", changes).await;
    scene.receiver.set(
        "/q",
        Mood::by(move |delivery| match delivery.attempt {
            1 => reply.clone().into(),
            _ => Mood::ack(),
        }),
    );
    scene.client.stop_queue("q", &json!({})).await;
    let lines = "{\"payload\": 1}\n".repeat(500);
    crate::support::client::ask(scene.client.batch("q", lines)).await.expect(207);
    scene.client.start_queue("q").await;
    let deliveries = scene.receiver.wait_for("/q", 1000).await;
    let of = |attempt| deliveries.iter().filter(move |it| it.attempt == attempt);
    let failed =
        of(1).map(|it| (it.id.clone(), it.at)).collect::<std::collections::HashMap<_, _>>();
    let wait = |it: &crate::support::receiver::Delivery| {
        Duration::try_from(it.at.duration_since(failed[&it.id])).unwrap_or_default()
    };
    of(2).map(wait).collect()
}

fn histogram(times: &[Duration], width: Duration, count: usize) -> Vec<usize> {
    let mut buckets = vec![0; count];
    for time in times {
        let at = (time.as_micros() / width.as_micros()) as usize;
        buckets[at.min(count - 1)] += 1;
    }
    for (at, count) in buckets.iter().enumerate() {
        say!("{:>5} ms {}", at as u128 * width.as_millis(), "#".repeat(*count / 3));
    }
    buckets
}
