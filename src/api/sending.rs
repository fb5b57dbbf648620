//! Messages in: one by one and in batches. Routes, bodies, handlers, in this order.

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::model::{Idempotency, Invalid, NewMessage, QueueName, QueueSettings};
use crate::store::{Enqueue, EnqueueOutcome, Enqueued, Precondition, PutQueue, Receipt, Refusal};

use super::body::{Path, Query, json, media_type, read};
use super::envelope::{self, EnvelopeBody, Trace};
use super::problem::{self, Problem, ProblemBody};
use super::{Doors, RequestId};

pub(super) fn routes() -> OpenApiRouter<Doors> {
    OpenApiRouter::new().routes(routes!(post_message)).routes(routes!(post_batch))
}

/// What the sender of a message is told.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct ReceiptBody {
    #[schema(example = "01961234-5678-7abc-8def-0123456789ab")]
    id: String,
    queue: String,
    /// `ready` or `scheduled`.
    state: &'static str,
    enqueued_at: String,
    deliver_at: String,
    /// Whether this is the answer to an earlier request with the same key.
    duplicate: bool,
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
#[derive(Debug, Serialize, ToSchema)]
struct BatchItem {
    /// 201, 200 for a duplicate, or that of the problem.
    status: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    id: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    duplicate: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<ProblemBody>,
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct SendQuery {
    /// Not available in this version.
    wait: Option<String>,
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct BatchQuery {
    /// All or none, for NDJSON.
    atomic: Option<bool>,
}

/// Send a message.
///
/// Any body: its bytes are the payload, its `Content-Type` goes along, options are headers
/// (`Pumphouse-Type`, `Pumphouse-Delay` or `Pumphouse-Deliver-At`, `Pumphouse-Expires-In` or
/// `Pumphouse-Expires-At`, `Pumphouse-Priority`, `Pumphouse-Group`, `Pumphouse-Fairness-Key`,
/// `Pumphouse-Unique-While-Pending`, `Pumphouse-Correlation-Id`, `Pumphouse-Causation-Id`,
/// `Pumphouse-Forward-<name>`, `Idempotency-Key`). Or an envelope, with its media type. When this
/// answers 201, the message is committed and synced to disk.
#[utoipa::path(post, path = "/v1/queues/{queue}/messages", tag = "sending",
    params(("queue" = String, Path, description = "The queue's name"), SendQuery,
        ("Idempotency-Key" = Option<String>, Header, description = "Quoted or bare, at most 255 characters")),
    request_body(content(
        (String = "application/octet-stream"),
        (EnvelopeBody = "application/vnd.pumphouse.message+json"))),
    responses(
        (status = 201, description = "Committed", body = ReceiptBody),
        (status = 200, description = "The same request came before; this was its answer", body = ReceiptBody)))]
async fn post_message(
    State(doors): State<Doors>,
    Path(queue): Path<String>,
    Query(query): Query<SendQuery>,
    request: Request,
) -> Result<Response, Problem> {
    let queue = QueueName::parse(&queue)?;
    if query.wait.is_some() {
        return Err(envelope::not_available("?wait"));
    }
    doors.refuse_while_draining()?;
    let (parts, body) = request.into_parts();
    let media_type = media_type(&parts.headers);
    let body = read(&parts.headers, body, doors.body_limit()).await?;
    let message = match media_type.as_str() {
        ENVELOPE => one_envelope(&queue, &parts.headers, &body)?,
        "application/cloudevents+json" | "application/cloudevents-batch+json" => {
            let detail = "CloudEvents are not available in this version";
            return Err(Problem::new(problem::MEDIA_TYPE, detail));
        }
        _ => one_raw(&queue, &parts.headers, body)?,
    };
    let enqueue = Enqueue { messages: vec![message], atomic: false, batch: None };
    let EnqueueOutcome::Done(mut all) = doors.enqueue(&queue, enqueue).await? else {
        return Err(Problem::new(problem::INTERNAL, "one message was refused as a batch"));
    };
    match all.pop() {
        Some(Enqueued::New(receipt)) => Ok(receipt_answer(StatusCode::CREATED, &receipt, false)),
        Some(Enqueued::Duplicate(receipt)) => Ok(receipt_answer(StatusCode::OK, &receipt, true)),
        Some(Enqueued::Refused(refusal)) => Err(refused(&refusal)),
        None => Err(Problem::new(problem::INTERNAL, "one message was sent, and none answered for")),
    }
}

/// Send many messages.
///
/// `{"messages": […], "atomic": false}`, or one envelope a line. Answers 207 with an item for each, in
/// order; with `atomic` 201 for all, or 422 and none is kept. `Idempotency-Key` covers the whole batch.
/// `traceparent`, `tracestate` and `baggage` are those of every message in it.
#[utoipa::path(post, path = "/v1/queues/{queue}/messages/batch", tag = "sending",
    params(("queue" = String, Path, description = "The queue's name"), BatchQuery,
        ("Idempotency-Key" = Option<String>, Header, description = "Covers the whole batch")),
    request_body(content((BatchBody = "application/json"), (String = "application/x-ndjson"))),
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
    let queue = QueueName::parse(&queue)?;
    doors.refuse_while_draining()?;
    let (parts, body) = request.into_parts();
    let media_type = media_type(&parts.headers);
    no_options(&parts.headers)?;
    let body = read(&parts.headers, body, BATCH_BYTES_MAX).await?;
    let (items, atomic) = match media_type.as_str() {
        "application/json" => {
            if query.atomic.is_some() {
                let detail = "atomic stands in the body here";
                return Err(Invalid::new("atomic", detail).into());
            }
            let batch = json::<BatchBody>(&body)?;
            (
                batch.messages.into_iter().map(|raw| Bytes::from(raw.get().to_owned())).collect(),
                batch.atomic,
            )
        }
        "application/x-ndjson" | "application/jsonl" => {
            (lines(&body), query.atomic.unwrap_or(false))
        }
        other => {
            let detail =
                format!("a batch is application/json or application/x-ndjson, not {other:?}");
            return Err(Problem::new(problem::MEDIA_TYPE, detail));
        }
    };
    if items.len() > BATCH_MAX {
        let detail =
            format!("a batch has at most {BATCH_MAX} messages; this one has {}", items.len());
        return Err(Problem::new(problem::TOO_LARGE, detail));
    }
    let key = envelope::key_of(&parts.headers)?;
    let same = batch_fingerprint(&media_type, atomic, &body);
    let trace = Trace::of(&parts.headers);
    let batch = Batch::new(&queue, &items, key, same, &trace, doors.body_limit());
    batch.send(&doors, &queue, atomic, &request_id).await
}

/// A batch on its way: what could be read of it, and what could not.
struct Batch {
    good: Vec<(usize, NewMessage)>,
    bad: Vec<(usize, Problem)>,
    key: Option<Idempotency>,
}

impl Batch {
    fn new(
        queue: &QueueName,
        items: &[Bytes],
        key: Option<String>,
        fingerprint: [u8; 32],
        trace: &Trace,
        body_limit: usize,
    ) -> Self {
        let mut batch = Self {
            good: Vec::with_capacity(items.len()),
            bad: Vec::new(),
            key: key.as_deref().map(|key| Idempotency::new("batch", key, fingerprint)),
        };
        for (index, item) in items.iter().enumerate() {
            match item_message(queue, item, body_limit) {
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
        queue: &QueueName,
        atomic: bool,
        request_id: &str,
    ) -> Result<Response, Problem> {
        if atomic && !self.bad.is_empty() {
            return Err(all_refused(self.bad));
        }
        let (places, messages): (Vec<_>, Vec<_>) = self.good.into_iter().unzip();
        let enqueue = Enqueue { messages, atomic, batch: self.key };
        let done = match doors.enqueue(queue, enqueue).await? {
            EnqueueOutcome::Done(done) => done,
            EnqueueOutcome::BatchKeyReused => return Err(refused(&Refusal::KeyReused)),
            EnqueueOutcome::Refused(refusals) => {
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
        let mut items = places
            .into_iter()
            .zip(&done)
            .map(|(at, one)| (at, item(one, request_id)))
            .collect::<Vec<_>>();
        items.extend(self.bad.iter().map(|(at, problem)| (*at, problem_item(problem, request_id))));
        items.sort_by_key(|(at, _)| *at);
        let known = |one: &Enqueued| matches!(one, Enqueued::Duplicate(_));
        let replayed = self.key.is_some() && !done.is_empty() && done.iter().all(known);
        let status = match (atomic, replayed) {
            (true, false) => StatusCode::CREATED,
            (true, true) => StatusCode::OK,
            (false, _) => StatusCode::MULTI_STATUS,
        };
        let items = items.into_iter().map(|(_, item)| item).collect();
        let mut response = (status, Json(BatchAnswer { items })).into_response();
        if replayed {
            response.headers_mut().insert("idempotency-replayed", HeaderValue::from_static("true"));
        }
        Ok(response)
    }
}

fn one_raw(queue: &QueueName, headers: &HeaderMap, body: Bytes) -> Result<NewMessage, Problem> {
    let key = envelope::key_of(headers)?;
    let key = key.map(|key| envelope::own_key(&key, envelope::fingerprint(headers, &body)));
    let mut message = envelope::from_headers(queue, headers, body)?;
    message.keys.extend(key);
    Ok(message)
}

fn one_envelope(
    queue: &QueueName,
    headers: &HeaderMap,
    body: &Bytes,
) -> Result<NewMessage, Problem> {
    no_options(headers)?;
    let (mut message, own) = envelope::from_envelope(queue, json(body)?)?;
    Trace::of(headers).put_into(&mut message);
    let header = envelope::key_of(headers)?;
    if header.is_some() && own.is_some() && header != own {
        let detail = "the envelope's key and the header's differ";
        return Err(Invalid::new("/idempotency_key", detail).into());
    }
    if let Some(key) = own.or(header) {
        message.keys.push(envelope::own_key(&key, envelope::fingerprint(headers, body)));
    }
    Ok(message)
}

fn item_message(queue: &QueueName, item: &Bytes, limit: usize) -> Result<NewMessage, Problem> {
    let (mut message, own) = envelope::from_envelope(queue, json(item)?)?;
    if message.body.len() > limit {
        let detail = format!("a payload has at most {limit} bytes");
        return Err(Problem::new(problem::TOO_LARGE, detail));
    }
    if let Some(key) = own {
        message.keys.push(envelope::own_key(&key, Sha256::digest(item).into()));
    }
    Ok(message)
}

/// An envelope has its options inside; the same as headers would leave open which counts.
fn no_options(headers: &HeaderMap) -> Result<(), Problem> {
    for name in headers.keys() {
        envelope::refuse_event_header(name)?;
        if name.as_str().starts_with("pumphouse-") {
            let detail = "with an envelope, options stand inside it, not in headers";
            return Err(Invalid::new(name.as_str(), detail).into());
        }
    }
    Ok(())
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

fn receipt_answer(status: StatusCode, receipt: &Receipt, duplicate: bool) -> Response {
    let body = ReceiptBody {
        id: receipt.id.to_string(),
        queue: receipt.queue.to_string(),
        state: receipt.state.as_str(),
        enqueued_at: receipt.enqueued_at.to_string(),
        deliver_at: receipt.deliver_at.to_string(),
        duplicate,
    };
    let location = format!("/v1/messages/{}", receipt.id);
    let mut response = (status, Json(body)).into_response();
    let location = HeaderValue::try_from(location).expect("an id is plain ASCII");
    response.headers_mut().insert(header::LOCATION, location);
    if duplicate {
        let yes = HeaderValue::from_static("true");
        response.headers_mut().insert("idempotency-replayed", yes);
    }
    response
}

fn item(one: &Enqueued, request_id: &str) -> BatchItem {
    let kept = |status, receipt: &Receipt, duplicate| BatchItem {
        status,
        id: Some(receipt.id.to_string()),
        duplicate: Some(duplicate),
        problem: None,
    };
    match one {
        Enqueued::New(receipt) => kept(201, receipt, false),
        Enqueued::Duplicate(receipt) => kept(200, receipt, true),
        Enqueued::Refused(refusal) => problem_item(&refused(refusal), request_id),
    }
}

fn problem_item(problem: &Problem, request_id: &str) -> BatchItem {
    let body = problem.body(request_id);
    let status = problem.code.status.as_u16();
    BatchItem { status, id: None, duplicate: None, problem: Some(body) }
}

/// One problem for a whole batch, with a pointer to each message that was wrong.
fn all_refused(problems: Vec<(usize, Problem)>) -> Problem {
    let errors = problems.into_iter().flat_map(|(at, problem)| {
        let prefix = format!("/messages/{at}");
        problem.into_errors().into_iter().map(move |wrong| wrong.under(&prefix))
    });
    Problem::invalid(errors.collect())
}

fn refused(refusal: &Refusal) -> Problem {
    match refusal {
        Refusal::NoSuchQueue(name) => Problem::no_such_queue(name),
        Refusal::QueueFull(name) => {
            let detail =
                format!("the queue {name} has as many messages as its max_messages allows");
            Problem::new(problem::QUEUE_FULL, detail)
        }
        Refusal::KeyReused => {
            let detail = "this Idempotency-Key came before with another request; use a new key for a new request";
            Problem::new(problem::KEY_REUSED, detail)
        }
    }
}

impl Doors {
    /// Takes messages in, to the end even if the client goes away, and makes the queue where that is wanted.
    async fn enqueue(
        &self,
        queue: &QueueName,
        enqueue: Enqueue,
    ) -> Result<EnqueueOutcome, Problem> {
        if !self.creates_queues() {
            // One transaction, which the store ends whether anybody waits for it or not.
            return Ok(self.pump().enqueue(enqueue).await?);
        }
        let (this, queue) = (self.clone(), queue.clone());
        self.to_the_end(async move {
            let outcome = this.pump().enqueue(enqueue.clone()).await?;
            if !lacks_queue(&outcome) {
                return Ok(outcome);
            }
            this.make_queue(&queue).await?;
            Ok(this.pump().enqueue(enqueue).await?)
        })
        .await
    }

    async fn make_queue(&self, queue: &QueueName) -> Result<(), Problem> {
        let settings = QueueSettings::default();
        let put = self.pump().store().put_queue(queue, settings, Precondition::Absent).await?;
        if let PutQueue::Created(_) = put {
            // A typing error in a name makes one too, and nothing else would tell.
            tracing::warn!(%queue, "a message to an unknown queue made it; it has no handler, so what is in it waits");
        }
        Ok(())
    }
}

fn lacks_queue(outcome: &EnqueueOutcome) -> bool {
    match outcome {
        EnqueueOutcome::Done(all) => {
            matches!(all.first(), Some(Enqueued::Refused(Refusal::NoSuchQueue(_))))
        }
        EnqueueOutcome::Refused(all) => matches!(all.first(), Some((_, Refusal::NoSuchQueue(_)))),
        EnqueueOutcome::BatchKeyReused => false,
    }
}

const ENVELOPE: &str = "application/vnd.pumphouse.message+json";
const BATCH_MAX: usize = 10_000;
const BATCH_BYTES_MAX: usize = 16 * 1024 * 1024;
