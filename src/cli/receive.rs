//! `pumphouse receive` and `pumphouse tail`: takes messages of a queue, or watches them come.

use std::collections::HashSet;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use bytes::Bytes;
use http::Method;
use serde_json::{Value, json};

use crate::clock::{Clock, SystemClock};
use crate::model::{QueueName, parse_span};

use super::again::Again;
use super::client::{Call, PATIENCE, Refused, call};
use super::reader::Reader;
use super::{Server, complain, show};

/// What to take, and what to say of it.
#[derive(Debug, clap::Args)]
pub(super) struct Receive {
    /// The queue to take from; its handler is of the kind pull
    #[arg(value_parser = |text: &str| QueueName::parse(text))]
    queue: QueueName,
    #[command(flatten)]
    server: Server,
    /// At most so many messages
    #[arg(long, value_name = "NUMBER", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1000))]
    max: u16,
    /// How long to wait for the first, at most 60s
    #[arg(long, value_name = "DURATION", default_value = "0s")]
    wait: String,
    /// What to say of each once it is printed
    #[arg(long, value_name = "VERDICT", default_value = "ack")]
    verdict: Verdict,
    /// Go on until interrupted
    #[arg(long)]
    follow: bool,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Verdict {
    /// It is done
    Ack,
    /// Put it back untouched: to look at what is there
    Release,
    /// Try it again later, as the queue's recovery says
    Retry,
    /// Set it aside
    DeadLetter,
    /// Drop it
    Discard,
}

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Self::Ack => "ack",
            Self::Release => "release",
            Self::Retry => "retry",
            Self::DeadLetter => "dead_letter",
            Self::Discard => "discard",
        }
    }
}

/// What to watch.
#[derive(Debug, clap::Args)]
pub(super) struct Tail {
    /// Only messages of this queue
    #[arg(value_parser = |text: &str| QueueName::parse(text))]
    queue: Option<QueueName>,
    #[command(flatten)]
    server: Server,
    /// Only messages of this type
    #[arg(long = "type", value_name = "TYPE")]
    kind: Option<String>,
}

/// Takes messages, prints each as a line of JSON, and says then what is to become of it.
pub(super) async fn receive(receive: Receive) -> Result<()> {
    let path = format!("/v1/queues/{}/leases", receive.queue);
    if receive.follow && matches!(receive.verdict, Verdict::Release) {
        let wrong = "--verdict release cannot be used with --follow: the same messages would come at once, again and again";
        return Err(super::command().error(clap::error::ErrorKind::ArgumentConflict, wrong).into());
    }
    // One that cannot be read is for the server to refuse.
    let is_zero = parse_span(&receive.wait).is_ok_and(|wait| wait.is_zero());
    let wait = if receive.follow && is_zero { "20s" } else { &receive.wait };
    let wanted = json!({"max": receive.max, "wait": wait});
    let reader = Reader::of_stdout();
    let mut again = if receive.follow { Again::for_ever() } else { Again::never() };
    // A call is never cut short, because it may have taken messages by then.
    while !reader.is_away() {
        let answer = match ask(&receive.server, Method::POST, &path, Some(&wanted)).await {
            Ok(answer) => answer,
            Err(error) => {
                again.after(error).await?;
                continue;
            }
        };
        again.is_over();
        let leases = answer["leases"].as_array().context("the answer has no leases")?;
        let mut settlements = Vec::new();
        let mut is_read = true;
        for lease in leases {
            let mut message = lease["message"].clone();
            message["attempt"] = lease["attempt"].clone();
            // What nobody reads is not settled but given back.
            is_read = is_read && show(&message.to_string())?;
            let verdict = if is_read { receive.verdict } else { Verdict::Release };
            settlements.push(json!({"token": lease["token"], "verdict": verdict.word()}));
        }
        let lost = settle(&receive, settlements, is_read).await?;
        if lost > 0 {
            let lost = anyhow!("{lost} of {} could not be settled; they come back", leases.len());
            if !receive.follow {
                return Err(lost);
            }
            complain(&lost);
        }
        if !receive.follow || !is_read {
            break;
        }
    }
    Ok(())
}

/// Says what is to become of messages, again where nobody knows whether that was heard. Returns how many it was too
/// late for; where it was said again, also those that were settled the first time.
async fn settle(receive: &Receive, mut settlements: Vec<Value>, is_read: bool) -> Result<usize> {
    // Without a reader there is no reason to stay for ever: the leases end by themselves.
    let for_ever = receive.follow && is_read;
    let mut again = if for_ever { Again::for_ever() } else { Again::for_a_while() };
    let mut lost = 0;
    while !settlements.is_empty() {
        let said = json!({"settlements": settlements});
        let heard = ask(&receive.server, Method::POST, "/v1/leases/settle", Some(&said)).await;
        let heard = match heard {
            Ok(heard) => heard,
            Err(error) => {
                again.after(error).await?;
                continue;
            }
        };
        let items = heard["items"].as_array().context("the answer has no items")?;
        let mut left = Vec::new();
        let mut why = None;
        for (settlement, item) in settlements.into_iter().zip(items) {
            match Refused::of_item(item) {
                Some(refused) if refused.is_for_now() => {
                    left.push(settlement);
                    why = Some(refused);
                }
                Some(_) => lost += 1,
                None => (),
            }
        }
        if let Some(why) = why {
            again.after(why.into()).await?;
        }
        settlements = left;
    }
    Ok(lost)
}

/// Prints a line for each message that comes in, until interrupted or nobody reads it any more.
pub(super) async fn tail(tail: Tail) -> Result<()> {
    let reader = Reader::of_stdout();
    tokio::select! {
        done = watch(&tail) => done,
        () = reader.has_gone() => Ok(()),
    }
}

async fn watch(tail: &Tail) -> Result<()> {
    // From now on, by this machine's clock; messages that came in the same second may be shown too.
    let mut since = SystemClock.now();
    let mut known = HashSet::<String>::new();
    let mut again = Again::for_ever();
    loop {
        let mut path = format!("/v1/messages?limit=200&since={since}");
        for (name, value) in
            [("queue", tail.queue.as_ref().map(ToString::to_string)), ("type", tail.kind.clone())]
        {
            if let Some(value) = value {
                let plain = percent_encoding::NON_ALPHANUMERIC;
                let value = percent_encoding::utf8_percent_encode(&value, plain);
                path.push_str(&format!("&{name}={value}"));
            }
        }
        let mut come = match list(&tail.server, &path).await {
            Ok(come) => come,
            Err(error) => {
                again.after(error).await?;
                continue;
            }
        };
        again.is_over();
        come.reverse();
        let mut seen = HashSet::new();
        for message in &come {
            let id = message["id"].as_str().unwrap_or_default().to_owned();
            if !known.contains(&id) && !show(&line(message))? {
                return Ok(());
            }
            seen.insert(id);
        }
        // What came a while ago is not asked for again.
        if let Some(last) = come.last().and_then(|last| last["enqueued_at"].as_str())
            && let Ok(last) = last.parse::<jiff::Timestamp>()
        {
            since = since.max(last.checked_sub(OVERLAP).unwrap_or(last));
        }
        known = seen;
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// All pages of a list.
async fn list(server: &Server, path: &str) -> Result<Vec<Value>> {
    let mut items = Vec::new();
    let mut cursor = String::new();
    loop {
        let page = ask(server, Method::GET, &format!("{path}&cursor={cursor}"), None).await?;
        items.extend(page["items"].as_array().context("the answer has no items")?.clone());
        match page["next"].as_str() {
            Some(next) => next.clone_into(&mut cursor),
            None => return Ok(items),
        }
    }
}

fn line(message: &Value) -> String {
    let text = |name: &str| message[name].as_str().unwrap_or("-").to_owned();
    let kind = message["type"].as_str().or(message["content_type"].as_str()).unwrap_or("-");
    format!(
        "{} {} {} {} {} {} bytes",
        text("enqueued_at"),
        text("queue"),
        text("id"),
        text("state"),
        kind.escape_debug(),
        message["size"]
    )
}

async fn ask(server: &Server, method: Method, path: &str, body: Option<&Value>) -> Result<Value> {
    let answer = call(Call {
        method,
        base: &server.url,
        path,
        headers: vec![("content-type".to_owned(), "application/json".to_owned())],
        body: body.map(|body| Bytes::from(body.to_string())).unwrap_or_default(),
        // A wait is at most a minute.
        patience: PATIENCE + Duration::from_secs(60),
    });
    serde_json::from_slice(&answer.await?).context("the server's answer is not JSON")
}

/// How often is looked for new messages, and how much of what was looked at is looked at again: transactions that were
/// open then may have been committed since.
const LOOK_EVERY: Duration = Duration::from_secs(1);
const OVERLAP: Duration = Duration::from_secs(10);
