//! The commands that talk to a running server, and what a server does with the queues it is started with.

use std::fs;
use std::process::Output;

use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::support::client::Client;
use crate::support::eventually;
use crate::support::process::{Database, Process};

use super::{fate, run};

/// What a command prints that is told where the server is; it has to succeed.
fn say(server: &Process, arguments: &[&str]) -> Value {
    let output = tell(server, arguments);
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", fate(&output).1);
    serde_json::from_slice(&output.stdout).unwrap_or(Value::Null)
}

fn tell(server: &Process, arguments: &[&str]) -> Output {
    run(&[("PUMPHOUSE_URL", &format!("http://{}", server.address()))], arguments)
}

#[tokio::test]
async fn a_message_is_sent_with_all_that_was_said_about_it() {
    let database = Database::sqlite();
    let server = Process::start(&database, &["--queue", "q=discard:"]).await;
    let options = ["--type", "greeting", "--delay", "1h", "--priority", "-5", "--key", "k"];
    let send =
        [&["send", "q", "{\"to\": \"ada\"}", "--header", "x-tenant=acme"][..], &options].concat();
    let receipt = say(&server, &send);
    assert_eq!(receipt["state"], "scheduled");
    assert_eq!(say(&server, &send)["duplicate"], true, "the key was sent too");
    let message = server.client().message(receipt["id"].as_str().expect("an id")).await;
    assert_eq!(message["type"], "greeting");
    assert_eq!(message["priority"], -5);
    assert_eq!(message["content_type"], "application/json");
    assert_eq!(message["headers"]["x-tenant"], "acme");
}

#[tokio::test]
async fn a_refusal_is_printed_and_exits_with_1() {
    let database = Database::sqlite();
    let server = Process::start(&database, &[]).await;
    let (code, said) = fate(&tell(&server, &["send", "nowhere", "x"]));
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("404 Not Found") && said.contains("no-such-queue"), "{said}");
}

#[tokio::test]
async fn a_queue_is_made_stopped_started_and_deleted() {
    let database = Database::sqlite();
    let server = Process::start(&database, &[]).await;
    say(&server, &["health"]);
    say(&server, &["queues", "put", "q=http://127.0.0.1:1/"]);
    let mut shown = say(&server, &["queues", "show", "q"]);
    assert_eq!(shown["handler"]["url"], "http://127.0.0.1:1/");

    shown["concurrency"]["limit"] = json!(3);
    say(&server, &["queues", "put", "q", "--settings", &shown.to_string()]);
    let folder = tempfile::tempdir().expect("a temporary directory can be made");
    let file = folder.path().join("q.json");
    fs::write(&file, shown.to_string()).expect("a file can be written");
    say(&server, &["queues", "put", "r", "--settings", file.to_str().expect("a plain path")]);
    let list = say(&server, &["queues", "list"]);
    let limits =
        list["items"].as_array().expect("items").iter().map(|queue| &queue["concurrency"]["limit"]);
    assert_eq!(limits.collect::<Vec<_>>(), [&json!(3), &json!(3)]);

    say(&server, &["queues", "stop", "q", "--deadline", "1s", "--reason", "it rains"]);
    let stopped = say(&server, &["queues", "show", "q"]);
    assert_eq!(stopped["stopped"]["reason"], "it rains");
    say(&server, &["queues", "start", "q"]);
    assert_eq!(say(&server, &["queues", "show", "q"])["stopped"], Value::Null);

    say(&server, &["queues", "stop", "q"]);
    say(&server, &["send", "q", "x"]);
    assert_eq!(fate(&tell(&server, &["queues", "delete", "q"])).0, Some(1), "it is not empty");
    assert_eq!(say(&server, &["queues", "purge", "q"])["purged"], 1);
    say(&server, &["send", "q", "x"]);
    say(&server, &["queues", "delete", "q", "--force"]);
    assert_eq!(fate(&tell(&server, &["queues", "show", "q"])).0, Some(1), "it is gone");
}

#[tokio::test]
async fn a_declared_queue_gets_its_handler_and_keeps_what_an_operator_changed() {
    let database = Database::sqlite();
    let mut server = Process::start(&database, &["--queue", "q=http://127.0.0.1:1/a"]).await;
    server.client().patch_queue("q", &json!({"concurrency": {"limit": 3}})).await;
    server.client().patch_queue("q", &json!({"handler": {"timeout": "7s"}})).await;

    server.kill_hard().await;
    let mut server = Process::start(&database, &["--queue", "q=http://127.0.0.1:1/a"]).await;
    let same = server.client().queue("q").await;
    assert_eq!(
        (&same["handler"]["timeout"], &same["concurrency"]["limit"]),
        (&json!("7s"), &json!(3))
    );

    server.kill_hard().await;
    let server = Process::start(&database, &["--queue", "q=log:"]).await;
    let other = server.client().queue("q").await;
    assert_eq!(other["handler"], json!({"kind": "builtin", "name": "log"}));
    assert_eq!(other["concurrency"]["limit"], 3);
}

#[tokio::test]
async fn a_declared_handler_comes_with_a_lease_that_it_can_work_with() {
    let database = Database::sqlite();
    let mut server = Process::start(&database, &["--queue", "q=http://127.0.0.1:1/"]).await;
    let short = json!({"handler": {"timeout": "1s"}, "lease": "3s"});
    server.client().patch_queue("q", &short).await;
    server.kill_hard().await;
    let mut server = Process::start(&database, &["--queue", "q=discard:"]).await;
    assert_eq!(server.client().queue("q").await["lease"], "1m", "3s is too short for any delivery");
    let id = server.client().send("q", "x").await;
    eventually("it is delivered", async || server.client().state(&id).await == "completed").await;

    server.client().patch_queue("q", &json!({"lease": "45s"})).await;
    server.kill_hard().await;
    let server = Process::start(&database, &["--queue", "q=log:"]).await;
    assert_eq!(server.client().queue("q").await["lease"], "45s", "this one is long enough");
}

#[tokio::test]
async fn the_list_of_queues_is_whole() {
    let database = Database::sqlite().off_the_disk();
    let server = Process::start(&database, &[]).await;
    for number in 0..201 {
        server.client().put_queue(&format!("q{number:03}"), &json!({})).await;
    }
    let list = say(&server, &["queues", "list"]);
    let names = list["items"].as_array().expect("items").iter().map(|queue| &queue["name"]);
    let names = names.collect::<Vec<_>>();
    assert_eq!((names.len(), names[200]), (201, &json!("q200")));
}

#[tokio::test]
async fn operators_get_a_listener_of_their_own() {
    let flags = ["--admin-listen", "127.0.0.1:0", "--queue", "q=discard:"];
    let database = Database::sqlite();
    let server = Process::start(&database, &flags).await;
    let log = server.log();
    let (_, rest) = log.split_once("admin_address=").expect("the log names it");
    let address = rest.split_whitespace().next().expect("an address");
    let operator = Client::new(address.parse().expect("an address and a port"));
    operator.get("/admin/v1/queues/q").await.expect(200);
    operator.get("/readyz").await.expect(200);
    operator.get("/v1/messages").await.expect(404);
    server.client().get("/v1/messages").await.expect(200);
    server.client().get("/admin/v1/queues/q").await.expect(404);
    for everywhere in ["/livez", "/readyz", "/docs/problems/not-found"] {
        operator.get(everywhere).await.expect(200);
        server.client().get(everywhere).await.expect(200);
    }
    for of_operators in ["/metrics", "/openapi.json", "/docs/", "/docs/openapi.json"] {
        operator.get(of_operators).await.expect(200);
        server.client().get(of_operators).await.expect(404).problem();
    }
}

#[tokio::test]
async fn an_address_in_use_and_a_file_in_use_are_named() {
    let taken = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let address = taken.local_addr().expect("it has an address").to_string();
    let (code, said) = fate(&run(&[], &["serve", "--listen", &address]));
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains(&format!("cannot listen on {address}")), "{said}");

    let database = Database::sqlite();
    let server = Process::start(&database, &[]).await;
    let (code, said) = fate(&run(&[], &["migrate", "--database", &database.url()]));
    assert_eq!(code, Some(1), "{said}");
    assert!(said.contains("another process"), "{said}");
    drop(server);
    let free = async || run(&[], &["migrate", "--database", &database.url()]).status.success();
    eventually("the file is free again", free).await;
}

#[tokio::test]
async fn messages_are_published_taken_and_watched() {
    let database = Database::sqlite();
    let server = Process::start(&database, &["--queue", "jobs=pull:"]).await;
    let put = json!({"queue": "jobs"});
    server.client().put("/admin/v1/topics/t/subscriptions/jobs", &put).await.expect(201);
    let published = say(&server, &["publish", "t", "{\"n\": 1}", "--type", "made"]);
    assert_eq!(published["matched"], 1);
    let looked = say(&server, &["receive", "jobs", "--verdict", "release"]);
    assert_eq!((&looked["payload"], &looked["attempt"]), (&json!({"n": 1}), &json!(1)));
    let taken = say(&server, &["receive", "jobs", "--wait", "5s"]);
    assert_eq!((&taken["type"], &taken["attempt"]), (&json!("made"), &json!(2)));
    assert_eq!(tell(&server, &["receive", "jobs"]).stdout, b"", "there is no more");
    let id = taken["id"].as_str().expect("an id");
    assert_eq!(server.client().state(id).await, "completed");
    let (code, said) = fate(&tell(&server, &["publish", "nobody", "x", "--require-subscribers"]));
    assert!(code == Some(1) && said.contains("no-subscribers"), "{said}");
    say(&server, &["queues", "put", "done=discard:"]);
    let waited = say(&server, &["send", "done", "x", "--wait", "10s"]);
    assert_eq!(waited["state"], "completed");
}

#[tokio::test]
async fn many_lines_are_sent_and_what_is_refused_is_named() {
    let database = Database::sqlite();
    let server = Process::start(&database, &["--queue", "q=pull:"]).await;
    let lines = |wrong: bool| {
        let mut lines = (0..1200).map(|n| format!("{{\"payload\":{n}}}\n")).collect::<Vec<_>>();
        if wrong {
            lines[700] = "{\"payload\":1,\"delay\":\"soon\"}\n".to_owned();
        }
        lines.concat()
    };
    let output = feed(&server, &["send", "q", "--lines", "--key", "import-1"], &lines(false)).await;
    assert_eq!(output.status.code(), Some(0), "{}", fate(&output).1);
    let summary: Value = serde_json::from_slice(&output.stdout).expect("a summary");
    assert_eq!((&summary["sent"], &summary["refused"]), (&json!(1200), &json!(0)));
    let again = feed(&server, &["send", "q", "--lines", "--key", "import-1"], &lines(false)).await;
    let summary: Value = serde_json::from_slice(&again.stdout).expect("a summary");
    assert_eq!((&summary["sent"], &summary["duplicates"]), (&json!(0), &json!(1200)));
    assert_eq!(server.client().queue("q").await["stats"]["ready"], 1200);
    let output = feed(&server, &["publish", "t", "--lines"], &lines(true)).await;
    let (code, said) = fate(&output);
    assert!(code == Some(1) && said.contains("line 701: "), "{said}");
}

#[tokio::test]
async fn whoever_tails_sees_messages_come() {
    let database = Database::sqlite();
    let server = Process::start(&database, &["--queue", "q=discard:"]).await;
    let mut tail = tokio::process::Command::new(env!("CARGO_BIN_EXE_pumphouse"))
        .args(["tail", "q", "--url", &format!("http://{}", server.address())])
        .stdout(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .expect("the program can be started");
    let stdout = tail.stdout.take().expect("it is a pipe");
    let mut lines = tokio::io::AsyncBufReadExt::lines(tokio::io::BufReader::new(stdout));
    for number in 0..3 {
        let id = server.client().send("q", format!("{number}")).await;
        let line = tokio::time::timeout(std::time::Duration::from_secs(20), lines.next_line());
        let line = line.await.expect("it comes").expect("it can be read").expect("a line");
        assert!(line.contains(&id) && line.contains(" q "), "{line}");
    }
}

#[test]
fn a_shell_can_complete_every_command() {
    for shell in ["bash", "zsh", "fish", "powershell", "elvish"] {
        let output = run(&[], &["completion", shell]);
        let script = String::from_utf8(output.stdout).expect("a script is text");
        assert!(output.status.success() && script.contains("require-subscribers"), "{shell}");
    }
}

/// Runs a command that talks to the server, with this on its standard input.
async fn feed(server: &Process, arguments: &[&str], input: &str) -> Output {
    let mut command = tokio::process::Command::new(env!("CARGO_BIN_EXE_pumphouse"));
    command.args(arguments).args(["--url", &format!("http://{}", server.address())]);
    command.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
    let mut child =
        command.stderr(std::process::Stdio::piped()).spawn().expect("it can be started");
    let mut stdin = child.stdin.take().expect("it is a pipe");
    tokio::io::AsyncWriteExt::write_all(&mut stdin, input.as_bytes()).await.expect("it reads");
    drop(stdin);
    child.wait_with_output().await.expect("it ends")
}
