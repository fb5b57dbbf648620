//! Messages that harm: one that kills its process, and one whose row cannot be read.

use std::time::Duration;

use serde_json::json;
use sqlx::{Connection, Executor, PgConnection, SqliteConnection};

use crate::support::client::text;
use crate::support::process::Database;
use crate::support::receiver::Mood;
use crate::support::scene::Scene;
use crate::support::{eventually, on_both};

on_both! {
    a_message_that_kills_its_process_ends_as_a_dead_letter
    those_that_were_open_beside_it_do_not_die_with_it
    a_row_that_cannot_be_read_becomes_a_dead_letter_and_the_next_is_delivered
}

async fn a_message_that_kills_its_process_ends_as_a_dead_letter(database: Database) {
    let mut scene = Scene::with_flags(database, &["--replica", "one"]).await;
    let recovery = json!({"max_crashes": 3, "max_attempts": 1});
    scene.queue_with("q", json!({"concurrency": {"limit": 1}, "recovery": recovery})).await;
    scene.receiver.set(
        "/q",
        Mood::by(|delivery| match &delivery.body[..] {
            b"deadly" => Mood::Hang,
            _ => Mood::ack(),
        }),
    );
    let deadly = scene.client.send("q", "deadly").await;
    let healthy = scene.client.send("q", "healthy").await;
    for crash in 1..=3 {
        eventually("it is delivered", async || {
            scene.receiver.deliveries_of(&deadly).len() == crash
        })
        .await;
        scene.process.kill_hard().await;
        scene.restart().await;
    }
    eventually("it is dead", async || scene.client.state(&deadly).await == "dead").await;
    eventually("the next one is done", async || scene.client.state(&healthy).await == "completed")
        .await;
    let message = scene.client.message(&deadly).await;
    let outcomes = message["deliveries"].as_array().expect("deliveries").iter();
    let outcomes = outcomes.map(|delivery| text(delivery, "/outcome")).collect::<Vec<_>>();
    assert_eq!(outcomes, ["lease_lost"; 3], "{message}");
    assert_eq!(scene.receiver.deliveries_of(&deadly).len(), 3);
    let dead = scene.client.all("/admin/v1/dead-letters?queue=q").await;
    assert_eq!(text(&dead[0], "/id"), deadly);
    assert!(!text(&dead[0], "/reason").is_empty(), "{dead:?}");
}

/// Without care, all that were open together come back together, and die together.
async fn those_that_were_open_beside_it_do_not_die_with_it(database: Database) {
    let mut scene = Scene::with_flags(database, &["--replica", "one"]).await;
    let recovery = json!({"max_crashes": 6});
    scene.queue_with("q", json!({"concurrency": {"limit": 16}, "recovery": recovery})).await;
    scene.receiver.set(
        "/q",
        Mood::by(|delivery| match &delivery.body[..] {
            b"deadly" => Mood::Hang,
            _ => Mood::slow(Duration::from_millis(400)),
        }),
    );
    scene.client.stop_queue("q", &json!({})).await;
    let mut ids = Vec::new();
    for number in 0..12 {
        let body = if number == 5 { "deadly" } else { "harmless" };
        ids.push(scene.client.send("q", body).await);
    }
    let deadly = ids.remove(5);
    scene.client.start_queue("q").await;
    for crash in 1..=6 {
        eventually("it is delivered", async || {
            scene.receiver.deliveries_of(&deadly).len() == crash
        })
        .await;
        scene.process.kill_hard().await;
        scene.restart().await;
    }
    eventually("it is dead", async || scene.client.state(&deadly).await == "dead").await;
    for id in ids {
        eventually("it is done", async || scene.client.state(&id).await == "completed").await;
        let crashes = scene.receiver.deliveries_of(&id).len() - 1;
        assert!(crashes <= 4, "the company gets smaller with each crash: {crashes}");
    }
    assert_eq!(scene.receiver.deliveries_of(&deadly).len(), 6);
}

async fn a_row_that_cannot_be_read_becomes_a_dead_letter_and_the_next_is_delivered(
    database: Database,
) {
    let mut scene = Scene::with_flags(database, &["--replica", "one"]).await;
    scene.queue_with("q", json!({"concurrency": {"limit": 0}})).await;
    let broken = scene.client.send("q", "broken").await;
    let whole = scene.client.send("q", "whole").await;
    scene.process.terminate().await;
    scene.process.exit_within(Duration::from_secs(10)).await;
    break_the_first_row(&scene.database).await;
    scene.restart().await;
    scene.client.patch_queue("q", &json!({"concurrency": {"limit": 1}})).await;
    eventually("the next one is done", async || scene.client.state(&whole).await == "completed")
        .await;
    eventually("the broken one is dead", async || {
        let dead = scene.client.all("/admin/v1/dead-letters?queue=q").await;
        dead.iter().any(|letter| text(letter, "/id") == broken)
    })
    .await;
    assert_eq!(scene.receiver.count("/q"), 1, "what cannot be read is not delivered");
    scene.client.get("/readyz").await.expect(200);
}

macro_rules! broken_in {
    ($table:literal) => {
        concat!(
            "update ",
            $table,
            " set details = '{broken' where seq = (select min(seq) from ",
            $table,
            ")"
        )
    };
}

async fn break_the_first_row(database: &Database) {
    let url = database.url();
    let changed = match database {
        Database::Sqlite(_) => {
            let mut connection = SqliteConnection::connect(&url).await.expect("it can be opened");
            let statement = broken_in!("content");
            let done = connection.execute(statement).await.expect("there is such a table");
            connection.close().await.expect("it can be closed");
            done.rows_affected()
        }
        Database::Postgres(_) => {
            let statement = broken_in!("pumphouse.content");
            let mut connection = PgConnection::connect(&url).await.expect("it can be opened");
            let done = connection.execute(statement).await.expect("there is such a table");
            connection.close().await.expect("it can be closed");
            done.rows_affected()
        }
    };
    assert_eq!(changed, 1);
}
