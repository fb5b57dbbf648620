//! The whole pump: look, start, stop, and its ceiling. Routes, bodies, handlers.

use std::time::Duration;

use axum::Json;
use axum::extract::{Request, State};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::model::{Invalid, LIMIT_MAX};
use crate::pump::{Stop, StopReport};

use super::Doors;
use super::body::{read_json, read_json_or_default};
use super::lasting::Lasting;
use super::messages::Nothing;
use super::problem::Problem;
use super::queues::{StoppedBody, run_state};

pub(super) fn routes() -> OpenApiRouter<Doors> {
    OpenApiRouter::new()
        .routes(routes!(get_pump, patch_pump))
        .routes(routes!(start_pump))
        .routes(routes!(stop_pump))
}

/// The pump as it stands.
#[derive(Debug, Serialize, ToSchema)]
struct PumpBody {
    /// `running` or `stopped`.
    state: &'static str,
    stopped: Option<StoppedBody>,
    /// The process that answers.
    replica: String,
    /// Every process that is alive.
    replicas: Vec<String>,
    /// Deliveries open in this process.
    in_flight: u32,
    concurrency: CeilingBody,
    queues: Vec<QueuePumpBody>,
}

/// How many deliveries of all queues may be open at once, in each process.
#[derive(Debug, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct CeilingBody {
    limit: u32,
}

/// A queue in this process.
#[derive(Debug, Serialize, ToSchema)]
struct QueuePumpBody {
    queue: String,
    in_flight: u32,
    limit: u32,
}

#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct PumpPatch {
    concurrency: CeilingBody,
}

/// How to stop.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct StopBody {
    /// `drain` (default) lets open deliveries end; `abort` cuts them at once.
    #[serde(default)]
    mode: StopMode,
    /// How long open deliveries may go on; 30s if not given.
    deadline: Option<Lasting>,
    /// Why, in a sentence; shown to whoever looks.
    reason: Option<String>,
    /// When it starts again by itself.
    #[schema(value_type = Option<String>, format = DateTime)]
    until: Option<Timestamp>,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
enum StopMode {
    #[default]
    Drain,
    Abort,
}

/// What became of the deliveries of the process that answers.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct StopAnswer {
    /// Ended by themselves.
    drained: u64,
    /// Cut at the deadline.
    aborted: u64,
    /// Leased and not yet started; given back.
    released: u64,
}

impl From<StopReport> for StopAnswer {
    fn from(StopReport { drained, aborted, released }: StopReport) -> Self {
        Self { drained, aborted, released }
    }
}

impl StopBody {
    pub(super) fn into_stop(self) -> Result<Stop, Problem> {
        let deadline = match (self.mode, self.deadline) {
            (StopMode::Abort, _) => Duration::ZERO,
            (StopMode::Drain, None) => DEADLINE,
            (StopMode::Drain, Some(Lasting(deadline))) if deadline <= DEADLINE_MAX => deadline,
            (StopMode::Drain, Some(_)) => {
                return Err(Invalid::new("/deadline", "a deadline is at most 12h").into());
            }
        };
        if self.reason.as_ref().is_some_and(|reason| reason.len() > REASON_MAX) {
            return Err(Invalid::new("/reason", "a reason has at most 1000 bytes").into());
        }
        Ok(Stop { deadline, by: "operator".to_owned(), reason: self.reason, until: self.until })
    }
}

/// Show the pump.
#[utoipa::path(get, path = "/admin/v1/pump", tag = "pump", responses((status = 200, body = PumpBody)))]
async fn get_pump(State(doors): State<Doors>) -> Json<PumpBody> {
    Json(pump_body(&doors))
}

/// Set the ceiling over all queues. In force when this answers.
#[utoipa::path(patch, path = "/admin/v1/pump", tag = "pump",
    request_body(content = PumpPatch, content_type = "application/merge-patch+json"), responses(
    (status = 200, body = PumpBody)))]
async fn patch_pump(
    State(doors): State<Doors>,
    request: Request,
) -> Result<Json<PumpBody>, Problem> {
    let PumpPatch { concurrency: CeilingBody { limit } } = read_json(request).await?;
    if limit > LIMIT_MAX {
        return Err(Invalid::new("/concurrency/limit", "a limit is from 0 to 100000").into());
    }
    let pump = doors.pump().clone();
    doors.to_the_end(async move { Ok(pump.set_ceiling(limit).await?) }).await?;
    Ok(Json(pump_body(&doors)))
}

/// Start the pump: every queue that is not stopped itself.
#[utoipa::path(post, path = "/admin/v1/pump/start", tag = "pump", responses((status = 200, body = PumpBody)))]
async fn start_pump(
    State(doors): State<Doors>,
    request: Request,
) -> Result<Json<PumpBody>, Problem> {
    let Nothing {} = read_json_or_default(request).await?;
    let pump = doors.pump().clone();
    doors.to_the_end(async move { Ok(pump.start().await?) }).await?;
    Ok(Json(pump_body(&doors)))
}

/// Stop the pump, now and after every restart. Queues keep accepting.
///
/// Answers when no delivery is open in this process any more.
#[utoipa::path(post, path = "/admin/v1/pump/stop", tag = "pump", request_body = Option<StopBody>, responses(
    (status = 200, body = StopAnswer)))]
async fn stop_pump(
    State(doors): State<Doors>,
    request: Request,
) -> Result<Json<StopAnswer>, Problem> {
    let stop = read_json_or_default::<StopBody>(request).await?.into_stop()?;
    let pump = doors.pump().clone();
    let report = doors.to_the_end(async move { Ok(pump.stop(stop).await?) }).await?;
    Ok(Json(report.into()))
}

fn pump_body(doors: &Doors) -> PumpBody {
    let overview = doors.pump().overview();
    let (state, stopped) = run_state(&overview.state);
    let queues = overview.queues.iter().map(|queue| QueuePumpBody {
        queue: queue.queue.to_string(),
        in_flight: queue.in_flight,
        limit: queue.limit,
    });
    PumpBody {
        state,
        stopped,
        replica: overview.replica.to_string(),
        replicas: overview.replicas.iter().map(ToString::to_string).collect(),
        in_flight: overview.in_flight,
        concurrency: CeilingBody { limit: overview.ceiling },
        queues: queues.collect(),
    }
}

const DEADLINE: Duration = Duration::from_secs(30);
const DEADLINE_MAX: Duration = Duration::from_secs(12 * 3600);
const REASON_MAX: usize = 1000;
