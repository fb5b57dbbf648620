//! Lists: limits, cursors, filters.

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use jiff::Timestamp;
use serde::Deserialize;
use utoipa::IntoParams;

use crate::model::{ErrorKind, Invalid, QueueName, State};
use crate::store::{Filter, Page};

use super::envelope::check_text;
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
    /// Not available in this version.
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
        let limit = match self.limit.as_deref() {
            None => LIMIT,
            Some(text) => text.parse().ok().filter(|limit| *limit > 0).ok_or_else(|| {
                Invalid::new("limit", format!("a limit is a number from 1 to {LIMIT_MAX}"))
            })?,
        };
        let after = match self.cursor.as_deref() {
            None | Some("") => None,
            Some(text) => Some(read_cursor(text)?),
        };
        Ok(Page { limit: limit.min(LIMIT_MAX), after })
    }

    pub(super) fn filter(&self) -> Result<Filter, Problem> {
        for (name, value) in [
            ("group", &self.group),
            ("status", &self.status),
            ("error_kind", &self.error_kind),
            ("q", &self.q),
        ] {
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

/// What a message's type or correlation id can be; anything else cannot match.
pub(super) fn text(name: &str, text: Option<&str>) -> Result<Option<String>, Invalid> {
    text.map(|text| check_text(text).map(|()| text.to_owned()))
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
    let wrong = || Invalid::new("cursor", "a cursor is what stood in next of the page before");
    let bytes = BASE64_URL_SAFE_NO_PAD.decode(text).map_err(|_| wrong())?;
    match bytes.split_first() {
        Some((&CURSOR_VERSION, position)) => {
            Ok(i64::from_be_bytes(position.try_into().map_err(|_| wrong())?))
        }
        _ => Err(wrong()),
    }
}

const LIMIT: usize = 50;
const LIMIT_MAX: usize = 200;
const CURSOR_VERSION: u8 = 1;

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
