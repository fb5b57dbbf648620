//! A `POST` to a handler, and the meaning of its answer. The deadline over it is the pipeline's.

use std::error::Error as StdError;
use std::io;
use std::sync::Arc;
use std::time::{Duration, UNIX_EPOCH};

use bytes::{Bytes, BytesMut};
use http::header::{CONTENT_LENGTH, CONTENT_TYPE, RETRY_AFTER};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use jiff::Timestamp;
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use tower::service_fn;

use crate::clock::Clock;
use crate::model::{ANSWER_KEPT, Answer, ErrorKind, Failure, HttpHandler, Message, Verdict};
use crate::telemetry::traces;

use super::{Delivery, Handler, chain, retry_after};

/// The connections to all handlers: pooled, HTTP/1.1, no redirects, no proxy, no cookies.
pub type Client = legacy::Client<HttpsConnector<HttpConnector>, Full<Bytes>>;

/// Makes a client that trusts the machine's certificate authorities, or Mozilla's where it has none.
pub fn client() -> Client {
    let mut connector = HttpConnector::new();
    connector.set_nodelay(true);
    connector.enforce_http(false);
    connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
    let provider = rustls::crypto::ring::default_provider();
    let tls = HttpsConnectorBuilder::new().with_provider_and_native_roots(provider.clone());
    let tls = tls.unwrap_or_else(|_| {
        let ours = HttpsConnectorBuilder::new().with_provider_and_webpki_roots(provider);
        ours.expect("ring knows TLS 1.2 and 1.3")
    });
    let connector = tls.https_or_http().enable_http1().wrap_connector(connector);
    legacy::Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE_TIMEOUT)
        .pool_max_idle_per_host(IDLE_PER_HOST_MAX)
        .http1_max_buf_size(HEAD_MAX)
        .build(connector)
}

/// A handler that posts each message to an endpoint.
pub fn http_handler(client: Client, endpoint: HttpHandler, clock: Arc<dyn Clock>) -> Handler {
    let endpoint = Arc::new(endpoint);
    Handler::new(service_fn(move |delivery: Delivery| {
        let (client, endpoint, clock) = (client.clone(), Arc::clone(&endpoint), Arc::clone(&clock));
        async move { post(&client, &endpoint, &*clock, delivery).await }
    }))
}

async fn post(
    client: &Client,
    endpoint: &HttpHandler,
    clock: &dyn Clock,
    delivery: Delivery,
) -> Result<Answer, Failure> {
    let request = request(endpoint, delivery, clock.now())?;
    let response = client.request(request).await.map_err(|error| unreachable(&error))?;
    let (parts, body) = response.into_parts();
    let excerpt = read(body).await?;
    meaning(&Response::from_parts(parts, ()), excerpt, clock.now())
}

/// The request for a delivery. Options of the message come first, then the queue's own headers, then ours,
/// so that nobody outside can put on a name that a handler trusts.
fn request(
    endpoint: &HttpHandler,
    delivery: Delivery,
    now: Timestamp,
) -> Result<Request<Full<Bytes>>, Failure> {
    let mut headers = HeaderMap::with_capacity(24);
    let Delivery { message: Message { head, body }, attempt, max_attempts, replica } = delivery;
    for (name, value) in &head.details.headers {
        put(&mut headers, name, value);
    }
    for (name, value) in &endpoint.headers {
        put(&mut headers, name, value);
    }
    let mut ours = |name: &'static str, value: &str| put(&mut headers, name, value);
    if let Some(content_type) = &head.details.content_type {
        ours("content-type", content_type);
    }
    let id = head.id.to_string();
    ours("webhook-id", &id);
    ours("webhook-timestamp", &now.as_second().to_string());
    ours("ce-specversion", "1.0");
    ours("ce-id", &id);
    ours("ce-source", &format!("/queues/{}", head.queue));
    ours("ce-type", head.kind.as_deref().unwrap_or("pumphouse.message"));
    ours("ce-time", &head.enqueued_at.to_string());
    ours("pumphouse-queue", head.queue.as_str());
    ours("pumphouse-attempt", &attempt.to_string());
    ours("pumphouse-max-attempts", &max_attempts.to_string());
    ours("pumphouse-replica", replica.as_str());
    ours("pumphouse-enqueued-at", &head.enqueued_at.to_string());
    for (name, value) in [
        ("pumphouse-type", &head.kind),
        ("pumphouse-correlation-id", &head.correlation_id),
        ("pumphouse-causation-id", &head.details.causation_id),
        ("traceparent", &head.details.traceparent.as_deref().and_then(traces::next_hop)),
        ("tracestate", &head.details.tracestate),
        ("baggage", &head.details.baggage),
    ] {
        if let Some(value) = value {
            ours(name, value);
        }
    }
    // Said outright, because for an empty body the client would leave it out.
    headers.insert(CONTENT_LENGTH, HeaderValue::from(body.len()));
    let mut request = Request::new(Full::new(body));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = endpoint.url.as_str().parse().map_err(|_| {
        Failure::new(ErrorKind::Connect, "the handler's URL is not one that can be called")
    })?;
    *request.headers_mut() = headers;
    Ok(request)
}

/// Puts a header on. Attributes of CloudEvents are percent-encoded as their HTTP binding says (3.1.3.2);
/// of the others, a value that is not plain ASCII is encoded in the same way, and any other goes as it is.
fn put(headers: &mut HeaderMap, name: &str, value: &str) {
    const ENCODED: &AsciiSet = &CONTROLS.add(b' ').add(b'"').add(b'%');
    let plain = value.bytes().all(|byte| matches!(byte, b' '..=b'~' | b'\t'));
    let encoded = if plain && !name.starts_with("ce-") {
        value.into()
    } else {
        utf8_percent_encode(value, ENCODED).to_string()
    };
    // Both were checked when the message or the queue was taken in; what an older version let through
    // is left out rather than failing every delivery of the message.
    if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::try_from(encoded)) {
        headers.insert(name, value);
    }
}

/// Reads the answer: whole if it is short, so that the connection can be used again; else its beginning.
async fn read(mut body: Incoming) -> Result<Bytes, Failure> {
    let mut kept = BytesMut::new();
    let mut seen = 0;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| broken(&error))?;
        let Some(data) = frame.data_ref() else { continue };
        kept.extend_from_slice(&data[..data.len().min(ANSWER_KEPT - kept.len())]);
        seen += data.len();
        if seen > ANSWER_READ_MAX {
            break; // dropping the body closes the connection
        }
    }
    Ok(kept.freeze())
}

/// What an answer means: a verdict, or a failure for the queue's recovery.
fn meaning(answer: &Response<()>, excerpt: Bytes, now: Timestamp) -> Result<Answer, Failure> {
    let status = answer.status();
    let now = UNIX_EPOCH + Duration::from_secs(now.as_second().try_into().unwrap_or(0));
    let retry_after = answer.headers().get(RETRY_AFTER).and_then(|value| value.to_str().ok());
    let retry_after = retry_after.and_then(|value| retry_after::parse(value, now));
    let failure = |kind, detail: String| Failure {
        status: Some(status.as_u16()),
        retry_after,
        excerpt: excerpt.clone(),
        ..Failure::new(kind, detail)
    };
    let verdict = match answer.headers().get("pumphouse-verdict").map(HeaderValue::as_bytes) {
        None | Some(b"ack") if carries_messages(answer.headers()) => {
            let detail = "the answer carries messages, which this version cannot send";
            return Err(failure(ErrorKind::Malformed, detail.to_owned()));
        }
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
    Ok(Answer { verdict, status: Some(status.as_u16()), excerpt })
}

fn said(verdict: &str, status: StatusCode) -> String {
    format!("the handler said {verdict} with status {}", status.as_u16())
}

/// Whether the answer asks to send messages. Refused rather than overlooked: an ack would lose them.
fn carries_messages(headers: &HeaderMap) -> bool {
    let content_type =
        headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or("");
    let media_type = content_type.split(';').next().unwrap_or("").trim().to_ascii_lowercase();
    let carrying =
        ["application/vnd.pumphouse.messages+json", "application/cloudevents-batch+json"];
    carrying.contains(&media_type.as_str())
}

/// No answer at all: tells apart why.
fn unreachable(error: &legacy::Error) -> Failure {
    let text = chain(error);
    let kind = if text.contains("dns error") {
        ErrorKind::Dns
    } else if causes(error).any(|cause| cause.is::<rustls::Error>() || wraps_tls(cause)) {
        ErrorKind::Tls
    } else if error.is_connect() {
        ErrorKind::Connect
    } else if causes(error).any(is_parse_error) {
        ErrorKind::Malformed
    } else {
        ErrorKind::Reset
    };
    Failure::new(kind, text)
}

/// An answer that ended before it was whole, or whose body is not what its headers say.
fn broken(error: &hyper::Error) -> Failure {
    let kind = if is_parse_error(error) { ErrorKind::Malformed } else { ErrorKind::Reset };
    Failure::new(kind, chain(error))
}

fn is_parse_error(error: &(dyn StdError + 'static)) -> bool {
    error.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_parse)
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

/// How long a connection may take; the whole exchange has the queue's timeout.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long an unused connection is kept: less than common servers keep theirs.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// How many unused connections are kept to one host.
const IDLE_PER_HOST_MAX: usize = 256;
/// The most bytes in the head of an answer.
const HEAD_MAX: usize = 64 * 1024;
/// The most bytes that are read of an answer.
const ANSWER_READ_MAX: usize = 64 * 1024;
