//! Messages in, one by one, into a queue or to a topic. Routes, bodies, handlers, in this order. See `batches.rs` for many.

use std::time::Duration;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, header};
use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::model::{
    Destination, EVENT_TYPES, Event, Invalid, NewMessage, QueueName, QueueSettings, TopicName,
    parse_span,
};
use crate::store::{
    Enqueue, EnqueueOutcome, Enqueued, Precondition, Published, PutQueue, Receipt, Refusal,
};

use super::batches;
use super::body::{Path, Query, json, media_type, read};
use super::envelope::{self, EnvelopeBody, EventBody, PayloadBody, Trace};
use super::messages;
use super::problem::{self, Problem};
use super::{Doors, RequestId};

pub(super) fn routes() -> OpenApiRouter<Doors> {
    OpenApiRouter::new().routes(routes!(post_message)).routes(routes!(publish_message))
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

/// What the publisher of a message is told.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct PublishedBody {
    /// What the copies share.
    #[schema(example = "01961234-5678-7abc-8def-0123456789ab")]
    pub(super) published_id: String,
    /// How many queues wanted it.
    pub(super) matched: usize,
    /// The copies.
    pub(super) messages: Vec<CopyBody>,
    /// Whether this is the answer to an earlier request with the same key.
    duplicate: bool,
}

/// A copy of what was published.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct CopyBody {
    queue: String,
    id: String,
}

impl From<&Published> for PublishedBody {
    fn from(published: &Published) -> Self {
        let copies = published.copies.iter();
        let copy = |(queue, id): (String, String)| CopyBody { queue, id };
        Self {
            published_id: published.id.to_string(),
            matched: published.copies.len(),
            messages: copies.map(|it| copy((it.queue.to_string(), it.id.to_string()))).collect(),
            duplicate: published.duplicate,
        }
    }
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct SendQuery {
    /// How long to wait for the message to be settled, as in `30s`; at most 60s.
    wait: Option<String>,
}

impl SendQuery {
    pub(super) fn wait(&self) -> Result<Option<Duration>, Problem> {
        self.wait.as_deref().map(wait_of).transpose()
    }
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub(super) struct PublishQuery {
    /// Refuse it where no queue wants it.
    require_subscribers: Option<bool>,
}

impl PublishQuery {
    fn destination(&self, topic: &str) -> Result<Destination, Problem> {
        let require_subscribers = self.require_subscribers.unwrap_or(false);
        Ok(Destination::Topic { topic: TopicName::parse(topic)?, require_subscribers })
    }
}

/// Send a message.
///
/// Any body: its bytes are the payload, its `Content-Type` goes along, options are headers
/// (`Pumphouse-Type`, `Pumphouse-Delay` or `Pumphouse-Deliver-At`, `Pumphouse-Expires-In` or
/// `Pumphouse-Expires-At`, `Pumphouse-Priority`, `Pumphouse-Group`, `Pumphouse-Fairness-Key`,
/// `Pumphouse-Unique-While-Pending`, `Pumphouse-Correlation-Id`, `Pumphouse-Causation-Id`, `Pumphouse-Reply-To`,
/// `Pumphouse-Forward-<name>`, `Idempotency-Key`). Or an envelope, with its media type. Or a CloudEvent, in binary
/// (`ce-*` headers) or structured mode; a batch of them is answered as batches are. When this answers 201, the message is
/// committed and synced to disk. With `wait` it answers when the message is settled, or the time is over.
#[utoipa::path(post, path = "/v1/queues/{queue}/messages", tag = "sending",
    params(("queue" = String, Path, description = "The queue's name"), SendQuery,
        ("Idempotency-Key" = Option<String>, Header, description = "Quoted or bare, at most 255 characters")),
    request_body(content(
        (PayloadBody = "application/octet-stream"),
        (EnvelopeBody = "application/vnd.pumphouse.message+json"),
        (EventBody = "application/cloudevents+json"))),
    responses(
        (status = 201, description = "Committed", body = ReceiptBody),
        (status = 202, description = "Committed, and not settled in the time to wait", body = ReceiptBody),
        (status = 200, description = "The same request came before, and this was its answer; or, with `wait`, the message, which is settled", body = SettledOrReceipt)))]
async fn post_message(
    State(doors): State<Doors>,
    RequestId(request_id): RequestId,
    Path(queue): Path<String>,
    Query(query): Query<SendQuery>,
    request: Request,
) -> Result<Response, Problem> {
    let queue = QueueName::parse(&queue)?;
    let wait = query.wait()?;
    let to = Destination::Queue(queue);
    match one(&doors, &to, &request_id, request, wait.is_some()).await? {
        Came::Message(message) => send(&doors, *message, wait).await,
        Came::Answered(response) => Ok(response),
    }
}

/// Publish a message to a topic.
///
/// Takes what a queue takes. One transaction puts a copy into each queue that has subscribed and wants it.
#[utoipa::path(post, path = "/v1/topics/{topic}/messages", tag = "sending",
    params(("topic" = String, Path, description = "The topic's name"), PublishQuery,
        ("Idempotency-Key" = Option<String>, Header, description = "Quoted or bare, at most 255 characters")),
    request_body(content(
        (PayloadBody = "application/octet-stream"),
        (EnvelopeBody = "application/vnd.pumphouse.message+json"),
        (EventBody = "application/cloudevents+json"))),
    responses(
        (status = 201, description = "Committed, in every queue that wants it", body = PublishedBody),
        (status = 200, description = "The same request came before; this was its answer", body = PublishedBody)))]
async fn publish_message(
    State(doors): State<Doors>,
    RequestId(request_id): RequestId,
    Path(topic): Path<String>,
    Query(query): Query<PublishQuery>,
    request: Request,
) -> Result<Response, Problem> {
    let to = query.destination(&topic)?;
    match one(&doors, &to, &request_id, request, false).await? {
        Came::Message(message) => send(&doors, *message, None).await,
        Came::Answered(response) => Ok(response),
    }
}

/// What a `200` has: the message with its deliveries where it was waited for, else the first receipt.
#[derive(ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "only its description is used")]
pub(super) enum SettledOrReceipt {
    Settled(Box<messages::MessageBody>),
    Receipt(ReceiptBody),
}

/// What a request to send one message brought.
enum Came {
    Message(Box<NewMessage>),
    /// It was a batch of events, and is answered as that.
    Answered(Response),
}

async fn one(
    doors: &Doors,
    to: &Destination,
    request_id: &str,
    request: Request,
    waits: bool,
) -> Result<Came, Problem> {
    doors.refuse_while_draining()?;
    let (parts, body) = request.into_parts();
    let headers = &parts.headers;
    let media_type = media_type(headers);
    let [event, events] = EVENT_TYPES;
    if media_type == events {
        if waits {
            return Err(Invalid::new("wait", "a batch is not waited for").into());
        }
        let body = read(headers, body, batches::BYTES_MAX).await?;
        let answer = batches::events(doors, to, headers, &body, request_id).await?;
        return Ok(Came::Answered(answer));
    }
    let body = read(headers, body, doors.body_limit()).await?;
    let message = if media_type == ENVELOPE {
        one_envelope(to, headers, &body)?
    } else if media_type == event {
        let _: IgnoredAny = json(&body)?;
        let event = Event::from_json(text(&body)?)?;
        with_key(envelope::from_event(to, headers, event)?, headers, &body)?
    } else if envelope::is_event(headers) {
        let message = envelope::from_event_headers(to, headers, body.clone())?;
        with_key(message, headers, &body)?
    } else {
        with_key(envelope::from_headers(to, headers, body.clone())?, headers, &body)?
    };
    Ok(Came::Message(Box::new(message)))
}

/// Sends it, waits for its end if that is wanted, and says what became of it.
pub(super) async fn send(
    doors: &Doors,
    message: NewMessage,
    wait: Option<Duration>,
) -> Result<Response, Problem> {
    doors.check_replies("reply_to", std::slice::from_ref(&message)).await?;
    // Before it is sent, so that nothing of it is missed.
    let watch = wait.map(|wait| (doors.pump().watch(message.id), wait));
    let to = message.to.clone();
    let enqueue = Enqueue { messages: vec![message], atomic: false, batch: None };
    let EnqueueOutcome::Done(mut all) = doors.enqueue(&to, enqueue).await? else {
        return Err(Problem::new(problem::INTERNAL, "one message was refused as a batch"));
    };
    let (receipt, is_new) = match all.pop() {
        Some(Enqueued::New(receipt)) => (receipt, true),
        Some(Enqueued::Duplicate(receipt)) => (receipt, false),
        Some(Enqueued::Published(published)) => return Ok(published_answer(&published)),
        Some(Enqueued::Refused(refusal)) => return Err(refused(&refusal)),
        None => {
            let what = "one message was sent, and none answered for";
            return Err(Problem::new(problem::INTERNAL, what));
        }
    };
    let status = if is_new { StatusCode::CREATED } else { StatusCode::OK };
    let Some((watch, wait)) = watch else { return Ok(receipt_answer(status, &receipt, !is_new)) };
    let watch = if is_new { watch } else { doors.pump().watch(receipt.id) };
    let ended = watch.ended(wait, is_new).await.unwrap_or_else(|error| {
        // It is committed, whatever can be seen of it now.
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "cannot look at a message that is waited for"
        );
        None
    });
    match ended {
        Some((record, deliveries)) => {
            let body = Json(messages::with_deliveries(&record, &deliveries));
            Ok(located(body.into_response(), &receipt, !is_new))
        }
        None => Ok(receipt_answer(StatusCode::ACCEPTED, &receipt, !is_new)),
    }
}

fn wait_of(text: &str) -> Result<Duration, Problem> {
    let wait = parse_span(text).map_err(|wrong| Invalid::new("wait", wrong.detail))?;
    if wait > WAIT_MAX {
        return Err(Invalid::new("wait", "at most 60s").into());
    }
    Ok(wait)
}

/// A body that is to be text.
pub(super) fn text(body: &[u8]) -> Result<&str, Problem> {
    let wrong = |_| Problem::new(problem::UNREADABLE, "the body is not UTF-8");
    std::str::from_utf8(body).map_err(wrong)
}

/// The message with the key of the request, if it has one.
fn with_key(
    mut message: NewMessage,
    headers: &HeaderMap,
    body: &[u8],
) -> Result<NewMessage, Problem> {
    let key = envelope::key_of(headers)?;
    let key = key.map(|key| envelope::own_key(&key, envelope::fingerprint(headers, body)));
    message.keys.extend(key);
    Ok(message)
}

fn one_envelope(
    to: &Destination,
    headers: &HeaderMap,
    body: &Bytes,
) -> Result<NewMessage, Problem> {
    no_options(headers)?;
    let (mut message, own) = envelope::from_envelope(to, json(body)?)?;
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

/// An envelope has its options inside; the same as headers would leave open which counts.
pub(super) fn no_options(headers: &HeaderMap) -> Result<(), Problem> {
    for name in headers.keys() {
        envelope::refuse_event_header(name)?;
        if name.as_str().starts_with("pumphouse-") {
            let detail = "with an envelope, options stand inside it, not in headers";
            return Err(Invalid::new(name.as_str(), detail).into());
        }
    }
    Ok(())
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
    located((status, Json(body)).into_response(), receipt, duplicate)
}

fn located(mut response: Response, receipt: &Receipt, duplicate: bool) -> Response {
    let location = format!("/v1/messages/{}", receipt.id);
    let location = HeaderValue::try_from(location).expect("an id is plain ASCII");
    response.headers_mut().insert(header::LOCATION, location);
    if duplicate { replayed(response) } else { response }
}

fn published_answer(published: &Published) -> Response {
    let body = Json(PublishedBody::from(published));
    if published.duplicate {
        return replayed((StatusCode::OK, body).into_response());
    }
    (StatusCode::CREATED, body).into_response()
}

/// An answer that was given before.
pub(super) fn replayed(mut response: Response) -> Response {
    response.headers_mut().insert("idempotency-replayed", HeaderValue::from_static("true"));
    response
}

pub(super) fn refused(refusal: &Refusal) -> Problem {
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
        Refusal::NoSubscribers(topic) => {
            let detail = format!(
                "no queue wants this message of the topic {topic}; \
                 PUT /admin/v1/topics/{topic}/subscriptions/NAME subscribes one"
            );
            Problem::new(problem::NO_SUBSCRIBERS, detail)
        }
    }
}

impl Doors {
    /// Takes messages in, to the end even if the client goes away, and makes the queue where that is wanted.
    pub(super) async fn enqueue(
        &self,
        to: &Destination,
        enqueue: Enqueue,
    ) -> Result<EnqueueOutcome, Problem> {
        let queue = to.queue().filter(|_| self.creates_queues()).cloned();
        let Some(queue) = queue else {
            // One transaction, which the store ends whether anybody waits for it or not.
            return Ok(self.pump().enqueue(enqueue).await?);
        };
        let this = self.clone();
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
            tracing::warn!(%queue, "a message to an unknown queue made it; its messages wait until a worker takes them, or it is given a handler");
        }
        Ok(())
    }

    /// Refuses messages whose answers go to queues that are not there, before a handler has done its work for nothing.
    /// `pointer` is where each names its queue.
    pub(super) async fn check_replies(
        &self,
        pointer: &str,
        messages: &[NewMessage],
    ) -> Result<(), Problem> {
        let replies = messages.iter().filter_map(|message| message.details.reply_to.as_ref());
        for queue in replies.collect::<std::collections::BTreeSet<_>>() {
            if self.pump().store().queue(queue).await?.is_none() {
                let detail = format!("there is no queue {queue} for the answer");
                return Err(Invalid::new(pointer, detail).into());
            }
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
/// How long a message is waited for at most.
const WAIT_MAX: Duration = Duration::from_secs(60);
