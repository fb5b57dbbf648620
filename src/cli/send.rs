//! `pumphouse send` and `pumphouse publish`: puts messages into a queue, or publishes them to a topic, of a running
//! Pumphouse.

use std::io::{self, Read};

use anyhow::{Context, Result};
use bytes::Bytes;
use http::Method;

use crate::model::{QueueName, TopicName, parse_span};

use super::client::{Call, PATIENCE, call, pretty};
use super::lines;
use super::{Server, parse_pair, print};

/// What to send to a queue, and how.
#[derive(Debug, clap::Args)]
pub(super) struct Send {
    /// The queue to send to
    #[arg(value_parser = |text: &str| QueueName::parse(text))]
    queue: QueueName,
    #[command(flatten)]
    message: Message,
    /// Wait so long for the message to be settled, and print what became of it; at most 60s
    #[arg(long, value_name = "DURATION", conflicts_with = "lines")]
    wait: Option<String>,
}

/// What to publish to a topic, and how.
#[derive(Debug, clap::Args)]
pub(super) struct Publish {
    /// The topic to publish to
    #[arg(value_parser = |text: &str| TopicName::parse(text))]
    topic: TopicName,
    #[command(flatten)]
    message: Message,
    /// Fail where no queue wants it
    #[arg(long)]
    require_subscribers: bool,
}

/// A message, and its options.
#[derive(Debug, clap::Args)]
struct Message {
    /// The payload; without it, or with -, it is read from standard input
    body: Option<String>,
    #[command(flatten)]
    server: Server,
    /// Read standard input as many messages: each line is an envelope in JSON, as in {"payload": 1, "type": "t"};
    /// progress is shown, and a summary at the end
    #[arg(
        long,
        conflicts_with_all = ["body", "kind", "content_type", "delay", "priority", "group", "reply_to", "headers"]
    )]
    lines: bool,
    /// What the message is about, as in orders.placed
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<String>,
    /// The payload's media type; without it application/json if it is JSON, else text/plain, and
    /// application/octet-stream for what is no text
    #[arg(long, value_name = "TYPE")]
    content_type: Option<String>,
    /// How long to wait before the first delivery, as in 10m
    #[arg(long, value_name = "DURATION")]
    delay: Option<String>,
    /// From -100 to 100; higher goes first
    #[arg(long, value_name = "NUMBER", allow_negative_numbers = true)]
    priority: Option<i8>,
    /// Messages of one group are delivered one at a time and in order
    #[arg(long, value_name = "GROUP")]
    group: Option<String>,
    /// The queue to which the handler's answer is sent
    #[arg(long, value_name = "QUEUE")]
    reply_to: Option<String>,
    /// An idempotency key: the same key with the same message again is the same message. With --lines it is of the
    /// whole input, and batches are cut by count and size only, so that the same input again is the same batches
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
    /// A header for the handler; can be repeated
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = parse_pair)]
    headers: Vec<(String, String)>,
}

/// Sends it and prints the answer: the message's id and what became of it.
pub(super) async fn run(send: Send) -> Result<()> {
    let path = format!("/v1/queues/{}/messages", send.queue);
    let mut query = String::new();
    let mut patience = PATIENCE;
    if let Some(wait) = &send.wait {
        query = format!("?wait={wait}");
        // One that cannot be read is for the server to refuse.
        patience += parse_span(wait).unwrap_or_default();
    }
    post(send.message, &path, &query, patience).await
}

/// Publishes it and prints the answer: who wanted it.
pub(super) async fn publish(publish: Publish) -> Result<()> {
    let path = format!("/v1/topics/{}/messages", publish.topic);
    let query = if publish.require_subscribers { "?require_subscribers=true" } else { "" };
    post(publish.message, &path, query, PATIENCE).await
}

async fn post(
    message: Message,
    path: &str,
    query: &str,
    patience: std::time::Duration,
) -> Result<()> {
    if message.lines {
        let path = format!("{path}/batch{query}");
        return lines::run(&message.server.url, &path, message.key).await;
    }
    let body = match message.body.as_deref() {
        None | Some("-") => {
            let mut bytes = Vec::new();
            io::stdin()
                .read_to_end(&mut bytes)
                .context("cannot read the payload from standard input")?;
            bytes
        }
        Some(text) => text.as_bytes().to_vec(),
    };
    let content_type = message.content_type.unwrap_or_else(|| content_type_of(&body).to_owned());
    let mut headers = vec![("content-type".to_owned(), content_type)];
    let options = [
        ("pumphouse-type", message.kind),
        ("pumphouse-delay", message.delay),
        ("pumphouse-priority", message.priority.map(|priority| priority.to_string())),
        ("pumphouse-group", message.group),
        ("pumphouse-reply-to", message.reply_to),
        ("idempotency-key", message.key),
    ];
    for (name, value) in options {
        headers.extend(value.map(|value| (name.to_owned(), value)));
    }
    for (name, value) in message.headers {
        headers.push((format!("pumphouse-forward-{name}"), value));
    }
    let path = format!("{path}{query}");
    let answer = call(Call {
        method: Method::POST,
        base: &message.server.url,
        path: &path,
        headers,
        body: Bytes::from(body),
        patience,
    });
    print(&pretty(&answer.await?))
}

fn content_type_of(body: &[u8]) -> &'static str {
    if serde_json::from_slice::<serde::de::IgnoredAny>(body).is_ok() {
        return "application/json";
    }
    match std::str::from_utf8(body) {
        Ok(_) => "text/plain; charset=utf-8",
        Err(_) => "application/octet-stream",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_media_type_is_told_from_the_payload() {
        assert_eq!(content_type_of(b"{\"a\": 1}"), "application/json");
        assert_eq!(content_type_of(b"hello"), "text/plain; charset=utf-8");
        assert_eq!(content_type_of(b"\xff"), "application/octet-stream");
    }
}
