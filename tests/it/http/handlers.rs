//! Handlers that misbehave: each costs what it costs, and nobody else anything.

use std::net::SocketAddr;
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_util::task::TaskTracker;

use crate::support::client::{ask, number, text};
use crate::support::process::{Database, Process};
use crate::support::receiver::{Gate, Mood, Receiver, Reply};
use crate::support::scene::{Scene, quick};
use crate::support::{eventually, pass};

#[tokio::test]
async fn a_handler_that_misbehaves_is_retried_and_its_fault_named() {
    let scene = Scene::new().await;
    let many = (0..200).fold(Reply::new(200), |reply, at| reply.header(&format!("x-{at}"), "y"));
    let long = Reply::new(200).header("x-long", &"y".repeat(1 << 20));
    for (mood, kind) in [
        (many.into(), "malformed"),
        (long.into(), "malformed"),
        (Mood::Close, "reset"),
        (Mood::HalfAnswer, "reset"),
        (Mood::Garbage, "malformed"),
        (Mood::Hang, "timeout"),
        (Mood::Drip, "timeout"),
    ] {
        scene.queue_with("q", json!({"handler": {"timeout": "300ms"}})).await;
        let bad = mood.clone();
        scene.receiver.set(
            "/q",
            Mood::by(move |delivery| match delivery.attempt {
                1 => bad.clone(),
                _ => Mood::ack(),
            }),
        );
        let id = scene.client.send("q", "x").await;
        let done = format!("it is completed after {kind}");
        eventually(&done, async || scene.client.state(&id).await == "completed").await;
        assert_eq!(error_kind(&scene.client.message(&id).await, 1), kind);
    }
}

#[tokio::test]
async fn nobody_reads_what_is_printed_and_everything_else_goes_on() {
    let flags = ["--queue", "shown=log:", "--drain-deadline", "300ms"];
    let database = Database::sqlite();
    let mut process = Process::start_with_stdout(&database, &flags, Stdio::piped()).await;
    let (client, receiver) = (process.client(), Receiver::start().await);
    client.put_queue("other", &quick(&receiver.url("/other"), json!({}))).await;
    // More than a pipe holds.
    let lines = format!("{{\"payload\": \"{}\"}}\n", "x".repeat(200)).repeat(2000);
    ask(client.batch("shown", lines)).await.expect(207);
    let stuck = async || {
        let before = client.queue("shown").await["stats"].clone();
        pass(Duration::from_millis(300)).await;
        let now = client.queue("shown").await["stats"].clone();
        now["ready"] == before["ready"] && number(&now, "/in_flight") > 0
    };
    eventually("the printing is stuck", stuck).await;
    client.get("/livez").await.expect(200);
    client.send("other", "x").await;
    receiver.wait_for("/other", 1).await;
    process.terminate().await;
    assert!(process.exit_within(Duration::from_secs(10)).await.success());
}

#[tokio::test]
async fn a_handler_that_is_not_there_is_tried_again() {
    let scene = Scene::new().await;
    let port = {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        listener.local_addr().expect("it has an address").port()
    };
    let recovery = json!({"recovery": {"max_attempts": 3}});
    let (no_tls, _tasks) = speaks_no_tls().await;
    for (url, kind) in [
        (format!("http://127.0.0.1:{port}/"), "connect"),
        ("http://no-such-host.invalid/".to_owned(), "dns"),
        (format!("https://{}/", no_tls), "tls"),
    ] {
        scene.client.put_queue("q", &quick(&url, recovery.clone())).await;
        let id = scene.client.send("q", "x").await;
        let dead = format!("it is dead for {url}");
        eventually(&dead, async || scene.client.state(&id).await == "dead").await;
        let message = scene.client.message(&id).await;
        for attempt in 1..=3 {
            assert_eq!(error_kind(&message, attempt), kind, "{url}");
        }
    }
}

#[tokio::test]
async fn one_deadline_covers_an_answer_that_drips() {
    let scene = Scene::new().await;
    let once = json!({"handler": {"timeout": "500ms"}, "recovery": {"max_attempts": 1}});
    scene.queue_with("q", once).await;
    scene.receiver.set("/q", Mood::Drip);
    let id = scene.client.send("q", "x").await;
    eventually("it is dead", async || scene.client.state(&id).await == "dead").await;
    let delivery = &scene.receiver.deliveries_of(&id)[0];
    eventually("it is cut", async || scene.receiver.open("/q") == 0).await;
    let ended = scene.receiver.deliveries_of(&id)[0].ended.expect("it has ended");
    let span = ended - delivery.started;
    assert!((400..3000).contains(&span.as_millis()), "cut at the deadline, not after {span:?}");
}

#[tokio::test]
async fn a_long_answer_is_an_ack_and_not_read_to_its_end() {
    let scene = Scene::new().await;
    scene.queue("q").await;
    scene.receiver.set("/q", Mood::Huge(1 << 30));
    let id = scene.client.send("q", "x").await;
    eventually("it is completed", async || scene.client.state(&id).await == "completed").await;
    assert_eq!(scene.receiver.deliveries_of(&id).len(), 1);
}

#[tokio::test]
async fn connections_to_a_handler_are_used_again() {
    let scene = Scene::new().await;
    scene.queue_with("q", json!({"concurrency": {"limit": 4}})).await;
    for number in 0..100 {
        scene.client.send("q", number.to_string()).await;
    }
    scene.receiver.wait_for("/q", 100).await;
    let connections = scene.receiver.connections();
    assert!(connections <= 8, "{connections} connections for 100 deliveries, 4 at once");
}

#[tokio::test]
async fn a_handler_that_hangs_costs_its_own_slot_only() {
    let scene = Scene::new().await;
    let limit = json!({"concurrency": {"limit": 2}, "handler": {"timeout": "20s"}});
    scene.queue_with("q", limit).await;
    scene.receiver.set(
        "/q",
        Mood::by(|delivery| match &delivery.body[..] {
            b"hang" => Mood::Hang,
            _ => Mood::ack(),
        }),
    );
    let hangs = scene.client.send("q", "hang").await;
    scene.receiver.wait_for_open("/q", 1).await;
    for number in 0..50 {
        scene.client.send("q", number.to_string()).await;
    }
    scene.receiver.wait_for("/q", 51).await;
    assert_eq!(scene.client.state(&hangs).await, "leased");
    assert_eq!(scene.receiver.most_open("/q"), 2);
}

#[tokio::test]
async fn a_stuck_queue_does_not_slow_another() {
    let scene = Scene::new().await;
    scene.queue_with("stuck", json!({"concurrency": {"limit": 50}})).await;
    scene.queue("well").await;
    let gate = Gate::closed();
    scene.receiver.set("/stuck", Mood::held(&gate));
    for number in 0..60 {
        scene.client.send("stuck", number.to_string()).await;
    }
    scene.receiver.wait_for_open("/stuck", 50).await;
    for number in 0..50 {
        let id = scene.client.send("well", number.to_string()).await;
        let delivered = &scene.receiver.wait_for_message(&id).await[0];
        let enqueued = text(&scene.client.message(&id).await, "/enqueued_at");
        let wait = delivered.at.duration_since(enqueued.parse().expect("RFC 3339"));
        assert!(wait.as_millis() < 500, "number {number} waited for {wait}");
    }
    assert_eq!(scene.receiver.open("/stuck"), 50);
    gate.open();
}

#[tokio::test]
async fn a_builtin_handler_needs_no_program() {
    let scene = Scene::new().await;
    for name in ["log", "discard"] {
        let settings = json!({"handler": {"kind": "builtin", "name": name}});
        scene.client.put_queue(name, &settings).await;
        let id = scene.client.send(name, "x").await;
        eventually("it is completed", async || scene.client.state(&id).await == "completed").await;
    }
}

#[tokio::test]
async fn neither_body_nor_secret_stands_in_a_log_line() {
    let flags = ["--log", "trace"];
    let scene = Scene::with_flags(crate::support::process::Database::sqlite(), &flags).await;
    let headers = json!({"handler": {"headers": {"authorization": "canary-header"}}});
    scene.queue_with("q", headers).await;
    scene.receiver.set(
        "/q",
        Mood::by(|delivery| match delivery.attempt {
            1 => Mood::status(500),
            _ => Mood::ack(),
        }),
    );
    let request =
        scene.client.message_to("q", "canary-body").header("Idempotency-Key", "canary-key");
    let request = request.header("Pumphouse-Forward-X-Token", "canary-forward");
    let id = crate::support::client::ask(request).await.expect(201).id();
    eventually("it is completed", async || scene.client.state(&id).await == "completed").await;
    let log = scene.process.log();
    assert!(log.contains("delivery{"), "there is a log to look at: {log}");
    let line = log.lines().find(|line| line.contains("canary"));
    assert_eq!(line, None);
}

fn error_kind(message: &Value, attempt: u64) -> String {
    let deliveries = message["deliveries"].as_array().expect("deliveries");
    let delivery = deliveries.iter().find(|delivery| delivery["number"] == attempt);
    text(delivery.unwrap_or_else(|| panic!("no attempt {attempt}: {message}")), "/error_kind")
}

/// A server that answers whatever it is told with something that is no TLS.
async fn speaks_no_tls() -> (SocketAddr, TaskTracker) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
    let address = listener.local_addr().expect("it has an address");
    let tasks = TaskTracker::new();
    tasks.spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            // Reads first: to close on what was not read would reset the connection instead.
            let mut hello = [0; 4096];
            let read = stream.read(&mut hello).await.expect("the client says hello");
            assert!(read > 0, "the client says hello");
            let answer = stream.write_all(b"this is no TLS, and never will be\n").await;
            answer.expect("the client reads");
            // Until the client has had enough: closed before, it might hear a reset and not the answer.
            let mut heard = Vec::new();
            let _ = stream.read_to_end(&mut heard).await;
        }
    });
    (address, tasks)
}
