//! `pumphouse send`: puts one message into a queue of a running Pumphouse.

use std::io::{self, Read};

use anyhow::{Context, Result};
use bytes::Bytes;
use http::Method;

use crate::model::QueueName;

use super::client::{Call, PATIENCE, call, pretty};
use super::{Server, parse_pair, print};

/// What to send, and how.
#[derive(Debug, clap::Args)]
pub(super) struct Send {
    /// The queue to send to
    #[arg(value_parser = |text: &str| QueueName::parse(text))]
    queue: QueueName,
    /// The payload; without it, or with -, it is read from standard input
    body: Option<String>,
    #[command(flatten)]
    server: Server,
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
    /// An idempotency key: the same key with the same message again is the same message
    #[arg(long, value_name = "KEY")]
    key: Option<String>,
    /// A header for the handler; can be repeated
    #[arg(long = "header", value_name = "NAME=VALUE", value_parser = parse_pair)]
    headers: Vec<(String, String)>,
}

/// Sends it and prints the answer: the message's id and what became of it.
pub(super) async fn run(send: Send) -> Result<()> {
    let body = match send.body.as_deref() {
        None | Some("-") => {
            let mut bytes = Vec::new();
            io::stdin()
                .read_to_end(&mut bytes)
                .context("cannot read the payload from standard input")?;
            bytes
        }
        Some(text) => text.as_bytes().to_vec(),
    };
    let content_type = send.content_type.unwrap_or_else(|| content_type_of(&body).to_owned());
    let mut headers = vec![("content-type".to_owned(), content_type)];
    let options = [
        ("pumphouse-type", send.kind),
        ("pumphouse-delay", send.delay),
        ("pumphouse-priority", send.priority.map(|priority| priority.to_string())),
        ("idempotency-key", send.key),
    ];
    for (name, value) in options {
        headers.extend(value.map(|value| (name.to_owned(), value)));
    }
    for (name, value) in send.headers {
        headers.push((format!("pumphouse-forward-{name}"), value));
    }
    let path = format!("/v1/queues/{}/messages", send.queue);
    let answer = call(Call {
        method: Method::POST,
        base: &send.server.url,
        path: &path,
        headers,
        body: Bytes::from(body),
        patience: PATIENCE,
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
