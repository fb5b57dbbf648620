//! Dead letters: look, bring back, delete. Routes, bodies, handlers.

use axum::Json;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::model::{Invalid, MessageId, QueueName, State as MessageState};
use crate::store::{Amended, Filter};

use super::Doors;
use super::body::{Path, Query, read_json, read_json_or_default};
use super::messages::{self, MessageBody, MessageList, Nothing, amended_body, message_id};
use super::pages::{ListQuery, text};
use super::problem::{self, Problem, ProblemBody};

pub(super) fn routes() -> OpenApiRouter<Doors> {
    OpenApiRouter::new()
        .routes(routes!(list_dead_letters))
        .routes(routes!(delete_dead_letter))
        .routes(routes!(redrive_dead_letter))
        .routes(routes!(redrive))
}

/// Which dead letters to bring back.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct RedriveBody {
    #[serde(default)]
    filter: RedriveFilter,
    /// Only these.
    #[serde(default)]
    ids: Vec<String>,
    /// At most how many, the oldest first; 1,000 if not given, at most 10,000.
    limit: Option<usize>,
}

#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct RedriveFilter {
    queue: Option<String>,
    r#type: Option<String>,
    correlation_id: Option<String>,
    group: Option<String>,
}

#[derive(Debug, Serialize, ToSchema)]
struct RedriveAnswer {
    redriven: usize,
}

/// List dead letters, newest first.
#[utoipa::path(get, path = "/admin/v1/dead-letters", tag = "dead letters", params(ListQuery), responses(
    (status = 200, body = MessageList)))]
async fn list_dead_letters(
    State(doors): State<Doors>,
    Query(query): Query<ListQuery>,
) -> Result<Json<MessageList>, Problem> {
    let filter = query.filter()?;
    if filter.state.is_some_and(|state| state != MessageState::Dead) {
        return Err(Invalid::new("state", "dead letters are dead").into());
    }
    let filter = Filter { state: Some(MessageState::Dead), ..filter };
    let list = messages::list(&doors, filter, query.page()?, query.with_payload()?).await?;
    Ok(Json(list))
}

/// Delete a dead letter, its payload and its history.
#[utoipa::path(delete, path = "/admin/v1/dead-letters/{id}", tag = "dead letters",
    params(("id" = String, Path, description = "The message's id")), responses(
    (status = 204, description = "It is gone"),
    (status = 409, description = "It is not dead", body = ProblemBody, content_type = "application/problem+json")))]
async fn delete_dead_letter(
    State(doors): State<Doors>,
    Path(id): Path<String>,
) -> Result<Response, Problem> {
    let id = message_id(&id)?;
    let store = doors.pump().store().clone();
    let deleted = doors.to_the_end(async move { Ok(store.delete_dead(id).await?) }).await?;
    match deleted {
        Amended::Done(_) => Ok(StatusCode::NO_CONTENT.into_response()),
        not => amended_body(id, not).map(IntoResponse::into_response),
    }
}

/// Bring a dead letter back: the same id, attempt numbers that go on, a new budget of failures.
#[utoipa::path(post, path = "/admin/v1/dead-letters/{id}/redrive", tag = "dead letters",
    params(("id" = String, Path, description = "The message's id")), responses(
    (status = 200, description = "It waits again", body = MessageBody),
    (status = 409, description = "It is not dead", body = ProblemBody, content_type = "application/problem+json")))]
async fn redrive_dead_letter(
    State(doors): State<Doors>,
    Path(id): Path<String>,
    request: Request,
) -> Result<Json<MessageBody>, Problem> {
    let Nothing {} = read_json_or_default(request).await?;
    let id = message_id(&id)?;
    let store = doors.pump().store().clone();
    let redriven = doors.to_the_end(async move {
        let filter = Filter { ids: vec![id], ..Filter::default() };
        let redriven = store.redrive(filter, 1).await?;
        Ok((store.message(id).await?, redriven))
    });
    let amended = match redriven.await? {
        (None, _) => Amended::NoSuchMessage,
        (Some((record, _)), redriven) if redriven.is_empty() => Amended::Not(record.state),
        (Some((record, _)), _) => Amended::Done(record),
    };
    amended_body(id, amended)
}

/// Bring dead letters back, at once. As a job that can be paused: not available in this version.
#[utoipa::path(post, path = "/admin/v1/redrives", tag = "dead letters", request_body = RedriveBody, responses(
    (status = 200, body = RedriveAnswer)))]
async fn redrive(
    State(doors): State<Doors>,
    request: Request,
) -> Result<Json<RedriveAnswer>, Problem> {
    let body = read_json::<RedriveBody>(request).await?;
    let limit = body.limit.unwrap_or(REDRIVE_DEFAULT);
    if !(1..=REDRIVE_MAX).contains(&limit) {
        return Err(Invalid::new("/limit", "a limit is from 1 to 10000").into());
    }
    let ids = body.ids.iter().enumerate().map(|(at, id)| {
        MessageId::parse(id).map_err(|wrong| Invalid::new(format!("/ids/{at}"), wrong.detail))
    });
    let queue = body.filter.queue.as_deref().map(QueueName::parse).transpose();
    let filter = Filter {
        ids: ids.collect::<Result<_, _>>()?,
        queue: queue.map_err(|wrong| Invalid::new("/filter/queue", wrong.detail))?,
        kind: text("/filter/type", body.filter.r#type.as_deref())?,
        correlation_id: text("/filter/correlation_id", body.filter.correlation_id.as_deref())?,
        group: text("/filter/group", body.filter.group.as_deref())?,
        ..Filter::default()
    };
    if filter == Filter::default() {
        let detail = "name a queue, a type, a correlation_id, a group or ids: to bring back everything is never meant";
        return Err(Problem::new(problem::INVALID, detail));
    }
    let store = doors.pump().store().clone();
    let redriven = doors.to_the_end(async move { Ok(store.redrive(filter, limit).await?) }).await?;
    Ok(Json(RedriveAnswer { redriven: redriven.len() }))
}

const REDRIVE_DEFAULT: usize = 1000;
const REDRIVE_MAX: usize = 10_000;
