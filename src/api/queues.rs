//! Queues: make, look, change, delete, start, stop, purge. Routes, bodies, handlers.

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, HeaderValue, StatusCode, header};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::model::{Invalid, QueueName, QueueRecord, QueueSettings, RunState};
use crate::store::{DeleteQueue, Depth, Precondition, PutQueue};

use super::Doors;
use super::body::{Path, Query, parse, read_json, read_json_or_default};
use super::messages::Nothing;
use super::pages::{QueueListQuery, write_queue_cursor};
use super::problem::{self, Problem, ProblemBody};
use super::pump::{StopAnswer, StopBody};
use super::queue_settings::SettingsBody;
use super::recovery::check_targets;
use super::settings_patch::SettingsPatch;

pub(super) fn routes() -> OpenApiRouter<Doors> {
    OpenApiRouter::new()
        .routes(routes!(list_queues))
        .routes(routes!(get_queue, put_queue, patch_queue, delete_queue))
        .routes(routes!(start_queue))
        .routes(routes!(stop_queue))
        .routes(routes!(purge_queue))
}

/// A queue: its settings, and how it stands.
#[derive(Debug, Serialize, ToSchema)]
struct QueueBody {
    name: String,
    #[serde(flatten)]
    settings: SettingsBody,
    /// `running` or `stopped`.
    state: &'static str,
    stopped: Option<StoppedBody>,
    /// Until when the handler asked to be left alone; may have passed.
    held_until: Option<String>,
    /// `closed`, `open` or `half_open`.
    breaker_state: &'static str,
    stats: Stats,
}

/// Who stopped it, when and why.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct StoppedBody {
    at: String,
    by: String,
    reason: Option<String>,
    /// When it starts again by itself.
    until: Option<String>,
}

/// How many messages a queue has.
#[derive(Debug, Default, Serialize, ToSchema)]
struct Stats {
    ready: u64,
    scheduled: u64,
    in_flight: u64,
    dead: u64,
    /// How many of those that are ready wait for their turn in their group.
    behind: u64,
    /// In seconds.
    oldest_ready_age: Option<f64>,
}

/// A page of queues, by name.
#[derive(Debug, Serialize, ToSchema)]
struct QueueList {
    items: Vec<QueueBody>,
    /// The cursor of the next page; null at the end.
    next: Option<String>,
}

#[derive(Debug, Serialize, ToSchema)]
struct PurgeAnswer {
    purged: u64,
}

#[derive(Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct DeleteQuery {
    /// Delete its messages too.
    #[serde(default)]
    force: bool,
}

/// List queues, by name.
#[utoipa::path(get, path = "/admin/v1/queues", tag = "queues", params(QueueListQuery),
    responses((status = 200, body = QueueList)))]
async fn list_queues(
    State(doors): State<Doors>,
    Query(query): Query<QueueListQuery>,
) -> Result<Json<QueueList>, Problem> {
    let (limit, after) = query.page()?;
    let store = doors.pump().store();
    // Every process holds all queues in memory anyway, so the store has no pages of them.
    let mut queues = store.queues().await?;
    queues.retain(|queue| after.as_ref().is_none_or(|after| queue.name > *after));
    let more = queues.len() > limit;
    queues.truncate(limit);
    let next = queues.last().filter(|_| more).map(|queue| write_queue_cursor(&queue.name));
    let depths = store.depths().await?;
    let items = queues.iter().map(|queue| queue_body(queue, &depths)).collect();
    Ok(Json(QueueList { items, next }))
}

/// Show a queue.
#[utoipa::path(get, path = "/admin/v1/queues/{queue}", tag = "queues",
    params(("queue" = String, Path, description = "The queue's name")), responses(
    (status = 200, body = QueueBody, headers(("ETag" = String, description = "Of the settings alone")))))]
async fn get_queue(
    State(doors): State<Doors>,
    Path(name): Path<String>,
) -> Result<Response, Problem> {
    let name = QueueName::parse(&name)?;
    let queue = doors.pump().store().queue(&name).await?;
    let queue = queue.ok_or_else(|| Problem::no_such_queue(&name))?;
    answer(&doors, StatusCode::OK, &queue).await
}

/// Make a queue, or replace its settings.
///
/// What is missing gets its default. The body of a `GET` can be put back.
#[utoipa::path(put, path = "/admin/v1/queues/{queue}", tag = "queues", request_body = SettingsBody,
    params(("queue" = String, Path, description = "The queue's name"),
        ("If-Match" = Option<String>, Header, description = "The ETag it must have"),
        ("If-None-Match" = Option<String>, Header, description = "`*`: there must be none")),
    responses(
    (status = 201, description = "It is new", body = QueueBody),
    (status = 200, description = "It has these settings now", body = QueueBody)))]
async fn put_queue(
    State(doors): State<Doors>,
    Path(name): Path<String>,
    request: Request,
) -> Result<Response, Problem> {
    let name = QueueName::parse(&name)?;
    let wanted = precondition(request.headers())?;
    let body = read_json::<Value>(request).await?;
    if !body.is_object() {
        return Err(Invalid::new("", "settings are a JSON object").into());
    }
    let body = parse::<SettingsBody, _>(body)?;
    for _ in 0..CHANGE_TRIES {
        let before = doors.pump().store().queue(&name).await?.map(|queue| queue.settings);
        let etag = before.as_ref().map(QueueSettings::etag);
        if !wanted.holds(etag.as_deref()) {
            return Err(precondition_failed());
        }
        let settings = body.clone().into_settings(before.as_ref())?;
        // A mask stands for a secret that was read, and must not bring it back over a newer one.
        let precondition = match etag {
            Some(etag) if body.has_a_mask() => Precondition::Matches(etag),
            _ => wanted.clone(),
        };
        match doors.put_queue(name.clone(), settings, precondition).await? {
            PutQueue::Created(queue) => return answer(&doors, StatusCode::CREATED, &queue).await,
            PutQueue::Replaced(queue) => return answer(&doors, StatusCode::OK, &queue).await,
            PutQueue::PreconditionFailed if body.has_a_mask() => {}
            PutQueue::PreconditionFailed => return Err(precondition_failed()),
        }
    }
    Err(kept_changing("queue"))
}

/// Change some settings: a JSON merge patch (RFC 7396). `null` resets to the default.
#[utoipa::path(patch, path = "/admin/v1/queues/{queue}", tag = "queues",
    request_body(content = SettingsBody, content_type = "application/merge-patch+json"),
    params(("queue" = String, Path, description = "The queue's name"),
        ("If-Match" = Option<String>, Header, description = "The ETag it must have")),
    responses(
    (status = 200, description = "In force", body = QueueBody)))]
async fn patch_queue(
    State(doors): State<Doors>,
    Path(name): Path<String>,
    request: Request,
) -> Result<Response, Problem> {
    let name = QueueName::parse(&name)?;
    let wanted = precondition(request.headers())?;
    let patch = SettingsPatch::new(read_json::<Value>(request).await?)?;
    // Another change may come in between: the ETag shows it, and the patch is applied to what is there then.
    for _ in 0..CHANGE_TRIES {
        let found = doors.pump().store().queue(&name).await?;
        let found = found.ok_or_else(|| Problem::no_such_queue(&name))?;
        let etag = found.settings.etag();
        if !wanted.holds(Some(&etag)) {
            return Err(precondition_failed());
        }
        let body = patch.apply_to(&found.settings)?;
        let settings = parse::<SettingsBody, _>(body)?.into_settings(Some(&found.settings))?;
        let put = doors.put_queue(name.clone(), settings, Precondition::Matches(etag)).await?;
        if let PutQueue::Replaced(queue) = put {
            return answer(&doors, StatusCode::OK, &queue).await;
        }
    }
    Err(kept_changing("queue"))
}

/// Delete a queue; with `force` its messages too.
#[utoipa::path(delete, path = "/admin/v1/queues/{queue}", tag = "queues",
    params(("queue" = String, Path, description = "The queue's name"), DeleteQuery,
        ("If-Match" = Option<String>, Header, description = "The ETag it must have")),
    responses(
    (status = 204, description = "It is gone"),
    (status = 409, description = "It has messages", body = ProblemBody, content_type = "application/problem+json")))]
async fn delete_queue(
    State(doors): State<Doors>,
    Path(name): Path<String>,
    Query(query): Query<DeleteQuery>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let name = QueueName::parse(&name)?;
    let precondition = precondition(&headers)?;
    let (pump, queue) = (doors.pump().clone(), name.clone());
    let deleted = doors.to_the_end(async move {
        let deleted = pump.store().delete_queue(&queue, query.force, precondition).await?;
        pump.refresh().await?;
        Ok(deleted)
    });
    match deleted.await? {
        DeleteQueue::Deleted => Ok(StatusCode::NO_CONTENT.into_response()),
        DeleteQueue::NoSuchQueue => Err(Problem::no_such_queue(&name)),
        DeleteQueue::PreconditionFailed => Err(precondition_failed()),
        DeleteQueue::NotEmpty => {
            let detail = "the queue has messages; ?force=true deletes them too";
            Err(Problem::new(problem::NOT_EMPTY, detail))
        }
        DeleteQueue::InUse => {
            let detail = "somebody sends to the queue in a transaction that is open, or changes it; try again when that has ended";
            Err(Problem::new(problem::IN_USE, detail))
        }
    }
}

/// Start a queue, now and after every restart.
#[utoipa::path(post, path = "/admin/v1/queues/{queue}/start", tag = "queues",
    params(("queue" = String, Path, description = "The queue's name")), responses(
    (status = 200, body = QueueBody)))]
async fn start_queue(
    State(doors): State<Doors>,
    Path(name): Path<String>,
    request: Request,
) -> Result<Response, Problem> {
    let name = QueueName::parse(&name)?;
    let Nothing {} = read_json_or_default(request).await?;
    let (pump, queue) = (doors.pump().clone(), name.clone());
    let found = doors.to_the_end(async move { Ok(pump.start_queue(&queue).await?) }).await?;
    let queue = doors.pump().store().queue(&name).await?;
    match queue {
        Some(queue) if found => answer(&doors, StatusCode::OK, &queue).await,
        _ => Err(Problem::no_such_queue(&name)),
    }
}

/// Stop a queue, now and after every restart. It keeps accepting.
///
/// Answers when no delivery of it is open in this process any more.
#[utoipa::path(post, path = "/admin/v1/queues/{queue}/stop", tag = "queues", request_body = Option<StopBody>,
    params(("queue" = String, Path, description = "The queue's name")), responses(
    (status = 200, body = StopAnswer)))]
async fn stop_queue(
    State(doors): State<Doors>,
    Path(name): Path<String>,
    request: Request,
) -> Result<Json<StopAnswer>, Problem> {
    let name = QueueName::parse(&name)?;
    let stop = read_json_or_default::<StopBody>(request).await?.into_stop()?;
    let (pump, queue) = (doors.pump().clone(), name.clone());
    let report = doors.to_the_end(async move { Ok(pump.stop_queue(&queue, stop).await?) }).await?;
    report.map(StopAnswer::from).map(Json).ok_or_else(|| Problem::no_such_queue(&name))
}

/// Delete what waits. What is leased, dead or done stays, and so do idempotency keys.
#[utoipa::path(post, path = "/admin/v1/queues/{queue}/purge", tag = "queues",
    params(("queue" = String, Path, description = "The queue's name")), responses(
    (status = 200, body = PurgeAnswer)))]
async fn purge_queue(
    State(doors): State<Doors>,
    Path(name): Path<String>,
    request: Request,
) -> Result<Json<PurgeAnswer>, Problem> {
    let name = QueueName::parse(&name)?;
    let Nothing {} = read_json_or_default(request).await?;
    let store = doors.pump().store().clone();
    if store.queue(&name).await?.is_none() {
        return Err(Problem::no_such_queue(&name));
    }
    let purged = doors.to_the_end(async move {
        let mut purged = 0;
        loop {
            let some = store.purge(&name, PURGE_BATCH).await?;
            purged += some;
            if some < PURGE_BATCH as u64 {
                return Ok(purged);
            }
        }
    });
    Ok(Json(PurgeAnswer { purged: purged.await? }))
}

impl Doors {
    async fn put_queue(
        &self,
        name: QueueName,
        settings: QueueSettings,
        precondition: Precondition,
    ) -> Result<PutQueue, Problem> {
        let pump = self.pump().clone();
        if !settings.recovery.rules.is_empty() {
            check_targets(&name, &settings.recovery, &pump.store().queues().await?)?;
        }
        self.to_the_end(async move {
            let put = pump.store().put_queue(&name, settings, precondition).await?;
            pump.refresh().await?; // in force when the answer goes out
            Ok(put)
        })
        .await
    }
}

async fn answer(
    doors: &Doors,
    status: StatusCode,
    queue: &QueueRecord,
) -> Result<Response, Problem> {
    let depths = doors.pump().store().depths().await?;
    let mut response = (status, Json(queue_body(queue, &depths))).into_response();
    let etag = HeaderValue::try_from(queue.settings.etag()).expect("hex digits make a header");
    response.headers_mut().insert(header::ETAG, etag);
    Ok(response)
}

fn queue_body(queue: &QueueRecord, depths: &[Depth]) -> QueueBody {
    let depth = depths.iter().find(|depth| depth.queue == queue.name);
    let stats = depth.map(|depth| Stats {
        ready: depth.ready,
        scheduled: depth.scheduled,
        in_flight: depth.leased,
        dead: depth.dead,
        behind: depth.behind,
        oldest_ready_age: depth.oldest_ready.map(|age| age.as_secs_f64()),
    });
    let (state, stopped) = run_state(&queue.state);
    QueueBody {
        name: queue.name.to_string(),
        settings: SettingsBody::from(&queue.settings).masked(),
        state,
        stopped,
        held_until: queue.guard.held_until.map(|until| until.to_string()),
        breaker_state: queue.guard.breaker.as_str(),
        stats: stats.unwrap_or_default(),
    }
}

/// Whether something runs, and who stopped it.
pub(super) fn run_state(state: &RunState) -> (&'static str, Option<StoppedBody>) {
    let text = |time: Timestamp| time.to_string();
    match state {
        RunState::Running => ("running", None),
        RunState::Stopped(stopped) => {
            let body = StoppedBody {
                at: text(stopped.at),
                by: stopped.by.clone(),
                reason: stopped.reason.clone(),
                until: stopped.until.map(text),
            };
            ("stopped", Some(body))
        }
    }
}

pub(super) fn precondition(headers: &HeaderMap) -> Result<Precondition, Problem> {
    let text = |name| headers.get(name).map(|value: &HeaderValue| value.to_str().unwrap_or(""));
    match (text(header::IF_MATCH), text(header::IF_NONE_MATCH)) {
        (None, None) => Ok(Precondition::None),
        (Some("*"), None) => Ok(Precondition::Exists),
        (Some(etag), None) => Ok(Precondition::Matches(etag.trim_start_matches("W/").to_owned())),
        (None, Some("*")) => Ok(Precondition::Absent),
        (None, Some(_)) => {
            Err(Invalid::new("If-None-Match", "* is the only value that is taken here").into())
        }
        (Some(_), Some(_)) => {
            Err(Invalid::new("If-Match", "If-Match and If-None-Match exclude each other").into())
        }
    }
}

pub(super) fn precondition_failed() -> Problem {
    let detail = "it is not what the precondition says; GET it and try again with its ETag";
    Problem::new(problem::PRECONDITION, detail)
}

/// Others were faster each time.
pub(super) fn kept_changing(what: &str) -> Problem {
    Problem::new(problem::UNAVAILABLE, format!("others kept changing the {what}; try again"))
}

/// How often a change is made to what is there then, where others change it meanwhile.
pub(super) const CHANGE_TRIES: usize = 10;
const PURGE_BATCH: usize = 1000;
