//! Messages that are there: look at them, cancel, hurry or postpone them. Routes, bodies, handlers.

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use bytes::Bytes;
use http::{HeaderValue, header};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use std::collections::BTreeMap;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::clock::{Clock, SystemClock};
use crate::model::{self, Attribute, DeliveryRecord, Invalid, MessageId, Record};
use crate::store::{Amended, Amendment, Filter, Page};

use super::Doors;
use super::body::{Path, Query, read_json, read_json_or_default};
use super::pages::{ListQuery, write_cursor};
use super::problem::{self, Problem, ProblemBody};

pub(super) fn routes() -> OpenApiRouter<Doors> {
    OpenApiRouter::new()
        .routes(routes!(list_messages))
        .routes(routes!(get_message, cancel_message, reschedule_message))
        .routes(routes!(get_payload))
        .routes(routes!(run_message))
}

/// A message as it stands.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct MessageBody {
    id: String,
    queue: String,
    /// `scheduled`, `ready`, `leased`, `completed`, `discarded`, `dead`, `expired` or `cancelled`.
    state: &'static str,
    r#type: Option<String>,
    content_type: Option<String>,
    priority: i8,
    correlation_id: Option<String>,
    causation_id: Option<String>,
    group: Option<String>,
    fairness_key: Option<String>,
    /// Under which it was published, for a copy of what was published to a topic.
    published_id: Option<String>,
    /// The queue to which the handler's answer goes.
    reply_to: Option<String>,
    /// Where it is delivered, for one that says so itself.
    url: Option<String>,
    /// The attributes and extensions of a CloudEvent.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[schema(value_type = BTreeMap<String, Value>, required = false)]
    event: BTreeMap<String, Attribute>,
    /// Sent on to the handler.
    headers: BTreeMap<String, String>,
    enqueued_at: String,
    deliver_at: String,
    expires_at: Option<String>,
    finished_at: Option<String>,
    /// Leases taken so far.
    attempts: u32,
    /// Deliveries that failed.
    failures: u32,
    /// Attempts that ended with nobody answering for them.
    crashes: u32,
    /// Why it is dead, discarded or cancelled.
    reason: Option<String>,
    /// The payload's length in bytes.
    size: u64,
    /// The payload as it came, if it is JSON, in lists that ask for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Value, required = false)]
    payload: Option<Box<RawValue>>,
    /// The payload, if it is anything else.
    #[serde(skip_serializing_if = "Option::is_none")]
    payload_base64: Option<String>,
    /// The latest first; not in lists.
    #[serde(skip_serializing_if = "Option::is_none")]
    deliveries: Option<Vec<DeliveryBody>>,
}

/// One delivery as it is remembered.
#[derive(Debug, Serialize, ToSchema)]
struct DeliveryBody {
    number: u32,
    replica: String,
    started_at: String,
    duration_ms: f64,
    /// `acked`, `failed`, `postponed`, `dead_lettered`, `discarded`, `moved`, `released` or `lease_lost`.
    outcome: &'static str,
    status: Option<u16>,
    error_kind: Option<&'static str>,
    error: Option<String>,
    /// The first 4 KiB of the answer.
    answer: Option<String>,
}

/// A page of messages, newest first.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct MessageList {
    items: Vec<MessageBody>,
    /// The cursor of the next page; null at the end.
    next: Option<String>,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct RescheduleBody {
    #[schema(value_type = String, format = DateTime)]
    deliver_at: Timestamp,
}

/// A body where none is needed.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Nothing {}

/// List messages, newest first.
#[utoipa::path(get, path = "/v1/messages", tag = "messages", params(ListQuery), responses(
    (status = 200, body = MessageList)))]
async fn list_messages(
    State(doors): State<Doors>,
    Query(query): Query<ListQuery>,
) -> Result<Json<MessageList>, Problem> {
    let (filter, page, with_payload) = (query.filter()?, query.page()?, query.with_payload()?);
    let mut listed = list(&doors, filter.clone(), page, with_payload).await?;
    if listed.next.is_none()
        && let Some(root) = root_of(&doors, &filter).await?
    {
        if listed.items.len() < page.limit {
            listed.items.push(shown(&doors, &root, with_payload).await?);
        } else {
            listed.next = Some(write_cursor(BEFORE_ALL));
        }
    }
    Ok(Json(listed))
}

/// Where a page begins that has nothing but the root of a conversation.
const BEFORE_ALL: i64 = 0;

/// The message that began a conversation which has its name: it names no conversation itself, and is older than all others.
async fn root_of(doors: &Doors, filter: &Filter) -> Result<Option<Record>, Problem> {
    let Some(id) = filter.correlation_id.as_deref().and_then(|id| MessageId::parse(id).ok()) else {
        return Ok(None);
    };
    let found = doors.pump().store().message(id).await?.map(|(record, _)| record);
    let of_itself = Filter { correlation_id: None, ..filter.clone() };
    let belongs =
        |record: &Record| record.head.correlation_id.is_none() && of_itself.matches(record);
    Ok(found.filter(belongs))
}

/// Show a message with its deliveries.
#[utoipa::path(get, path = "/v1/messages/{id}", tag = "messages",
    params(("id" = String, Path, description = "The message's id")), responses(
    (status = 200, body = MessageBody)))]
async fn get_message(
    State(doors): State<Doors>,
    Path(id): Path<String>,
) -> Result<Json<MessageBody>, Problem> {
    let id = message_id(&id)?;
    let found = doors.pump().store().message(id).await?;
    let (record, deliveries) = found.ok_or_else(|| no_such_message(id))?;
    Ok(Json(with_deliveries(&record, &deliveries)))
}

/// A message as it is shown alone.
pub(super) fn with_deliveries(record: &Record, deliveries: &[DeliveryRecord]) -> MessageBody {
    let deliveries = deliveries.iter().map(delivery_body).collect();
    MessageBody { deliveries: Some(deliveries), ..message_body(record) }
}

/// The payload, byte for byte as it was sent.
#[utoipa::path(get, path = "/v1/messages/{id}/payload", tag = "messages",
    params(("id" = String, Path, description = "The message's id")), responses(
    (status = 200, description = "The bytes", content_type = "application/octet-stream")))]
async fn get_payload(
    State(doors): State<Doors>,
    Path(id): Path<String>,
) -> Result<Response, Problem> {
    let id = message_id(&id)?;
    let store = doors.pump().store();
    let (record, _) = store.message(id).await?.ok_or_else(|| no_such_message(id))?;
    let payload = store.payload(id).await?.ok_or_else(|| no_such_message(id))?;
    let content_type = record.head.details.content_type.unwrap_or_default();
    let content_type = HeaderValue::try_from(content_type).ok().filter(|value| !value.is_empty());
    let mut response = payload.into_response();
    let plain = HeaderValue::from_static("application/octet-stream");
    response.headers_mut().insert(header::CONTENT_TYPE, content_type.unwrap_or(plain));
    // A browser that looks at a stranger's payload must neither guess at it nor run it.
    let no_guess = HeaderValue::from_static("nosniff");
    response.headers_mut().insert(header::X_CONTENT_TYPE_OPTIONS, no_guess);
    let sandbox = HeaderValue::from_static("sandbox");
    response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, sandbox);
    Ok(response)
}

/// Cancel a message that waits.
#[utoipa::path(delete, path = "/v1/messages/{id}", tag = "messages",
    params(("id" = String, Path, description = "The message's id")), responses(
    (status = 200, description = "It is cancelled", body = MessageBody),
    (status = 409, description = "It does not wait any more", body = ProblemBody, content_type = "application/problem+json")))]
async fn cancel_message(
    State(doors): State<Doors>,
    Path(id): Path<String>,
) -> Result<Json<MessageBody>, Problem> {
    amend(&doors, &id, Amendment::Cancel).await
}

/// Run a message that waits now, even if its queue is stopped.
#[utoipa::path(post, path = "/v1/messages/{id}/run", tag = "messages",
    params(("id" = String, Path, description = "The message's id")), responses(
    (status = 200, description = "It is due now", body = MessageBody),
    (status = 409, description = "It does not wait any more, or it is ready in a group", body = ProblemBody, content_type = "application/problem+json")))]
async fn run_message(
    State(doors): State<Doors>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Json<MessageBody>, Problem> {
    let Nothing {} = read_json_or_default(request).await?;
    let id = message_id(&id)?;
    let pump = doors.pump().clone();
    let run = async move {
        let amended = pump.store().amend(id, Amendment::RunNow).await?;
        if let Amended::Done(record) = &amended {
            // Whoever wants it run now wants its handler asked.
            pump.lift(&record.head.queue).await?;
        }
        Ok(amended)
    };
    amended_body(id, doors.to_the_end(run).await?)
}

/// Set when a message that waits is due.
#[utoipa::path(patch, path = "/v1/messages/{id}", tag = "messages", request_body = RescheduleBody,
    params(("id" = String, Path, description = "The message's id")), responses(
    (status = 200, description = "It is due then", body = MessageBody),
    (status = 409, description = "It does not wait any more, or it is ready in a group", body = ProblemBody, content_type = "application/problem+json")))]
async fn reschedule_message(
    State(doors): State<Doors>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Json<MessageBody>, Problem> {
    let RescheduleBody { deliver_at } = read_json(request).await?;
    let due = model::moment(deliver_at, SystemClock.now())
        .map_err(|detail| Invalid::new("/deliver_at", detail))?;
    amend(&doors, &id, Amendment::Reschedule(due)).await
}

async fn amend(
    doors: &Doors,
    id: &str,
    amendment: Amendment,
) -> Result<Json<MessageBody>, Problem> {
    let id = message_id(id)?;
    let store = doors.pump().store().clone();
    let amended = doors.to_the_end(async move { Ok(store.amend(id, amendment).await?) }).await?;
    amended_body(id, amended)
}

/// What a changed message looks like, or why it was not changed.
pub(super) fn amended_body(id: MessageId, amended: Amended) -> Result<Json<MessageBody>, Problem> {
    match amended {
        Amended::Done(record) => Ok(Json(message_body(&record))),
        Amended::Not(state) => {
            let detail = format!("the message is {state}, which does not allow it");
            Err(Problem::new(problem::WRONG_STATE, detail))
        }
        Amended::InGroup => {
            let detail = "the message is ready and of a group: it goes when those before it are done, which can be cancelled";
            Err(Problem::new(problem::WRONG_STATE, detail))
        }
        Amended::NoSuchMessage => Err(no_such_message(id)),
    }
}

pub(super) async fn list(
    doors: &Doors,
    filter: Filter,
    page: Page,
    with_payload: bool,
) -> Result<MessageList, Problem> {
    let store = doors.pump().store();
    let mut listed = store.messages(filter.clone(), page).await?;
    let fitting = fitting(&listed.items);
    if with_payload && fitting < listed.items.len() {
        // Asked again, because only the store knows where the page after a shorter one begins.
        listed = store.messages(filter, Page { limit: fitting, ..page }).await?;
    }
    let mut items = Vec::with_capacity(listed.items.len());
    for record in &listed.items {
        items.push(shown(doors, record, with_payload).await?);
    }
    Ok(MessageList { items, next: listed.next.map(write_cursor) })
}

async fn shown(doors: &Doors, record: &Record, with_payload: bool) -> Result<MessageBody, Problem> {
    let mut body = message_body(record);
    if with_payload && let Some(payload) = doors.pump().store().payload(record.head.id).await? {
        put_payload(&mut body, &payload);
    }
    Ok(body)
}

/// How many messages, from the front, have payloads that fit into one answer; at least one.
fn fitting(records: &[Record]) -> usize {
    let mut room = PAYLOADS_BYTES_MAX;
    let fits = |record: &&Record| {
        let left = room.checked_sub(record.size);
        room = left.unwrap_or(0);
        left.is_some()
    };
    records.iter().take_while(fits).count().max(1)
}

/// How many bytes of payloads a list holds at most, but for a single larger one.
const PAYLOADS_BYTES_MAX: u64 = 16 * 1024 * 1024;

pub(super) fn put_payload(body: &mut MessageBody, payload: &Bytes) {
    let content_type = body.content_type.as_deref().unwrap_or("");
    let media_type = content_type.split(';').next().unwrap_or("").trim().to_ascii_lowercase();
    let is_json = media_type == "application/json" || media_type.ends_with("+json");
    let shown = is_json && depth(payload) <= DEPTH_SHOWN_MAX;
    body.payload = shown.then(|| serde_json::from_slice(payload).ok()).flatten();
    body.payload_base64 = body.payload.is_none().then(|| BASE64_STANDARD.encode(payload));
}

/// How deep a JSON payload may be to stand in an answer as it is. Parsers give up at some depth (serde_json
/// at 128), and one strange payload must not make the whole page unreadable for them.
const DEPTH_SHOWN_MAX: usize = 100;

/// How deep brackets are nested in JSON, those in strings left out.
fn depth(json: &[u8]) -> usize {
    let (mut depth, mut deepest, mut in_string, mut escaped) = (0_usize, 0, false, false);
    for byte in json {
        match byte {
            _ if escaped => escaped = false,
            b'\\' if in_string => escaped = true,
            b'"' => in_string = !in_string,
            b'[' | b'{' if !in_string => {
                depth += 1;
                deepest = deepest.max(depth);
            }
            b']' | b'}' if !in_string => depth = depth.saturating_sub(1),
            _ => (),
        }
    }
    deepest
}

pub(super) fn message_body(record: &Record) -> MessageBody {
    let head = &record.head;
    let details = &head.details;
    MessageBody {
        id: head.id.to_string(),
        queue: head.queue.to_string(),
        state: record.state.as_str(),
        r#type: head.kind.clone(),
        content_type: details.content_type.clone(),
        priority: head.priority,
        correlation_id: head.correlation_id.clone(),
        causation_id: details.causation_id.clone(),
        group: details.group.clone(),
        fairness_key: details.fairness_key.clone(),
        published_id: details.published_id.map(|id| id.to_string()),
        reply_to: details.reply_to.as_ref().map(ToString::to_string),
        url: details.url.as_ref().map(ToString::to_string),
        event: details.event.iter().cloned().collect(),
        headers: details.headers.iter().cloned().collect(),
        enqueued_at: head.enqueued_at.to_string(),
        deliver_at: record.deliver_at.to_string(),
        expires_at: head.expires_at.map(|time| time.to_string()),
        finished_at: record.finished_at.map(|time| time.to_string()),
        attempts: record.tries.attempts,
        failures: record.tries.failures,
        crashes: record.tries.crashes,
        reason: record.reason.clone(),
        size: record.size,
        payload: None,
        payload_base64: None,
        deliveries: None,
    }
}

fn delivery_body(delivery: &DeliveryRecord) -> DeliveryBody {
    let answer = String::from_utf8_lossy(&delivery.answer).into_owned();
    DeliveryBody {
        number: delivery.number,
        replica: delivery.replica.to_string(),
        started_at: delivery.started_at.to_string(),
        duration_ms: delivery.duration.as_micros() as f64 / 1000.0,
        outcome: delivery.outcome.as_str(),
        status: delivery.status,
        error_kind: delivery.error_kind.map(|kind| kind.as_str()),
        error: delivery.error.clone(),
        answer: (!answer.is_empty()).then_some(answer),
    }
}

/// An id from a path; what is none names no message.
pub(super) fn message_id(text: &str) -> Result<MessageId, Problem> {
    MessageId::parse(text)
        .map_err(|_| Problem::new(problem::NO_SUCH_MESSAGE, "a message id is a UUID; this is none"))
}

fn no_such_message(id: MessageId) -> Problem {
    let detail = format!("there is no message {id}; it was deleted, or never was");
    Problem::new(problem::NO_SUCH_MESSAGE, detail)
}
