//! Those who talk to a Pumphouse without our help: the worker in Python, and a client made from the OpenAPI document.

use std::process::Stdio;
use std::time::Duration;

use serde_json::json;
use tokio::process::{Child, Command};

use crate::support::client::{number, text};
use crate::support::process::Database;
use crate::support::python;
use crate::support::scene::Scene;
use crate::support::{eventually, on_both};

on_both! {
    the_worker_in_python_works_and_leaves_in_good_order
    the_worker_in_python_ends_what_it_has_begun_and_gives_the_rest_back
}

async fn the_worker_in_python_works_and_leaves_in_good_order(database: Database) {
    let mut scene = Scene::on(database).await;
    let settings = json!({"handler": {"kind": "pull"}, "recovery": {"immediate": 5}});
    scene.client.put_queue("jobs", &settings).await;
    let base = format!("http://{}", scene.process.address());
    let worker = worker("examples/worker.py", &base);
    for number in 0..100 {
        scene.client.send_envelope("jobs", &json!({"payload": {"job": number}})).await;
    }
    let completed = async |scene: &Scene| {
        scene.client.all("/v1/messages?queue=jobs&state=completed").await.len()
    };
    eventually("it has done them all", async || completed(&scene).await == 100).await;
    // The server goes and comes back at another port in between for others; here it just is away.
    let flags = format!("{}", scene.process.address());
    scene.process.kill_hard().await;
    crate::support::pass(Duration::from_millis(500)).await;
    let process =
        crate::support::process::Process::start(&scene.database, &["--listen", &flags]).await;
    scene.client = process.client();
    scene.process = process;
    for number in 100..110 {
        scene.client.send_envelope("jobs", &json!({"payload": {"job": number}})).await;
    }
    eventually("it comes again", async || completed(&scene).await == 110).await;
    let said = told_to_leave(worker).await.lines().count();
    assert!(said >= 110, "each was done at least once: {said}");
    assert_eq!(scene.client.all("/v1/messages?queue=jobs&state=leased").await.len(), 0);
}

async fn the_worker_in_python_ends_what_it_has_begun_and_gives_the_rest_back(database: Database) {
    let scene = Scene::on(database).await;
    let client = &scene.client;
    client.put_queue("jobs", &json!({"handler": {"kind": "pull"}})).await;
    // The worker as it is, but for its work, which is slow.
    let folder = tempfile::tempdir().expect("a directory to work in");
    let file = folder.path().join("worker.py");
    let (quick, slow) =
        ("    print(\"done:\"", "    print(\"begun\", flush=True); time.sleep(0.7)\n");
    let source = include_str!("../../../examples/worker.py");
    assert_eq!(source.matches(quick).count(), 1, "this is where it works");
    std::fs::write(&file, source.replace(quick, &format!("{slow}{quick}"))).expect("it is written");
    for number in 0..9 {
        client.send_envelope("jobs", &json!({"payload": number})).await;
    }
    // And one that is no JSON.
    client.send("jobs", "plain").await;
    let base = format!("http://{}", scene.process.address());
    let worker = worker(file.to_str().expect("a path is text"), &base);
    let of = async |state: &str| {
        client.all(&format!("/v1/messages?queue=jobs&state={state}")).await.len()
    };
    eventually("it has done some", async || of("completed").await >= 2).await;
    assert!(of("leased").await > 2, "it holds several");
    let said = told_to_leave(worker).await;
    let count = |word: &str| said.lines().filter(|line| line.starts_with(word)).count();
    let done = of("completed").await;
    assert_eq!((count("begun"), count("done")), (done, done), "what was begun is done: {said}");
    assert!(done < 10, "it left in the middle: {said}");
    assert_eq!(of("ready").await, 10 - done, "the rest went back");
    for message in client.all("/v1/messages?queue=jobs&state=ready").await {
        let message = client.message(&text(&message, "/id")).await;
        assert_eq!((number(&message, "/failures"), number(&message, "/crashes")), (0, 0));
        let deliveries = message["deliveries"].as_array().expect("deliveries");
        let outcomes = deliveries.iter().map(|it| text(it, "/outcome")).collect::<Vec<_>>();
        assert_eq!(outcomes, ["released"], "{message}");
    }
    // What it could not come to, the next one does: also what is no JSON.
    let next = self::worker("examples/worker.py", &base);
    eventually("all is done", async || of("completed").await == 10).await;
    let said = said + &told_to_leave(next).await;
    assert_eq!(said.matches("done:").count(), 10, "each once: {said}");
    assert!(said.contains("b'plain'"), "{said}");
}

/// Starts a worker of the queue `jobs`.
fn worker(file: &str, base: &str) -> Child {
    let mut worker = Command::new("python3");
    worker.args([file, base, "jobs"]).stdout(Stdio::piped()).stderr(Stdio::null());
    worker.kill_on_drop(true).spawn().expect("there is a python3")
}

/// Tells a worker to leave, and gives what it has said when it has left in good order.
async fn told_to_leave(worker: Child) -> String {
    let kill = format!("kill -TERM {}", worker.id().expect("it runs"));
    let status = Command::new("sh").args(["-c", &kill]).status().await;
    assert!(status.expect("a shell can be started").success());
    let output = tokio::time::timeout(Duration::from_secs(20), worker.wait_with_output()).await;
    let output = output.expect("it ends").expect("it can be waited for");
    assert!(output.status.success(), "{output:?}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[tokio::test]
async fn a_client_made_from_the_document_works() {
    let scene = Scene::new().await;
    let folder = python::generate("openapi/pumphouse.json").await;
    let base = format!("http://{}", scene.process.address());
    let folder = folder.path().to_str().expect("a path is text").to_owned();
    let said = python::run(include_str!("generated_client.py"), &[&folder, &base]).await;
    assert_eq!(said.trim(), "the generated client works");
}
