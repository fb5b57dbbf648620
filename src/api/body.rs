//! Reads bodies: never more than is allowed, and JSON with pointers to what is wrong.

use std::error::Error as StdError;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{FromRequestParts, Request};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, header};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::Deserializer;
use serde::de::DeserializeOwned;
use serde_path_to_error::Segment;

use crate::model::Invalid;

use super::problem::{self, Problem};

/// A path's variables, with a problem for what cannot be read.
#[derive(Debug, FromRequestParts)]
#[from_request(via(axum::extract::Path), rejection(Problem))]
pub(super) struct Path<T>(pub(super) T);

/// A query, with a problem for what is wrong.
#[derive(Debug, FromRequestParts)]
#[from_request(via(axum::extract::Query), rejection(Problem))]
pub(super) struct Query<T>(pub(super) T);

/// Reads a body of at most `limit` bytes, within a time.
///
/// One that is announced larger is refused before a byte of it is kept, and so is one with a
/// `Content-Encoding`, because the handler would get the bytes without the word that explains them.
pub(super) async fn read(
    headers: &HeaderMap,
    mut body: Body,
    limit: usize,
) -> Result<Bytes, Problem> {
    let encoding = headers.get(header::CONTENT_ENCODING).map(HeaderValue::as_bytes);
    if encoding.is_some_and(|encoding| !encoding.eq_ignore_ascii_case(b"identity")) {
        hear_out(headers, &mut body).await;
        let detail = "a Content-Encoding is not taken: send the bytes plain, or with the media type of what they are, like application/gzip";
        return Err(Problem::new(problem::MEDIA_TYPE, detail));
    }
    let too_large =
        || Problem::new(problem::TOO_LARGE, format!("a request here has at most {limit} bytes"));
    let announced = headers.get(header::CONTENT_LENGTH).and_then(|value| value.to_str().ok());
    if announced.and_then(|text| text.parse::<u64>().ok()).is_some_and(|len| len > limit as u64) {
        hear_out(headers, &mut body).await;
        return Err(too_large());
    }
    let limited = Limited::new(&mut body, limit).collect();
    match tokio::time::timeout(BODY_TIMEOUT, limited).await {
        Ok(Ok(body)) => Ok(body.to_bytes()),
        Ok(Err(error)) if is_over_limit(&*error) => {
            hear_out(headers, &mut body).await;
            Err(too_large())
        }
        Ok(Err(_)) => Err(Problem::new(problem::UNREADABLE, "the body broke off")),
        Err(_) => Err(Problem::new(problem::UNREADABLE, "the body took too long to arrive")),
    }
}

/// Reads on for a moment and throws it away, because a client that is still sending when the connection
/// closes hears a reset and not the answer. One that waits to be told to go on sends nothing.
async fn hear_out(headers: &HeaderMap, body: &mut Body) {
    if headers.contains_key(header::EXPECT) {
        return;
    }
    let mut left = HEARD_OUT_MAX;
    let rest = async {
        while let Some(Ok(frame)) = body.frame().await {
            let length = frame.data_ref().map_or(0, Bytes::len);
            let Some(less) = left.checked_sub(length) else { return };
            left = less;
        }
    };
    // What is cut off here gets the reset.
    let _ = tokio::time::timeout(HEARD_OUT_FOR, rest).await;
}

fn is_over_limit(error: &(dyn StdError + 'static)) -> bool {
    let mut next = Some(error);
    while let Some(error) = next {
        if error.is::<LengthLimitError>() {
            return true;
        }
        next = error.source();
    }
    false
}

/// Reads the JSON body of a request that carries settings or an order, not messages.
pub(super) async fn read_json<T: DeserializeOwned>(request: Request) -> Result<T, Problem> {
    let (parts, body) = request.into_parts();
    is_json(&parts.headers)?;
    json(&read(&parts.headers, body, SETTINGS_MAX).await?)
}

/// Refuses what says of itself that it is no JSON.
pub(super) fn is_json(headers: &HeaderMap) -> Result<(), Problem> {
    let media_type = media_type(headers);
    if !media_type.is_empty() && media_type != "application/json" && !media_type.ends_with("+json")
    {
        let detail = format!("this takes application/json, not {media_type}");
        return Err(Problem::new(problem::MEDIA_TYPE, detail));
    }
    Ok(())
}

/// The same where no body stands for an empty object.
pub(super) async fn read_json_or_default<T>(request: Request) -> Result<T, Problem>
where
    T: DeserializeOwned + Default,
{
    let (parts, body) = request.into_parts();
    let bytes = read(&parts.headers, body, SETTINGS_MAX).await?;
    if bytes.is_empty() { Ok(T::default()) } else { json(&bytes) }
}

/// Parses JSON: 400 where it is none, 422 with a pointer where it is not what was wanted.
pub(super) fn json<T: DeserializeOwned>(text: &[u8]) -> Result<T, Problem> {
    let mut parser = serde_json::Deserializer::from_slice(text);
    let value = parse(&mut parser)?;
    parser.end().map_err(|error| wrong_json(&error, String::new()))?;
    Ok(value)
}

/// The same of JSON that is being read, or was read already.
pub(super) fn parse<'de, T, J>(json: J) -> Result<T, Problem>
where
    T: DeserializeOwned,
    J: Deserializer<'de, Error = serde_json::Error>,
{
    serde_path_to_error::deserialize(json).map_err(|error| {
        let pointer = pointer(error.path().iter());
        wrong_json(error.inner(), pointer)
    })
}

fn wrong_json(error: &serde_json::Error, pointer: String) -> Problem {
    if error.is_data() {
        return Invalid::new(pointer, error.to_string()).into();
    }
    Problem::new(problem::UNREADABLE, format!("the body is not JSON: {error}"))
}

fn pointer<'a>(segments: impl Iterator<Item = &'a Segment>) -> String {
    let mut pointer = String::new();
    for segment in segments {
        match segment {
            Segment::Seq { index } => pointer.push_str(&format!("/{index}")),
            Segment::Map { key } => {
                pointer = Invalid::pointer(&pointer, key);
            }
            Segment::Enum { .. } | Segment::Unknown => (),
        }
    }
    pointer
}

/// The media type of a request, in lower case and without parameters; empty where it has none.
pub(super) fn media_type(headers: &HeaderMap) -> String {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    value.unwrap_or("").split(';').next().unwrap_or("").trim().to_ascii_lowercase()
}

/// How long a whole body may take to arrive.
const BODY_TIMEOUT: Duration = Duration::from_secs(20);
/// How much of a body that is too large is read and thrown away, and for how long.
const HEARD_OUT_MAX: usize = 16 * 1024 * 1024;
const HEARD_OUT_FOR: Duration = Duration::from_millis(500);
/// The most bytes in a body that carries settings.
const SETTINGS_MAX: usize = 256 * 1024;
