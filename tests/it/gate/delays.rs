//! Never before its time, and at an idle pump soon after.

use std::time::Duration;

use jiff::Timestamp;
use serde_json::json;

use crate::support::client::{ENVELOPE, ask, text};
use crate::support::on_both;
use crate::support::process::Database;
use crate::support::scene::Scene;

on_both! { a_delayed_message_is_never_early_and_comes_soon_after }

/// What the protocol promises for an idle pump.
const LATE_AT_MOST: Duration = Duration::from_millis(250);

async fn a_delayed_message_is_never_early_and_comes_soon_after(database: Database) {
    let scene = Scene::on(database.off_the_disk()).await;
    scene.queue("q").await;
    // One at a time is due, now here, now there on the second, so that no poll can be lucky.
    for delay in [1, 40, 130, 270, 333, 510, 700, 777, 1000, 1010] {
        let envelope = json!({"payload": delay, "delay": format!("{delay}ms")});
        let request = scene.client.message_to("q", envelope.to_string());
        let answer = ask(request.header("content-type", ENVELOPE)).await.expect(201);
        let receipt = answer.json();
        let due = text(&receipt, "/deliver_at").parse::<Timestamp>().expect("RFC 3339");
        let enqueued = text(&receipt, "/enqueued_at").parse::<Timestamp>().expect("RFC 3339");
        assert_eq!(due.duration_since(enqueued).as_millis(), delay, "{receipt}");
        let deliveries = scene.receiver.wait_for_message(&answer.id()).await;
        let late = deliveries[0].at.duration_since(due);
        assert!(!late.is_negative(), "delayed by {delay} ms and early by {late}");
        assert!(late.unsigned_abs() <= LATE_AT_MOST, "delayed by {delay} ms and late by {late}");
    }
}
