//! `pumphouse queues`: shows and changes the queues of a running Pumphouse, through its admin plane.

use std::io::Read;
use std::time::Duration;
use std::{fs, io};

use anyhow::{Context, Result};
use bytes::Bytes;
use clap::Subcommand;
use clap::error::ErrorKind;
use http::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::model::{Builtin, Handler, QueueName, parse_span};

use super::client::{Call, PATIENCE, call, pretty};
use super::config::parse_handler;
use super::{Server, print};

/// What to do with queues.
#[derive(Debug, clap::Args)]
pub(super) struct Queues {
    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Show all queues with their settings and how much waits in each
    List {
        #[command(flatten)]
        server: Server,
    },
    /// Show one queue
    Show(Named),
    /// Make a queue, or give it other settings
    #[command(after_help = PUT_EXAMPLES)]
    Put {
        /// NAME=URL for a queue whose messages are posted there (log: and discard: for the handlers of the
        /// house), or NAME with --settings. What is not said gets its default
        #[arg(value_name = "NAME[=URL]")]
        queue: String,
        /// Settings as JSON, in a file, - for standard input, or the JSON itself
        #[arg(long, value_name = "FILE|JSON")]
        settings: Option<String>,
        #[command(flatten)]
        server: Server,
    },
    /// Deliver again, now and after every restart
    Start(Named),
    /// Deliver no more, now and after every restart; sending goes on. Returns when nothing is open
    Stop {
        #[command(flatten)]
        named: Named,
        /// How long open deliveries may go on before they are cut; 0s cuts at once
        #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = span)]
        deadline: Duration,
        /// Why, for whoever looks at the queue later
        #[arg(long)]
        reason: Option<String>,
    },
    /// Delete what waits in a queue; what is leased, dead or done stays
    Purge(Named),
    /// Delete an empty queue
    Delete {
        #[command(flatten)]
        named: Named,
        /// Delete it with all messages in it
        #[arg(long)]
        force: bool,
    },
}

const PUT_EXAMPLES: &str = "\
Examples:
  pumphouse queues put emails=http://127.0.0.1:9000/emails
  pumphouse queues put slow --settings '{\"handler\": {\"kind\": \"http\", \"url\": \"http://h/\"}, \"concurrency\": {\"limit\": 1}}'
  pumphouse queues show slow > slow.json     change it, and then
  pumphouse queues put slow --settings slow.json";

#[derive(Debug, clap::Args)]
struct Named {
    /// The queue
    #[arg(value_parser = |text: &str| QueueName::parse(text))]
    queue: QueueName,
    #[command(flatten)]
    server: Server,
}

impl Named {
    fn path(&self, rest: &str) -> String {
        format!("/admin/v1/queues/{}{rest}", self.queue)
    }
}

/// Does it and prints the answer.
pub(super) async fn run(queues: Queues) -> Result<()> {
    match queues.action {
        Action::List { server } => list(&server).await,
        Action::Show(named) => {
            ask(Method::GET, &named.server, &named.path(""), None, PATIENCE).await
        }
        Action::Put { queue, settings, server } => {
            let (queue, settings) = put(&queue, settings.as_deref())?;
            let path = format!("/admin/v1/queues/{queue}");
            ask(Method::PUT, &server, &path, Some(settings), PATIENCE).await
        }
        Action::Start(named) => {
            ask(Method::POST, &named.server, &named.path("/start"), None, PATIENCE).await
        }
        Action::Stop { named, deadline, reason } => {
            let mut body = json!({ "mode": "drain", "deadline": deadline.as_secs_f64() });
            if let Some(reason) = reason {
                body["reason"] = reason.into();
            }
            // The answer comes when the last delivery has ended.
            let patience = deadline + PATIENCE;
            ask(Method::POST, &named.server, &named.path("/stop"), Some(body), patience).await
        }
        Action::Purge(named) => {
            ask(Method::POST, &named.server, &named.path("/purge"), None, PATIENCE).await
        }
        Action::Delete { named, force } => {
            let path = named.path(if force { "?force=true" } else { "" });
            ask(Method::DELETE, &named.server, &path, None, PATIENCE).await
        }
    }
}

/// Walks the pages and prints them as one list.
async fn list(server: &Server) -> Result<()> {
    let mut items = Vec::new();
    let mut cursor = String::new();
    loop {
        let path = format!("/admin/v1/queues?limit=200&cursor={cursor}");
        let page = call(Call {
            method: Method::GET,
            base: &server.url,
            path: &path,
            headers: Vec::new(),
            body: Bytes::new(),
            patience: PATIENCE,
        });
        let page = serde_json::from_slice::<Page>(&page.await?);
        let page = page.context("the answer is no list of queues")?;
        items.extend(page.items);
        let Some(next) = page.next else { break };
        cursor = next;
    }
    print(&pretty(json!({ "items": items }).to_string().as_bytes()))
}

#[derive(Deserialize)]
struct Page {
    items: Vec<Value>,
    next: Option<String>,
}

async fn ask(
    method: Method,
    server: &Server,
    path: &str,
    body: Option<Value>,
    patience: Duration,
) -> Result<()> {
    let json = ("content-type".to_owned(), "application/json".to_owned());
    let answer = call(Call {
        method,
        base: &server.url,
        path,
        headers: body.iter().map(|_| json.clone()).collect(),
        body: body.map(|body| Bytes::from(body.to_string())).unwrap_or_default(),
        patience,
    });
    print(&pretty(&answer.await?))
}

/// The queue's name and the settings to put.
fn put(queue: &str, settings: Option<&str>) -> Result<(QueueName, Value)> {
    let (name, url) = match queue.split_once('=') {
        Some((name, url)) => (name, Some(url)),
        None => (queue, None),
    };
    let name = QueueName::parse(name).map_err(|invalid| usage(invalid.detail))?;
    match (url, settings) {
        (Some(url), None) => {
            let handler = parse_handler(url).map_err(usage)?;
            Ok((name, json!({ "handler": handler_json(&handler, url) })))
        }
        (None, Some(settings)) => Ok((name, read_settings(settings)?)),
        (None, None) => {
            Err(usage(format!("say where its messages go: {name}=URL, or {name} --settings FILE")))
        }
        (Some(_), Some(_)) => {
            Err(usage(format!("say either {name}=URL or {name} --settings FILE, not both")))
        }
    }
}

/// A mistake in the arguments that only shows when they are seen together.
fn usage(text: String) -> anyhow::Error {
    clap::Error::raw(ErrorKind::ValueValidation, format!("{text}\n")).into()
}

fn handler_json(handler: &Handler, url: &str) -> Value {
    match handler {
        Handler::Builtin { name: Builtin::Log } => json!({ "kind": "builtin", "name": "log" }),
        Handler::Builtin { name: Builtin::Discard } => {
            json!({ "kind": "builtin", "name": "discard" })
        }
        Handler::Pull => json!({ "kind": "pull" }),
        Handler::Http(_) | Handler::Push(_) | Handler::Service => {
            json!({ "kind": "http", "url": url })
        }
    }
}

fn read_settings(settings: &str) -> Result<Value> {
    let text = match settings {
        "-" => {
            let mut text = String::new();
            io::stdin().read_to_string(&mut text).context("cannot read standard input")?;
            text
        }
        json if json.trim_start().starts_with('{') => json.to_owned(),
        path => fs::read_to_string(path).with_context(|| format!("cannot read the file {path}"))?,
    };
    serde_json::from_str(&text).context("the settings are not JSON")
}

fn span(text: &str) -> Result<Duration, String> {
    parse_span(text).map_err(|invalid| invalid.detail)
}
