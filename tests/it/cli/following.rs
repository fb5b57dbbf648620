//! `receive` and `tail`: they live through a server that is away or busy, and end when nobody reads them.

use std::sync::Mutex;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::ChildStdout;
use tokio::time::timeout;

use crate::support::client::Client;
use crate::support::process::{Database, Process};
use crate::support::receiver::{Mood, Receiver, Reply};
use crate::support::{PATIENCE, eventually, never_within, pass};

use super::running::Running;

const FOLLOW: &[&str] = &["receive", "q", "--follow"];

/// Sends until one of them is shown, because `tail` shows nothing from before its own start.
async fn send_until_shown(client: &Client, shown: impl Fn(&str) -> bool) -> String {
    let mut last = String::new();
    eventually("it is shown", async || {
        last = client.send("q", "x").await;
        let mut looks = 0..20;
        while looks.next().is_some() && !shown(&last) {
            pass(Duration::from_millis(50)).await;
        }
        shown(&last)
    })
    .await;
    last
}

async fn read_line(lines: &mut Lines<BufReader<ChildStdout>>) -> String {
    let line = timeout(PATIENCE, lines.next_line()).await.expect("a line comes");
    line.expect("it can be read").expect("a line")
}

#[tokio::test]
async fn whoever_follows_lives_through_a_restart_of_the_server() {
    let database = Database::sqlite().off_the_disk();
    let mut server = Process::start(&database, &["--queue", "q=pull:"]).await;
    let address = server.address().to_string();
    let all = [FOLLOW, &["tail"]].map(|arguments| Running::start(&address, arguments));
    for one in &all {
        send_until_shown(&server.client(), |id| one.printed().contains(id)).await;
    }
    server.kill_hard().await;
    for one in &all {
        eventually("it says so", async || one.said().contains("trying again")).await;
    }
    let server = Process::start(&database, &["--listen", &address]).await;
    let id = server.client().send("q", "2").await;
    for one in &all {
        eventually("it is shown", async || one.printed().contains(&id)).await;
        assert_eq!(one.said().matches("trying again").count(), 1, "{}", one.said());
    }
    eventually("it is acked", async || server.client().state(&id).await == "completed").await;
}

#[tokio::test]
async fn what_does_not_pass_ends_them() {
    let database = Database::sqlite().off_the_disk();
    let server = Process::start(&database, &["--queue", "q=discard:"]).await;
    for (arguments, why) in [
        (FOLLOW, "wrong-handler"),
        (&["receive", "nowhere", "--follow"], "no-such-queue"),
        (&["receive", "q", "--follow", "--wait", "2m"], "invalid"),
    ] {
        let end = Running::start(server.address(), arguments).end().await;
        assert_eq!(end.code, Some(1), "{end:?}");
        assert!(end.said.contains(why) && end.times("trying again") == 0, "{end:?}");
    }
    // It says 200 to everything, and nothing more.
    let other = Receiver::start().await;
    let end = Running::start(other.url("").replace("http://", ""), &["tail"]).end().await;
    assert!(end.code == Some(1) && end.said.contains("not JSON"), "{end:?}");
    let end = Running::start("127.0.0.1:1", &["receive", "q"]).end().await;
    assert_eq!((end.code, end.times("trying again")), (Some(1), 0), "one take is one try: {end:?}");
}

#[tokio::test]
async fn a_server_that_is_busy_is_asked_again_and_told_again() {
    let server = Receiver::start().await;
    let script = |path: &str, answers: Vec<Mood>| {
        let answers = Mutex::new(answers.into_iter());
        let next = move || answers.lock().expect("no test panics with it").next();
        server.set(path, Mood::by(move |_| next().unwrap_or_else(|| Mood::status(401))));
    };
    let answer = |status, body: Value| Mood::Answer(Reply::new(status).body(body.to_string()));
    let message = json!({"id": "the-first"});
    let leases = json!({"leases": [
        {"token": "a", "attempt": 1, "message": message},
        {"token": "b", "attempt": 1, "message": {}},
        {"token": "c", "attempt": 1, "message": {}},
    ]});
    let heard = |items: &[(&str, u16)]| {
        let item = |(token, status): &(&str, u16)| json!({"token": token, "status": status});
        answer(207, json!({"items": items.iter().map(item).collect::<Vec<_>>()}))
    };
    let (took, settled) = ("/v1/queues/q/leases", "/v1/leases/settle");
    script(took, vec![Mood::status(503), Mood::status(429), Mood::Close, answer(200, leases)]);
    script(
        settled,
        vec![
            Mood::status(503),
            heard(&[("a", 200), ("b", 503), ("c", 503)]),
            heard(&[("b", 200), ("c", 409)]),
        ],
    );
    let address = server.url("").replace("http://", "");
    let end = Running::start(&address, FOLLOW).end().await;
    assert!(end.code == Some(1) && end.said.contains("401 Unauthorized"), "{end:?}");
    assert_eq!(end.printed.matches("the-first").count(), 1, "{end:?}");
    assert_eq!(end.times("trying again"), 2, "once for each trouble: {end:?}");
    assert!(end.said.contains("1 of 3 could not be settled"), "and it went on: {end:?}");
    assert_eq!(server.deliveries(took).len(), 5, "the last was answered 401");
    let said = server.deliveries(settled);
    let tokens = said.iter().map(|one| {
        let said = serde_json::from_slice::<Value>(&one.body).expect("JSON");
        let tokens = said["settlements"].as_array().expect("settlements").iter();
        tokens.map(|it| it["token"].as_str().expect("a token").to_owned()).collect::<String>()
    });
    assert_eq!(tokens.collect::<Vec<_>>(), ["abc", "abc", "bc"]);
}

#[tokio::test]
async fn what_was_not_printed_when_the_reader_went_away_is_ready_again() {
    let database = Database::sqlite().off_the_disk();
    let server = Process::start(&database, &["--queue", "q=pull:"]).await;
    // So long that a pipe has no room for five of them.
    for _ in 0..20 {
        server.client().send("q", "x".repeat(20_000)).await;
    }
    let arguments = [FOLLOW, &["--max", "5"]].concat();
    let (running, stdout) = Running::with_stdout(server.address(), &arguments);
    let mut lines = BufReader::new(stdout).lines();
    let line = read_line(&mut lines).await;
    drop(lines);
    let end = running.end().await;
    assert_eq!(end.code, Some(0), "a reader that has gone is no failure: {end:?}");
    let message = serde_json::from_str::<Value>(&line).expect("JSON");
    let id = message["id"].as_str().expect("an id");
    assert_eq!(server.client().state(id).await, "completed", "what was read is done");
    let stats = server.client().queue("q").await["stats"].clone();
    let count = |name: &str| stats[name].as_u64().unwrap_or_else(|| panic!("no {name}: {stats}"));
    assert_eq!(count("in_flight"), 0, "{stats}");
    let all = server.client().all("/v1/messages?queue=q").await;
    let done = all.iter().filter(|it| it["state"] == "completed").count() as u64;
    assert!((1..5).contains(&done), "{done}");
    assert_eq!(count("ready"), 20 - done, "{stats}");
}

#[tokio::test]
async fn an_idle_tail_ends_when_its_reader_goes_away() {
    let database = Database::sqlite().off_the_disk();
    let server = Process::start(&database, &["--queue", "q=pull:"]).await;
    let (running, stdout) = Running::with_stdout(server.address(), &["tail", "q"]);
    let mut lines = BufReader::new(stdout).lines();
    let (sent, line) = tokio::join!(
        async {
            // Until one comes after its start; few, so that a pipe has room for them.
            for _ in 0..10 {
                server.client().send("q", "x").await;
                pass(Duration::from_millis(300)).await;
            }
        },
        read_line(&mut lines)
    );
    let () = sent;
    assert!(line.contains(" q "), "{line}");
    drop(lines);
    let end = running.end().await;
    assert_eq!((end.code, end.said.as_str()), (Some(0), ""));
}

#[tokio::test]
async fn what_is_to_be_retried_comes_back_when_the_queue_says() {
    let database = Database::sqlite().off_the_disk();
    let server = Process::start(&database, &["--queue", "q=pull:"]).await;
    let backoff = json!({"kind": "fixed", "base": "1h", "jitter": "none"});
    let recovery = json!({"recovery": {"immediate": 1, "backoff": backoff}});
    server.client().patch_queue("q", &recovery).await;
    let id = server.client().send("q", "x").await;
    let running = Running::start(server.address(), &[FOLLOW, &["--verdict", "retry"]].concat());
    let waits = async || server.client().state(&id).await == "scheduled";
    eventually("it waits for its retry", waits).await;
    let tries = || running.printed().lines().count();
    eventually("it was tried at once, and then again", async || tries() == 2).await;
    never_within("it comes a third time", Duration::from_secs(1), || tries() > 2).await;
}
