//! A CloudEvent (CloudEvents 1.0.2, JSON event format 1.0.2) as a message.

use std::collections::BTreeMap;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use serde_json::Value;
use serde_json::value::RawValue;

use super::{Details, Invalid, NewMessage, QueueName, check_text};

/// The attributes that every event has.
const REQUIRED: [&str; 4] = ["specversion", "id", "source", "type"];
/// The most attributes and extensions of an event, and the most bytes of them together.
const ATTRIBUTES_MAX: usize = 64;
const ATTRIBUTES_BYTES_MAX: usize = 16 * 1024;

/// The message of an event in the JSON format, for the queue that its extension `queue` names. That extension is for the
/// pump alone; all other attributes and extensions go to the handler as they came. Its type is the message's type, its
/// content type the payload's.
pub fn message_of_event(event: &str) -> Result<NewMessage, Invalid> {
    let mut members = serde_json::from_str::<BTreeMap<String, Box<RawValue>>>(event)
        .map_err(|_| Invalid::new("", "an event is a JSON object"))?;
    let data = members.remove("data");
    let data_base64 = members.remove("data_base64");
    let mut attributes = BTreeMap::new();
    for (name, value) in members {
        if let Some(value) = attribute(&name, &value)? {
            attributes.insert(name, value);
        }
    }
    let Some(queue) = attributes.remove("queue") else {
        return Err(Invalid::new(
            "/queue",
            "an event that is sent names its queue in an extension",
        ));
    };
    let queue = QueueName::parse(&queue).map_err(|wrong| Invalid::new("/queue", wrong.detail))?;
    for name in REQUIRED {
        if attributes.get(name).is_none_or(String::is_empty) {
            return Err(Invalid::new(format!("/{name}"), "an event has this attribute"));
        }
    }
    if attributes["specversion"] != "1.0" {
        return Err(Invalid::new("/specversion", "1.0 is the only version there is"));
    }
    let content_type = attributes.get("datacontenttype").cloned();
    let body = body(data.as_deref(), data_base64.as_deref(), content_type.as_deref())?;
    let kind = Some(attributes["type"].clone());
    for (name, text) in [("type", &kind), ("datacontenttype", &content_type)] {
        if let Some(Err(detail)) = text.as_deref().map(check_text) {
            return Err(Invalid::new(format!("/{name}"), detail));
        }
    }
    let size = attributes.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>();
    if attributes.len() > ATTRIBUTES_MAX || size > ATTRIBUTES_BYTES_MAX {
        return Err(Invalid::new("", "at most 64 attributes of 16 KiB together"));
    }
    // What the JSON format says of data without a content type.
    let content_type = content_type.or_else(|| data.map(|_| "application/json".to_owned()));
    attributes.remove("datacontenttype");
    let details =
        Details { content_type, event: attributes.into_iter().collect(), ..Details::default() };
    Ok(NewMessage { kind, details, ..NewMessage::new(queue, body) })
}

/// An attribute as text, as the HTTP binding has it; `None` for one that is null, which is as if it were not there.
fn attribute(name: &str, value: &RawValue) -> Result<Option<String>, Invalid> {
    let good = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit();
    if name.is_empty() || !name.bytes().all(good) {
        let detail = "a name of an attribute is lower case letters and digits";
        return Err(Invalid::new(Invalid::pointer("", name), detail));
    }
    let value = serde_json::from_str(value.get());
    let text = match value.map_err(|_| Invalid::new(format!("/{name}"), "this is not JSON"))? {
        Value::Null => return Ok(None),
        Value::String(text) => text,
        Value::Bool(yes) => yes.to_string(),
        Value::Number(number) => number.to_string(),
        Value::Array(_) | Value::Object(_) => {
            let detail = "an attribute is a text, a number or a truth";
            return Err(Invalid::new(format!("/{name}"), detail));
        }
    };
    if text.chars().any(char::is_control) {
        return Err(Invalid::new(format!("/{name}"), "an attribute has no control characters"));
    }
    Ok(Some(text))
}

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
            let media_type = content_type.unwrap_or("application/json");
            let media_type = media_type.split(';').next().unwrap_or("").trim();
            let is_json = media_type.ends_with("/json") || media_type.ends_with("+json");
            match serde_json::from_str::<String>(data.get()) {
                Ok(text) if !is_json => Ok(text.into()),
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

    use super::*;

    fn read(event: &Value) -> Result<NewMessage, Invalid> {
        message_of_event(&event.to_string())
    }

    fn event(more: &Value) -> Value {
        let mut event =
            json!({"specversion": "1.0", "id": "1", "source": "/s", "type": "t", "queue": "q"});
        for (name, value) in more.as_object().unwrap() {
            event[name] = value.clone();
        }
        event
    }

    #[test]
    fn what_an_event_says_is_kept_and_its_queue_is_for_the_pump() {
        let message = read(&event(&json!({"subject": "größer", "count": 7, "last": true,
            "nothing": null, "data": {"n": 1}})))
        .unwrap();
        assert_eq!((message.queue.as_str(), message.kind.as_deref()), ("q", Some("t")));
        assert_eq!(&message.body[..], br#"{"n":1}"#);
        assert_eq!(message.details.content_type.as_deref(), Some("application/json"));
        let seen =
            message.details.event.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let wanted = [
            ("count", "7"),
            ("id", "1"),
            ("last", "true"),
            ("source", "/s"),
            ("specversion", "1.0"),
            ("subject", "größer"),
            ("type", "t"),
        ];
        assert_eq!(seen.collect::<Vec<_>>(), wanted);
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
    fn what_is_missing_or_wrong_is_named() {
        for (more, pointer) in [
            (json!({"id": null}), "/id"),
            (json!({"source": ""}), "/source"),
            (json!({"queue": null}), "/queue"),
            (json!({"queue": "NO"}), "/queue"),
            (json!({"specversion": "0.3"}), "/specversion"),
            (json!({"Upper": "x"}), "/Upper"),
            (json!({"list": []}), "/list"),
            (json!({"subject": "a\nb"}), "/subject"),
            (json!({"data": 1, "data_base64": "eA=="}), "/data"),
            (json!({"data_base64": "?"}), "/data_base64"),
        ] {
            assert_eq!(read(&event(&more)).unwrap_err().pointer, pointer, "{more}");
        }
        assert!(message_of_event("[]").is_err());
    }
}
