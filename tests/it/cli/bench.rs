//! Does `pumphouse bench` measure what it says, and leave behind nothing? Never how fast.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::eventually;
use crate::support::process::{Database, Process};

use super::{fate, run};

/// What a bench prints; it has to succeed.
fn measure(arguments: &[&str]) -> Value {
    let output = run(&[], &[&["bench"][..], arguments, &["--json", "--quiet"]].concat());
    let (code, said) = fate(&output);
    assert_eq!(code, Some(0), "{arguments:?}: {said}");
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

/// The median of a figure.
#[track_caller]
fn figure(report: &Value, key: &str) -> f64 {
    let figure = &report["figures"][key]["median"];
    figure.as_f64().unwrap_or_else(|| panic!("no figure {key} in {report}"))
}

/// Whether everything that was sent has arrived, and something was.
#[track_caller]
fn all_delivered(report: &Value) {
    assert!(figure(report, "sent") > 0.0, "{report}");
    assert_eq!(figure(report, "delivered"), figure(report, "sent"), "{report}");
    assert!(figure(report, "messages_per_second") > 0.0, "{report}");
}

/// Whether a higher quantile is no shorter time.
#[track_caller]
fn in_order(report: &Value, keys: &[&str]) {
    let times = keys.iter().map(|key| figure(report, key)).collect::<Vec<_>>();
    assert!(times[0] > 0.0 && times.is_sorted(), "{keys:?}: {times:?}");
}

fn url(server: &Process) -> String {
    format!("http://{}", server.address())
}

#[test]
fn enqueue_counts_what_the_queue_then_holds() {
    let report = measure(&["enqueue", "--connections", "4", "--seconds", "0.3", "--warm-up", "0"]);
    assert_eq!(report["bench"], "enqueue");
    assert_eq!(report["settings"]["connections"], 4);
    assert!(figure(&report, "requests") > 0.0, "{report}");
    assert_eq!(figure(&report, "stored"), figure(&report, "sent"));
    in_order(&report, &["request_p50_ms", "request_p99_ms"]);
}

#[test]
fn enqueue_sends_batches_too() {
    let flags = ["--batch", "50", "--connections", "2", "--seconds", "0.3"];
    let report = measure(&[&["enqueue"][..], &flags].concat());
    assert!(figure(&report, "requests") > 0.0, "{report}");
    assert_eq!(figure(&report, "stored"), figure(&report, "sent"));
    assert_eq!(figure(&report, "sent") % 50.0, 0.0);
}

#[test]
fn a_drain_into_a_function_handles_every_message() {
    let report = measure(&["drain", "--messages", "1500"]);
    assert_eq!(report["settings"]["handler"], "service");
    assert_eq!(figure(&report, "sent"), 1500.0);
    all_delivered(&report);
    assert!(figure(&report, "settled_per_second") <= figure(&report, "messages_per_second"));
}

#[test]
fn a_drain_over_http_handles_every_message() {
    let report = measure(&["drain", "--messages", "1501", "--handler", "http"]);
    assert_eq!(figure(&report, "sent"), 1501.0);
    all_delivered(&report);
}

#[test]
fn end_to_end_delivers_and_settles_every_message() {
    let report = measure(&["end-to-end", "--connections", "4", "--seconds", "0.3"]);
    all_delivered(&report);
    in_order(&report, &["delivered_p50_ms", "delivered_p99_ms"]);
}

#[test]
fn latency_sends_at_its_rate_whatever_is_answered() {
    let report = measure(&["latency", "--rate", "100", "--seconds", "0.4"]);
    assert_eq!(figure(&report, "sent"), 40.0);
    assert_eq!(figure(&report, "delivered"), 40.0);
    let times = ["delivered_p50_ms", "delivered_p90_ms", "delivered_p99_ms", "delivered_max_ms"];
    in_order(&report, &times);
    in_order(&report, &["late_p50_ms", "answered_p50_ms"]);
}

#[test]
fn several_runs_have_a_median_between_their_extremes() {
    let report = measure(&["drain", "--messages", "200", "--runs", "3"]);
    assert_eq!(report["runs"].as_array().map(Vec::len), Some(3));
    let rate = &report["figures"]["messages_per_second"];
    let all = ["min", "median", "max"].map(|of| rate[of].as_f64().expect("a number"));
    assert!(all.is_sorted(), "{all:?}");
}

#[test]
fn a_table_is_for_people_and_progress_is_not_in_it() {
    let output = run(&[], &["bench", "drain", "--messages", "200"]);
    let (code, said) = fate(&output);
    assert_eq!(code, Some(0), "{said}");
    assert!(said.contains("filled ") && said.contains(" of 200"), "{said}");
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(table.starts_with("pumphouse bench drain: 200 messages into a function"), "{table}");
    let line = table.lines().find(|line| line.trim_start().starts_with("messages handled"));
    assert!(line.is_some_and(|line| line.ends_with("/s")), "{table}");
}

#[tokio::test]
async fn a_named_server_gets_a_queue_that_is_gone_afterwards() {
    let database = Database::sqlite();
    let server = Process::start(&database, &["--queue", "mine=discard:"]).await;
    let client = server.client();
    client.send("mine", "x").await;
    let before = client.queue("mine").await["created_at"].clone();
    let url = url(&server);
    for command in [
        &["enqueue", "--connections", "2", "--seconds", "0.2"][..],
        &["drain", "--messages", "100"],
        &["end-to-end", "--connections", "2", "--seconds", "0.2"],
        &["latency", "--seconds", "0.2"],
    ] {
        let report = measure(&[command, &["--url", &url]].concat());
        assert!(figure(&report, "sent") > 0.0, "{report}");
        client.get("/admin/v1/queues/bench").await.expect(404);
    }
    assert_eq!(client.queue("mine").await["created_at"], before, "nobody else's is touched");
    eventually("the message of the other queue is done", async || {
        client.queue("mine").await["stats"]["ready"] == 0
    })
    .await;
}

#[tokio::test]
async fn a_queue_of_that_name_is_never_touched() {
    let database = Database::sqlite();
    let server = Process::start(&database, &[]).await;
    let client = server.client();
    client.put_queue("bench", &json!({"handler": {"kind": "pull"}, "max_messages": 7})).await;
    client.send("bench", "precious").await;
    for command in ["enqueue", "drain", "end-to-end", "latency"] {
        let (code, said) = fate(&run(&[], &["bench", command, "--url", &url(&server)]));
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("has a queue bench already"), "{said}");
        let queue = client.queue("bench").await;
        assert_eq!((&queue["max_messages"], &queue["stats"]["ready"]), (&json!(7), &json!(1)));
    }
}

#[tokio::test]
async fn a_database_that_holds_queues_is_left_alone() {
    let database = Database::sqlite();
    let mut server = Process::start(&database, &["--queue", "mine=discard:"]).await;
    server.kill_hard().await;
    for command in ["enqueue", "drain"] {
        let (code, said) = fate(&run(&[], &["bench", command, "--database", &database.url()]));
        assert_eq!(code, Some(1), "{said}");
        assert!(said.contains("has queues (mine)"), "{said}");
    }
}

#[tokio::test]
async fn a_database_that_was_named_is_empty_afterwards() {
    for database in [Database::sqlite(), Database::postgres().await] {
        for command in [&["enqueue", "--seconds", "0.2"][..], &["drain", "--messages", "100"]] {
            // The second run finds an empty database, or it would refuse.
            let flags = ["--database", &database.url(), "--runs", "2"];
            measure(&[command, &flags].concat());
        }
        let server = Process::start(&database, &[]).await;
        let queues = server.client().get("/admin/v1/queues").await.expect(200).json();
        assert_eq!(queues["items"], json!([]));
    }
}

#[test]
fn what_cannot_be_measured_is_said() {
    for (arguments, says) in [
        (&["enqueue", "--connections", "0"][..], "a whole number from 1 to 4096"),
        (&["enqueue", "--seconds", "soon"], "a number of seconds from 0.05"),
        (&["enqueue", "--payload", "8"], "from 64 bytes"),
        (&["enqueue", "--batch", "10000", "--payload", "1MiB"], "a batch is at most 16 MiB"),
        (&["enqueue", "--url", "https://h"], "only plain http://"),
        (&["enqueue", "--bare"], "--url <URL>"),
        (&["enqueue", "--url", "http://h", "--dir", "."], "leave out --database and --dir"),
        (&["enqueue", "--database", "mysql://h"], "postgres://USER@HOST/NAME"),
        (&["drain", "--url", "http://h", "--handler", "service"], "say --handler http"),
        (&["drain", "--url", "http://h", "--bare"], "drain needs a server"),
        (&["latency", "--rate", "0"], "a number of messages a second from 0.1"),
        (&["end-to-end", "--sink", "here"], "--sink"),
    ] {
        let (code, said) = fate(&run(&[], &[&["bench"][..], arguments].concat()));
        assert_eq!(code, Some(2), "{arguments:?}: {said}");
        assert!(said.contains(says), "{arguments:?}: {said}");
    }
    let (code, said) = fate(&run(&[], &["bench", "enqueue", "--dir", "missing"]));
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("cannot make a temporary directory in missing"), "{said}");
    let (code, said) = fate(&run(&[], &["bench", "enqueue", "--url", "http://127.0.0.1:1"]));
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("cannot connect to http://127.0.0.1:1"), "{said}");
}

/// A bench of a minute, in a directory that shows when its file is there and when it has gone.
fn long_bench(directory: &TempDir, flags: &[&str]) -> std::process::Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_pumphouse"));
    command.args(["bench", "enqueue", "--seconds", "60", "--connections", "1", "--quiet"]);
    command.args(flags).current_dir(directory.path());
    command.stdout(Stdio::null()).stderr(Stdio::piped());
    command.spawn().expect("the program can be started")
}

fn interrupt(child: std::process::Child) -> Output {
    let script = format!("kill -INT {}", child.id());
    let status = Command::new("sh").args(["-c", &script]).status();
    assert!(status.expect("a shell can be started").success());
    child.wait_with_output().expect("a child can be waited for")
}

fn is_empty(directory: &Path) -> bool {
    std::fs::read_dir(directory).expect("it is there").next().is_none()
}

#[tokio::test]
async fn an_interrupted_bench_tidies_up() {
    let directory = tempfile::tempdir().expect("a temporary directory can be made");
    let child = long_bench(&directory, &[]);
    eventually("the bench has its file", async || !is_empty(directory.path())).await;
    let (code, said) = fate(&interrupt(child));
    assert_eq!((code, said.as_str()), (Some(1), "pumphouse: interrupted\n"));
    assert!(is_empty(directory.path()), "its file is gone");

    let database = Database::sqlite();
    let server = Process::start(&database, &[]).await;
    let client = server.client();
    let child = long_bench(&directory, &["--url", &url(&server)]);
    let stats = async || client.get("/admin/v1/queues/bench").await;
    eventually("the bench sends", async || {
        let queue = stats().await;
        queue.status == 200 && queue.json()["stats"]["ready"] != 0
    })
    .await;
    assert_eq!(fate(&interrupt(child)).0, Some(1));
    client.get("/admin/v1/queues/bench").await.expect(404);
}
