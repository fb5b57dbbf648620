//! Whether this process lives and is ready, and its metrics. Routes, bodies, handlers.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Json;
use axum::Router;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get};
use http::{StatusCode, header};
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::model::State as MessageState;
use crate::store;
use crate::telemetry::metrics;

use super::Doors;
use super::problem::{self, Problem};

pub(super) fn routes() -> OpenApiRouter<Doors> {
    OpenApiRouter::new().routes(routes!(livez)).routes(routes!(readyz))
}

pub(super) fn metrics_routes() -> OpenApiRouter<Doors> {
    OpenApiRouter::new().routes(routes!(metrics_page))
}

/// Whether this process can take messages.
#[derive(Debug, Serialize, ToSchema)]
struct ReadyBody {
    ready: bool,
    /// `ok`, or what is wrong with the database or its schema.
    database: &'static str,
    /// Whether the process is on its way out.
    draining: bool,
}

/// The process runs.
#[utoipa::path(get, path = "/livez", tag = "health", responses((status = 200, description = "It does")))]
async fn livez() -> &'static str {
    "ok\n"
}

/// The database answers, its schema is known, and the process is not on its way out.
#[utoipa::path(get, path = "/readyz", tag = "health", responses(
    (status = 200, body = ReadyBody), (status = 503, body = ReadyBody)))]
async fn readyz(State(doors): State<Doors>) -> Response {
    let database = doors.checked().await;
    let draining = doors.pump().is_shutting_down();
    let ready = database == "ok" && !draining;
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(ReadyBody { ready, database, draining })).into_response()
}

/// What a process answers before its database has: it lives, and nothing else.
pub(super) fn waiting_routes() -> Router {
    let not_ready = async || {
        let body = ReadyBody { ready: false, database: "not yet reached", draining: false };
        (StatusCode::SERVICE_UNAVAILABLE, Json(body))
    };
    let unavailable = async || {
        let detail =
            "the database was not reached yet since this process started; nothing was kept";
        Problem::new(problem::UNAVAILABLE, detail)
    };
    Router::new()
        .route("/livez", get(livez))
        .route("/readyz", get(not_ready))
        .route("/{*any}", any(unavailable))
        .route("/", any(unavailable))
}

/// Metrics in the Prometheus text format.
#[utoipa::path(get, path = "/metrics", tag = "health", responses(
    (status = 200, description = "Prometheus text", content_type = "text/plain")))]
async fn metrics_page(State(doors): State<Doors>) -> Result<Response, Problem> {
    if doors.lately().depths_are_old() {
        // A database that is away must not hide the other metrics: the depths then stay as they were.
        match tokio::time::timeout(CHECK_MAX, doors.pump().store().depths()).await {
            Ok(Ok(depths)) => set_depths(&depths),
            Ok(Err(error)) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "cannot read depths");
            }
            Err(_) => tracing::warn!("cannot read depths: the database does not answer"),
        }
    }
    let text = doors.render_metrics();
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response())
}

fn set_depths(depths: &[store::Depth]) {
    for depth in depths {
        let states = [
            (MessageState::Ready, depth.ready),
            (MessageState::Scheduled, depth.scheduled),
            (MessageState::Leased, depth.leased),
            (MessageState::Dead, depth.dead),
        ];
        for (state, count) in states {
            metrics::queue_messages(&depth.queue, state).set(count as f64);
        }
        let age = depth.oldest_ready.unwrap_or_default();
        metrics::oldest_ready(&depth.queue).set(age.as_secs_f64());
    }
}

/// What was asked of the database a moment ago, so that probes and scrapes do not ask again.
#[derive(Debug, Default)]
pub(super) struct Lately {
    check: Mutex<Option<(Instant, &'static str)>>,
    depths: Mutex<Option<Instant>>,
}

impl Lately {
    fn depths_are_old(&self) -> bool {
        let mut last = self.depths.lock().unwrap_or_else(PoisonError::into_inner);
        let old = last.is_none_or(|at| at.elapsed() > FRESH);
        if old {
            *last = Some(Instant::now());
        }
        old
    }
}

impl Doors {
    /// Asks the database how it is, at most once a second.
    async fn checked(&self) -> &'static str {
        let check = || self.lately().check.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, said)) = *check()
            && at.elapsed() < FRESH
        {
            return said;
        }
        let said = match tokio::time::timeout(CHECK_MAX, self.pump().store().check()).await {
            Ok(Ok(())) => "ok",
            Ok(Err(store::Error::Full(_))) => "no room left",
            Ok(Err(store::Error::Refused { .. } | store::Error::Corrupt { .. })) => {
                "cannot be used"
            }
            Ok(Err(
                store::Error::Unavailable(_)
                | store::Error::Busy(_)
                | store::Error::KeyInUse
                | store::Error::Rejected { .. },
            ))
            | Err(_) => "does not answer",
        };
        *check() = Some((Instant::now(), said));
        said
    }
}

const FRESH: Duration = Duration::from_secs(1);
const CHECK_MAX: Duration = Duration::from_secs(2);
