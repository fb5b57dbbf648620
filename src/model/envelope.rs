//! A message with its options, as JSON; and what holds for every message, in whatever form it came.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use http::HeaderName;
use jiff::Timestamp;
use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

use super::{
    DELAY_MAX, Destination, Details, IDEMPOTENCY_KEY_MAX, Idempotency, Invalid, NewMessage,
    PRIORITY_MAX, PRIORITY_MIN, QueueName, TEXT_MAX, TopicName, When, parse_span,
};

/// A message with its options, as JSON. Members that it does not know are refused.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, expecting = "a message as a JSON object")]
pub struct Envelope {
    /// Where it is to go; only where many queues can be meant.
    pub queue: Option<String>,
    /// To which topic it is to be published, in place of a queue.
    pub topic: Option<String>,
    payload: Option<Box<RawValue>>,
    payload_base64: Option<String>,
    content_type: Option<String>,
    r#type: Option<String>,
    #[serde(default)]
    headers: BTreeMap<String, String>,
    delay: Option<Span>,
    deliver_at: Option<Timestamp>,
    expires_in: Option<Span>,
    expires_at: Option<Timestamp>,
    priority: Option<i64>,
    correlation_id: Option<String>,
    causation_id: Option<String>,
    idempotency_key: Option<String>,
    group: Option<String>,
    fairness_key: Option<String>,
    unique_while_pending: Option<String>,
    reply_to: Option<String>,
}

/// How a message says its options; a mistake is reported under the name that the sender wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// As headers beside the payload.
    Headers,
    /// As members of an [`Envelope`].
    Envelope,
}

impl Envelope {
    /// Where it says that it is to go.
    pub fn destination(&self) -> Result<Destination, Invalid> {
        match (&self.queue, &self.topic) {
            (Some(queue), None) => QueueName::parse(queue).map(Destination::Queue),
            (None, Some(topic)) => TopicName::parse(topic).map(Destination::from),
            (None, None) => {
                Err(Invalid::new("queue", "a message that is sent names its queue or its topic"))
            }
            (Some(_), Some(_)) => Err(Invalid::new("topic", "queue and topic exclude each other")),
        }
        .map_err(|wrong| Invalid::new(format!("/{}", wrong.pointer), wrong.detail))
    }

    /// The message for this destination, and its own idempotency key. `now` bounds how far ahead a time may lie.
    pub fn into_message(
        self,
        to: Destination,
        now: Timestamp,
    ) -> Result<(NewMessage, Option<String>), Vec<Invalid>> {
        let form = Form::Envelope;
        let one = |wrong: Invalid| vec![wrong];
        let (body, json) = match (self.payload, self.payload_base64) {
            (Some(json), None) => (Bytes::from(json.get().to_owned()), true),
            (None, Some(text)) => {
                let bytes = BASE64_STANDARD.decode(text);
                let wrong = |_| one(Invalid::new("/payload_base64", "this is not base64"));
                (bytes.map_err(wrong)?.into(), false)
            }
            (Some(_), Some(_)) | (None, None) => {
                let detail = "an envelope has either payload or payload_base64";
                return Err(one(Invalid::new("/payload", detail)));
            }
        };
        let mut message = NewMessage::new(to, body);
        message.kind = self.r#type;
        message.correlation_id = self.correlation_id;
        let span = |span: Option<Span>| span.map(|span| span.0);
        message.deliver = form.deliver(span(self.delay), self.deliver_at, now).map_err(one)?;
        message.expires = form.expires(span(self.expires_in), self.expires_at, now).map_err(one)?;
        message.priority = priority(self.priority.unwrap_or(0))
            .map_err(|detail| one(Invalid::new("/priority", detail)))?;
        message.details = Details {
            content_type: self.content_type.or_else(|| json.then(|| "application/json".to_owned())),
            headers: self.headers.into_iter().collect(),
            causation_id: self.causation_id,
            group: self.group,
            fairness_key: self.fairness_key,
            reply_to: self
                .reply_to
                .as_deref()
                .map(reply_to)
                .transpose()
                .map_err(|detail| one(Invalid::new("/reply_to", detail)))?,
            ..Details::default()
        };
        if let Some(key) = &self.unique_while_pending {
            check_key(key).map_err(|detail| one(Invalid::new("/unique_while_pending", detail)))?;
            message.keys.push(Idempotency::while_pending(key));
        }
        if let Some(key) = &self.idempotency_key {
            check_key(key).map_err(|detail| one(Invalid::new("/idempotency_key", detail)))?;
        }
        form.check(&message)?;
        for (name, _) in &mut message.details.headers {
            name.make_ascii_lowercase();
        }
        Ok((message, self.idempotency_key))
    }
}

impl Form {
    /// When it is to be delivered.
    pub fn deliver(
        self,
        within: Option<Duration>,
        at: Option<Timestamp>,
        now: Timestamp,
    ) -> Result<When, Invalid> {
        self.when(["delay", "deliver_at"], within, at, now)
    }

    /// When it is no longer worth delivering.
    pub fn expires(
        self,
        within: Option<Duration>,
        at: Option<Timestamp>,
        now: Timestamp,
    ) -> Result<Option<When>, Invalid> {
        if within.is_none() && at.is_none() {
            return Ok(None);
        }
        self.when(["expires_in", "expires_at"], within, at, now).map(Some)
    }

    fn when(
        self,
        [within_option, at_option]: [&str; 2],
        within: Option<Duration>,
        at: Option<Timestamp>,
        now: Timestamp,
    ) -> Result<When, Invalid> {
        let (within_name, at_name) = (self.name(within_option), self.name(at_option));
        match (within, at) {
            (None, None) => Ok(When::Now),
            (Some(within), None) if within <= DELAY_MAX => Ok(When::In(within)),
            (Some(_), None) => Err(Invalid::new(within_name, "at most 366d")),
            (None, Some(at)) => moment(at, now).map_err(|detail| Invalid::new(at_name, detail)),
            (Some(_), Some(_)) => {
                let detail = format!("{within_option} and {at_option} exclude each other");
                Err(Invalid::new(within_name, detail))
            }
        }
    }

    /// What holds for a message however it came.
    pub fn check(self, message: &NewMessage) -> Result<(), Vec<Invalid>> {
        let details = &message.details;
        let mut wrong = Vec::new();
        for (option, text) in [
            ("type", &message.kind),
            ("correlation_id", &message.correlation_id),
            ("causation_id", &details.causation_id),
            ("content_type", &details.content_type),
            ("group", &details.group),
            ("fairness_key", &details.fairness_key),
        ] {
            if let Some(Err(detail)) = text.as_deref().map(check_text) {
                wrong.push(Invalid::new(self.name(option), detail));
            }
        }
        if !(PRIORITY_MIN..=PRIORITY_MAX).contains(&message.priority) {
            let detail = "a priority is a whole number from -100 to 100";
            wrong.push(Invalid::new(self.name("priority"), detail));
        }
        for (option, when) in [("delay", Some(message.deliver)), ("expires_in", message.expires)] {
            if matches!(when, Some(When::In(span)) if span > DELAY_MAX) {
                wrong.push(Invalid::new(self.name(option), "at most 366d"));
            }
        }
        if details.group.is_some() {
            // Whoever comes later could not come before, however urgent: the group would wait for it.
            if message.deliver != When::Now {
                wrong.push(Invalid::new(self.name("group"), "a message of a group has no delay"));
            }
            if message.priority != 0 {
                wrong
                    .push(Invalid::new(self.name("group"), "a message of a group has no priority"));
            }
        }
        let mut size = 0;
        for (name, value) in &details.headers {
            size += name.len() + value.len();
            if let Err(detail) = check_forwarded(name, value) {
                wrong.push(Invalid::new(self.name_forwarded(name), detail));
            }
        }
        if details.headers.len() > FORWARDED_MAX || size > FORWARDED_BYTES_MAX {
            let pointer = match self {
                Self::Envelope => "/headers",
                Self::Headers => "pumphouse-forward-*",
            };
            wrong.push(Invalid::new(pointer, "at most 32 headers of 16 KiB together"));
        }
        if wrong.is_empty() { Ok(()) } else { Err(wrong) }
    }

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
            Self::Envelope => Invalid::pointer("/headers", header),
            Self::Headers => format!("pumphouse-forward-{header}"),
        }
    }
}

/// A time at which something is to happen; it has the same limit as a delay.
///
/// Measured by the clock of this process: what is due is decided by the database's, but for a limit of a
/// year it does not matter how far the two are apart.
pub fn moment(at: Timestamp, now: Timestamp) -> Result<When, &'static str> {
    let latest = now.checked_add(DELAY_MAX).unwrap_or(Timestamp::MAX);
    if at <= latest { Ok(When::At(at)) } else { Err("at most 366d from now") }
}

/// Reads the name of the queue to which an answer is to go.
pub fn reply_to(text: &str) -> Result<QueueName, String> {
    QueueName::parse(text).map_err(|wrong| wrong.detail)
}

/// Reads a priority.
pub fn priority(number: i64) -> Result<i8, &'static str> {
    let good = i8::try_from(number).ok().filter(|p| (PRIORITY_MIN..=PRIORITY_MAX).contains(p));
    good.ok_or("a priority is a whole number from -100 to 100")
}

/// Whether a text can be an idempotency key.
pub fn check_key(key: &str) -> Result<(), &'static str> {
    let plain = key.bytes().all(|byte| matches!(byte, b' '..=b'~') && byte != b'"');
    let good = plain && !key.is_empty() && key.len() <= IDEMPOTENCY_KEY_MAX;
    if good {
        Ok(())
    } else {
        Err("a key is 1 to 255 visible ASCII characters, in quotes or without any")
    }
}

/// Whether a text can be a type, an id of a conversation or a media type.
pub fn check_text(text: &str) -> Result<(), &'static str> {
    if !text.is_empty() && text.len() <= TEXT_MAX && !text.chars().any(char::is_control) {
        Ok(())
    } else {
        Err("1 to 255 bytes without control characters")
    }
}

/// Whether a header may be sent on to a handler.
pub fn check_forwarded(name: &str, value: &str) -> Result<(), &'static str> {
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

/// A duration as an envelope has it: a text, or a number of seconds.
#[derive(Debug, Clone, Copy)]
struct Span(Duration);

impl<'de> Deserialize<'de> for Span {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        from.deserialize_any(SpanVisitor)
    }
}

struct SpanVisitor;

impl Visitor<'_> for SpanVisitor {
    type Value = Span;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a duration like \"30s\", or a number of seconds")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Span, E> {
        parse_span(text).map(Span).map_err(|wrong| E::custom(wrong.detail))
    }

    fn visit_u64<E: de::Error>(self, seconds: u64) -> Result<Span, E> {
        self.visit_str(&seconds.to_string())
    }

    fn visit_i64<E: de::Error>(self, seconds: i64) -> Result<Span, E> {
        self.visit_str(&seconds.to_string())
    }

    fn visit_f64<E: de::Error>(self, seconds: f64) -> Result<Span, E> {
        self.visit_str(&seconds.to_string())
    }
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
const FORWARDED_MAX: usize = 32;
const FORWARDED_BYTES_MAX: usize = 16 * 1024;
