//! Clocks that send: make, look, change, pause, run, delete. Routes, bodies, handlers.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use http::{HeaderValue, StatusCode, header};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::RawValue;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::clock::{Clock, SystemClock};
use crate::model::{
    Destination, Firing, Invalid, MISSED_MAX, Missed, Schedule, ScheduleName, ScheduleRecord,
    Timetable,
};
use crate::policy::Times;
use crate::store::{Precondition, PutSchedule};

use super::Doors;
use super::body::{Path, is_json, json, parse, read, read_json_or_default};
use super::envelope::EnvelopeBody;
use super::lasting::Lasting;
use super::messages::Nothing;
use super::problem::{self, Problem};
use super::queues::{CHANGE_TRIES, kept_changing, precondition, precondition_failed};

pub(super) fn routes() -> OpenApiRouter<Doors> {
    OpenApiRouter::new()
        .routes(routes!(list_schedules))
        .routes(routes!(get_schedule, put_schedule, patch_schedule, delete_schedule))
        .routes(routes!(pause_schedule))
        .routes(routes!(resume_schedule))
        .routes(routes!(run_schedule))
}

/// A schedule, as it is put: `cron` (with `time_zone`) or `every` (with `from`) says when.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct SchedulePut {
    /// Minute, hour, day, month, weekday; or seconds before those.
    #[schema(example = "30 2 * * *")]
    cron: Option<String>,
    /// By whose clocks `cron` goes; UTC without it.
    #[schema(example = "Europe/Berlin")]
    time_zone: Option<String>,
    /// Always after as long, from 1s to 366d.
    every: Option<Lasting>,
    /// From when on `every` is counted; now without it.
    #[schema(value_type = Option<String>, format = DateTime)]
    from: Option<Timestamp>,
    /// What is sent: an envelope that names its `queue` or `topic`, without times of its own.
    #[schema(value_type = EnvelopeBody)]
    message: Box<RawValue>,
    /// What becomes of times at which nobody was there to send: `skip`, `once` for all of them (without it), or
    /// `{"all": 100}` for each of the latest so many.
    #[serde(default)]
    missed: MissedBody,
    /// Whether it sends nothing by itself for now.
    #[serde(default)]
    paused: bool,
    #[serde(default)]
    #[schema(value_type = Value, read_only, required = false)]
    #[expect(dead_code, reason = "so that what a GET shows can be put back")]
    name: Option<Value>,
    #[serde(default)]
    #[schema(value_type = Value, read_only, required = false)]
    #[expect(dead_code, reason = "so that what a GET shows can be put back")]
    next: Option<Value>,
    #[serde(default)]
    #[schema(value_type = Value, read_only, required = false)]
    #[expect(dead_code, reason = "so that what a GET shows can be put back")]
    next_at: Option<Value>,
    #[serde(default)]
    #[schema(value_type = Value, read_only, required = false)]
    #[expect(dead_code, reason = "so that what a GET shows can be put back")]
    firings: Option<Value>,
}

#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[schema(as = Missed)]
enum MissedBody {
    Skip,
    #[default]
    Once,
    /// At most so many.
    All(u32),
}

/// A schedule as it stands.
#[derive(Debug, Serialize, ToSchema)]
struct ScheduleBody {
    name: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    cron: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    time_zone: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    every: Option<Lasting>,
    #[serde(skip_serializing_if = "Option::is_none")]
    from: Option<String>,
    #[schema(value_type = EnvelopeBody)]
    message: Box<RawValue>,
    missed: MissedBody,
    paused: bool,
    /// When it sends next; null while it is paused.
    next_at: Option<String>,
    /// The next five times, also while it is paused.
    next: Vec<String>,
    /// What it has sent, the latest first; at most 50.
    firings: Vec<FiringBody>,
}

/// One time for which a schedule sent, or did not.
#[derive(Debug, Serialize, ToSchema)]
struct FiringBody {
    due_at: String,
    fired_at: String,
    /// Whether somebody wanted it run.
    by_hand: bool,
    /// The message; what its copies share, for one that was published.
    message_id: Option<String>,
    /// How many times before this were missed and not made up for.
    skipped: u32,
    /// Why nothing was sent.
    problem: Option<String>,
}

#[derive(Debug, Serialize, ToSchema)]
struct ScheduleList {
    items: Vec<ScheduleBody>,
}

impl From<MissedBody> for Missed {
    fn from(body: MissedBody) -> Self {
        match body {
            MissedBody::Skip => Self::Skip,
            MissedBody::Once => Self::Once,
            MissedBody::All(max) => Self::All { max },
        }
    }
}

impl From<Missed> for MissedBody {
    fn from(missed: Missed) -> Self {
        match missed {
            Missed::Skip => Self::Skip,
            Missed::Once => Self::Once,
            Missed::All { max } => Self::All(max),
        }
    }
}

impl From<&Firing> for FiringBody {
    fn from(firing: &Firing) -> Self {
        Self {
            due_at: firing.due_at.to_string(),
            fired_at: firing.fired_at.to_string(),
            by_hand: firing.by_hand,
            message_id: firing.message_id.map(|id| id.to_string()),
            skipped: firing.skipped,
            problem: firing.problem.clone(),
        }
    }
}

impl SchedulePut {
    /// What it says, checked.
    fn into_schedule(self) -> Result<Schedule, Problem> {
        let timetable = match (self.cron, self.every) {
            (Some(expression), None) => {
                if self.from.is_some() {
                    return Err(Invalid::new("/from", "only with every").into());
                }
                let time_zone = self.time_zone.unwrap_or_else(|| "UTC".to_owned());
                Timetable::Cron { expression, time_zone }
            }
            (None, Some(Lasting(every))) => {
                if self.time_zone.is_some() {
                    return Err(Invalid::new("/time_zone", "only with cron").into());
                }
                let from = self.from.unwrap_or_else(|| SystemClock.now());
                Timetable::Every { every, from }
            }
            (None, None) | (Some(_), Some(_)) => {
                let detail = "a schedule has either cron or every";
                return Err(Invalid::new("/cron", detail).into());
            }
        };
        let times = Times::read(&timetable)?;
        if times.after(SystemClock.now()).is_none() {
            return Err(Invalid::new("/cron", "there is no such time").into());
        }
        if let MissedBody::All(max) = self.missed
            && !(1..=MISSED_MAX).contains(&max)
        {
            return Err(Invalid::new("/missed/all", "from 1 to 1000").into());
        }
        let (message, missed, paused) = (self.message, self.missed.into(), self.paused);
        let schedule = Schedule { timetable, message, missed, paused };
        // For what the reader of envelopes says of it, with pointers.
        let under = |wrong: Invalid| wrong.under("/message");
        let text = schedule.message.get().as_bytes();
        json::<crate::model::Envelope>(text).map_err(|problem| {
            Problem::invalid(problem.into_errors().into_iter().map(under).collect())
        })?;
        let wrong = |all: Vec<Invalid>| Problem::invalid(all.into_iter().map(under).collect());
        schedule.message().map_err(wrong)?;
        Ok(schedule)
    }
}

/// List schedules, by name.
#[utoipa::path(get, path = "/admin/v1/schedules", tag = "schedules",
    responses((status = 200, body = ScheduleList)))]
async fn list_schedules(State(doors): State<Doors>) -> Result<Json<ScheduleList>, Problem> {
    let mut items = Vec::new();
    for record in doors.pump().store().schedules().await? {
        items.push(schedule_body(&doors, &record).await?);
    }
    Ok(Json(ScheduleList { items }))
}

/// Show a schedule, with its next five times and what it has sent.
#[utoipa::path(get, path = "/admin/v1/schedules/{name}", tag = "schedules",
    params(("name" = String, Path, description = "The schedule's name")),
    responses((status = 200, body = ScheduleBody, headers(("ETag" = String, description = "Of what was put")))))]
async fn get_schedule(
    State(doors): State<Doors>,
    Path(name): Path<String>,
) -> Result<Response, Problem> {
    let name = ScheduleName::parse(&name)?;
    let record = doors.schedule(&name).await?;
    answer(&doors, StatusCode::OK, &record).await
}

/// Make a schedule, or replace it. What it has sent stays remembered.
#[utoipa::path(put, path = "/admin/v1/schedules/{name}", tag = "schedules", request_body = SchedulePut,
    params(("name" = String, Path, description = "The schedule's name"),
        ("If-Match" = Option<String>, Header, description = "The ETag it must have"),
        ("If-None-Match" = Option<String>, Header, description = "`*`: there must be none")),
    responses(
        (status = 201, description = "It is new", body = ScheduleBody),
        (status = 200, description = "It says this now", body = ScheduleBody)))]
async fn put_schedule(
    State(doors): State<Doors>,
    Path(name): Path<String>,
    request: Request,
) -> Result<Response, Problem> {
    let name = ScheduleName::parse(&name)?;
    let wanted = precondition(request.headers())?;
    let (parts, body) = request.into_parts();
    is_json(&parts.headers)?;
    let body = read(&parts.headers, body, SCHEDULE_BYTES_MAX).await?;
    let schedule = json::<SchedulePut>(&body)?.into_schedule()?;
    doors.check_target(&schedule).await?;
    match put(&doors, &name, schedule, wanted).await? {
        PutSchedule::Created(record) => answer(&doors, StatusCode::CREATED, &record).await,
        PutSchedule::Replaced(record) => answer(&doors, StatusCode::OK, &record).await,
        PutSchedule::PreconditionFailed => Err(precondition_failed()),
    }
}

/// Change a schedule: a JSON merge patch (RFC 7396); `message` is replaced whole.
#[utoipa::path(patch, path = "/admin/v1/schedules/{name}", tag = "schedules",
    request_body(content = SchedulePut, content_type = "application/merge-patch+json"),
    params(("name" = String, Path, description = "The schedule's name"),
        ("If-Match" = Option<String>, Header, description = "The ETag it must have")),
    responses((status = 200, description = "It says this now", body = ScheduleBody)))]
async fn patch_schedule(
    State(doors): State<Doors>,
    Path(name): Path<String>,
    request: Request,
) -> Result<Response, Problem> {
    let name = ScheduleName::parse(&name)?;
    let wanted = precondition(request.headers())?;
    let (parts, body) = request.into_parts();
    is_json(&parts.headers)?;
    let body = read(&parts.headers, body, SCHEDULE_BYTES_MAX).await?;
    let patch = json::<BTreeMap<String, Box<RawValue>>>(&body)?;
    change(&doors, &name, &wanted, |before| Ok(Some(patched(before, &patch)?.into_schedule()?)))
        .await
}

/// Delete a schedule. What it has sent stays in its queue.
#[utoipa::path(delete, path = "/admin/v1/schedules/{name}", tag = "schedules",
    params(("name" = String, Path, description = "The schedule's name")),
    responses((status = 204, description = "It is gone")))]
async fn delete_schedule(
    State(doors): State<Doors>,
    Path(name): Path<String>,
) -> Result<StatusCode, Problem> {
    let name = ScheduleName::parse(&name)?;
    let (store, named) = (doors.pump().store().clone(), name.clone());
    let delete = async move { Ok(store.delete_schedule(&named).await?) };
    if doors.to_the_end(delete).await? {
        Ok(StatusCode::NO_CONTENT)
    } else {
        Err(no_such_schedule(&name))
    }
}

/// Pause a schedule. Times that pass meanwhile are not made up for.
#[utoipa::path(post, path = "/admin/v1/schedules/{name}/pause", tag = "schedules",
    params(("name" = String, Path, description = "The schedule's name")),
    responses((status = 200, body = ScheduleBody)))]
async fn pause_schedule(
    State(doors): State<Doors>,
    Path(name): Path<String>,
    request: Request,
) -> Result<Response, Problem> {
    set_paused(doors, name, request, true).await
}

/// Go on with a schedule, from its next time on.
#[utoipa::path(post, path = "/admin/v1/schedules/{name}/resume", tag = "schedules",
    params(("name" = String, Path, description = "The schedule's name")),
    responses((status = 200, body = ScheduleBody)))]
async fn resume_schedule(
    State(doors): State<Doors>,
    Path(name): Path<String>,
    request: Request,
) -> Result<Response, Problem> {
    set_paused(doors, name, request, false).await
}

/// Send a schedule's message now, paused or not. Its times stay as they are.
#[utoipa::path(post, path = "/admin/v1/schedules/{name}/run", tag = "schedules",
    params(("name" = String, Path, description = "The schedule's name")),
    responses((status = 200, body = FiringBody)))]
async fn run_schedule(
    State(doors): State<Doors>,
    Path(name): Path<String>,
    request: Request,
) -> Result<Json<FiringBody>, Problem> {
    let Nothing {} = read_json_or_default(request).await?;
    let name = ScheduleName::parse(&name)?;
    let (pump, named) = (doors.pump().clone(), name.clone());
    let run = async move { Ok(pump.run_schedule(&named).await?) };
    let firing = doors.to_the_end(run).await?.ok_or_else(|| no_such_schedule(&name))?;
    Ok(Json(FiringBody::from(&firing)))
}

async fn set_paused(
    doors: Doors,
    name: String,
    request: Request,
    paused: bool,
) -> Result<Response, Problem> {
    let Nothing {} = read_json_or_default(request).await?;
    let name = ScheduleName::parse(&name)?;
    change(&doors, &name, &Precondition::None, |before| {
        Ok((before.paused != paused).then(|| Schedule { paused, ..before.clone() }))
    })
    .await
}

/// Changes a schedule to what is made of it as it stands; `None` leaves it as it is.
async fn change(
    doors: &Doors,
    name: &ScheduleName,
    wanted: &Precondition,
    make: impl Fn(&Schedule) -> Result<Option<Schedule>, Problem>,
) -> Result<Response, Problem> {
    // Another change may come in between: the ETag shows it, and this one is made to what is there then.
    for _ in 0..CHANGE_TRIES {
        let record = doors.schedule(name).await?;
        let etag = record.schedule.etag();
        if !wanted.holds(Some(&etag)) {
            return Err(precondition_failed());
        }
        let Some(schedule) = make(&record.schedule)? else {
            return answer(doors, StatusCode::OK, &record).await;
        };
        // What was given before was looked at then.
        if schedule.message.get() != record.schedule.message.get() {
            doors.check_target(&schedule).await?;
        }
        match put(doors, name, schedule, Precondition::Matches(etag)).await? {
            PutSchedule::Created(record) | PutSchedule::Replaced(record) => {
                return answer(doors, StatusCode::OK, &record).await;
            }
            PutSchedule::PreconditionFailed => (),
        }
    }
    Err(kept_changing("schedule"))
}

async fn put(
    doors: &Doors,
    name: &ScheduleName,
    schedule: Schedule,
    wanted: Precondition,
) -> Result<PutSchedule, Problem> {
    let (pump, name) = (doors.pump().clone(), name.clone());
    let put = async move { Ok(pump.put_schedule(&name, schedule, wanted).await?) };
    doors.to_the_end(put).await
}

/// The schedule as it is put, with these members replaced; those that are null get their default.
fn patched(
    before: &Schedule,
    patch: &BTreeMap<String, Box<RawValue>>,
) -> Result<SchedulePut, Problem> {
    let raw = |value: &Value| serde_json::value::to_raw_value(value);
    let mut members = BTreeMap::new();
    let mut member = |name: &str, value: Value| {
        let value = raw(&value).expect("a value is always JSON");
        members.insert(name.to_owned(), value);
    };
    match &before.timetable {
        Timetable::Cron { expression, time_zone } => {
            member("cron", expression.as_str().into());
            member("time_zone", time_zone.as_str().into());
        }
        Timetable::Every { every, from } => {
            member("every", crate::model::span_text(*every).into());
            member("from", from.to_string().into());
        }
    }
    let missed = serde_json::to_value(MissedBody::from(before.missed));
    member("missed", missed.expect("a policy is always JSON"));
    member("paused", before.paused.into());
    members.insert("message".to_owned(), before.message.clone());
    // Who says when anew says it whole.
    if patch.contains_key("cron") || patch.contains_key("every") {
        for name in ["cron", "every", "from"] {
            members.remove(name);
        }
        if patch.contains_key("every") {
            members.remove("time_zone");
        }
    }
    for (name, value) in patch {
        if value.get() == "null" {
            members.remove(name)
        } else {
            members.insert(name.clone(), value.clone())
        };
    }
    let text = serde_json::to_string(&members).expect("members are JSON");
    parse(&mut serde_json::Deserializer::from_str(&text))
}

async fn answer(
    doors: &Doors,
    status: StatusCode,
    record: &ScheduleRecord,
) -> Result<Response, Problem> {
    let body = schedule_body(doors, record).await?;
    let mut response = (status, Json(body)).into_response();
    let etag = HeaderValue::try_from(record.schedule.etag()).expect("hex digits in quotes");
    response.headers_mut().insert(header::ETAG, etag);
    Ok(response)
}

async fn schedule_body(doors: &Doors, record: &ScheduleRecord) -> Result<ScheduleBody, Problem> {
    let ScheduleRecord { name, schedule, state, .. } = record;
    let next = doors.pump().next_times(schedule, SHOWN).await?;
    let (mut cron, mut time_zone, mut interval, mut counted) = (None, None, None, None);
    match &schedule.timetable {
        Timetable::Cron { expression, time_zone: zone } => {
            (cron, time_zone) = (Some(expression.clone()), Some(zone.clone()));
        }
        Timetable::Every { every, from } => {
            (interval, counted) = (Some(Lasting(*every)), Some(from.to_string()));
        }
    }
    Ok(ScheduleBody {
        name: name.to_string(),
        cron,
        time_zone,
        every: interval,
        from: counted,
        message: schedule.message.clone(),
        missed: schedule.missed.into(),
        paused: schedule.paused,
        next_at: state.next_at.map(|at| at.to_string()),
        next: next.iter().map(ToString::to_string).collect(),
        firings: state.firings.iter().map(FiringBody::from).collect(),
    })
}

impl Doors {
    async fn schedule(&self, name: &ScheduleName) -> Result<ScheduleRecord, Problem> {
        let record = self.pump().schedule(name).await?;
        record.ok_or_else(|| no_such_schedule(name))
    }

    /// Refuses a schedule whose queue is not there, or that for its answers, or whose payload is too large: it would
    /// find out in the night.
    async fn check_target(&self, schedule: &Schedule) -> Result<(), Problem> {
        let Ok(message) = schedule.message() else { return Ok(()) };
        if message.body.len() > self.body_limit() {
            let detail = format!("a payload has at most {} bytes", self.body_limit());
            return Err(Problem::new(problem::TOO_LARGE, detail));
        }
        if let Destination::Queue(queue) = &message.to
            && self.pump().store().queue(queue).await?.is_none()
        {
            let detail = format!("there is no queue {queue}; make it first");
            return Err(Invalid::new("/message/queue", detail).into());
        }
        self.check_replies("/message/reply_to", std::slice::from_ref(&message)).await
    }
}

fn no_such_schedule(name: &ScheduleName) -> Problem {
    let detail = format!("there is no schedule {name}; PUT /admin/v1/schedules/{name} makes one");
    Problem::new(problem::NO_SUCH_SCHEDULE, detail)
}

/// How many of the next times are shown.
const SHOWN: usize = 5;
/// The most bytes in a schedule with its payload.
const SCHEDULE_BYTES_MAX: usize = 4 * 1024 * 1024;
