//! Many messages in, into a queue or to a topic. Routes, bodies, handlers, in this order.

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::{HeaderMap, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::model::{
    Destination, EVENT_TYPES, Event, Idempotency, Invalid, NewMessage, QueueName, TopicName,
};
use crate::policy::published_at_once;
use crate::store::{Enqueue, EnqueueOutcome, Enqueued, Receipt, Refusal};

use super::body::{Path, Query, json, media_type, read};
use super::envelope::{self, EnvelopeBody, EventBody, Trace};
use super::problem::{self, Problem, ProblemBody};
use super::sending::{no_options, refused, replayed, text};
use super::{Doors, RequestId};

pub(super) fn routes() -> OpenApiRouter<Doors> {
    OpenApiRouter::new().routes(routes!(post_batch)).routes(routes!(publish_batch))
}

/// Many messages.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct BatchBody {
    /// At most 10,000.
    #[schema(value_type = Vec<EnvelopeBody>)]
    messages: Vec<Box<RawValue>>,
    /// All or none.
    #[serde(default)]
    atomic: bool,
}

/// What became of many messages, in order.
#[derive(Debug, Serialize, ToSchema)]
struct BatchAnswer {
    items: Vec<BatchItem>,
}

/// What became of one of many.
#[derive(Debug, Default, Serialize, ToSchema)]
struct BatchItem {
    /// 201, 200 for a duplicate, or that of the problem.
    status: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    /// Of one that was published: what its copies share.
    #[serde(skip_serializing_if = "Option::is_none")]
    published_id: Option<String>,
    /// Of one that was published: how many queues wanted it.
    #[serde(skip_serializing_if = "Option::is_none")]
    matched: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    duplicate: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<ProblemBody>,
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct BatchQuery {
    /// All or none, for NDJSON.
    atomic: Option<bool>,
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct PublishBatchQuery {
    /// All or none, for NDJSON.
    atomic: Option<bool>,
    /// Refuse those that no queue wants.
    require_subscribers: Option<bool>,
}

/// Send many messages.
///
/// `{"messages": […], "atomic": false}`, or one envelope a line, or a batch of CloudEvents. Answers 207 with an item for
/// each, in order; with `atomic` 201 for all, or 422 and none is kept. `Idempotency-Key` covers the whole batch.
/// `traceparent`, `tracestate` and `baggage` are those of every message in it.
#[utoipa::path(post, path = "/v1/queues/{queue}/messages/batch", tag = "sending",
    params(("queue" = String, Path, description = "The queue's name"), BatchQuery,
        ("Idempotency-Key" = Option<String>, Header, description = "Covers the whole batch")),
    request_body(content((BatchBody = "application/json"), (String = "application/x-ndjson"), (Vec<EventBody> = "application/cloudevents-batch+json"))),
    responses(
        (status = 207, description = "An item for each message, in order", body = BatchAnswer),
        (status = 201, description = "`atomic`: all are committed", body = BatchAnswer),
        (status = 200, description = "`atomic`: the same request came before; this was its answer", body = BatchAnswer)))]
async fn post_batch(
    State(doors): State<Doors>,
    RequestId(request_id): RequestId,
    Path(queue): Path<String>,
    Query(query): Query<BatchQuery>,
    request: Request,
) -> Result<Response, Problem> {
    let to = Destination::Queue(QueueName::parse(&queue)?);
    many(&doors, &to, query.atomic, &request_id, request).await
}

/// Publish many messages to a topic.
///
/// The same for a topic: each message becomes a copy in each queue that wants it. One that could make more than 10,000
/// copies is sent in parts; where one of them fails, its messages and those after it have the problem, and a repeat with
/// the same `Idempotency-Key` sends these.
#[utoipa::path(post, path = "/v1/topics/{topic}/messages/batch", tag = "sending",
    params(("topic" = String, Path, description = "The topic's name"), PublishBatchQuery,
        ("Idempotency-Key" = Option<String>, Header, description = "Covers the whole batch")),
    request_body(content((BatchBody = "application/json"), (String = "application/x-ndjson"), (Vec<EventBody> = "application/cloudevents-batch+json"))),
    responses(
        (status = 207, description = "An item for each message, in order", body = BatchAnswer),
        (status = 201, description = "`atomic`: all are committed", body = BatchAnswer),
        (status = 200, description = "`atomic`: the same request came before; this was its answer", body = BatchAnswer)))]
async fn publish_batch(
    State(doors): State<Doors>,
    RequestId(request_id): RequestId,
    Path(topic): Path<String>,
    Query(query): Query<PublishBatchQuery>,
    request: Request,
) -> Result<Response, Problem> {
    let require_subscribers = query.require_subscribers.unwrap_or(false);
    let to = Destination::Topic { topic: TopicName::parse(&topic)?, require_subscribers };
    many(&doors, &to, query.atomic, &request_id, request).await
}

async fn many(
    doors: &Doors,
    to: &Destination,
    atomic: Option<bool>,
    request_id: &str,
    request: Request,
) -> Result<Response, Problem> {
    doors.refuse_while_draining()?;
    let (parts, body) = request.into_parts();
    let media_type = media_type(&parts.headers);
    if media_type == EVENT_TYPES[1] {
        if atomic.is_some() {
            let detail = "a batch of events is taken one by one";
            return Err(Invalid::new("atomic", detail).into());
        }
        let body = read(&parts.headers, body, BYTES_MAX).await?;
        return events(doors, to, &parts.headers, &body, request_id).await;
    }
    no_options(&parts.headers)?;
    let body = read(&parts.headers, body, BYTES_MAX).await?;
    let (items, atomic) = match media_type.as_str() {
        "application/json" => {
            if atomic.is_some() {
                let detail = "atomic stands in the body here";
                return Err(Invalid::new("atomic", detail).into());
            }
            let batch = json::<BatchBody>(&body)?;
            (
                batch.messages.into_iter().map(|raw| Bytes::from(raw.get().to_owned())).collect(),
                batch.atomic,
            )
        }
        "application/x-ndjson" | "application/jsonl" => (lines(&body), atomic.unwrap_or(false)),
        other => {
            let detail = format!(
                "a batch is application/json, application/x-ndjson or {}, not {other:?}",
                EVENT_TYPES[1]
            );
            return Err(Problem::new(problem::MEDIA_TYPE, detail));
        }
    };
    refuse_too_many(items.len())?;
    let key = envelope::key_of(&parts.headers)?;
    let same = batch_fingerprint(&media_type, atomic, &body);
    let message = |item: &Bytes| item_message(to, item, doors.body_limit());
    let batch = Batch::new(&items, message, key, same, &Trace::of(&parts.headers));
    batch.send(doors, to, atomic, request_id).await
}

/// Sends a batch of CloudEvents, each for itself.
pub(super) async fn events(
    doors: &Doors,
    to: &Destination,
    headers: &HeaderMap,
    body: &Bytes,
    request_id: &str,
) -> Result<Response, Problem> {
    no_options(headers)?;
    let items = json::<Vec<Box<RawValue>>>(body)?;
    refuse_too_many(items.len())?;
    let key = envelope::key_of(headers)?;
    let same = batch_fingerprint(EVENT_TYPES[1], false, body);
    let items = items.into_iter().map(|raw| Bytes::from(raw.get().to_owned())).collect::<Vec<_>>();
    let message = |item: &Bytes| event_message(to, item, doors.body_limit());
    let batch = Batch::new(&items, message, key, same, &Trace::of(headers));
    batch.send(doors, to, false, request_id).await
}

fn refuse_too_many(count: usize) -> Result<(), Problem> {
    if count <= BATCH_MAX {
        return Ok(());
    }
    let detail = format!("a batch has at most {BATCH_MAX} messages; this one has {count}");
    Err(Problem::new(problem::TOO_LARGE, detail))
}

/// A batch on its way: what could be read of it, and what could not.
struct Batch {
    good: Vec<(usize, NewMessage)>,
    bad: Vec<(usize, Problem)>,
    key: Option<Idempotency>,
}

impl Batch {
    fn new(
        items: &[Bytes],
        message: impl Fn(&Bytes) -> Result<NewMessage, Problem>,
        key: Option<String>,
        fingerprint: [u8; 32],
        trace: &Trace,
    ) -> Self {
        let mut batch = Self {
            good: Vec::with_capacity(items.len()),
            bad: Vec::new(),
            key: key.as_deref().map(|key| Idempotency::new("batch", key, fingerprint)),
        };
        for (index, item) in items.iter().enumerate() {
            match message(item) {
                Ok(mut message) => {
                    trace.put_into(&mut message);
                    if let Some(key) = &key {
                        // Derived from the batch's key, so that a repeat collapses item by item.
                        let key = format!("{key}:{index}");
                        message.keys.push(Idempotency::new("batch-item", &key, fingerprint));
                    }
                    batch.good.push((index, message));
                }
                Err(problem) => batch.bad.push((index, problem)),
            }
        }
        batch
    }

    async fn send(
        self,
        doors: &Doors,
        to: &Destination,
        atomic: bool,
        request_id: &str,
    ) -> Result<Response, Problem> {
        if atomic && !self.bad.is_empty() {
            return Err(all_refused(self.bad));
        }
        let (places, messages): (Vec<_>, Vec<_>) = self.good.into_iter().unzip();
        doors.check_replies("reply_to", &messages).await?;
        let at_once = doors.at_once(to).await?;
        if atomic && messages.len() > at_once {
            let detail = format!(
                "at most {at_once} messages are published all or none, because each becomes many"
            );
            return Err(Problem::new(problem::TOO_LARGE, detail));
        }
        let enqueue = Enqueue { messages, atomic, batch: self.key };
        let Parts { done, rest } = match doors.enqueue_in_parts(to, enqueue, at_once).await? {
            Ok(parts) => parts,
            Err(refusals) => {
                if let Some((_, Refusal::NoSuchQueue(name))) = refusals.first() {
                    return Err(Problem::no_such_queue(name));
                }
                let problems = refusals.iter().map(|(at, refusal)| (places[*at], refused(refusal)));
                return Err(all_refused(problems.collect()));
            }
        };
        if let Some(Enqueued::Refused(Refusal::NoSuchQueue(name))) = done.first() {
            return Err(Problem::no_such_queue(name));
        }
        let is_replayed =
            self.key.is_some() && rest.is_none() && !done.is_empty() && done.iter().all(is_known);
        let sent = done.iter().map(|one| item(one, request_id));
        let unsent = rest.iter().cycle().map(|problem| problem_item(problem, request_id));
        let mut items = places.into_iter().zip(sent.chain(unsent)).collect::<Vec<_>>();
        items.extend(self.bad.iter().map(|(at, problem)| (*at, problem_item(problem, request_id))));
        items.sort_by_key(|(at, _)| *at);
        let status = match (atomic, is_replayed) {
            (true, false) => StatusCode::CREATED,
            (true, true) => StatusCode::OK,
            (false, _) => StatusCode::MULTI_STATUS,
        };
        let items = items.into_iter().map(|(_, item)| item).collect();
        let response = (status, Json(BatchAnswer { items })).into_response();
        Ok(if is_replayed { replayed(response) } else { response })
    }
}

/// What became of a batch that was sent in parts.
struct Parts {
    done: Vec<Enqueued>,
    /// What came in the way of the others, after some were sent.
    rest: Option<Problem>,
}

/// Which messages could not be taken, where one refusal refuses all.
type Refusals = Vec<(usize, Refusal)>;

impl Doors {
    /// Takes messages in, so many in one transaction, to the end even if the client goes away: whoever repeats a batch
    /// without a key would send twice what was sent by then.
    async fn enqueue_in_parts(
        &self,
        to: &Destination,
        enqueue: Enqueue,
        at_once: usize,
    ) -> Result<Result<Parts, Refusals>, Problem> {
        let (this, to) = (self.clone(), to.clone());
        self.to_the_end(async move {
            let Enqueue { messages, atomic, batch } = enqueue;
            let mut done = Vec::with_capacity(messages.len());
            let mut messages = messages.into_iter().peekable();
            loop {
                let some = messages.by_ref().take(at_once).collect();
                let some = Enqueue { messages: some, atomic, batch };
                let problem = match this.enqueue(&to, some).await {
                    Ok(EnqueueOutcome::Done(some)) => {
                        done.extend(some);
                        if messages.peek().is_none() {
                            return Ok(Ok(Parts { done, rest: None }));
                        }
                        continue;
                    }
                    Ok(EnqueueOutcome::Refused(refusals)) => return Ok(Err(refusals)),
                    Ok(EnqueueOutcome::BatchKeyReused) => refused(&Refusal::KeyReused),
                    Err(problem) => problem,
                };
                if done.is_empty() {
                    return Err(problem);
                }
                // The answer is no error, so nobody else says what was in the way.
                let error = problem.cause.as_deref().map(|cause| cause as &dyn std::error::Error);
                tracing::warn!(code = problem.code.word, error, "a batch was sent in part");
                return Ok(Ok(Parts { done, rest: Some(problem) }));
            }
        })
        .await
    }

    /// How many messages go into one transaction: of those that become many, few enough that others are not held up.
    async fn at_once(&self, to: &Destination) -> Result<usize, Problem> {
        let Destination::Topic { topic, .. } = to else { return Ok(BATCH_MAX) };
        let subscriptions = self.pump().store().subscriptions().await?;
        Ok(published_at_once(topic, &subscriptions).min(BATCH_MAX))
    }
}

fn is_known(one: &Enqueued) -> bool {
    match one {
        Enqueued::Duplicate(_) => true,
        Enqueued::Published(published) => published.duplicate,
        Enqueued::New(_) | Enqueued::Refused(_) => false,
    }
}

fn item_message(to: &Destination, item: &Bytes, limit: usize) -> Result<NewMessage, Problem> {
    let (mut message, own) = envelope::from_envelope(to, json(item)?)?;
    refuse_too_large(&message, limit)?;
    if let Some(key) = own {
        message.keys.push(envelope::own_key(&key, Sha256::digest(item).into()));
    }
    Ok(message)
}

fn event_message(to: &Destination, item: &Bytes, limit: usize) -> Result<NewMessage, Problem> {
    let event = Event::from_json(text(item)?)?;
    let key = event.key();
    let mut message = event.into_message(to.clone());
    refuse_too_large(&message, limit)?;
    message.keys.push(key);
    Ok(message)
}

fn refuse_too_large(message: &NewMessage, limit: usize) -> Result<(), Problem> {
    if message.body.len() <= limit {
        return Ok(());
    }
    Err(Problem::new(problem::TOO_LARGE, format!("a payload has at most {limit} bytes")))
}

/// What makes a batch the same: its media type, whether it is all or none, and its body.
fn batch_fingerprint(media_type: &str, atomic: bool, body: &[u8]) -> [u8; 32] {
    let mut hash = Sha256::new();
    hash.update((media_type.len() as u64).to_be_bytes());
    hash.update(media_type);
    hash.update([u8::from(atomic)]);
    hash.update(body);
    hash.finalize().into()
}

fn lines(body: &Bytes) -> Vec<Bytes> {
    let mut lines = Vec::new();
    for line in body.split(|byte| *byte == b'\n') {
        let line = line.trim_ascii();
        if !line.is_empty() {
            lines.push(body.slice_ref(line));
        }
    }
    lines
}

fn item(one: &Enqueued, request_id: &str) -> BatchItem {
    let kept = |status, receipt: &Receipt, duplicate| BatchItem {
        status,
        id: Some(receipt.id.to_string()),
        duplicate: Some(duplicate),
        ..BatchItem::default()
    };
    match one {
        Enqueued::New(receipt) => kept(201, receipt, false),
        Enqueued::Duplicate(receipt) => kept(200, receipt, true),
        Enqueued::Published(published) => BatchItem {
            status: if published.duplicate { 200 } else { 201 },
            published_id: Some(published.id.to_string()),
            matched: Some(published.copies.len()),
            duplicate: Some(published.duplicate),
            ..BatchItem::default()
        },
        Enqueued::Refused(refusal) => problem_item(&refused(refusal), request_id),
    }
}

fn problem_item(problem: &Problem, request_id: &str) -> BatchItem {
    let body = problem.body(request_id);
    let status = problem.code.status.as_u16();
    BatchItem { status, problem: Some(body), ..BatchItem::default() }
}

/// One problem for a whole batch, with a pointer to each message that was wrong.
fn all_refused(problems: Vec<(usize, Problem)>) -> Problem {
    let errors = problems.into_iter().flat_map(|(at, problem)| {
        let prefix = format!("/messages/{at}");
        problem.into_errors().into_iter().map(move |wrong| wrong.under(&prefix))
    });
    Problem::invalid(errors.collect())
}

const BATCH_MAX: usize = 10_000;
/// The most bytes in the body of a batch.
pub(super) const BYTES_MAX: usize = 16 * 1024 * 1024;
