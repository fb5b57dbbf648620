//! A CloudEvent (CloudEvents 1.0.2, JSON event format 1.0.2, HTTP binding 1.0.2) as a message, and a message as one.

use std::collections::BTreeMap;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use jiff::Timestamp;
use serde_json::Value;
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use super::{
    Attribute, Destination, Details, Idempotency, Invalid, Message, NewMessage, QueueName,
    TopicName, check_text,
};

/// The media types of an event in the JSON format, and of a batch of them.
pub const EVENT_TYPES: [&str; 2] =
    ["application/cloudevents+json", "application/cloudevents-batch+json"];

/// The attributes that every event has.
const REQUIRED: [&str; 4] = ["specversion", "id", "source", "type"];
/// The most attributes and extensions of an event, and the most bytes of them together.
const ATTRIBUTES_MAX: usize = 64;
const ATTRIBUTES_BYTES_MAX: usize = 16 * 1024;

/// An event that was read and is one: its attributes are what CloudEvents asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// All attributes and extensions but `datacontenttype`.
    attributes: BTreeMap<String, Attribute>,
    content_type: Option<String>,
    body: Bytes,
}

impl Event {
    /// Reads an event in the JSON format (structured mode, or one of a batch). What is wrong is named by its pointer.
    pub fn from_json(event: &str) -> Result<Self, Invalid> {
        let mut members = serde_json::from_str::<BTreeMap<String, Box<RawValue>>>(event)
            .map_err(|_| Invalid::new("", "an event is a JSON object"))?;
        let data = members.remove("data");
        let data_base64 = members.remove("data_base64");
        let mut attributes = BTreeMap::new();
        for (name, value) in members {
            check_name(&name)
                .map_err(|detail| Invalid::new(Invalid::pointer("", &name), detail))?;
            let pointer = format!("/{name}");
            let value = attribute(&value).map_err(|detail| Invalid::new(pointer, detail))?;
            attributes.extend(value.map(|value| (name, value)));
        }
        let content_type = attributes.remove("datacontenttype").map(|value| value.to_string());
        let body = body(data.as_deref(), data_base64.as_deref(), content_type.as_deref())?;
        // What the JSON format says of data without a content type.
        let is_json = data.is_some() && content_type.is_none();
        let content_type = content_type.or_else(|| is_json.then(|| "application/json".to_owned()));
        Self { attributes, content_type, body }.checked(|name| format!("/{name}"))
    }

    /// An event in binary mode: attributes are headers `ce-*`, as their names without that and what they say; the body
    /// is the payload.
    pub fn from_headers(
        headers: impl IntoIterator<Item = (String, String)>,
        content_type: Option<String>,
        body: Bytes,
    ) -> Result<Self, Invalid> {
        let mut attributes = BTreeMap::new();
        for (name, value) in headers {
            let wrong = |detail: &str| Invalid::new(format!("ce-{name}"), detail);
            check_name(&name).map_err(wrong)?;
            if name == "datacontenttype" {
                return Err(wrong("in binary mode this is the header Content-Type"));
            }
            if attributes.insert(name.clone(), Attribute::Text(value)).is_some() {
                return Err(wrong("an attribute is given once"));
            }
        }
        Self { attributes, content_type, body }.checked(|name| format!("ce-{name}"))
    }

    /// Looks at what holds for every event; `named` is how its sender named an attribute.
    fn checked(self, named: impl Fn(&str) -> String) -> Result<Self, Invalid> {
        for name in REQUIRED {
            if self.attributes.get(name).is_none_or(Attribute::is_empty) {
                return Err(Invalid::new(named(name), "an event has this attribute"));
            }
        }
        if self.attributes["specversion"] != Attribute::from("1.0") {
            return Err(Invalid::new(named("specversion"), "1.0 is the only version there is"));
        }
        let time = self.attributes.get("time").map(ToString::to_string);
        if time.is_some_and(|time| time.parse::<Timestamp>().is_err()) {
            return Err(Invalid::new(named("time"), "a time is RFC 3339"));
        }
        let kind = self.kind();
        for (name, text) in [("type", Some(&kind)), ("datacontenttype", self.content_type.as_ref())]
        {
            if let Some(Err(detail)) = text.map(|text| check_text(text)) {
                return Err(Invalid::new(named(name), detail));
            }
        }
        for (name, value) in &self.attributes {
            if value.to_string().chars().any(char::is_control) {
                return Err(Invalid::new(named(name), "an attribute has no control characters"));
            }
        }
        let size =
            self.attributes.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>();
        if self.attributes.len() > ATTRIBUTES_MAX || size > ATTRIBUTES_BYTES_MAX {
            return Err(Invalid::new(named("*"), "at most 64 attributes of 16 KiB together"));
        }
        Ok(self)
    }

    /// Takes out where it is to go, as one of its extensions `queue` and `topic` says: those are for the pump alone.
    pub fn take_destination(&mut self) -> Result<Destination, Invalid> {
        let mut take = |name: &str| self.attributes.remove(name).map(|value| value.to_string());
        match (take("queue"), take("topic")) {
            (Some(queue), None) => {
                let wrong = |wrong: Invalid| Invalid::new("/queue", wrong.detail);
                QueueName::parse(&queue).map(Destination::Queue).map_err(wrong)
            }
            (None, Some(topic)) => {
                let wrong = |wrong: Invalid| Invalid::new("/topic", wrong.detail);
                TopicName::parse(&topic).map(Destination::from).map_err(wrong)
            }
            _ => {
                let detail = "an event that is sent names its queue or its topic in an extension";
                Err(Invalid::new("/queue", detail))
            }
        }
    }

    /// Its type.
    pub fn kind(&self) -> String {
        self.attributes["type"].to_string()
    }

    /// The key that it brings along: of one source there is one event with an id.
    pub fn key(&self) -> Idempotency {
        let (source, id) = (self.attributes["source"].to_string(), &self.attributes["id"]);
        let mut hash = Sha256::new();
        let mut add = |part: &[u8]| {
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part);
        };
        for (name, value) in &self.attributes {
            add(name.as_bytes());
            add(value.to_string().as_bytes());
        }
        add(self.content_type.as_deref().unwrap_or("").as_bytes());
        add(&self.body);
        let fingerprint = hash.finalize().into();
        Idempotency::new("event", &format!("{}:{source}{id}", source.len()), fingerprint)
    }

    /// The message: all attributes and extensions go on to the handler as they came; its type is the message's type, its
    /// content type the payload's.
    pub fn into_message(self, to: Destination) -> NewMessage {
        let kind = Some(self.kind());
        let (content_type, event) = (self.content_type, self.attributes.into_iter().collect());
        let details = Details { content_type, event, ..Details::default() };
        NewMessage { kind, details, ..NewMessage::new(to, self.body) }
    }
}

/// A message in the JSON format (structured mode): the event that it came as, or, for a plain message, one that says of
/// it what there is to say.
pub fn event_json(message: &Message) -> String {
    let (head, body) = (&message.head, &message.body);
    let mut members = BTreeMap::<&str, Box<RawValue>>::new();
    let attributes = event_attributes(message);
    for (name, value) in attributes.iter() {
        members.insert(name, raw(value));
    }
    let content_type = head.details.content_type.as_deref();
    if let Some(content_type) = content_type {
        members.insert("datacontenttype", raw(&content_type));
    }
    if !body.is_empty() {
        let json = || serde_json::from_slice::<&RawValue>(body).ok().map(ToOwned::to_owned);
        let text = || std::str::from_utf8(body).ok().map(|text| raw(&text));
        let media_type = content_type.unwrap_or("application/octet-stream").to_ascii_lowercase();
        let data = match media_type.as_str() {
            media_type if is_json(media_type) => json(),
            media_type if media_type.starts_with("text/") => text(),
            _ => None,
        };
        match data {
            Some(data) => members.insert("data", data),
            None => members.insert("data_base64", raw(&BASE64_STANDARD.encode(body))),
        };
    }
    serde_json::to_string(&members).expect("texts and JSON are always JSON")
}

/// The attributes of the event that a message is to its handler.
pub(crate) fn event_attributes(message: &Message) -> std::borrow::Cow<'_, [(String, Attribute)]> {
    let head = &message.head;
    if !head.details.event.is_empty() {
        return (&head.details.event[..]).into();
    }
    let kind = head.kind.as_deref().unwrap_or("pumphouse.message");
    let made = [
        ("specversion", "1.0".to_owned()),
        ("id", head.details.published_id.unwrap_or(head.id).to_string()),
        ("source", format!("/queues/{}", head.queue)),
        ("type", kind.to_owned()),
        ("time", head.enqueued_at.to_string()),
    ];
    let made = made.map(|(name, value)| (name.to_owned(), Attribute::Text(value)));
    made.to_vec().into()
}

fn raw(value: &impl serde::Serialize) -> Box<RawValue> {
    serde_json::value::to_raw_value(value).expect("texts, numbers and truths are always JSON")
}

fn is_json(content_type: &str) -> bool {
    let media_type = content_type.split(';').next().unwrap_or("").trim();
    media_type.ends_with("/json") || media_type.ends_with("+json")
}

fn check_name(name: &str) -> Result<(), &'static str> {
    let good = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    if name.is_empty() || name == "data" || !name.bytes().all(good) {
        return Err("a name of an attribute is lower case letters and digits, and not data");
    }
    Ok(())
}

/// An attribute in the JSON format; `None` for one that is null, which is as if it were not there.
fn attribute(value: &RawValue) -> Result<Option<Attribute>, &'static str> {
    let value = serde_json::from_str(value.get()).map_err(|_| "this is not JSON")?;
    match value {
        Value::Null => Ok(None),
        Value::String(text) => Ok(Some(Attribute::Text(text))),
        Value::Bool(truth) => Ok(Some(Attribute::Truth(truth))),
        Value::Number(number) => {
            let number = number.as_i64().and_then(|number| i32::try_from(number).ok());
            number.map(|number| Some(Attribute::Number(number))).ok_or(SORTS)
        }
        Value::Array(_) | Value::Object(_) => Err(SORTS),
    }
}

const SORTS: &str = "an attribute is a text, a truth, or a whole number of 32 bits";

/// The payload: the text of `data` as it came; of a string what it says, where the content type is not JSON.
fn body(
    data: Option<&RawValue>,
    base64: Option<&RawValue>,
    content_type: Option<&str>,
) -> Result<Bytes, Invalid> {
    match (data, base64) {
        (None, None) => Ok(Bytes::new()),
        (Some(_), Some(_)) => Err(Invalid::new("/data", "an event has either data or data_base64")),
        (Some(data), None) => {
            let content_type = content_type.unwrap_or("application/json").to_ascii_lowercase();
            match serde_json::from_str::<String>(data.get()) {
                Ok(text) if !is_json(&content_type) => Ok(text.into()),
                _ => Ok(data.get().to_owned().into()),
            }
        }
        (None, Some(text)) => {
            let wrong = || Invalid::new("/data_base64", "this is not base64");
            let text = serde_json::from_str::<String>(text.get()).map_err(|_| wrong())?;
            BASE64_STANDARD.decode(text).map(Bytes::from).map_err(|_| wrong())
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::model::{Head, MessageId};

    use super::*;

    fn read(event: &Value) -> Result<NewMessage, Invalid> {
        let mut event = Event::from_json(&event.to_string())?;
        let to = event.take_destination()?;
        Ok(event.into_message(to))
    }

    fn event(more: &Value) -> Value {
        let mut event =
            json!({"specversion": "1.0", "id": "1", "source": "/s", "type": "t", "queue": "q"});
        for (name, value) in more.as_object().unwrap() {
            event[name] = value.clone();
        }
        event
    }

    fn delivered(message: NewMessage) -> Message {
        let head = Head {
            id: MessageId::new(),
            queue: QueueName::parse("q").unwrap(),
            kind: message.kind,
            correlation_id: None,
            details: message.details,
            priority: 0,
            enqueued_at: Timestamp::UNIX_EPOCH,
            expires_at: None,
        };
        Message { head, body: message.body }
    }

    #[test]
    fn what_an_event_says_is_kept_and_its_queue_is_for_the_pump() {
        let message = read(&event(&json!({"subject": "größer", "count": 7, "last": true,
            "nothing": null, "data": {"n": 1}})))
        .unwrap();
        let queue = message.to.queue().map(QueueName::as_str);
        assert_eq!((queue, message.kind.as_deref()), (Some("q"), Some("t")));
        assert_eq!(&message.body[..], br#"{"n":1}"#);
        assert_eq!(message.details.content_type.as_deref(), Some("application/json"));
        let seen = message.details.event.iter().cloned().collect::<BTreeMap<_, _>>();
        let wanted = [
            ("count", Attribute::Number(7)),
            ("id", "1".into()),
            ("last", Attribute::Truth(true)),
            ("source", "/s".into()),
            ("specversion", "1.0".into()),
            ("subject", "größer".into()),
            ("type", "t".into()),
        ];
        assert_eq!(seen, wanted.map(|(name, value)| (name.to_owned(), value)).into());
    }

    #[test]
    fn an_event_goes_out_as_it_came_in() {
        for more in [
            json!({"data": {"n": 1}, "datacontenttype": "application/json", "count": 7, "last": false}),
            json!({"data": "plain", "datacontenttype": "text/plain", "time": "2026-01-01T00:00:00.5+01:00"}),
            json!({"data_base64": "AAH/", "datacontenttype": "image/png"}),
            json!({"subject": "nothing else"}),
        ] {
            let mut came = event(&more);
            let went = event_json(&delivered(read(&came).unwrap()));
            came.as_object_mut().unwrap().remove("queue");
            assert_eq!(serde_json::from_str::<Value>(&went).unwrap(), came);
        }
    }

    #[test]
    fn a_plain_message_is_an_event_to_whoever_wants_events() {
        let queue = QueueName::parse("q").unwrap();
        let message = delivered(NewMessage::new(queue, vec![0xff]));
        let event: Value = serde_json::from_str(&event_json(&message)).unwrap();
        let id = message.head.id.to_string();
        assert_eq!(
            event,
            json!({"specversion": "1.0", "id": id, "source": "/queues/q", "type": "pumphouse.message",
                "time": "1970-01-01T00:00:00Z", "data_base64": "/w=="})
        );
    }

    #[test]
    fn data_is_what_its_content_type_says() {
        for (more, body) in [
            (json!({}), ""),
            (json!({"data": "x"}), "\"x\""),
            (json!({"data": "x", "datacontenttype": "text/plain"}), "x"),
            (json!({"data": "x", "datacontenttype": "application/a+json"}), "\"x\""),
            (json!({"data": {"a": 1}, "datacontenttype": "text/plain"}), "{\"a\":1}"),
            (json!({"data_base64": "eHk="}), "xy"),
        ] {
            assert_eq!(read(&event(&more)).unwrap().body, body, "{more}");
        }
    }

    #[test]
    fn of_one_source_there_is_one_event_with_an_id() {
        let key = |more: Value| Event::from_json(&event(&more).to_string()).unwrap().key();
        let first = key(json!({}));
        assert_eq!(first, key(json!({})));
        assert_ne!(first.key, key(json!({"id": "2"})).key);
        assert_ne!(
            key(json!({"source": "/s1", "id": "1"})).key,
            key(json!({"source": "/s", "id": "11"})).key
        );
        let other = key(json!({"data": 1}));
        assert_eq!(first.key, other.key);
        assert_ne!(first.fingerprint, other.fingerprint, "the same name for something else");
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        for (more, pointer) in [
            (json!({"id": null}), "/id"),
            (json!({"source": ""}), "/source"),
            (json!({"queue": null}), "/queue"),
            (json!({"queue": "NO"}), "/queue"),
            (json!({"topic": "both"}), "/queue"),
            (json!({"queue": null, "topic": "NO"}), "/topic"),
            (json!({"specversion": "0.3"}), "/specversion"),
            (json!({"time": "yesterday"}), "/time"),
            (json!({"Upper": "x"}), "/Upper"),
            (json!({"list": []}), "/list"),
            (json!({"half": 0.5}), "/half"),
            (json!({"large": 3_000_000_000_i64}), "/large"),
            (json!({"subject": "a\nb"}), "/subject"),
            (json!({"data": 1, "data_base64": "eA=="}), "/data"),
            (json!({"data_base64": "?"}), "/data_base64"),
        ] {
            assert_eq!(read(&event(&more)).unwrap_err().pointer, pointer, "{more}");
        }
        assert!(Event::from_json("[]").is_err());
        let headers = |more: &[(&str, &str)]| {
            let all = [("specversion", "1.0"), ("id", "1"), ("source", "/s"), ("type", "t")];
            let all = all.iter().chain(more).map(|(n, v)| ((*n).to_owned(), (*v).to_owned()));
            Event::from_headers(all.collect::<Vec<_>>(), None, Bytes::new())
        };
        assert!(headers(&[]).is_ok());
        for (more, pointer) in [
            ([("id", "2")], "ce-id"),
            ([("my-ext", "x")], "ce-my-ext"),
            ([("data", "x")], "ce-data"),
            ([("datacontenttype", "text/plain")], "ce-datacontenttype"),
        ] {
            assert_eq!(headers(&more).unwrap_err().pointer, pointer);
        }
    }
}
