//! A group that is blocked, with a hundred thousand messages behind: does it cost the others anything?

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pumphouse::store::{Postgres, Sqlite};
use serde_json::json;
use sqlx::sqlite::SqliteConnectOptions;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, PgConnection};

use crate::support::client::{ask, number};
use crate::support::process::Database;
use crate::support::receiver::Mood;
use crate::support::scene::Scene;
use crate::support::{eventually, eventually_within, on_both, say};

/// How many wait in the group that is blocked.
const BLOCKED: usize = 100_000;
/// How many messages the others get in a round, in how many groups, and how many rounds there are.
const SENT: usize = 2_000;
const GROUPS: usize = 200;
const ROUNDS: usize = 9;
/// How many messages a claim takes whose cost is looked at.
const CLAIMED: usize = 16;

on_both! {
    a_blocked_group_of_a_hundred_thousand_costs_the_others_nothing
}

/// Two houses, one with such a group and one without, are given the same in turn, so that both are measured in the same
/// moments of a noisy machine. The one without has as many messages, which wait in another queue: what is compared is
/// the group, and not the size of the tables.
async fn a_blocked_group_of_a_hundred_thousand_costs_the_others_nothing(database: Database) {
    let alone = match &database {
        Database::Sqlite(_) => Database::sqlite(),
        Database::Postgres(_) => Database::postgres().await,
    };
    let (beside, alone) = (Scene::on(database).await, Scene::on(alone).await);
    for scene in [&beside, &alone] {
        scene
            .queue_with("q", json!({"group_on_dead": "block", "concurrency": {"limit": 64}}))
            .await;
    }
    block(&beside).await;
    alone.queue_with("parked", json!({"concurrency": {"limit": 0}})).await;
    for _ in 0..BLOCKED / 10_000 {
        ask(alone.client.batch("parked", "{\"payload\": \"x\"}\n".repeat(10_000)))
            .await
            .expect(207);
    }
    let mut ratios = Vec::new();
    for round in 0..ROUNDS {
        let took = [drain(&beside, round).await, drain(&alone, round).await];
        say!("beside it {:?}, alone {:?}", took[0], took[1]);
        ratios.push(took[0].as_secs_f64() / took[1].as_secs_f64());
    }
    ratios.sort_by(f64::total_cmp);
    say!("ratios {ratios:.2?}, the middle one {:.2}", ratios[ROUNDS / 2]);
    let stats = beside.client.queue("q").await["stats"].clone();
    assert_eq!(number(&stats, "/behind") as usize, BLOCKED, "{stats}");
    let mut costs = Vec::new();
    for scene in [&beside, &alone] {
        scene.client.patch_queue("q", &json!({"concurrency": {"limit": 0}})).await;
        for n in 0..CLAIMED {
            let request = scene.client.message_to("q", "x");
            ask(request.header("Pumphouse-Group", format!("claim {n}"))).await.expect(201);
        }
        costs.push(cost_of_a_claim(&scene.database).await);
    }
    say!(
        "what a claim touches: beside it {}, alone {} (pages, or steps of SQLite)",
        costs[0],
        costs[1]
    );
    // For each message that is claimed two looks into the index of those who wait, which has two levels more there, and
    // one page to spare. To pass by all who wait would be hundreds.
    assert!(costs[0] <= costs[1] + 5 * CLAIMED as u64, "{costs:?}");
    // Rounds differ by a tenth here; what is found in many of them stands in docs/decisions/0022-groups.md.
    assert!(ratios[ROUNDS / 2] <= 1.25, "{ratios:?}");
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

/// What a claim on the queue looks at: pages on Postgres; on SQLite the steps of its machine, of which each row takes a few.
async fn cost_of_a_claim(database: &Database) -> u64 {
    match database {
        Database::Sqlite(_) => steps_of_a_claim(&database.url()).await,
        Database::Postgres(url) => pages_of_a_claim(url).await,
    }
}

async fn pages_of_a_claim(url: &str) -> u64 {
    let mut connection = PgConnection::connect(url).await.expect("the database answers");
    for (name, value) in Postgres::planning() {
        let set = format!("set {name} = {value}");
        sqlx::raw_sql(AssertSqlSafe(set)).execute(&mut connection).await.expect("it is set");
    }
    // What the rounds before have left, and how much of it was vacuumed meanwhile, is another in each house.
    sqlx::raw_sql("vacuum").execute(&mut connection).await.expect("it can be vacuumed");
    let begin = "set search_path = pumphouse; begin";
    sqlx::raw_sql(begin).execute(&mut connection).await.expect("it begins");
    let plain = |text: &&str| !text.contains("recursive") && !text.contains("urgent\n");
    let claim = Postgres::statements().filter(|text| text.contains("won as (")).find(plain);
    let limit = CLAIMED.to_string();
    let claim = ["'q'", &limit, "1", "1", "1000000", "'r'", "1000000"]
        .iter()
        .enumerate()
        .fold(claim.expect("it is there").to_owned(), |text, (n, value)| {
            text.replace(&format!("${}", n + 1), value)
        });
    let explain = format!("explain (analyze, buffers) {claim}");
    let plan = sqlx::query_scalar::<_, String>(AssertSqlSafe(explain)).fetch_all(&mut connection);
    let plan = plan.await.expect("it can be explained");
    // The first line about buffers is that of the whole plan: `Buffers: shared hit=701 read=3`.
    let buffers = plan.iter().find(|line| line.contains("Buffers:")).expect("it says so");
    let counts = buffers.split(' ').filter_map(|word| word.split_once('='));
    let looked_at = counts.filter(|(what, _)| *what == "hit" || *what == "read");
    let pages = looked_at.map(|(_, count)| count.parse::<u64>().expect("a count")).sum();
    sqlx::raw_sql("rollback").execute(&mut connection).await.expect("it is undone");
    pages
}

async fn steps_of_a_claim(url: &str) -> u64 {
    let options = url.parse::<SqliteConnectOptions>().expect("it is a URL").read_only(true);
    let mut connection = options.connect().await.expect("it can be read");
    let steps = Arc::new(AtomicU64::new(0));
    let count = steps.clone();
    let mut handle = connection.lock_handle().await.expect("it is idle");
    handle.set_progress_handler(1, move || {
        count.fetch_add(1, Ordering::Relaxed);
        true
    });
    drop(handle);
    let ready = Sqlite::statements().into_iter().find(|text| text.contains("message_in_turn"));
    let id: i64 = sqlx::query_scalar("select id from queue where name = 'q'")
        .fetch_one(&mut connection)
        .await
        .expect("the queue is there");
    steps.store(0, Ordering::Relaxed);
    let listed = sqlx::query_scalar::<_, String>(AssertSqlSafe(ready.expect("it is there")));
    let listed = listed.bind(id).bind(0_i64).bind(CLAIMED as i64);
    let listed = listed.fetch_one(&mut connection).await.expect("it is listed");
    assert_eq!(listed.matches("[").count(), CLAIMED + 1, "{listed}");
    steps.load(Ordering::Relaxed)
}
