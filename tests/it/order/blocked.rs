//! A group that is blocked, with a hundred thousand messages behind: does it cost the others anything?

use std::time::{Duration, Instant};

use serde_json::json;
use sqlx::{Connection, PgConnection};

use crate::support::client::{ask, number};
use crate::support::process::Database;
use crate::support::receiver::Mood;
use crate::support::scene::Scene;
use crate::support::{eventually, eventually_within, on_both, say};

/// How many wait in the group that is blocked.
const BLOCKED: usize = 100_000;
/// How many messages the others get in a round, in how many groups, and how many rounds there are.
const SENT: usize = 4_000;
const GROUPS: usize = 200;
const ROUNDS: usize = 5;

on_both! {
    a_blocked_group_of_a_hundred_thousand_costs_the_others_nothing
}

/// Two houses, one with such a group and one without, are given the same in turn, so that both are measured in the same
/// moments of a noisy machine.
async fn a_blocked_group_of_a_hundred_thousand_costs_the_others_nothing(database: Database) {
    let alone = match &database {
        Database::Sqlite(_) => Database::sqlite(),
        Database::Postgres(_) => Database::postgres().await,
    };
    let (beside, alone) = (Scene::on(database).await, Scene::on(alone).await);
    for scene in [&beside, &alone] {
        scene.queue_with("q", json!({"group_on_dead": "block", "concurrency": {"limit": 64}})).await;
    }
    block(&beside).await;
    let mut ratios = Vec::new();
    for round in 0..ROUNDS {
        let took = [drain(&beside, round).await, drain(&alone, round).await];
        say!("beside it {:?}, alone {:?}", took[0], took[1]);
        ratios.push(took[0].as_secs_f64() / took[1].as_secs_f64());
    }
    say!("ratios {ratios:.2?}");
    ratios.sort_by(f64::total_cmp);
    let stats = beside.client.queue("q").await["stats"].clone();
    assert_eq!(number(&stats, "/behind") as usize, BLOCKED, "{stats}");
    if let (Database::Postgres(with), Database::Postgres(without)) =
        (&beside.database, &alone.database)
    {
        let buffers = [buffers_of_a_claim(with).await, buffers_of_a_claim(without).await];
        say!("buffers a claim touches: beside it {}, alone {}", buffers[0], buffers[1]);
        assert!(buffers[0] <= buffers[1] + 8, "{buffers:?}");
    }
    assert!(ratios[ROUNDS / 2] <= 1.1, "{ratios:?}");
}

async fn block(scene: &Scene) {
    scene.receiver.set("/q", Mood::status(400));
    let first = scene.client.message_to("q", "x").header("Pumphouse-Group", "stuck");
    let first = ask(first).await.expect(201).id();
    eventually("it is dead", async || scene.client.state(&first).await == "dead").await;
    scene.receiver.set("/q", Mood::ack());
    for _ in 0..BLOCKED / 10_000 {
        let lines = "{\"payload\": \"x\", \"group\": \"stuck\"}\n".repeat(10_000);
        ask(scene.client.batch("q", lines)).await.expect(207);
    }
}

/// How long the messages of other groups take, from the first one sent to the last one handled.
async fn drain(scene: &Scene, round: usize) -> Duration {
    let before = scene.receiver.count("/q");
    let began = Instant::now();
    for batch in 0..SENT / 1_000 {
        let line = |n: usize| {
            let group = format!("{round} {}", n % GROUPS);
            format!("{}\n", json!({"payload": batch * 1_000 + n, "group": group}))
        };
        ask(scene.client.batch("q", (0..1_000).map(line).collect::<String>())).await.expect(207);
    }
    let all = async || scene.receiver.count("/q") >= before + SENT;
    eventually_within("all are handled", Duration::from_secs(120), all).await;
    began.elapsed()
}

/// How many pages a claim on the queue looks at, after one message of each of twenty groups was sent.
async fn buffers_of_a_claim(url: &str) -> i64 {
    let mut connection = PgConnection::connect(url).await.expect("the database answers");
    for set in pumphouse::store::Postgres::planning() {
        let set = format!("set {} = {}", set.0, set.1);
        sqlx::raw_sql(sqlx::AssertSqlSafe(set)).execute(&mut connection).await.expect("it is set");
    }
    let mut set_up = String::from("set search_path = pumphouse; begin;");
    for n in 0..20 {
        set_up.push_str(&format!("select send('q', '1', in_group => 'claim {n}');"));
    }
    sqlx::raw_sql(sqlx::AssertSqlSafe(set_up)).execute(&mut connection).await.expect("it is sent");
    let claim = pumphouse::store::Postgres::statements()
        .find(|text| text.contains("won as (") && !text.contains("recursive") && !text.contains("urgent"))
        .expect("there is a statement that claims");
    let claim = ["'q'", "16", "1", "1", "1000000", "'r'", "1000000"]
        .iter()
        .enumerate()
        .fold(claim.to_owned(), |text, (n, value)| text.replace(&format!("${}", n + 1), value));
    let explain = format!("explain (analyze, buffers, format json) {claim}");
    let plan: serde_json::Value = sqlx::query_scalar(sqlx::AssertSqlSafe(explain))
        .fetch_one(&mut connection)
        .await
        .expect("it can be explained");
    let plan = &plan[0]["Plan"];
    let buffers = number(plan, "/Shared Hit Blocks") + number(plan, "/Shared Read Blocks");
    sqlx::raw_sql("rollback").execute(&mut connection).await.expect("it is undone");
    buffers as i64
}
