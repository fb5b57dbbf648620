//! Those who talk to a Pumphouse without our help: the worker in Python, and a client made from the OpenAPI document.

use std::process::Stdio;
use std::time::Duration;

use serde_json::json;
use tokio::process::Command;

use crate::support::process::Database;
use crate::support::python;
use crate::support::scene::Scene;
use crate::support::{eventually, on_both};

on_both! {
    the_worker_in_python_works_and_leaves_in_good_order
}

async fn the_worker_in_python_works_and_leaves_in_good_order(database: Database) {
    let mut scene = Scene::on(database).await;
    let settings = json!({"handler": {"kind": "pull"}, "recovery": {"immediate": 5}});
    scene.client.put_queue("jobs", &settings).await;
    let base = format!("http://{}", scene.process.address());
    let worker = Command::new("python3")
        .args(["examples/worker.py", &base, "jobs"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .expect("there is a python3");
    let pid = worker.id().expect("it runs");
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
    let status = Command::new("sh").args(["-c", &format!("kill -TERM {pid}")]).status().await;
    assert!(status.expect("a shell can be started").success());
    let output = tokio::time::timeout(Duration::from_secs(20), worker.wait_with_output()).await;
    let output = output.expect("it ends").expect("it can be waited for");
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8_lossy(&output.stdout).lines().count();
    assert!(said >= 110, "each was done at least once: {said}");
    assert_eq!(scene.client.all("/v1/messages?queue=jobs&state=leased").await.len(), 0);
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
