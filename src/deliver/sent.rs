//! The messages in a handler's answer, which leave together with its ack.

use http::HeaderMap;
use http::header::CONTENT_TYPE;
use jiff::Timestamp;
use serde::Deserialize;
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use crate::model::{Envelope, Event, Idempotency, Invalid, NewMessage};

/// The media type of an answer that carries messages.
const CARRIES: &str = "application/vnd.pumphouse.messages+json";
/// One that carries CloudEvents, each of which names its queue or its topic in an extension.
const EVENTS: &str = "application/cloudevents-batch+json";
/// How many messages an answer carries at most.
pub(super) const SENT_MAX: usize = 1000;

/// How many characters are told of what is wrong.
const TOLD_MAX: usize = 200;

/// What an answer's media type says of its body.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Carries {
    /// Something for people.
    Nothing,
    Messages,
    Events,
}

impl Carries {
    pub(super) fn of(headers: &HeaderMap) -> Self {
        let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let media_type = content_type.unwrap_or("").split(';').next().unwrap_or("").trim();
        match media_type.to_ascii_lowercase().as_str() {
            CARRIES => Self::Messages,
            EVENTS => Self::Events,
            _ => Self::Nothing,
        }
    }
}

/// An answer's body: `{"messages": [{"queue" or "topic": "…", …envelope}]}`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Body {
    messages: Vec<Box<RawValue>>,
}

/// Reads the messages. **Fails** with what is wrong, in a sentence that has nothing of the body but names of members and
/// headers.
pub(super) fn read(body: &[u8], now: Timestamp) -> Result<Vec<NewMessage>, String> {
    let body = serde_json::from_slice::<Body>(body)
        .map_err(|error| format!("the answer carries no messages: {}", place(&error)))?;
    if body.messages.len() > SENT_MAX {
        return Err(format!("an answer carries at most {SENT_MAX} messages"));
    }
    let one = |(number, raw): (usize, &RawValue)| {
        message(raw, now).map_err(|detail| format!("/messages/{number}{detail}"))
    };
    body.messages.iter().map(|raw| &**raw).enumerate().map(one).collect()
}

/// Reads a batch of CloudEvents. **Fails** in the same way.
pub(super) fn read_events(body: &[u8]) -> Result<Vec<NewMessage>, String> {
    let events = serde_json::from_slice::<Vec<Box<RawValue>>>(body)
        .map_err(|error| format!("the answer carries no events: {}", place(&error)))?;
    if events.len() > SENT_MAX {
        return Err(format!("an answer carries at most {SENT_MAX} events"));
    }
    let one = |(number, raw): (usize, &RawValue)| {
        event(raw).map_err(|wrong| cut(&wrong.under(&format!("/{number}")).to_string()))
    };
    events.iter().map(|raw| &**raw).enumerate().map(one).collect()
}

fn event(raw: &RawValue) -> Result<NewMessage, Invalid> {
    let mut event = Event::from_json(raw.get())?;
    let to = event.take_destination()?;
    Ok(event.into_message(to))
}

fn message(raw: &RawValue, now: Timestamp) -> Result<NewMessage, String> {
    let envelope = serde_json::from_str::<Envelope>(raw.get())
        .map_err(|error| format!(" is no envelope: {}", place(&error)))?;
    let to = envelope.destination().map_err(|wrong| cut(&wrong.to_string()))?;
    let (mut message, key) = envelope.into_message(to, now).map_err(|wrong| first(&wrong))?;
    if let Some(key) = key {
        let fingerprint = Sha256::digest(raw.get()).into();
        message.keys.push(Idempotency::new("message", &key, fingerprint));
    }
    Ok(message)
}

/// The first thing that is wrong, cut short: names of headers stand in it, which may be of any length.
pub(super) fn first(wrong: &[Invalid]) -> String {
    wrong.first().map(|wrong| cut(&wrong.to_string())).unwrap_or_default()
}

fn cut(text: &str) -> String {
    text.chars().take(TOLD_MAX).collect()
}

/// Where an error is, without what stands there.
fn place(error: &serde_json::Error) -> String {
    let what = if error.is_data() {
        "a member is missing, unknown or of the wrong type"
    } else {
        "this is not JSON"
    };
    format!("{what}, line {} column {}", error.line(), error.column())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: &str) -> Result<Vec<NewMessage>, String> {
        super::read(body.as_bytes(), Timestamp::UNIX_EPOCH)
    }

    #[test]
    fn messages_are_read_in_order() {
        let sent = read(r#"{"messages": [{"queue": "a", "payload": {"n": 1}, "type": "t"}, {"queue": "b", "payload_base64": "eA=="}]}"#).unwrap();
        let queue = |it: &NewMessage| it.to.queue().unwrap().as_str().to_owned();
        let seen = sent.iter().map(|it| (queue(it), &it.body[..])).collect::<Vec<_>>();
        assert_eq!(seen, [("a".to_owned(), &br#"{"n": 1}"#[..]), ("b".to_owned(), &b"x"[..])]);
        assert_eq!(sent[0].kind.as_deref(), Some("t"));
        assert_eq!(read(r#"{"messages": []}"#).unwrap(), []);
    }

    #[test]
    fn what_is_wrong_is_named_and_nothing_of_the_body_is_told() {
        for (body, names) in [
            ("secret", "not JSON"),
            ("{}", "member"),
            (r#"{"messages": "secret"}"#, "member"),
            (r#"{"messages": [{"payload": 1}]}"#, "/messages/0/queue"),
            (
                r#"{"messages": [{"queue": "a", "payload": 1}, {"queue": "NO", "payload": "secret"}]}"#,
                "/messages/1/queue",
            ),
            (r#"{"messages": [{"queue": "a"}]}"#, "/messages/0/payload"),
            (r#"{"messages": [{"queue": "a", "payload": 1, "delay": "secret"}]}"#, "/messages/0"),
            (
                r#"{"messages": [{"queue": "a", "payload": 1, "priority": 101}]}"#,
                "/messages/0/priority",
            ),
            (r#"{"messages": [{"queue": "a", "payload": 1, "secret": 1}]}"#, "/messages/0"),
        ] {
            let wrong = read(body).unwrap_err();
            assert!(wrong.contains(names) && !wrong.contains("secret"), "{body}: {wrong}");
        }
        for (body, names) in [
            ("secret", "not JSON"),
            ("{}", "member"),
            (r#"[{"specversion": "1.0", "id": "1", "source": "/s", "type": "t"}]"#, "/0/queue"),
            (
                r#"[{"queue": "q", "specversion": "1.0", "id": "secret", "source": "/s"}]"#,
                "/0/type",
            ),
        ] {
            let wrong = read_events(body.as_bytes()).unwrap_err();
            assert!(wrong.contains(names) && !wrong.contains("secret"), "{body}: {wrong}");
        }
        let many = format!(
            r#"{{"messages": [{}]}}"#,
            vec![r#"{"queue":"a","payload":1}"#; SENT_MAX + 1].join(",")
        );
        assert!(read(&many).is_err());
    }
}
