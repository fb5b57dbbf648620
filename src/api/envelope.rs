//! From a request to a message: option headers over raw bytes, or a JSON envelope. It stores nothing.

use std::collections::BTreeMap;

use bytes::Bytes;
use http::{HeaderMap, HeaderName};
use jiff::Timestamp;
use percent_encoding::percent_decode_str;
use serde_json::Value;
use sha2::{Digest, Sha256};
use utoipa::ToSchema;

use crate::clock::{Clock, SystemClock};
use crate::model::{self, Destination, Event, Form, Idempotency, Invalid, NewMessage, parse_span};

use super::lasting::Lasting;
use super::problem::{self, Problem};

/// A payload, byte for byte.
#[derive(ToSchema)]
#[schema(as = Payload, value_type = String, format = Binary)]
#[expect(dead_code, reason = "only its description is used")]
pub(super) struct PayloadBody(Bytes);

/// A CloudEvent in the JSON format.
#[derive(ToSchema)]
#[schema(as = CloudEvent)]
#[expect(dead_code, reason = "only its description is used")]
pub(super) struct EventBody {
    #[schema(example = "1.0")]
    specversion: String,
    id: String,
    source: String,
    r#type: String,
    /// Attributes and extensions, and `data` or `data_base64`.
    #[serde(flatten)]
    others: BTreeMap<String, Value>,
}

/// A message with its options, as JSON: how [`model::Envelope`] looks to those who read the description.
#[derive(ToSchema)]
#[schema(as = Envelope)]
#[expect(dead_code, reason = "only its description is used")]
pub(super) struct EnvelopeBody {
    /// Any JSON; its text goes to the handler as it came.
    #[schema(required = false)]
    payload: Value,
    /// The payload's bytes, where it is no JSON.
    payload_base64: Option<String>,
    /// The payload's media type; `application/json` for a JSON payload.
    content_type: Option<String>,
    /// What it is about.
    r#type: Option<String>,
    /// Headers to send on to the handler.
    #[schema(required = false)]
    headers: BTreeMap<String, String>,
    delay: Option<Lasting>,
    #[schema(value_type = Option<String>, format = DateTime)]
    deliver_at: Option<Timestamp>,
    expires_in: Option<Lasting>,
    #[schema(value_type = Option<String>, format = DateTime)]
    expires_at: Option<Timestamp>,
    /// -100 to 100, higher first.
    priority: Option<i64>,
    correlation_id: Option<String>,
    causation_id: Option<String>,
    idempotency_key: Option<String>,
    /// The key of those of the queue that are delivered one at a time and in order; without delay and priority.
    group: Option<String>,
    /// On whose behalf it is sent: those who wait take turns.
    fairness_key: Option<String>,
    /// Of this key there is at most one message that can still be delivered.
    unique_while_pending: Option<String>,
    /// The queue to which the handler's answer is sent, with its ack.
    reply_to: Option<String>,
}

/// The message of an envelope for this queue, and its own idempotency key.
pub(super) fn from_envelope(
    to: &Destination,
    envelope: model::Envelope,
) -> Result<(NewMessage, Option<String>), Problem> {
    for (pointer, given) in [("/queue", &envelope.queue), ("/topic", &envelope.topic)] {
        if given.is_some() {
            return Err(Invalid::new(pointer, "where it goes stands in the path").into());
        }
    }
    envelope.into_message(to.clone(), SystemClock.now()).map_err(Problem::invalid)
}

/// A raw body with options in headers.
pub(super) fn from_headers(
    to: &Destination,
    headers: &HeaderMap,
    body: Bytes,
) -> Result<NewMessage, Problem> {
    let mut message = NewMessage::new(to.clone(), body);
    message.details.content_type = content_type(headers)?;
    put_options(&mut message, headers)?;
    Ok(message)
}

/// An event in binary mode, with options in headers as any message; without a key of its own it has that of the event.
pub(super) fn from_event_headers(
    to: &Destination,
    headers: &HeaderMap,
    body: Bytes,
) -> Result<NewMessage, Problem> {
    let mut attributes = Vec::new();
    for (name, value) in headers {
        let Some(attribute) = name.as_str().strip_prefix("ce-") else { continue };
        let wrong = || Invalid::new(name.as_str(), "a value is UTF-8, percent-encoded or plain");
        let text = std::str::from_utf8(value.as_bytes()).map_err(|_| wrong())?.trim();
        // Quotes are what older senders put around a value; the binding says to take them off.
        let quoted = text.strip_prefix('"').and_then(|text| text.strip_suffix('"'));
        let text = quoted.map_or_else(|| text.to_owned(), |text| text.replace("\\\"", "\""));
        let text = percent_decode_str(&text).decode_utf8().map_err(|_| wrong())?;
        attributes.push((attribute.to_owned(), text.into_owned()));
    }
    let event = Event::from_headers(attributes, content_type(headers)?, body)?;
    from_event(to, headers, event)
}

/// An event, with options in headers.
pub(super) fn from_event(
    to: &Destination,
    headers: &HeaderMap,
    event: Event,
) -> Result<NewMessage, Problem> {
    let key = event.key();
    let mut message = event.into_message(to.clone());
    put_options(&mut message, headers)?;
    message.keys.extend(key_of(headers)?.is_none().then_some(key));
    Ok(message)
}

/// A message that says itself where it goes, with its options and its key.
pub(super) fn pushed(
    mut message: NewMessage,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<NewMessage, Problem> {
    message.details.content_type = content_type(headers)?;
    put_options(&mut message, headers)?;
    if let Some(name) = headers.keys().find(|name| name.as_str().starts_with("ce-")) {
        let detail = "an event is sent into a queue or to a topic";
        return Err(Invalid::new(name.as_str(), detail).into());
    }
    let key = key_of(headers)?.map(|key| own_key(&key, fingerprint(headers, body)));
    message.keys.extend(key);
    Ok(message)
}

/// Whether a request brings an event in binary mode.
pub(super) fn is_event(headers: &HeaderMap) -> bool {
    headers.keys().any(|name| name.as_str().starts_with("ce-"))
}

fn content_type(headers: &HeaderMap) -> Result<Option<String>, Invalid> {
    let content_type = headers.get(http::header::CONTENT_TYPE);
    content_type
        .map(|value| value.to_str().map(ToOwned::to_owned))
        .transpose()
        .map_err(|_| Invalid::new("Content-Type", "a media type is ASCII"))
}

/// Gives a message the options that stand in headers.
fn put_options(message: &mut NewMessage, headers: &HeaderMap) -> Result<(), Problem> {
    let mut forwarded = Vec::new();
    let (mut delay, mut deliver_at, mut expires_in, mut expires_at) = (None, None, None, None);
    Trace::of(headers).put_into(message);
    for name in headers.keys() {
        if !name.as_str().starts_with("pumphouse-") {
            continue;
        }
        let mut values = headers.get_all(name).iter();
        let (Some(value), None) = (values.next(), values.next()) else {
            return Err(Invalid::new(name.as_str(), "an option is given once").into());
        };
        let text = std::str::from_utf8(value.as_bytes())
            .map_err(|_| Invalid::new(name.as_str(), "a header's value is UTF-8"))?;
        let wrong = |wrong: Invalid| Invalid::new(name.as_str(), wrong.detail);
        match name.as_str() {
            "pumphouse-type" if message.kind.as_deref().is_some_and(|kind| kind != text) => {
                let detail = "the event has another type";
                return Err(Invalid::new(name.as_str(), detail).into());
            }
            "pumphouse-type" => message.kind = Some(text.to_owned()),
            "pumphouse-delay" => delay = Some(parse_span(text).map_err(wrong)?),
            "pumphouse-deliver-at" => deliver_at = Some(parse_time(text).map_err(wrong)?),
            "pumphouse-expires-in" => expires_in = Some(parse_span(text).map_err(wrong)?),
            "pumphouse-expires-at" => expires_at = Some(parse_time(text).map_err(wrong)?),
            "pumphouse-priority" => {
                let number = text.trim().parse().ok();
                message.priority = model::priority(number.unwrap_or(i64::MAX))
                    .map_err(|detail| Invalid::new(name.as_str(), detail))?;
            }
            "pumphouse-correlation-id" => message.correlation_id = Some(text.to_owned()),
            "pumphouse-causation-id" => message.details.causation_id = Some(text.to_owned()),
            "pumphouse-group" => message.details.group = Some(text.to_owned()),
            "pumphouse-fairness-key" => message.details.fairness_key = Some(text.to_owned()),
            "pumphouse-reply-to" => {
                let queue = model::reply_to(text);
                let queue = queue.map_err(|detail| Invalid::new(name.as_str(), detail))?;
                message.details.reply_to = Some(queue);
            }
            // Those of ad-hoc destinations are read where they are taken.
            "pumphouse-url" | "pumphouse-queue" if message.details.url.is_some() => (),
            "pumphouse-unique-while-pending" => {
                model::check_key(text).map_err(|detail| Invalid::new(name.as_str(), detail))?;
                message.keys.push(Idempotency::while_pending(text));
            }
            other => match other.strip_prefix("pumphouse-forward-") {
                Some(forward) => forwarded.push((forward.to_owned(), text.to_owned())),
                None => {
                    let detail = "there is no such option; see docs/protocol.md, Sending";
                    return Err(Invalid::new(name.as_str(), detail).into());
                }
            },
        }
    }
    let now = SystemClock.now();
    message.deliver = Form::Headers.deliver(delay, deliver_at, now)?;
    message.expires = Form::Headers.expires(expires_in, expires_at, now)?;
    message.details.headers = forwarded;
    Form::Headers.check(message).map_err(Problem::invalid)?;
    Ok(())
}

/// Where a request stands in its sender's trace. It comes in headers, whatever form the messages have.
#[derive(Debug)]
pub(super) struct Trace {
    parent: Option<String>,
    state: Option<String>,
    baggage: Option<String>,
}

impl Trace {
    pub(super) fn of(headers: &HeaderMap) -> Self {
        Self {
            parent: trace_header(headers, "traceparent", TRACEPARENT_MAX),
            state: trace_header(headers, "tracestate", TRACESTATE_MAX),
            baggage: trace_header(headers, "baggage", BAGGAGE_MAX),
        }
    }

    pub(super) fn put_into(&self, message: &mut NewMessage) {
        message.details.traceparent.clone_from(&self.parent);
        message.details.tracestate.clone_from(&self.state);
        message.details.baggage.clone_from(&self.baggage);
    }
}

/// A header of W3C Trace Context or Baggage; lists that came in several lines are joined, as they say.
/// What cannot be read or is too long is left out, because a broken trace must not cost a message.
fn trace_header(headers: &HeaderMap, name: &str, longest: usize) -> Option<String> {
    let values = headers.get_all(name).iter();
    let values = values.map(|value| std::str::from_utf8(value.as_bytes()).ok());
    let values = values.collect::<Option<Vec<_>>>()?.join(",");
    (!values.is_empty() && values.len() <= longest).then_some(values)
}

/// An envelope, a batch and an event in the JSON format say inside what headers of an event would say beside them.
pub(super) fn refuse_event_header(name: &HeaderName) -> Result<(), Problem> {
    if name.as_str().starts_with("ce-") {
        let detail = "the body has another media type than the payload of an event in binary mode";
        return Err(Invalid::new(name.as_str(), detail).into());
    }
    Ok(())
}

/// The value of the header `Idempotency-Key`, quoted as the IETF draft has it, or bare.
pub(super) fn key_of(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    let Some(value) = headers.get("idempotency-key") else { return Ok(None) };
    let wrong = |detail: &str| Problem::from(Invalid::new("Idempotency-Key", detail));
    if headers.get_all("idempotency-key").iter().count() > 1 {
        return Err(wrong("one key at most"));
    }
    let text = value.to_str().map_err(|_| wrong("a key is visible ASCII"))?.trim();
    let bare = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text);
    model::check_key(bare).map_err(wrong)?;
    Ok(Some(bare.to_owned()))
}

/// What makes a single request the same: content type, options and body.
pub(super) fn fingerprint(headers: &HeaderMap, body: &[u8]) -> [u8; 32] {
    let mut options = headers
        .iter()
        .filter(|(name, _)| {
            let name = name.as_str();
            name.starts_with("pumphouse-") || name.starts_with("ce-") || name == "content-type"
        })
        .map(|(name, value)| (name.as_str(), value.as_bytes()))
        .collect::<Vec<_>>();
    options.sort_unstable();
    let mut hash = Sha256::new();
    for (name, value) in options {
        for part in [name.as_bytes(), value] {
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part);
        }
    }
    hash.update(body);
    hash.finalize().into()
}

/// The key of one message, in the scope of single messages.
pub(super) fn own_key(key: &str, fingerprint: [u8; 32]) -> Idempotency {
    Idempotency::new("message", key, fingerprint)
}

fn parse_time(text: &str) -> Result<Timestamp, Invalid> {
    let wrong = |_| Invalid::new("", "a time is RFC 3339 in UTC, like 2026-01-31T12:00:00Z");
    text.trim().parse().map_err(wrong)
}

/// A problem with what a later version will have.
pub(super) fn not_available(what: &str) -> Problem {
    let detail = format!("{what} is not available in this version");
    Problem::new(problem::NOT_AVAILABLE, detail)
}

/// A traceparent has 55 bytes in its first version, and may grow in later ones.
const TRACEPARENT_MAX: usize = 512;
/// What W3C Trace Context wants to be passed on at least.
const TRACESTATE_MAX: usize = 512;
/// What W3C Baggage wants to be passed on at least.
const BAGGAGE_MAX: usize = 8192;
