//! Lists: limits, cursors, filters.

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use jiff::Timestamp;
use serde::Deserialize;
use utoipa::IntoParams;

use crate::model::{self, ErrorKind, Invalid, QueueName, State};
use crate::store::{Filter, Page};

use super::problem::{self, Problem};

/// Which messages, and which part of the list.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct ListQuery {
    /// At most how many; 50 if not given, more than 200 count as 200.
    limit: Option<String>,
    /// From `next` of the page before.
    cursor: Option<String>,
    /// Of this queue.
    queue: Option<String>,
    /// In this state.
    state: Option<String>,
    /// Of this type.
    r#type: Option<String>,
    /// Of this conversation.
    correlation_id: Option<String>,
    /// Enqueued at or after; RFC 3339.
    since: Option<String>,
    /// Enqueued before; RFC 3339.
    until: Option<String>,
    /// `payload` to have payloads in the list: at most 16 MiB of them, so that a page can be shorter.
    include: Option<String>,
    /// Of this group.
    group: Option<String>,
    /// Not available in this version.
    status: Option<String>,
    /// Not available in this version.
    error_kind: Option<String>,
    /// Not available in this version.
    q: Option<String>,
}

impl ListQuery {
    pub(super) fn page(&self) -> Result<Page, Problem> {
        let after = match self.cursor.as_deref() {
            None | Some("") => None,
            Some(text) => Some(read_cursor(text)?),
        };
        Ok(Page { limit: limit(self.limit.as_deref())?, after })
    }

    pub(super) fn filter(&self) -> Result<Filter, Problem> {
        for (name, value) in
            [("status", &self.status), ("error_kind", &self.error_kind), ("q", &self.q)]
        {
            if let Some(value) = value {
                if name == "error_kind" {
                    ErrorKind::parse(value)?;
                }
                let detail = format!("to filter by {name} is not available in this version");
                return Err(Problem::new(problem::NOT_AVAILABLE, detail));
            }
        }
        Ok(Filter {
            queue: self.queue.as_deref().map(QueueName::parse).transpose()?,
            state: self.state.as_deref().map(State::parse).transpose()?,
            kind: text("type", self.r#type.as_deref())?,
            correlation_id: text("correlation_id", self.correlation_id.as_deref())?,
            group: text("group", self.group.as_deref())?,
            since: time("since", self.since.as_deref())?,
            until: time("until", self.until.as_deref())?,
            ids: Vec::new(),
        })
    }

    pub(super) fn with_payload(&self) -> Result<bool, Problem> {
        match self.include.as_deref() {
            None => Ok(false),
            Some("payload") => Ok(true),
            Some(_) => Err(Invalid::new("include", "payload is the only thing to include").into()),
        }
    }
}

/// Which part of the list of queues.
#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct QueueListQuery {
    /// At most how many; 50 if not given, more than 200 count as 200.
    limit: Option<String>,
    /// From `next` of the page before.
    cursor: Option<String>,
}

impl QueueListQuery {
    /// At most how many, and the queue after whose name the page begins.
    pub(super) fn page(&self) -> Result<(usize, Option<QueueName>), Problem> {
        let after = match self.cursor.as_deref() {
            None | Some("") => None,
            Some(text) => Some(read_queue_cursor(text)?),
        };
        Ok((limit(self.limit.as_deref())?, after))
    }
}

fn limit(text: Option<&str>) -> Result<usize, Invalid> {
    let Some(text) = text else { return Ok(LIMIT) };
    let limit = text.parse::<usize>().ok().filter(|limit| *limit > 0).ok_or_else(|| {
        Invalid::new("limit", format!("a limit is a number from 1 to {LIMIT_MAX}"))
    })?;
    Ok(limit.min(LIMIT_MAX))
}

/// What a message's type or correlation id can be; anything else cannot match.
pub(super) fn text(name: &str, text: Option<&str>) -> Result<Option<String>, Invalid> {
    text.map(|text| model::check_text(text).map(|()| text.to_owned()))
        .transpose()
        .map_err(|detail| Invalid::new(name, detail))
}

fn time(name: &str, text: Option<&str>) -> Result<Option<Timestamp>, Invalid> {
    let parse = |text: &str| text.parse::<Timestamp>();
    text.map(parse)
        .transpose()
        .map_err(|_| Invalid::new(name, "a time is RFC 3339 in UTC, like 2026-01-31T12:00:00Z"))
}

/// Writes a position so that nobody is tempted to count with it.
pub(super) fn write_cursor(position: i64) -> String {
    let mut bytes = vec![CURSOR_VERSION];
    bytes.extend(position.to_be_bytes());
    BASE64_URL_SAFE_NO_PAD.encode(bytes)
}

fn read_cursor(text: &str) -> Result<i64, Invalid> {
    let position = unwrap_cursor(CURSOR_VERSION, text)?;
    Ok(i64::from_be_bytes(position.try_into().map_err(|_| no_cursor())?))
}

/// The same in the list of queues, which goes by their names.
pub(super) fn write_queue_cursor(queue: &QueueName) -> String {
    let mut bytes = vec![QUEUE_CURSOR_VERSION];
    bytes.extend(queue.as_str().bytes());
    BASE64_URL_SAFE_NO_PAD.encode(bytes)
}

fn read_queue_cursor(text: &str) -> Result<QueueName, Invalid> {
    let name = unwrap_cursor(QUEUE_CURSOR_VERSION, text)?;
    let name = String::from_utf8(name).map_err(|_| no_cursor())?;
    QueueName::parse(&name).map_err(|_| no_cursor())
}

fn unwrap_cursor(version: u8, text: &str) -> Result<Vec<u8>, Invalid> {
    let bytes = BASE64_URL_SAFE_NO_PAD.decode(text).map_err(|_| no_cursor())?;
    match bytes.split_first() {
        Some((first, rest)) if *first == version => Ok(rest.to_vec()),
        _ => Err(no_cursor()),
    }
}

fn no_cursor() -> Invalid {
    Invalid::new("cursor", "a cursor is what stood in next of the page before")
}

const LIMIT: usize = 50;
const LIMIT_MAX: usize = 200;
const CURSOR_VERSION: u8 = 1;
/// Another one, so that no list takes the cursor of the other.
const QUEUE_CURSOR_VERSION: u8 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_is_read_back_and_nothing_else_is() {
        for position in [0, 1, i64::MAX, -5] {
            assert_eq!(read_cursor(&write_cursor(position)), Ok(position));
        }
        for bad in ["x", "AAAA", "AQ", "äö", "AgAAAAAAAAAB", "AQAAAAAAAAABAA"] {
            assert!(read_cursor(bad).is_err(), "{bad}");
        }
        let queue = QueueName::parse("emails").unwrap();
        assert_eq!(read_queue_cursor(&write_queue_cursor(&queue)), Ok(queue.clone()));
        assert!(read_cursor(&write_queue_cursor(&queue)).is_err());
        assert!(read_queue_cursor(&write_cursor(7)).is_err());
    }

    #[test]
    fn limits_are_clamped_and_zero_is_wrong() {
        let limit = |text: &str| {
            ListQuery { limit: Some(text.to_owned()), ..Default::default() }.page().map(|p| p.limit)
        };
        assert_eq!(limit("7").ok(), Some(7));
        assert_eq!(limit("100000").ok(), Some(200));
        assert!(limit("0").is_err() && limit("-1").is_err() && limit("x").is_err());
    }
}
