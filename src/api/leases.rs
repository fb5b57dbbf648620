//! Pulling workers: take messages, say what became of them, hold them for longer. Routes, bodies, handlers.

use std::time::Duration;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use http::StatusCode;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::clock::{Clock, SystemClock};
use crate::model::{
    self, Invalid, Leased, NewMessage, QueueName, Record, Reply, State as MessageState, Ticket,
    Verdict,
};
use crate::pump::{Heard, PULL_MAX, Pull, Pulled, WorkersWord};

use super::batches::BYTES_MAX;
use super::body::{Path, json, read, read_json, read_json_or_default};
use super::envelope::{EnvelopeBody, own_key};
use super::lasting::Lasting;
use super::messages::{MessageBody, message_body, put_payload};
use super::problem::{self, Problem, ProblemBody};
use super::{Doors, RequestId};

pub(super) fn routes() -> OpenApiRouter<Doors> {
    OpenApiRouter::new()
        .routes(routes!(lease_messages))
        .routes(routes!(settle_leases))
        .routes(routes!(renew_leases))
}

/// What a worker wants.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct LeaseRequest {
    /// At most so many messages, from 1 to 1000; 10 without it.
    max: Option<usize>,
    /// How long to wait for the first, at most 60s; not at all without it.
    wait: Option<Lasting>,
    /// How long it may hold them, from 1s to 12h; the queue's `lease` without it.
    duration: Option<Lasting>,
}

/// What a worker got.
#[derive(Debug, Serialize, ToSchema)]
struct LeasesBody {
    leases: Vec<LeaseBody>,
}

/// A message that a worker holds.
#[derive(Debug, Serialize, ToSchema)]
struct LeaseBody {
    /// To be shown with all that is said of it.
    token: String,
    expires_at: String,
    /// The attempt's number, from 1.
    attempt: u32,
    /// The sender's trace, to go on from.
    #[serde(skip_serializing_if = "Option::is_none")]
    traceparent: Option<String>,
    message: MessageBody,
}

/// What workers say.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct SettleBody {
    /// At most 1000.
    settlements: Vec<SettlementBody>,
}

/// What a worker says of a message.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct SettlementBody {
    token: String,
    verdict: VerdictBody,
    /// With `retry`: not before this; without it, by the queue's recovery.
    delay: Option<Lasting>,
    /// Why, for whoever looks.
    reason: Option<String>,
    /// With `ack`: what is to be sent together with it, or not at all; each names its `queue` or `topic`.
    #[serde(default)]
    #[schema(value_type = Vec<EnvelopeBody>, required = false)]
    messages: Vec<Box<RawValue>>,
    /// With `ack`: what goes to the queue that the message names in `reply_to`.
    reply: Option<WorkersReply>,
}

/// An answer to a message.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct WorkersReply {
    /// Any JSON.
    #[schema(value_type = serde_json::Value, required = false)]
    payload: Option<Box<RawValue>>,
    payload_base64: Option<String>,
    content_type: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum VerdictBody {
    Ack,
    Retry,
    DeadLetter,
    Discard,
    /// Given back untouched: nothing is counted.
    Release,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct RenewBody {
    /// At most 1000.
    tokens: Vec<String>,
    /// How long from now, from 1s to 12h.
    duration: Lasting,
}

/// What became of what workers said, in order.
#[derive(Debug, Serialize, ToSchema)]
struct HeardBody {
    items: Vec<HeardItem>,
}

#[derive(Debug, Serialize, ToSchema)]
struct HeardItem {
    token: String,
    /// 200, or that of the problem: 409 for a lease that is over, used or unknown.
    status: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    problem: Option<ProblemBody>,
}

/// Lease messages to a worker.
///
/// Waits for the first. A queue that is stopped leases nothing; how many are out is bounded by the queue's
/// `concurrency.limit`, over all workers and replicas.
#[utoipa::path(post, path = "/v1/queues/{queue}/leases", tag = "pulling",
    params(("queue" = String, Path, description = "The queue's name")),
    request_body = Option<LeaseRequest>,
    responses(
        (status = 200, description = "The messages; none where there were none in time", body = LeasesBody)))]
async fn lease_messages(
    State(doors): State<Doors>,
    Path(queue): Path<String>,
    request: Request,
) -> Result<Json<LeasesBody>, Problem> {
    let queue = QueueName::parse(&queue)?;
    doors.refuse_while_draining()?;
    let wanted = read_json_or_default::<LeaseRequest>(request).await?;
    let pull = Pull {
        max: wanted.max.unwrap_or(10),
        wait: wanted.wait.unwrap_or_default().0,
        duration: wanted.duration.map(|lasting| lasting.0),
    };
    if !(1..=PULL_MAX).contains(&pull.max) {
        return Err(Invalid::new("/max", "from 1 to 1000").into());
    }
    if pull.wait > WAIT_MAX {
        return Err(Invalid::new("/wait", "at most 60s").into());
    }
    pull.duration.map_or(Ok(()), check_duration)?;
    match doors.pump().pull(&queue, pull).await? {
        Pulled::Leases(leased, duration) => {
            let leases = leased.iter().map(|one| lease_body(one, duration)).collect();
            Ok(Json(LeasesBody { leases }))
        }
        Pulled::NoSuchQueue => Err(Problem::no_such_queue(&queue)),
        Pulled::NotPulled => {
            let detail = format!(
                "the queue {queue} sends its messages to a handler; workers take them where handler.kind is pull"
            );
            Err(Problem::new(problem::WRONG_HANDLER, detail))
        }
    }
}

/// Say what became of messages.
///
/// An ack and what is sent with it are one transaction.
#[utoipa::path(post, path = "/v1/leases/settle", tag = "pulling", request_body = SettleBody,
    responses((status = 207, description = "An item for each, in order", body = HeardBody)))]
async fn settle_leases(
    State(doors): State<Doors>,
    RequestId(request_id): RequestId,
    request: Request,
) -> Result<Response, Problem> {
    let (parts, body) = request.into_parts();
    let body = json::<SettleBody>(&read(&parts.headers, body, BYTES_MAX).await?)?;
    refuse_too_many("/settlements", body.settlements.len())?;
    let tokens = body.settlements.iter().map(|one| one.token.clone()).collect::<Vec<_>>();
    let mut words = Vec::new();
    let mut items = tokens.into_iter().map(|token| (token, Ok(()))).collect::<Vec<_>>();
    for (place, settlement) in body.settlements.into_iter().enumerate() {
        match word(settlement, doors.body_limit()) {
            Ok(word) => words.push((place, word)),
            Err(problem) => items[place].1 = Err(problem),
        }
    }
    let (places, words): (Vec<_>, Vec<_>) = words.into_iter().unzip();
    let pump = doors.pump().clone();
    // To the end, even if the worker goes away: it has said what it had to say.
    let heard = doors.to_the_end(async move { Ok(pump.hear(words).await?) }).await?;
    for (place, heard) in places.into_iter().zip(heard) {
        items[place].1 = match heard {
            Heard::Settled => Ok(()),
            Heard::LeaseLost => Err(lease_lost()),
            Heard::Refused(what) => Err(Invalid::new("/messages", what).into()),
            Heard::Failed(error) => Err(error.into()),
        };
    }
    Ok(heard_answer(items, &request_id))
}

/// Hold messages for longer.
#[utoipa::path(post, path = "/v1/leases/renew", tag = "pulling", request_body = RenewBody,
    responses((status = 207, description = "An item for each, in order", body = HeardBody)))]
async fn renew_leases(
    State(doors): State<Doors>,
    RequestId(request_id): RequestId,
    request: Request,
) -> Result<Response, Problem> {
    let RenewBody { tokens, duration } = read_json(request).await?;
    refuse_too_many("/tokens", tokens.len())?;
    check_duration(duration.0)?;
    let known = tokens.iter().filter_map(|token| Ticket::parse(token)).collect::<Vec<_>>();
    let pump = doors.pump().clone();
    let renewed = async move { Ok(pump.prolong(known, duration.0).await?) };
    let mut renewed = doors.to_the_end(renewed).await?.into_iter();
    let item = |token: String| {
        let is_held = Ticket::parse(&token).is_some() && renewed.next() == Some(true);
        (token, if is_held { Ok(()) } else { Err(lease_lost()) })
    };
    Ok(heard_answer(tokens.into_iter().map(item).collect(), &request_id))
}

fn lease_body(leased: &Leased, duration: Duration) -> LeaseBody {
    let head = &leased.message.head;
    let record = Record {
        head: head.clone(),
        state: MessageState::Leased,
        deliver_at: leased.due_at,
        finished_at: None,
        tries: leased.tries,
        reason: None,
        size: leased.message.body.len() as u64,
    };
    let mut message = message_body(&record);
    put_payload(&mut message, &leased.message.body);
    let expires_at = leased.leased_at.checked_add(duration);
    LeaseBody {
        token: Ticket::from(&leased.lease).to_string(),
        expires_at: expires_at.unwrap_or(jiff::Timestamp::MAX).to_string(),
        attempt: leased.tries.attempts,
        traceparent: head.details.traceparent.clone(),
        message,
    }
}

fn word(body: SettlementBody, limit: usize) -> Result<WorkersWord, Problem> {
    let Some(ticket) = Ticket::parse(&body.token) else { return Err(lease_lost()) };
    if body.reason.as_ref().is_some_and(|reason| reason.len() > REASON_MAX) {
        return Err(Invalid::new("/reason", "a reason has at most 1000 bytes").into());
    }
    if body.delay.is_some_and(|delay| delay.0 > model::DELAY_MAX) {
        return Err(Invalid::new("/delay", "at most 366d").into());
    }
    let only_with = |pointer: &str, verdict: &str| {
        Err(Problem::from(Invalid::new(pointer, format!("only with the verdict {verdict}"))))
    };
    if body.delay.is_some() && body.verdict != VerdictBody::Retry {
        return only_with("/delay", "retry");
    }
    if body.verdict != VerdictBody::Ack {
        if !body.messages.is_empty() {
            return only_with("/messages", "ack");
        }
        if body.reply.is_some() {
            return only_with("/reply", "ack");
        }
    }
    if body.messages.len() > SENT_MAX {
        return Err(Invalid::new("/messages", "at most 1000 messages").into());
    }
    let why = |word: &str| body.reason.clone().unwrap_or_else(|| format!("the worker said {word}"));
    let verdict = match body.verdict {
        VerdictBody::Ack => Some(Verdict::Ack),
        VerdictBody::Retry => Some(Verdict::Retry { after: body.delay.map(|it| it.0) }),
        VerdictBody::DeadLetter => Some(Verdict::DeadLetter { reason: why("dead_letter") }),
        VerdictBody::Discard => Some(Verdict::Discard { reason: why("discard") }),
        VerdictBody::Release => None,
    };
    let sent = body.messages.iter().enumerate().map(|(place, raw)| {
        sent(raw, limit).map_err(|problem| {
            let errors = problem.into_errors().into_iter();
            Problem::invalid(errors.map(|it| it.under(&format!("/messages/{place}"))).collect())
        })
    });
    let sent = sent.collect::<Result<_, _>>()?;
    let reply = body.reply.map(reply).transpose()?.unwrap_or_default();
    Ok(WorkersWord { ticket, verdict, reason: body.reason, sent, reply })
}

/// A message that a worker sends with its ack.
fn sent(raw: &RawValue, limit: usize) -> Result<NewMessage, Problem> {
    let envelope = json::<model::Envelope>(raw.get().as_bytes())?;
    let to = envelope.destination()?;
    let made = envelope.into_message(to, SystemClock.now());
    let (mut message, key) = made.map_err(Problem::invalid)?;
    if message.body.len() > limit {
        let detail = format!("a payload has at most {limit} bytes");
        return Err(Invalid::new("/payload", detail).into());
    }
    message.keys.extend(key.map(|key| own_key(&key, Sha256::digest(raw.get()).into())));
    Ok(message)
}

fn reply(body: WorkersReply) -> Result<Reply, Problem> {
    let WorkersReply { payload, payload_base64, content_type } = body;
    if let Some(Err(detail)) = content_type.as_deref().map(model::check_text) {
        return Err(Invalid::new("/reply/content_type", detail).into());
    }
    match (payload, payload_base64) {
        (Some(json), None) => {
            let content_type = content_type.or_else(|| Some("application/json".to_owned()));
            Ok(Reply { content_type, body: json.get().to_owned().into() })
        }
        (None, Some(text)) => {
            let wrong = |_| Invalid::new("/reply/payload_base64", "this is not base64");
            let body = BASE64_STANDARD.decode(text).map_err(wrong)?.into();
            Ok(Reply { content_type, body })
        }
        (Some(_), Some(_)) | (None, None) => {
            Err(Invalid::new("/reply", "it has either payload or payload_base64").into())
        }
    }
}

fn check_duration(duration: Duration) -> Result<(), Problem> {
    if (DURATION_MIN..=DURATION_MAX).contains(&duration) {
        return Ok(());
    }
    Err(Invalid::new("/duration", "from 1s to 12h").into())
}

fn refuse_too_many(pointer: &str, count: usize) -> Result<(), Problem> {
    if count <= AT_ONCE_MAX { Ok(()) } else { Err(Invalid::new(pointer, "at most 1000").into()) }
}

fn lease_lost() -> Problem {
    let detail = "the lease is over, was settled already, or never was; nothing was changed, and the message goes to \
                  somebody else if it is not done";
    Problem::new(problem::LEASE_LOST, detail)
}

fn heard_answer(items: Vec<(String, Result<(), Problem>)>, request_id: &str) -> Response {
    let item = |(token, said): (String, Result<(), Problem>)| match said {
        Ok(()) => HeardItem { token, status: StatusCode::OK.as_u16(), problem: None },
        Err(problem) => HeardItem {
            token,
            status: problem.code.status.as_u16(),
            problem: Some(problem.body(request_id)),
        },
    };
    let body = HeardBody { items: items.into_iter().map(item).collect() };
    (StatusCode::MULTI_STATUS, Json(body)).into_response()
}

const WAIT_MAX: Duration = Duration::from_secs(60);
const DURATION_MIN: Duration = Duration::from_secs(1);
const DURATION_MAX: Duration = Duration::from_secs(12 * 3600);
const AT_ONCE_MAX: usize = 1000;
const SENT_MAX: usize = 1000;
const REASON_MAX: usize = 1000;
