//! Are the examples in the docs true? Each is taken from its page as it stands there, and run.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::json;
use tokio::process::{Child, Command};

use crate::support::postgres::psql;
use crate::support::process::Database;
use crate::support::scene::Scene;
use crate::support::{eventually, pass};

const PAGE: &str = include_str!("../../../docs/beyond-transactions.md");

/// Something that the page shows.
#[derive(Debug)]
struct Block {
    language: String,
    text: String,
}

/// The blocks of a page, in order.
fn blocks(page: &str) -> Vec<Block> {
    let mut blocks = Vec::new();
    for (number, part) in page.split("```").enumerate() {
        if number % 2 == 1 {
            let (language, text) = part.split_once('\n').expect("a block has a first line");
            blocks.push(Block { language: language.to_owned(), text: text.to_owned() });
        }
    }
    blocks
}

/// The commands of a block, each with what it is to say.
fn commands(text: &str) -> Vec<(String, String)> {
    let mut commands = Vec::<(String, String)>::new();
    for line in text.lines() {
        let goes_on = commands.last().is_some_and(|(command, _)| command.ends_with('\\'));
        if let Some(command) = line.strip_prefix("$ ") {
            commands.push((command.to_owned(), String::new()));
        } else if let Some((command, said)) = commands.last_mut() {
            let to = if goes_on { command } else { said };
            to.push('\n');
            to.push_str(line);
        }
    }
    commands
}

/// Whether this was said, where `…` stands for anything.
fn is_said(said: &str, shown: &str) -> bool {
    let mut rest = said.trim();
    let parts = shown.trim().split('…').collect::<Vec<_>>();
    let (first, last) = (parts[0], parts[parts.len() - 1]);
    let middle = parts.iter().all(|part| match rest.find(part) {
        Some(at) => {
            rest = &rest[at + part.len()..];
            true
        }
        None => false,
    });
    middle && said.trim().starts_with(first) && said.trim().ends_with(last)
}

/// A scene as the page has it, and its handler.
struct House {
    scene: Scene,
    port: u16,
    _handler: Child,
    _folder: tempfile::TempDir,
}

impl House {
    async fn open() -> Self {
        let scene = Scene::on(Database::postgres().await).await;
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let port = free.local_addr().expect("it has an address").port();
        drop(free);
        let script = blocks(PAGE).into_iter().find(|block| block.language == "python");
        let script =
            script.expect("the page has a handler").text.replace("9000", &port.to_string());
        let folder = tempfile::tempdir().expect("a folder can be made");
        let path = folder.path().join("handler.py");
        std::fs::write(&path, script).expect("a file can be written");
        let handler = Command::new("python3").arg(path).kill_on_drop(true).spawn();
        let handler = handler.expect("there is a python3");
        eventually("the handler listens", async || {
            tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_ok()
        })
        .await;
        Self { scene, port, _handler: handler, _folder: folder }
    }

    /// What is written for the page's addresses, with those of this house.
    fn here(&self, text: &str) -> String {
        let pump = self.scene.process.address().to_string();
        let handler = format!("127.0.0.1:{}", self.port);
        text.replace("localhost:8080", &pump).replace("localhost:9000", &handler)
    }

    async fn shell(&self, command: &str) -> String {
        let command = self.here(command);
        let output = Command::new("sh").args(["-c", &command]).stdin(Stdio::null()).output().await;
        let output = output.expect("there is a shell");
        assert!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("answers are text")
    }

    async fn all(&self, path: &str) -> Vec<serde_json::Value> {
        self.scene.client.all(path).await
    }
}

#[tokio::test]
async fn the_page_about_transactions_says_what_is_true() {
    let house = House::open().await;
    let (mut ran, mut lines) = (0, 0);
    for block in blocks(PAGE) {
        match block.language.as_str() {
            "console" => {
                for (command, shown) in commands(&block.text) {
                    let said = house.shell(&command).await;
                    ran += 1;
                    if command.contains("correlation_id=order-17") {
                        // Its last message is kept a moment after the first was sent.
                        conversation(&house, &command, &shown).await;
                    } else if !shown.trim().is_empty() {
                        lines += 1;
                        assert!(is_said(&said, &shown), "{command}\nsaid {said}\nnot {shown}");
                    }
                }
            }
            "sql" => sql(&house, &block.text).await,
            "rust" | "python" => (),
            other => panic!("nobody runs blocks of {other}"),
        }
    }
    assert!(ran >= 14 && lines >= 8, "{ran} commands, {lines} answers");
    eventually("the order is on its way", async || {
        let sent = house.all("/v1/messages?correlation_id=order-19").await;
        sent.len() == 3 && sent[2]["type"] == "order.placed"
    })
    .await;
    assert_eq!(house.all("/v1/messages?correlation_id=order-18").await, [json!(null); 0]);
    let reports = house.all("/v1/messages?queue=mails&state=scheduled").await;
    assert_eq!(reports.iter().filter(|it| it["causation_id"].is_null()).count(), 1);
    let accounts = house.all("/v1/messages?queue=accounts&group=account-7").await;
    assert_eq!(accounts.len(), 2);
}

const WAYS: &str = include_str!("../../../docs/ways.md");

#[tokio::test]
async fn the_page_about_ways_in_and_out_says_what_is_true() {
    let house = House::open().await;
    let (mut ran, mut lines) = (0, 0);
    for block in blocks(WAYS).iter().filter(|block| block.language == "console") {
        for (command, shown) in commands(&block.text) {
            let said = house.shell(&command).await;
            ran += 1;
            if !shown.trim().is_empty() {
                lines += 1;
                assert!(is_said(&said, &shown), "{command}\nsaid {said}\nnot {shown}");
            }
        }
    }
    assert!(ran >= 16 && lines >= 13, "{ran} commands, {lines} answers");
    eventually("the answer is sent on", async || {
        let sent = house.all("/v1/messages?queue=audit&correlation_id=question-1").await;
        sent.len() == 1 && sent[0]["causation_id"].is_string()
    })
    .await;
    for language in blocks(WAYS).iter().map(|block| block.language.as_str()) {
        assert!(
            matches!(language, "console" | "text" | "toml"),
            "nobody runs blocks of {language}"
        );
    }
}

async fn conversation(house: &House, command: &str, shown: &str) {
    for _ in 0..300 {
        if is_said(&house.shell(command).await, shown)
            && house.all("/v1/messages?correlation_id=order-17").await.len() == 3
        {
            return;
        }
        pass(Duration::from_millis(20)).await;
    }
    panic!("{command} does not say {shown}: {}", house.shell(command).await);
}

/// Runs a script, or statements of which each says in a comment how it fails.
async fn sql(house: &House, text: &str) {
    let url = house.scene.database.url();
    let fails = |line: &&str| line.contains("-- ERROR:");
    if !text.lines().any(|line| fails(&line)) {
        let output = psql(&url, text).await;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        return;
    }
    for line in text.lines().filter(fails) {
        let (statement, shown) = line.split_once(" -- ").expect("a comment follows");
        let output = psql(&url, statement).await;
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains(shown), "{statement}\nsaid {said}\nnot {shown}");
    }
}

/// The blocks in Rust stand in the example as they stand on the page, and that runs.
#[tokio::test]
async fn the_example_with_an_own_transaction_is_the_one_on_the_page_and_runs() {
    let house = House::open().await;
    for queue in ["orders", "parcels", "mails"] {
        let settings = json!({"handler": {"kind": "builtin", "name": "discard"}});
        house.scene.client.put_queue(queue, &settings).await;
    }
    let url = house.scene.database.url();
    assert!(psql(&url, "create table placed (id integer, customer text)").await.status.success());
    let source = include_str!("../../../examples/own_transaction.rs");
    let plain = |text: &str| text.split_whitespace().collect::<String>();
    for block in blocks(PAGE).iter().filter(|block| block.language == "rust") {
        assert!(plain(source).contains(&plain(&block.text)), "not in the example: {}", block.text);
    }
    let program = Path::new(env!("CARGO_BIN_EXE_pumphouse"));
    let example = program.parent().expect("it lies somewhere").join("examples/own_transaction");
    let output = Command::new(example).arg(&url).output().await.expect("it was built");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let sent = house.all("/v1/messages?queue=orders").await;
    assert_eq!(sent.len(), 2, "{sent:?}");
    eventually("both are done", async || {
        house.all("/v1/messages?queue=orders&state=completed").await.len() == 2
    })
    .await;
}
