//! A `POST` to a handler, and the meaning of its answer. The deadline over it is the pipeline's.

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::io;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, HOST, RETRY_AFTER};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use jiff::Timestamp;
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use tower::service_fn;

use crate::clock::Clock;
use crate::model::{
    ANSWER_HEADERS_KEPT, ANSWER_KEPT, Answer, EVENT_TYPES, ErrorKind, Failure, Format, HttpHandler,
    Reply, Verdict, check_text, event_attributes, event_json,
};
use crate::telemetry::traces;

use super::connections::{Connections, Connector, NoAnswer};
use super::sent::{self, Carries};
use super::{Delivery, Handler, chain, retry_after};

/// A handler that posts each message to an endpoint.
///
/// Of an answer that carries messages at most `answer_max` bytes are read.
pub fn http_handler(
    connector: Connector,
    to: &HttpHandler,
    clock: Arc<dyn Clock>,
    answer_max: usize,
) -> Handler {
    let endpoint = Endpoint::new(connector, to, answer_max).map(Arc::new);
    Handler::new(service_fn(move |delivery: Delivery| {
        let (endpoint, clock) = (endpoint.clone(), Arc::clone(&clock));
        async move {
            let what = "the handler's URL is not one that can be called";
            let endpoint = endpoint.ok_or_else(|| Failure::new(ErrorKind::Connect, what))?;
            endpoint.post(&*clock, delivery).await
        }
    }))
}

/// Where a handler is, with all that is the same for each delivery.
#[derive(Debug)]
pub(super) struct Endpoint {
    connections: Arc<Connections>,
    /// The URL's path and query.
    target: Uri,
    host: HeaderValue,
    /// The queue's own headers.
    headers: HeaderMap,
    /// How much is read of an answer that carries messages.
    answer_max: usize,
    format: Format,
}

impl Endpoint {
    /// `None` for a URL without a host, which no queue can be given.
    pub(super) fn new(connector: Connector, to: &HttpHandler, answer_max: usize) -> Option<Self> {
        let uri = to.url.as_str().parse::<Uri>().ok()?;
        let target = uri.path_and_query().cloned().map_or(Uri::from_static("/"), Uri::from);
        let host = HeaderValue::try_from(uri.authority()?.as_str()).ok()?;
        let mut headers = HeaderMap::new();
        for (name, value) in &to.headers {
            put(&mut headers, name, value);
        }
        let connections = Connections::new(connector, uri);
        Some(Self { connections, target, host, headers, answer_max, format: to.format })
    }

    pub(super) async fn post(
        &self,
        clock: &dyn Clock,
        delivery: Delivery,
    ) -> Result<Answer, Failure> {
        let wants_reply = delivery.message.head.details.reply_to.is_some();
        let request = self.request(delivery, clock.now());
        let (response, connection) = self.connections.send(request).await.map_err(unanswered)?;
        let (parts, body) = response.into_parts();
        let carries = Carries::of(&parts.headers);
        let (most, keep) = match carries {
            Carries::Messages | Carries::Events => (self.answer_max, self.answer_max),
            Carries::Nothing if wants_reply => (self.answer_max, self.answer_max),
            Carries::Nothing => (ANSWER_READ_MAX, ANSWER_KEPT),
        };
        let body = read(body, keep, most).await?;
        if body.is_whole {
            connection.keep();
        }
        let answer = Response::from_parts(parts, ());
        meaning(&answer, &body, (carries, wants_reply), clock.now())
    }

    /// The request for a delivery. Options of the message come first, then the queue's own headers, then
    /// ours, so that nobody outside can put on a name that a handler trusts.
    fn request(&self, delivery: Delivery, now: Timestamp) -> Request<Full<Bytes>> {
        let mut headers = HeaderMap::with_capacity(24);
        let Delivery { message, attempt, max_attempts, replica, .. } = delivery;
        let head = &message.head;
        headers.insert(HOST, self.host.clone());
        for (name, value) in &head.details.headers {
            put(&mut headers, name, value);
        }
        for (name, value) in &self.headers {
            headers.insert(name, value.clone());
        }
        let mut ours = |name: &'static str, value: &str| {
            put_as(&mut headers, HeaderName::from_static(name), value);
        };
        let is_event = self.format == Format::Structured;
        match &head.details.content_type {
            _ if is_event => ours("content-type", EVENT_TYPES[0]),
            Some(content_type) => ours("content-type", content_type),
            None => (),
        }
        let id = head.id.to_string();
        let enqueued_at = head.enqueued_at.to_string();
        ours("webhook-id", &id);
        ours("webhook-timestamp", &now.as_second().to_string());
        ours("pumphouse-queue", head.queue.as_str());
        ours("pumphouse-attempt", &attempt.to_string());
        ours("pumphouse-max-attempts", &max_attempts.to_string());
        ours("pumphouse-replica", replica.as_str());
        ours("pumphouse-enqueued-at", &enqueued_at);
        for (name, value) in [
            ("pumphouse-type", &head.kind),
            ("pumphouse-correlation-id", &head.correlation_id),
            ("pumphouse-causation-id", &head.details.causation_id),
            ("pumphouse-group", &head.details.group),
            ("pumphouse-fairness-key", &head.details.fairness_key),
            ("traceparent", &head.details.traceparent.as_deref().and_then(traces::next_hop)),
            ("tracestate", &head.details.tracestate),
            ("baggage", &head.details.baggage),
        ] {
            if let Some(value) = value {
                ours(name, value);
            }
        }
        if let Some(published_id) = head.details.published_id {
            ours("pumphouse-published-id", &published_id.to_string());
        }
        let body = if is_event {
            event_json(&message).into()
        } else {
            // An event goes on as it came, and a plain message as the event that it is to its handler.
            for (name, value) in event_attributes(&message).iter() {
                put(&mut headers, &format!("ce-{name}"), &value.to_string());
            }
            message.body
        };
        // Said outright, because for an empty body the client would leave it out.
        headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = self.target.clone();
        *request.headers_mut() = headers;
        request
    }
}

/// Puts a header on. What is no name was refused when the message or the queue was taken in; what an older
/// version let through is left out rather than failing every delivery of the message.
fn put(headers: &mut HeaderMap, name: &str, value: &str) {
    if let Ok(name) = HeaderName::try_from(name) {
        put_as(headers, name, value);
    }
}

/// Puts a header on. Attributes of CloudEvents are percent-encoded as their HTTP binding says (3.1.3.2);
/// of the others, a value that is not plain ASCII is encoded in the same way, and any other goes as it is.
fn put_as(headers: &mut HeaderMap, name: HeaderName, value: &str) {
    const ENCODED: &AsciiSet = &CONTROLS.add(b' ').add(b'"').add(b'%');
    let plain = value.bytes().all(|byte| matches!(byte, b' '..=b'~' | b'\t'));
    let value = if plain && !name.as_str().starts_with("ce-") {
        HeaderValue::try_from(value)
    } else {
        HeaderValue::try_from(utf8_percent_encode(value, ENCODED).to_string())
    };
    if let Ok(value) = value {
        headers.insert(name, value);
    }
}

/// What was read of an answer's body.
struct Body {
    kept: Bytes,
    is_whole: bool,
}

/// Reads the answer, at most so much: whole if it is short, so that the connection can be used again; else its
/// beginning.
async fn read(mut body: Incoming, keep: usize, most: usize) -> Result<Body, Failure> {
    let mut kept = BytesMut::new();
    let mut seen = 0;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| broken(&error))?;
        let Some(data) = frame.data_ref() else { continue };
        kept.extend_from_slice(&data[..data.len().min(keep - kept.len())]);
        seen += data.len();
        if seen > most {
            return Ok(Body { kept: kept.freeze(), is_whole: false });
        }
    }
    Ok(Body { kept: kept.freeze(), is_whole: true })
}

/// What an answer means: a verdict, or a failure for the queue's recovery.
fn meaning(
    answer: &Response<()>,
    body: &Body,
    (carries, wants_reply): (Carries, bool),
    now: Timestamp,
) -> Result<Answer, Failure> {
    let excerpt = body.kept.slice(..body.kept.len().min(ANSWER_KEPT));
    let status = answer.status();
    let at = now;
    let now = UNIX_EPOCH + Duration::from_secs(now.as_second().try_into().unwrap_or(0));
    let retry_after = answer.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
    let retry_after = retry_after.and_then(|value| retry_after::parse(value, now));
    let failure = |kind, detail: String| Failure {
        status: Some(status.as_u16()),
        retry_after,
        headers: kept(answer.headers()),
        excerpt: excerpt.clone(),
        ..Failure::new(kind, detail)
    };
    let verdict = match answer.headers().get("pumphouse-verdict").map(HeaderValue::as_bytes) {
        Some(b"ack") => Verdict::Ack,
        Some(b"retry") => Verdict::Retry { after: retry_after },
        Some(b"dead_letter") => Verdict::DeadLetter { reason: said("dead_letter", status) },
        Some(b"discard") => Verdict::Discard { reason: said("discard", status) },
        Some(_) => {
            let detail =
                "the handler's Pumphouse-Verdict is none of ack, retry, dead_letter, discard";
            return Err(failure(ErrorKind::Malformed, detail.to_owned()));
        }
        None if status.is_success() => Verdict::Ack,
        None => {
            return Err(failure(
                ErrorKind::Status,
                format!("the handler answered {}", status.as_u16()),
            ));
        }
    };
    let mut reply = Reply::default();
    // What carries messages is for the pump, and no answer to anybody.
    if verdict == Verdict::Ack && wants_reply && carries == Carries::Nothing {
        if !body.is_whole {
            let detail = "an answer that is sent on is not longer than the body limit";
            return Err(failure(ErrorKind::TooLarge, detail.to_owned()));
        }
        let content_type = answer.headers().get(CONTENT_TYPE);
        let content_type = content_type.and_then(|value| value.to_str().ok());
        // One that no message can have is left out, rather than failing what was done.
        let content_type = content_type.filter(|text| check_text(text).is_ok());
        reply = Reply { content_type: content_type.map(str::to_owned), body: body.kept.clone() };
    }
    let sent =
        match (&verdict, carries) {
            (Verdict::Ack, Carries::Messages | Carries::Events) if !body.is_whole => {
                let detail = "an answer that carries messages is not longer than the body limit";
                return Err(failure(ErrorKind::TooLarge, detail.to_owned()));
            }
            (Verdict::Ack, Carries::Messages) => sent::read(&body.kept, at)
                .map_err(|detail| failure(ErrorKind::Malformed, detail))?,
            (Verdict::Ack, Carries::Events) => sent::read_events(&body.kept)
                .map_err(|detail| failure(ErrorKind::Malformed, detail))?,
            // Nothing is sent without an ack.
            (_, _) => Vec::new(),
        };
    Ok(Answer { verdict, status: Some(status.as_u16()), excerpt, sent, reply })
}

/// The headers of an answer that a rule can ask for.
fn kept(headers: &HeaderMap) -> BTreeMap<String, String> {
    let text = |(name, value): (&HeaderName, &HeaderValue)| {
        Some((name.as_str().to_owned(), value.to_str().ok()?.to_owned()))
    };
    headers.iter().take(ANSWER_HEADERS_KEPT).filter_map(text).collect()
}

fn said(verdict: &str, status: StatusCode) -> String {
    format!("the handler said {verdict} with status {}", status.as_u16())
}

/// No answer at all: tells apart why.
fn unanswered(why: NoAnswer) -> Failure {
    match why {
        NoAnswer::Exchange(error) => broken(&error),
        NoAnswer::Connect(error) => {
            let text = chain(&*error);
            let kind = if text.contains("dns error") {
                ErrorKind::Dns
            } else if causes(&*error).any(|cause| cause.is::<rustls::Error>() || wraps_tls(cause)) {
                ErrorKind::Tls
            } else {
                ErrorKind::Connect
            };
            Failure::new(kind, text)
        }
    }
}

/// An answer that ended before it was whole, or whose body is not what its headers say.
fn broken(error: &hyper::Error) -> Failure {
    let kind = if error.is_parse() { ErrorKind::Malformed } else { ErrorKind::Reset };
    Failure::new(kind, chain(error))
}

/// An I/O error hides what it carries from its source chain, and may carry another one.
fn wraps_tls(error: &(dyn StdError + 'static)) -> bool {
    let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    inner.is_some_and(|inner| inner.is::<rustls::Error>() || wraps_tls(inner))
}

fn causes<'a>(
    error: &'a (dyn StdError + 'static),
) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    let mut next = Some(error);
    std::iter::from_fn(move || {
        let this = next?;
        next = this.source();
        Some(this)
    })
}

/// The most bytes that are read of an answer.
const ANSWER_READ_MAX: usize = 64 * 1024;
