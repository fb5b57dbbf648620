//! From a request to a message: option headers over raw bytes, or a JSON envelope. It stores nothing.

use std::collections::BTreeMap;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use http::{HeaderMap, HeaderName};
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};
use utoipa::ToSchema;

use crate::clock::{Clock, SystemClock};
use crate::model::{
    DELAY_MAX, Details, IDEMPOTENCY_KEY_MAX, Idempotency, Invalid, NewMessage, PRIORITY_MAX,
    PRIORITY_MIN, QueueName, TEXT_MAX, When, parse_span,
};

use super::body::pointer_to;
use super::lasting::Lasting;
use super::problem::{self, Problem};

/// How a message says its options; a mistake is reported under the name that the sender wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Form {
    Headers,
    Envelope,
}

/// A message with its options, as JSON.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct Envelope {
    /// Any JSON; its text goes to the handler as it came.
    #[schema(value_type = Value, required = false)]
    payload: Option<Box<RawValue>>,
    /// The payload's bytes, where it is no JSON.
    payload_base64: Option<String>,
    /// The payload's media type; `application/json` for a JSON payload.
    content_type: Option<String>,
    /// What it is about.
    r#type: Option<String>,
    /// Headers to send on to the handler.
    #[serde(default)]
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
    /// Not available in this version.
    group: Option<String>,
    /// Not available in this version.
    fairness_key: Option<String>,
}

/// A raw body with options in headers.
pub(super) fn from_headers(
    queue: &QueueName,
    headers: &HeaderMap,
    body: Bytes,
) -> Result<NewMessage, Problem> {
    let mut message = NewMessage::new(queue.clone(), body);
    let mut forwarded = Vec::new();
    let (mut delay, mut deliver_at, mut expires_in, mut expires_at) = (None, None, None, None);
    Trace::of(headers).put_into(&mut message);
    for name in headers.keys() {
        refuse_event_header(name)?;
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
            "pumphouse-type" => message.kind = Some(text.to_owned()),
            "pumphouse-delay" => delay = Some(parse_span(text).map_err(wrong)?),
            "pumphouse-deliver-at" => deliver_at = Some(parse_time(text).map_err(wrong)?),
            "pumphouse-expires-in" => expires_in = Some(parse_span(text).map_err(wrong)?),
            "pumphouse-expires-at" => expires_at = Some(parse_time(text).map_err(wrong)?),
            "pumphouse-priority" => {
                let number = text.trim().parse().ok();
                message.priority = priority(number.unwrap_or(i64::MAX)).map_err(wrong)?;
            }
            "pumphouse-correlation-id" => message.correlation_id = Some(text.to_owned()),
            "pumphouse-causation-id" => message.details.causation_id = Some(text.to_owned()),
            "pumphouse-group" => return Err(not_available("an ordering group")),
            "pumphouse-fairness-key" => return Err(not_available("a fairness key")),
            other => match other.strip_prefix("pumphouse-forward-") {
                Some(forward) => forwarded.push((forward.to_owned(), text.to_owned())),
                None => {
                    let detail = "there is no such option; see docs/protocol.md, Sending";
                    return Err(Invalid::new(name.as_str(), detail).into());
                }
            },
        }
    }
    message.deliver = when(Form::Headers, DELIVER, delay, deliver_at)?;
    message.expires = expiry(Form::Headers, expires_in, expires_at)?;
    message.details.headers = forwarded;
    let content_type = headers.get(http::header::CONTENT_TYPE);
    message.details.content_type = content_type
        .map(|value| value.to_str().map(ToOwned::to_owned))
        .transpose()
        .map_err(|_| Invalid::new("Content-Type", "a media type is ASCII"))?;
    check(Form::Headers, &message)?;
    Ok(message)
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

/// CloudEvents are for a later version; taken as a plain message, one would lose what it says in headers.
pub(super) fn refuse_event_header(name: &HeaderName) -> Result<(), Problem> {
    if name.as_str().starts_with("ce-") { Err(not_available("CloudEvents")) } else { Ok(()) }
}

impl Envelope {
    /// The message and its own idempotency key.
    pub(super) fn into_message(
        self,
        queue: &QueueName,
    ) -> Result<(NewMessage, Option<String>), Problem> {
        if self.group.is_some() {
            return Err(not_available("an ordering group"));
        }
        if self.fairness_key.is_some() {
            return Err(not_available("a fairness key"));
        }
        let (body, json) = match (self.payload, self.payload_base64) {
            (Some(json), None) => (Bytes::from(json.get().to_owned()), true),
            (None, Some(text)) => {
                let bytes = BASE64_STANDARD.decode(text);
                let wrong = |_| Invalid::new("/payload_base64", "this is not base64");
                (bytes.map_err(wrong)?.into(), false)
            }
            (Some(_), Some(_)) | (None, None) => {
                let detail = "an envelope has either payload or payload_base64";
                return Err(Invalid::new("/payload", detail).into());
            }
        };
        let mut message = NewMessage::new(queue.clone(), body);
        message.kind = self.r#type;
        message.correlation_id = self.correlation_id;
        let span = |lasting: Option<Lasting>| lasting.map(|lasting| lasting.0);
        message.deliver = when(Form::Envelope, DELIVER, span(self.delay), self.deliver_at)?;
        message.expires = expiry(Form::Envelope, span(self.expires_in), self.expires_at)?;
        message.priority = priority(self.priority.unwrap_or(0))
            .map_err(|wrong| Invalid::new("/priority", wrong.detail))?;
        message.details = Details {
            content_type: self.content_type.or_else(|| json.then(|| "application/json".to_owned())),
            headers: self.headers.into_iter().collect(),
            causation_id: self.causation_id,
            ..Details::default()
        };
        if let Some(key) = &self.idempotency_key {
            check_key(key).map_err(|detail| Invalid::new("/idempotency_key", detail))?;
        }
        check(Form::Envelope, &message)?;
        for (name, _) in &mut message.details.headers {
            name.make_ascii_lowercase();
        }
        Ok((message, self.idempotency_key))
    }
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
    check_key(bare).map_err(wrong)?;
    Ok(Some(bare.to_owned()))
}

fn check_key(key: &str) -> Result<(), &'static str> {
    let plain = key.bytes().all(|byte| matches!(byte, b' '..=b'~') && byte != b'"');
    let good = plain && !key.is_empty() && key.len() <= IDEMPOTENCY_KEY_MAX;
    if good {
        Ok(())
    } else {
        Err("a key is 1 to 255 visible ASCII characters, in quotes or without any")
    }
}

/// What makes a single request the same: content type, options and body.
pub(super) fn fingerprint(headers: &HeaderMap, body: &[u8]) -> [u8; 32] {
    let mut options = headers
        .iter()
        .filter(|(name, _)| name.as_str().starts_with("pumphouse-") || *name == "content-type")
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

impl Form {
    /// What the sender calls the option that an envelope calls `option`.
    fn name(self, option: &str) -> String {
        match self {
            Self::Envelope => format!("/{option}"),
            Self::Headers if option == "content_type" => "Content-Type".to_owned(),
            Self::Headers => format!("pumphouse-{}", option.replace('_', "-")),
        }
    }

    fn name_forwarded(self, header: &str) -> String {
        match self {
            Self::Envelope => pointer_to("/headers", header),
            Self::Headers => format!("pumphouse-forward-{header}"),
        }
    }
}

/// The options for the same moment: so long from now, and at a time.
const DELIVER: [&str; 2] = ["delay", "deliver_at"];
const EXPIRE: [&str; 2] = ["expires_in", "expires_at"];

fn when(
    form: Form,
    [within_option, at_option]: [&str; 2],
    within: Option<Duration>,
    at: Option<Timestamp>,
) -> Result<When, Invalid> {
    let (within_name, at_name) = (form.name(within_option), form.name(at_option));
    match (within, at) {
        (None, None) => Ok(When::Now),
        (Some(within), None) if within <= DELAY_MAX => Ok(When::In(within)),
        (Some(_), None) => Err(Invalid::new(within_name, "at most 366d")),
        (None, Some(at)) => moment(at).map_err(|detail| Invalid::new(at_name, detail)),
        (Some(_), Some(_)) => {
            let detail = format!("{within_option} and {at_option} exclude each other");
            Err(Invalid::new(within_name, detail))
        }
    }
}

fn expiry(
    form: Form,
    within: Option<Duration>,
    at: Option<Timestamp>,
) -> Result<Option<When>, Invalid> {
    if within.is_none() && at.is_none() {
        return Ok(None);
    }
    when(form, EXPIRE, within, at).map(Some)
}

/// A time at which something is to happen; it has the same limit as a delay.
///
/// Measured by the clock of this process: what is due is decided by the database's, but for a limit of a
/// year it does not matter how far the two are apart.
pub(super) fn moment(at: Timestamp) -> Result<When, &'static str> {
    let latest = SystemClock.now().checked_add(DELAY_MAX).unwrap_or(Timestamp::MAX);
    if at <= latest { Ok(When::At(at)) } else { Err("at most 366d from now") }
}

fn priority(number: i64) -> Result<i8, Invalid> {
    let good = i8::try_from(number).ok().filter(|p| (PRIORITY_MIN..=PRIORITY_MAX).contains(p));
    good.ok_or_else(|| Invalid::new("", "a priority is a whole number from -100 to 100"))
}

fn parse_time(text: &str) -> Result<Timestamp, Invalid> {
    let wrong = |_| Invalid::new("", "a time is RFC 3339 in UTC, like 2026-01-31T12:00:00Z");
    text.trim().parse().map_err(wrong)
}

/// What holds for a message however it came.
fn check(form: Form, message: &NewMessage) -> Result<(), Problem> {
    let details = &message.details;
    let mut wrong = Vec::new();
    for (option, text) in [
        ("type", &message.kind),
        ("correlation_id", &message.correlation_id),
        ("causation_id", &details.causation_id),
        ("content_type", &details.content_type),
    ] {
        if let Some(Err(detail)) = text.as_deref().map(check_text) {
            wrong.push(Invalid::new(form.name(option), detail));
        }
    }
    let mut size = 0;
    for (name, value) in &details.headers {
        size += name.len() + value.len();
        if let Err(detail) = check_forwarded(name, value) {
            wrong.push(Invalid::new(form.name_forwarded(name), detail));
        }
    }
    if details.headers.len() > FORWARDED_MAX || size > FORWARDED_BYTES_MAX {
        let pointer = match form {
            Form::Envelope => "/headers",
            Form::Headers => "pumphouse-forward-*",
        };
        wrong.push(Invalid::new(pointer, "at most 32 headers of 16 KiB together"));
    }
    if wrong.is_empty() { Ok(()) } else { Err(Problem::invalid(wrong)) }
}

/// Whether a text can be a type, an id of a conversation or a media type.
pub(super) fn check_text(text: &str) -> Result<(), &'static str> {
    if !text.is_empty() && text.len() <= TEXT_MAX && !text.chars().any(char::is_control) {
        Ok(())
    } else {
        Err("1 to 255 bytes without control characters")
    }
}

/// Whether a header may be sent on to a handler.
pub(super) fn check_forwarded(name: &str, value: &str) -> Result<(), &'static str> {
    let lower = name.to_ascii_lowercase();
    if HeaderName::try_from(&lower).is_err() {
        return Err("this is no header name");
    }
    let reserved = RESERVED.contains(&lower.as_str())
        || RESERVED_PREFIXES.iter().any(|prefix| lower.starts_with(prefix));
    if reserved {
        return Err(
            "this header is reserved: connection headers, Host, Content-*, webhook-*, ce-*, Pumphouse-*, trace headers",
        );
    }
    if value.chars().any(|c| c.is_control() && c != '\t') {
        return Err("a header's value has no control characters");
    }
    Ok(())
}

/// A problem with what a later version will have.
pub(super) fn not_available(what: &str) -> Problem {
    let detail = format!("{what} is not available in this version");
    Problem::new(problem::NOT_AVAILABLE, detail)
}

const RESERVED: [&str; 14] = [
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "host",
    "expect",
    "traceparent",
    "tracestate",
    "baggage",
];
const RESERVED_PREFIXES: [&str; 4] = ["content-", "webhook-", "ce-", "pumphouse-"];
/// A traceparent has 55 bytes in its first version, and may grow in later ones.
const TRACEPARENT_MAX: usize = 512;
/// What W3C Trace Context wants to be passed on at least.
const TRACESTATE_MAX: usize = 512;
/// What W3C Baggage wants to be passed on at least.
const BAGGAGE_MAX: usize = 8192;
const FORWARDED_MAX: usize = 32;
const FORWARDED_BYTES_MAX: usize = 16 * 1024;
